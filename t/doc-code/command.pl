# pve-backup-access in the PATH, and a stock QEMU with the disk drive-scsi0 and no guest system: $qmp, its
# socket; $backups and $directory, two empty directories. A block must leave nothing in QEMU but bitmaps.

use v5.36;

use File::Temp ();

use PBA::Test::Backend;
use PBA::Test::Command qw(put_in_path);
use PBA::Test::DocCode;

return sub ($block) {
    state $backend = PBA::Test::Backend->start(
        name => 'upstream',
        guest => 0,
        disks => [{ id => 'scsi0', size => 16 << 20, bus => 'scsi', shape => 'drive' }],
    );
    my $outside = $backend->outside;
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    mkdir("$dir/$_") or die "$dir/$_: $!\n" for qw(bin backups out);
    put_in_path("$dir/bin");
    symlink($backend->qmp_path, "$dir/100.qmp") or die "symlink: $!\n";
    PBA::Test::DocCode::run_shell(
        $block,
        PATH => "$dir/bin:$ENV{PATH}",
        qmp => "$dir/100.qmp",
        backups => "$dir/backups",
        directory => "$dir/out",
    );
    PBA::Test::DocCode::check_same($outside, $backend->outside);
};
