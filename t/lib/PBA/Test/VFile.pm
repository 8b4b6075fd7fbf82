package PBA::Test::VFile;

# pba-vfile over an NBD server of the tests, without a virtual machine. It ends with the object.
#
#   my $file = PBA::Test::VFile->start(socket => $path, device => 'disk', size => $bytes,
#       bitmap => 'bitmap0');
#
# start() dies with what the program says.

use v5.36;

use Fcntl qw(O_RDWR);
use File::Temp ();
use POSIX ();
use Socket qw(AF_UNIX PF_UNSPEC SHUT_WR SOCK_STREAM);

my $O_DIRECT = (POSIX::uname())[4] eq 'aarch64' ? 0x10000 : 0x4000;

sub start ($class, %opt) {
    my ($program) = grep { -x } map { "$_/auto/PVE/BackupAccess/pba-vfile" } @INC;
    my $dir = File::Temp->newdir('pba-vfile.XXXXXX', TMPDIR => 1);
    my $self = bless({ dir => $dir, path => "$dir/vfile-0", owner => $$ }, $class);
    socketpair(my $parent, my $child, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or die "socketpair: $!\n";
    syswrite($parent, "\0");    # what it waits for: the NBD server is up
    my @bitmap = $opt{bitmap} // ();
    $self->{pid} = fork() // die "fork: $!\n";
    if (!$self->{pid}) {
        open(STDIN, '<&', $child) or POSIX::_exit(126);
        open(STDERR, '>&', $child) or POSIX::_exit(126);
        exec($program, $self->{path}, @opt{qw(socket device size)}, @bitmap) or POSIX::_exit(127);
    }
    close($child);
    $self->{socket} = $parent;
    my $said = '';
    while ($said !~ m/\0/ && sysread($parent, $said, 4096, length($said))) { }
    die "$said\n" if $said !~ m/\0\z/;
    return $self;
}

sub pid ($self) { return $self->{pid} }
sub path ($self) { return $self->{path} }

sub open ($self) {
    sysopen(my $handle, $self->{path}, O_RDWR | $O_DIRECT) or die "$self->{path}: $!\n";
    return $handle;
}

sub peak_kib ($self) {
    CORE::open(my $fh, '<', "/proc/$self->{pid}/status") or die "no such server: $!\n";
    my ($kib) = map { /^VmHWM:\s+(\d+)/ } <$fh>;
    return $kib;
}

# Its exit status as in $?.
sub end ($self) {
    shutdown($self->{socket}, SHUT_WR);
    waitpid(delete($self->{pid}), 0);
    return $?;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$ || !$self->{pid};
    local ($?, $!);
    $self->end;
    return;
}

1;
