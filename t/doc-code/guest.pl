# A guest on a stock QEMU, with the disks disk0 and disk1. The block can use $qmp_socket; $dir, a directory of
# its own; and store($offset, $data), which accepts data. The block must leave nothing behind.

use v5.36;

use PBA::Test::Backend;
use PBA::Test::DocCode;

my $mib = 1024 * 1024;

return sub ($block) {
    state $backend = PBA::Test::Backend->start(
        name => 'upstream',
        disks => [map { { id => $_, size => 16 * $mib } } qw(disk0 disk1)],
    );
    my $outside = $backend->outside;
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    $backend->guest->write($_, 3 * $mib, 65536, 0x31) for qw(disk0 disk1);
    PBA::Test::DocCode::run_perl(
        $block,
        '$qmp_socket' => $backend->qmp_path,
        '$dir' => "$dir",
        store => sub ($offset, $data) { die "no data\n" if $data eq '' },
    );
    PBA::Test::DocCode::check_same($outside, $backend->outside);
};
