# On Proxmox VE, the host attaches fleecing images, whose clusters may have any size. QEMU frees nothing for a
# discard of a part of a cluster, so none is sent, and none is counted as freed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use PBA::Test::Backend;
use PBA::Test::Handle;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $size = 16 * $MiB + 512 * $KiB;
my $cluster = 2 * $MiB;
my $whole = 16 * $MiB;

# The data that is overwritten and freed; the file system's own blocks change the result a little.
my $kept = 3 * $cluster;
my $freed = $kept - 64 * $KiB;

sub start () {
    my $backend = PBA::Test::Backend->start(
        name => 'pve',
        guest => 0,
        disks => [{ id => 'disk0', size => $size }]
    );
    my $node = $backend->device('disk0') . '-fleecing';
    $backend->vm->remove_fleecing_node($node);
    $backend->attach_fleecing('disk0', cluster => $cluster);
    return ($backend, $node);
}

# The space that the image takes on the host's disk.
sub used ($backend, $node) {
    return (stat($backend->vm->fleecing_file($node)))[12] * 512;
}

# With a virtual file, the space is freed soon after the call.
sub freed ($full, $backend, $node) {
    my $deadline = time + 10;
    while ($full - used($backend, $node) < $freed && time < $deadline) {
        select(undef, undef, undef, 0.05);
    }
    return $full - used($backend, $node);
}

# The parts of regions that QEMU can free.
sub whole_clusters (@regions) {
    my $sum = 0;
    while (my ($offset, $length) = splice(@regions, 0, 2)) {
        my $begin = int(($offset + $cluster - 1) / $cluster);
        my $end = int(($offset + $length) / $cluster);
        $sum += ($end - $begin) * $cluster if $end > $begin;
    }
    return $sum;
}

sub back_up ($backend, $mode, $mechanism, $code) {
    my $access = $backend->access;
    $access->setup($backend->devices($mode));
    my $device = $backend->device('disk0');
    my $volume = PVE::BackupAccess::Volume->open($device, $access->volumes($mechanism)->{$device});
    $code->($volume);
    $volume->close;
    $access->teardown(1);
    return;
}

my @mechanisms = ('nbd', PBA::Test::Handle->missing ? () : 'file-handle');
my ($backend, $node) = start();

# QEMU 7.2 aborts on parts of clusters, which the front discards to free the clean parts.
plan(skip_all => 'needs QEMU 10.0 or later') if $backend->vm->version->[0] < 10;
for my $mechanism (@mechanisms) {
    subtest "$mechanism: all of the disk" => sub {

        # Old data that is not zero, because zeroes would take no space.
        my @overwritten = map { $_ * $MiB } 1, 5, 9;
        $backend->write('disk0', $_, 64 * $KiB, 0x16) for @overwritten;
        back_up(
            $backend, 'new',
            $mechanism,
            sub ($volume) {
                my $empty = used($backend, $node);
                $backend->write('disk0', $_, 64 * $KiB, 0x17) for @overwritten;
                my $full = used($backend, $node);
                cmp_ok($full - $empty, '>=', $kept, 'old data is kept in whole clusters');
                my $statistics = $volume->copy(to => '/dev/null');
                is($statistics->{'bytes-discarded'}, $whole, 'the statistics count what was freed');
                cmp_ok(freed($full, $backend, $node), '>=', $freed, 'the space is freed');
            }
        );
    };
    subtest "$mechanism: parts of clusters" => sub {
        $backend->write('disk0', 64 * $KiB, 64 * $KiB, 0x18);
        $backend->write('disk0', 6 * $MiB + 512 * $KiB, 4 * $MiB, 0x19);
        back_up(
            $backend, 'use',
            $mechanism,
            sub ($volume) {
                my $statistics = $volume->copy(to => '/dev/null', discard => 0);
                my @regions = $volume->dirty_regions(1000);
                is($statistics->{'bytes-discarded'}, 0, 'nothing is discarded unasked');
                $statistics = $volume->copy(to => '/dev/null');
                my $expected = whole_clusters(@regions);
                cmp_ok($expected, '>', 0, 'the regions contain whole clusters');
                is($statistics->{'bytes-discarded'}, $expected, 'only whole clusters are counted');
            }
        );
    };
}

done_testing();
