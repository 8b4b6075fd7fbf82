package PVE::BackupAccess::Provider::Store::RawFile;

# What a server of an image exports, as a file that can be read like a raw image. It is served by
# pba-vfile, which says when it is ready, and unmounts and ends with this process.

use v5.36;

use Cwd ();
use DynaLoader ();
use POSIX ();
use Socket qw(AF_UNIX PF_UNSPEC SHUT_WR SOCK_STREAM);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(program_environment start_program);
use PVE::BackupAccess::Wait qw(read_some wait_for_child);

# It lies beside the module's library, whose path may be relative to what is the working directory
# now. It is trusted (taint mode) as the library is, whose code runs already.
my ($program) = map { Cwd::realpath($_) =~ m{\A(.*/)}s ? "$1pba-vfile" : () }
    grep { m{/PVE/BackupAccess/BackupAccess\.} } @DynaLoader::dl_shared_objects;

my sub fail ($class, $message) {
    PVE::BackupAccess::Error->throw($class, $message);
}

# At that path, where nothing may be yet; if none is given in the server's directory.
sub start ($class, $server, $size, $path = $server->dir . '/raw') {
    my ($bytes) = $size =~ m/\A([0-9]+)\z/;    # of a manifest, which was checked: no taint
    my $self = $class->_serve($path, $server->socket, 'image', $bytes, 'whole');
    $self->{server} = $server;
    return $self;
}

# The arguments are the program's.
sub _serve ($class, $path, @more) {
    fail('UnsupportedError', 'no /dev/fuse - a raw file for qemu-img needs FUSE')
        if !-e '/dev/fuse';
    local $^F = 2;    # whatever the caller has set: no program but this one has them
    socketpair(my $parent, my $child, AF_UNIX, SOCK_STREAM, PF_UNSPEC)
        or fail('SystemError', "cannot make sockets - $!");
    syswrite($parent, "\0");    # what it waits for: the server is up
    my $self = bless({ owner => $$, socket => $parent, path => $path }, $class);

    # It unmounts, and then ends, when the other end of its socket is closed: a signal would not let it.
    my %how = (in => $child, err => $child, signal => 0);
    start_program(\$self->{pid}, \%how, $program, $path, @more);
    close($child);
    my $said = '';

    1 while $said !~ m/\0/ && read_some($parent, \$said, 4096);
    fail('SystemError', 'cannot serve a raw file - ' . ($said || 'pba-vfile ended'))
        if $said !~ m/\0\z/;
    return $self;
}

sub path ($self) { return $self->{path} }

# Whether it goes on; once it does not, it has been waited for.
sub is_running ($self) {
    my $pid = $self->{pid} // return 0;
    local ($!, $?);
    my $ended = waitpid($pid, POSIX::WNOHANG());
    return 1 if $ended == 0;
    $self->_ended($ended == $pid ? $? : 0);
    return 0;
}

# One that was killed has not unmounted its file.
sub _ended ($self, $status) {
    delete($self->{pid});
    return if !POSIX::WIFSIGNALED($status);
    my @unmount = $> == 0 ? qw(umount -l) : qw(fusermount3 -u -z);
    local %ENV = program_environment();
    local $SIG{CHLD} = 'DEFAULT';
    system({ $unmount[0] } @unmount, $self->{path});
    unlink($self->{path});
    return;
}

# Whoever still reads gets an error.
sub stop ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    shutdown($self->{socket}, SHUT_WR);
    $self->_ended(wait_for_child($pid) // 0);
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    $self->stop if $self->{owner} == $$;
    return;
}

1;
