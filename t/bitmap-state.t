# The dirty bytes that bitmap_state reports are those of the map that a provider reads, also if the last bit of
# the bitmap reaches beyond the end of the disk.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;

my $mib = 1 << 20;
my %sizes = (even => 8 * $mib, odd => 8 * $mib + 4608);

sub in_map ($access, $device) {
    my $volume = $access->volume($device);
    my $sum = 0;
    while (my (undef, $length) = $volume->next_dirty_region) {
        $sum += $length;
    }
    return $sum;
}

sub check ($backend, $mode, $what) {
    my $access = $backend->access;
    my %state = map { $_->{device} => $access->bitmap_state($_) }
        $access->setup($backend->devices($mode))->@*;
    for my $id (sort keys %sizes) {
        my $device = $backend->device($id);
        is($state{$device}{dirty}, in_map($access, $device), "$what: $id");
    }
    $access->teardown(1);
    return;
}

for my $name (PBA::Test::Backend->names) {
    my $backend = PBA::Test::Backend->start_paused(
        name => $name,
        disks => [map { { id => $_, size => $sizes{$_}, bus => 'scsi' } } sort keys %sizes],
    );
    check($backend, 'none', "$name, no bitmap");
    check($backend, 'use', "$name, a new bitmap");
    check($backend, 'use', "$name, nothing was written");
    $backend->vm->qemu_io($_, 'write -P 1 1M 64k') for sort keys %sizes;
    check($backend, 'use', "$name, a write in the middle");
    $backend->vm->qemu_io($_, "write -P 2 @{[$sizes{$_} - 512]} 512") for sort keys %sizes;
    check($backend, 'use', "$name, a write at the end");
}

done_testing;
