package PBA::Bench::FuseFile;

# A disk as a file, served by one of several programs, each in its own process:
#
#   PBA::Bench::FuseFile->ours($server, $size)      # pba-vfile
#   PBA::Bench::FuseFile->nbdfuse($server)
#   PBA::Bench::FuseFile->memory($program, $image)  # the floor
#
# $server is a PBA::Bench::Server. The file is removed with the object.

use v5.36;

use File::Temp ();
use POSIX ();
use Time::HiRes ();

use PBA::Test::VFile;

use parent 'PBA::Test::ServedFile';

my $start_seconds = 30;

sub ours ($class, $server, $size) {
    return PBA::Test::VFile->start(
        socket => $server->{socket},
        device => $server->{export},
        size => $size,
        bitmap => $server->{bitmap},
        kind => 'image',
    );
}

sub nbdfuse ($class, $server) {
    return $class->_start(sub ($path) { ('nbdfuse', $path, $server->uri) });
}

sub memory ($class, $program, $image) {
    return $class->_start(sub ($path) { ($program, $path, $image) });
}

# Runs the command that mounts the disk over a file.
sub _start ($class, $command) {
    my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
    my $path = "$dir/disk";
    open(my $fh, '>', $path) or die "$path: $!\n";
    close($fh);
    my $pid = fork() // die "cannot fork: $!\n";
    exec($command->($path)) or POSIX::_exit(127) if !$pid;
    my $self = bless({ dir => $dir, path => $path, owner => $$, pid => $pid }, $class);
    return $self->_wait_mounted;
}

sub _wait_mounted ($self) {
    my $deadline = Time::HiRes::time() + $start_seconds;
    while (!-s $self->{path}) {
        die "the file's server ended\n" if waitpid($self->{pid}, POSIX::WNOHANG()) != 0;
        die "no file after $start_seconds seconds\n" if Time::HiRes::time() > $deadline;
        Time::HiRes::sleep(0.01);
    }
    return $self;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$ || !$self->{pid};
    local $?;
    system('umount', $self->{path});
    waitpid($self->{pid}, 0);
    return;
}

1;
