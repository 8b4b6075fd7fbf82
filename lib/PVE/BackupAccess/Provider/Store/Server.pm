package PVE::BackupAccess::Provider::Store::Server;

# qemu-nbd over one image; a subclass says what an image is. It is given a socket that listens already, so no client has to wait for it.
# It ends with this process, in two ways: it ends with its last client, one of which is the connection
# that is kept here; and the kernel sends it a signal, which counts while others are connected, too.

use v5.36;

use IO::Socket::UNIX ();
use POSIX qw(SIGKILL);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(start_program);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Try qw(attempt);
use PVE::BackupAccess::Volume;
use PVE::BackupAccess::Wait qw(wait_for_child);

our $qemu_nbd = 'qemu-nbd';

# A qemu-nbd has a buffer for each request. From 128 KiB on malloc would map one anew each time, and the
# kernel clear it: a third of what a copy costs.
my $malloc = 'glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864';

my $longest_socket = 107;    # bytes of a path in a struct sockaddr_un

my sub fail ($message) {
    PVE::BackupAccess::Error->throw('SystemError', $message);
}

# A socket of a process that was killed is in the way of the next one; one that is in use is not touched.
my sub listen_on ($socket) {
    fail("$socket is too long for a socket - choose a directory with a shorter path")
        if length($socket) > $longest_socket;
    unlink($socket) if -S $socket && !IO::Socket::UNIX->new(Peer => $socket) && $!{ECONNREFUSED};
    return IO::Socket::UNIX->new(Local => $socket, Listen => 16)
        // fail("cannot listen on $socket - $!");
}

# Serves the image: for reading, or with writable => 1. With socket => $path at that path. What _image_arguments of the
# subclass makes of image and options are qemu-nbd's arguments.
sub start ($class, $image, %options) {
    my $private = PVE::BackupAccess::Provider::Store::PrivateDir->new;
    my $self = bless({ owner => $$, private => $private }, $class);
    my $socket = $self->{socket} = $options{socket} // $self->dir . '/nbd';

    # Whatever the caller has set: a qemu-nbd that inherits a connection to itself never ends.
    local $^F = 2;
    my $listener = listen_on($socket);
    $self->{listens} = 1;

    # Should this process be killed before the connection below is there, this one tells qemu-nbd.
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
    fail('cannot serve ' . $class->_name_of($image) . ' - ' . ($self->_log || $error =~ s/\n\z//r));
}

# What a message calls the image.
sub _name_of ($class, $image) { return $image }

sub _spawn ($self, $listener, @command) {
    my $log = $self->dir . '/log';
    open(my $fh, '>', $log) or fail("cannot open $log - $!");
    my %how = (
        out => $fh,
        err => $fh,
        listener => $listener,
        environment => { GLIBC_TUNABLES => $malloc },
        signal =>
            SIGKILL,    # qemu-nbd (7.2 to 11.0) forgets a SIGTERM that comes before its main loop
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

# Whether it goes on; once it does not, it has been waited for.
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

# Ends it, and returns its exit status. What it has not written yet it writes, unless killed.
sub _end ($self, $signal) {
    my $pid = $self->{pid} // return 0;
    local ($!, $?);
    delete($self->{connection});

    # A child that has not been waited for keeps its number. A SIGCHLD handler of the caller's may have
    # waited for it; then the number may be another process' by now.
    my $ended = waitpid($pid, POSIX::WNOHANG());
    my $status = $ended == $pid ? $? : undef;
    if ($ended == 0) {
        CORE::kill($signal, $pid);
        $status = wait_for_child($pid);    # a handler that dies: DESTROY waits
    }
    delete($self->{pid});
    return $status;
}

# For one that only reads.
sub kill ($self) {
    $self->_end('KILL');
    return;
}

# What was written is in the image, and the image closed as it should be, when this returns.
sub stop ($self) {
    my $status = $self->_end('TERM');
    fail('cannot tell how qemu-nbd ended - other code of this process waited for it')
        if !defined($status);
    fail("qemu-nbd ended with status $status - " . $self->_log) if $status != 0;
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    $self->kill;
    unlink($self->{socket}) if $self->{listens};
    return;
}

1;
