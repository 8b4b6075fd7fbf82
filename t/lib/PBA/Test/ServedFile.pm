package PBA::Test::ServedFile;

# The base class of files that a process serves: {path} and {pid}.

use v5.36;

use Fcntl qw(O_DIRECT O_RDWR);

# Opens the file without the page cache.
sub handle ($self, $mode = O_RDWR) {
    sysopen(my $handle, $self->{path}, $mode | O_DIRECT) or die "$self->{path}: $!\n";
    return $handle;
}

# The peak memory of the server.
sub peak_kib ($self) {
    open(my $fh, '<', "/proc/$self->{pid}/status") or die "no such server: $!\n";
    my ($kib) = map { /^VmHWM:\s+(\d+)/ } <$fh>;
    return $kib;
}

1;
