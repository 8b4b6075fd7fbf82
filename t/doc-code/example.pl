# A guest on a stock QEMU with the disk disk0, for a provider. The block can use $qmp_socket; $store and
# $fleecing_dir, two directories; $volume, the disk in its current state; and store($offset, $data). The block
# must leave nothing behind except in $store.

use v5.36;

use lib 'examples/lib';
use PBA::Test::Backend;
use PBA::Test::DocCode;

my $size = 16 * 1024 * 1024;

return sub ($block) {
    state $backend = PBA::Test::Backend->start(
        name => 'upstream',
        disks => [{ id => 'disk0', size => $size }],
    );
    my $outside = $backend->outside;
    my $store = $backend->work_dir('store');
    my ($access, $volume, $stored) = (undef, undef, 0);
    if ($block->{code} =~ m/\$volume->/) {
        $access = $backend->access;
        $access->setup($backend->devices('new'));
        $volume = $access->volume('disk0');
    }
    PBA::Test::DocCode::run_perl(
        $block,
        '$qmp_socket' => $backend->qmp_path,
        '$store' => $store,
        '$fleecing_dir' => $backend->work_dir('fleecing'),
        '$volume' => $volume,
        store => sub ($offset, $data) { $stored += length($data) },
    );
    $access->teardown(1) if $access;
    my ($image) = glob("$store/*/*/disk0.raw");
    $stored = -s $image if $image;
    die "$stored bytes were stored, not $size\n" if $stored != $size;
    PBA::Test::DocCode::check_same($outside, $backend->outside);
};
