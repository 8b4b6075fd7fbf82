package PBA::Bench::FuseFile;

# A disk as a file, served by one of several programs, each in a process of its own:
#
#   PBA::Bench::FuseFile->ours($server, $size)      # pba-vfile, as the module starts it
#   PBA::Bench::FuseFile->nbdfuse($server)
#   PBA::Bench::FuseFile->memory($program, $image)  # the floor
#
# $server is a PBA::Bench::Server. The file goes with the object.

use v5.36;

use Fcntl qw(O_RDONLY);
use File::Temp ();
use POSIX ();
use Socket qw(AF_UNIX PF_UNSPEC SOCK_STREAM);
use Time::HiRes ();

my $O_DIRECT = (POSIX::uname())[4] eq 'aarch64' ? 0x10000 : 0x4000;
my $start_seconds = 30;

sub ours ($class, $server, $size) {
    my ($program) = grep { -x } map { "$_/auto/PVE/BackupAccess/pba-vfile" } @INC;
    my $self = $class->_new('file', 1);
    my @bitmap = $server->{bitmap} // ();
    socketpair(my $parent, my $child, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or die "socketpair: $!\n";
    syswrite($parent, "\0");    # what it waits for: the NBD server is up
    $self->_spawn(
        sub {
            open(STDIN, '<&', $child) or die "stdin: $!\n";
            exec($program, $self->{path}, $server->uri, 'disk', $size, @bitmap);
        }
    );
    close($child);
    $self->{socket} = $parent;
    sysread($parent, my $said, 4096);
    die "pba-vfile: $said\n" if $said ne "\0";
    return $self;
}

sub nbdfuse ($class, $server) {
    my $self = $class->_new('disk', 0);
    open(my $fh, '>', $self->{path}) or die "$self->{path}: $!\n";
    $self->_spawn(sub { exec('nbdfuse', $self->{path}, $server->uri) });
    return $self->_wait_mounted;
}

sub memory ($class, $program, $image) {
    my $self = $class->_new('disk', 0);
    open(my $fh, '>', $self->{path}) or die "$self->{path}: $!\n";
    $self->_spawn(sub { exec($program, $self->{path}, $image) });
    return $self->_wait_mounted;
}

sub _new ($class, $name, $ends_itself) {
    my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
    return
        bless({ dir => $dir, path => "$dir/$name", owner => $$, polite => $ends_itself }, $class);
}

sub _spawn ($self, $exec) {
    $self->{pid} = fork() // die "cannot fork: $!\n";
    return if $self->{pid};
    $exec->();
    POSIX::_exit(127);
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
    if ($self->{polite}) {
        close($self->{socket});
    }
    else {
        system('umount', $self->{path});
    }
    waitpid($self->{pid}, 0);
    return;
}

1;
