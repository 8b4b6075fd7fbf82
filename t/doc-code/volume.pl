# A guest as on Proxmox VE, with the disk drive-scsi0, of which 16 MiB are to be read. The block can use
# $access, which is set up; $volume, the open volume of the disk; and $dir, a directory of its own. The block
# must leave nothing else behind.

use v5.36;

use File::Temp ();

use PBA::Test::DocCode qw(check_same run_perl start_guest);

my $mib = 1024 * 1024;

return sub ($block) {
    state $backend = start_guest();
    my $outside = $backend->outside;
    $backend->guest->write('scsi0', 3 * $mib, 65536, 0x31);
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    my $volume = $access->volume('drive-scsi0');
    run_perl(
        $block,
        '$access' => $access,
        '$volume' => $volume,
        '$dir' => "$dir",
    );
    $volume->close;
    $access->teardown(1);
    check_same($outside, $backend->outside);
};
