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
use Socket qw(SHUT_WR);

use parent 'PVE::BackupAccess::Provider::Qcow2Chain::RawFile';

my $O_DIRECT = (POSIX::uname())[4] eq 'aarch64' ? 0x10000 : 0x4000;

sub start ($class, %opt) {
    my $dir = File::Temp->newdir('pba-vfile.XXXXXX', TMPDIR => 1);
    my @arguments = ("$dir/vfile-0", @opt{qw(socket device size)}, $opt{bitmap} // ());
    my $self = $class->_serve(@arguments);
    $self->{dir} = $dir;
    return $self;
}

sub handle ($self) {
    sysopen(my $handle, $self->{path}, O_RDWR | $O_DIRECT) or die "$self->{path}: $!\n";
    return $handle;
}

# What the server's memory was at most.
sub peak_kib ($self) {
    open(my $fh, '<', "/proc/$self->{pid}/status") or die "no such server: $!\n";
    my ($kib) = map { /^VmHWM:\s+(\d+)/ } <$fh>;
    return $kib;
}

# Its exit status as in $?.
sub end ($self) {
    shutdown($self->{socket}, SHUT_WR);
    waitpid(delete($self->{pid}), 0);
    return $?;
}

1;
