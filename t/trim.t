# What the guest trims or zeroes during an access is still in the snapshot. QEMU 7.2 returns the current content
# of the disk for a read that begins in a cluster that was copied and ends in one that was not, so this test
# reads large pieces.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;

my $mib = 1024 * 1024;
my $size = 16 * $mib;

sub check_reads ($volume, $name) {
    for my $piece (65536, 96 * 1024, $mib, $size) {
        my $bad = 0;
        for (my $at = 0; $at < $size; $at += $piece) {
            my $length = $size - $at < $piece ? $size - $at : $piece;
            $bad++ if $volume->pread($at, $length) ne 'A' x $length;
        }
        is($bad, 0, "$name: reads of $piece bytes show the instant");
    }
}

# The pve backend uses the same stock QEMU here, whose exports do not have the description that asks for reads
# by cluster.
for my $name ($ENV{PBA_QEMU} ? PBA::Test::Backend->names : 'upstream') {
    subtest "backend $name" => sub {
        my $backend = PBA::Test::Backend->start(
            name => $name,
            disks => [{ id => 'disk0', size => $size, device_args => 'discard_granularity=65536' }],
        );
        my $guest = $backend->guest;
        for my $mode (qw(none new)) {
            $guest->write('disk0', 0, $size, 0x41);
            my $access = $backend->access;
            $access->setup($backend->devices($mode));
            my $volume = $access->volume($backend->device('disk0'));
            $guest->write('disk0', 128 * 1024, 65536, 0x42);
            $guest->zero('disk0', 320 * 1024, 65536);
            $guest->trim('disk0', 512 * 1024, 65536);
            $guest->write('disk0', 3 * $mib + 4096, 4096, 0x43);
            $guest->trim('disk0', 8 * $mib, 4 * $mib);
            $guest->zero('disk0', 13 * $mib, $mib);
            check_reads($volume, "mode $mode");
            $access->teardown(1);
        }
        $backend->check_manners;
    };
}

done_testing;
