# Reads a disk like a provider that has no NBD client and uses the mechanism file-handle: by system calls
# on a file. Punching a hole into the file where data has been stored frees fleecing space.
#
#     perl examples/file-handle.pl QMP-SOCKET DEVICE FLEECING-DIRECTORY IMAGE

use v5.36;

use Fcntl qw(O_CREAT O_WRONLY SEEK_SET);

use PVE::BackupAccess;

my $piece = 1024 * 1024;

sub store ($handle, $image, $offset, $length) {
    my $end = $offset + $length;
    for (my $at = $offset; $at < $end; $at += $piece) {
        my $size = $end - $at < $piece ? $end - $at : $piece;
        sysseek($handle, $at, SEEK_SET) // die "seek: $!\n";
        my $read = sysread($handle, my $data, $size) // die "read at $at: $!\n";
        die "read at $at: only $read bytes\n" if $read != $size;
        sysseek($image, $at, SEEK_SET) // die "seek: $!\n";
        syswrite($image, $data) == $size or die "write at $at: $!\n";
    }
    return;
}

# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE for whole clusters. Perl has no fallocate, so this runs the
# program of util-linux.
sub discard ($handle, $offset, $length) {
    my @range = ('--offset', $offset, '--length', $length);
    system('fallocate', '--punch-hole', @range, "/proc/$$/fd/" . fileno($handle)) == 0
        or warn "cannot discard at $offset\n";
    return;
}

my ($qmp, $device, $fleecing_dir, $file) = @ARGV;
die "usage: $0 QMP-SOCKET DEVICE FLEECING-DIRECTORY IMAGE\n" if @ARGV != 4;

my $access = PVE::BackupAccess->new(
    qmp => $qmp,
    'target-id' => 'file-handle',
    'fleecing-dir' => $fleecing_dir,
);
$access->setup([{ device => $device, 'bitmap-mode' => 'use' }]);
my $volume = $access->volumes('file-handle')->{$device};
sysopen(my $image, $file, O_CREAT | O_WRONLY, 0600) or die "$file: $!\n";
truncate($image, $volume->{size}) or die "$file: $!\n";
my $bytes = 0;

while (my ($offset, $length) = $volume->{'next-dirty-region'}->()) {
    store($volume->{'file-handle'}, $image, $offset, $length);
    discard($volume->{'file-handle'}, $offset, $length);
    $bytes += $length;
}

# teardown(1) clears the bitmap, so everything that it recorded must be on disk first.
$image->sync && close($image) or die "$file: $!\n";
$access->teardown(1);
say "$bytes bytes";
