package PVE::BackupAccess::Provider::Store::Server;

# qemu-nbd over one image; a subclass says what an image is. qemu-nbd gets a socket that already listens, so no client has
# to wait for it. It ends with this process for two reasons: it ends with its last client, and this process keeps a
# connection; and the kernel sends it a signal, which also works while other clients are connected.

use v5.36;

use IO::Socket::UNIX ();
use POSIX qw(SIGKILL);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw($longest_socket how_ended kill_child start_program);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Try qw(attempt ensure);
use PVE::BackupAccess::Volume;
use PVE::BackupAccess::Wait qw(wait_for_child);

our $qemu_nbd = 'qemu-nbd';

# How long to wait for one that was killed: its image must not be in use when the next program opens it.
my $seconds_to_end = 10;

# qemu-nbd allocates a buffer for each request. By default malloc maps each buffer of 128 KiB or more anew, and the kernel
# clears it, which takes a third of the time of a copy.
my $malloc = 'glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864';

my sub fail ($message) {
    PVE::BackupAccess::Error->throw('SystemError', $message);
}

# A new socket, to which only this user can connect, whatever the umask is.
my sub make_socket ($path) {
    my ($listener, $problem);
    my $mask = umask(0077);
    my $make = sub {
        $listener = IO::Socket::UNIX->new(Local => $path, Listen => 16);
        $problem = $!;
    };
    ensure($make, sub (@) { umask($mask) });
    return $listener // fail("cannot listen on $path - $problem");
}

# Removes a socket that a killed process left at this path, but not one that is in use.
my sub listen_on ($socket) {
    fail(
        "the socket's path $socket is longer than $longest_socket bytes - choose a directory with a shorter path"
    ) if length($socket) > $longest_socket;
    unlink($socket) if -S $socket && !IO::Socket::UNIX->new(Peer => $socket) && $!{ECONNREFUSED};
    return make_socket($socket);
}

# Serves the image: read-only, or with writable => 1 for writing; with socket => $path at that path. The subclass'
# _image_arguments converts the image and the options to qemu-nbd's arguments.
sub start ($class, $image, %options) {
    my $private = PVE::BackupAccess::Provider::Store::PrivateDir->new;
    my $name = $class->_name_of($image);
    my $self = bless({ owner => $$, private => $private, name => $name }, $class);
    my $socket = $self->{socket} = $options{socket} // $self->dir . '/nbd';

    # Even if the caller has changed $^F: a qemu-nbd that inherits a connection to itself never ends.
    local $^F = 2;
    my $listener = listen_on($socket);
    $self->{listens} = 1;

    # If this process is killed before the connection below exists, the end of this one tells qemu-nbd.
    my $first = IO::Socket::UNIX->new(Peer => $socket) or fail("cannot connect to $socket - $!");
    my @command = (
        $qemu_nbd, '--shared=32', '--export-name=image',
        $options{writable} ? '--discard=unmap' : '--read-only',
        $class->_image_arguments($image, %options),
    );
    $self->_spawn($listener, @command);
    close($listener);
    my $error = attempt {
        $self->{connection}
            = PVE::BackupAccess::Volume->open('image', { 'nbd-path' => $self->uri });
    };
    return $self if !$error;
    $self->kill;
    fail("cannot serve $name - " . ($self->_log || $error =~ s/\n\z//r));
}

# The image's name for messages.
sub _name_of ($class, $image) { return $image }

sub _spawn ($self, $listener, @command) {
    my $log = $self->dir . '/log';
    open(my $fh, '>', $log) or fail("cannot open $log - $!");
    my %how = (
        out => $fh,
        err => $fh,
        listener => $listener,
        environment => { GLIBC_TUNABLES => $malloc },
        signal => SIGKILL
        ,    # qemu-nbd (7.2 to 11.0) ignores a SIGTERM that arrives before its main loop runs
    );
    start_program(\$self->{pid}, \%how, @command);
    return;
}

sub uri ($self) {
    my $path = $self->{socket} =~ s{([^A-Za-z0-9/._~-])}{sprintf('%%%02X', ord($1))}ger;
    return "nbd+unix:///image?socket=$path";
}

sub socket ($self) { return $self->{socket} }
sub dir ($self) { return $self->{private}->path }
sub pid ($self) { return $self->{pid} }

# Whether qemu-nbd runs. If it has ended, this waits for it.
sub is_running ($self) {
    my $pid = $self->{pid} // return 0;
    local ($!, $?);
    return 1 if waitpid($pid, POSIX::WNOHANG()) == 0;
    delete($self->{pid});
    return 0;
}

sub _log ($self) {
    open(my $fh, '<', $self->dir . '/log') or return '';
    my ($line) = <$fh>;
    chomp($line //= '');
    return $line;
}

# Ends qemu-nbd, which first writes what it has not written yet, and returns its exit status.
sub _end ($self) {
    my $pid = $self->{pid} // return 0;
    local ($!, $?);
    delete($self->{connection});

    # A child keeps its PID until it has been waited for. If a SIGCHLD handler of the caller has done that, the PID may
    # already be that of another process.
    my $ended = waitpid($pid, POSIX::WNOHANG());
    my $status = $ended == $pid ? $? : undef;
    if ($ended == 0) {
        CORE::kill(TERM => $pid);
        $status = wait_for_child($pid);    # if a handler dies here, DESTROY waits
    }
    delete($self->{pid});
    return $status;
}

# Only for a read-only server. On storage that hangs, qemu-nbd is left behind.
sub kill ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    delete($self->{connection});
    kill_child($pid, $seconds_to_end);
    delete($self->{pid});
    return;
}

# When this returns, all written data is in the image, and the image was closed cleanly.
sub stop ($self) {
    my $status = $self->_end;
    return if defined($status) && $status == 0;
    my $how = how_ended($status);
    fail(join(' - ', "qemu-nbd, which served $self->{name}, $how", grep { $_ ne '' } $self->_log));
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    $self->kill;
    unlink($self->{socket}) if $self->{listens};
    return;
}

1;
