package PBA::Bench::FuseFile;

# A disk as a file, served by one of several programs, each in a process of its own:
#
#   PBA::Bench::FuseFile->ours($server, $size)      # pba-vfile
#   PBA::Bench::FuseFile->nbdfuse($server)
#   PBA::Bench::FuseFile->memory($program, $image)  # the floor
#
# $server is a PBA::Bench::Server. The file goes with the object.

use v5.36;

use Fcntl qw(O_RDONLY);
use File::Temp ();
use POSIX ();
use Time::HiRes ();

use PBA::Test::VFile;

my $O_DIRECT = (POSIX::uname())[4] eq 'aarch64' ? 0x10000 : 0x4000;
my $start_seconds = 30;

sub ours ($class, $server, $size) {
    return PBA::Test::VFile->start(
        socket => $server->{socket},
        device => $server->{export},
        size => $size,
        bitmap => $server->{bitmap},
    );
}

sub nbdfuse ($class, $server) {
    return $class->_start(sub ($path) { ('nbdfuse', $path, $server->uri) });
}

sub memory ($class, $program, $image) {
    return $class->_start(sub ($path) { ($program, $path, $image) });
}

# Runs the command that mounts it over such a file.
sub _start ($class, $command) {
    my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
    my $path = "$dir/disk";
    open(my $fh, '>', $path) or die "$path: $!\n";
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

# For reading without the page cache.
sub handle ($self) {
    sysopen(my $fh, $self->{path}, O_RDONLY | $O_DIRECT) or die "$self->{path}: $!\n";
    return $fh;
}

# What the server's memory was at most.
sub peak_kib ($self) {
    open(my $fh, '<', "/proc/$self->{pid}/status") or die "no such server: $!\n";
    my ($kib) = map { /^VmHWM:\s+(\d+)/ } <$fh>;
    return $kib;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$ || !$self->{pid};
    local $?;
    system('umount', $self->{path});
    waitpid($self->{pid}, 0);
    return;
}

1;
