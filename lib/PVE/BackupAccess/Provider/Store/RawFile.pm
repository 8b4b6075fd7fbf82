package PVE::BackupAccess::Provider::Store::RawFile;

# Shows what a Store::Server exports as a file that can be read like a raw image. pba-vfile serves the file. It reports
# when it is ready, and unmounts the file and ends with this process.

use v5.36;

use Cwd ();
use DynaLoader ();
use POSIX qw(SIGKILL);
use Socket qw(AF_UNIX PF_UNSPEC SHUT_WR SOCK_STREAM);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(kill_child program_environment start_program);
use PVE::BackupAccess::Wait qw(child_ends read_some);

# pba-vfile is in the directory of the module's library, whose path may be relative to the current directory. In taint
# mode it is trusted like the library, whose code already runs.
my ($program) = map { Cwd::realpath($_) =~ m{\A(.*/)}s ? "$1pba-vfile" : () }
    grep { m{/PVE/BackupAccess/BackupAccess\.} } @DynaLoader::dl_shared_objects;

# How long pba-vfile may take to unmount, in seconds.
our $longest_end = 10;

my sub fail ($class, $message) {
    PVE::BackupAccess::Error->throw($class, $message);
}

# Nothing may exist at the path. By default the file is in the server's directory.
sub start ($class, $server, $size, $path = $server->dir . '/raw') {
    my ($bytes) = $size =~ m/\A([0-9]+)\z/;    # removes taint: the manifest was checked
    my $self = $class->_serve($path, $server->socket, 'image', $bytes, 'image');
    $self->{server} = $server;
    return $self;
}

# The arguments are those of pba-vfile.
sub _serve ($class, $path, @more) {
    fail('UnsupportedError',
        "cannot serve $path as a raw file - this needs FUSE, but there is no /dev/fuse")
        if !-e '/dev/fuse';
    local $^F = 2;    # only pba-vfile inherits the sockets, even if the caller has changed $^F
    socketpair(my $parent, my $child, AF_UNIX, SOCK_STREAM, PF_UNSPEC)
        or fail('SystemError', "cannot make sockets for pba-vfile - $!");
    syswrite($parent, "\0");    # tells pba-vfile that the server is up
    my $self = bless({ owner => $$, socket => $parent, path => $path }, $class);

    # pba-vfile unmounts the file and ends when the other end of its socket is closed. A signal would end it before that.
    my %how = (in => $child, err => $child, signal => 0);
    start_program(\$self->{pid}, \%how, $program, $path, @more);
    close($child);
    my $said = '';

    1 while $said !~ m/\0/ && read_some($parent, \$said, 4096);
    fail('SystemError', "cannot serve $path as a raw file - " . ($said || 'pba-vfile ended'))
        if $said !~ m/\0\z/;
    return $self;
}

sub path ($self) { return $self->{path} }

# Whether pba-vfile runs. If it has ended, this waits for it.
sub is_running ($self) {
    my $pid = $self->{pid} // return 0;
    local ($!, $?);
    my $ended = waitpid($pid, POSIX::WNOHANG());
    return 1 if $ended == 0;
    $self->_ended($ended == $pid ? $? : 0);
    return 0;
}

# If pba-vfile was killed, it has not unmounted its file.
sub _ended ($self, $status) {
    delete($self->{pid});
    return if $status == -1 || !POSIX::WIFSIGNALED($status);
    my @unmount = $> == 0 ? qw(umount -l) : qw(fusermount3 -u -z);
    local %ENV = program_environment();
    local $SIG{CHLD} = 'DEFAULT';
    system({ $unmount[0] } @unmount, $self->{path});
    unlink($self->{path});
    return;
}

# Programs that still read the file get an error.
sub stop ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    shutdown($self->{socket}, SHUT_WR);
    my $is_over = child_ends($pid, $longest_end);
    my $status = $is_over ? $? : SIGKILL;
    kill_child($pid) if !$is_over;
    $self->_ended($status);
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    $self->stop if $self->{owner} == $$;
    return;
}

1;
