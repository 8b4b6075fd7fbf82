# A directory with two archives of guest 100, a full and an incremental one: $directory, $provider, $volname
# (the newer one) and $device. $dir is an empty directory. Each block has its own copy.

use v5.36;

use File::Temp ();

use PBA::Test::DocCode;
use PBA::Test::QemuNbd qw(img);
use PVE::BackupAccess::Image;
use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Task;

sub provider ($path) {
    return PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $path }, 'store',
        sub (@) { });
}

sub back_up ($dir) {
    my $image = PVE::BackupAccess::Image->start(
        disks => [{ device => 'drive-scsi0', file => "$dir/disk.qcow2", format => 'qcow2' }],
        uuid => '00000000-0000-4000-8000-000000000001',
    );
    PVE::BackupAccess::Task->new(
        qmp => $image->qmp,
        vmid => 100,
        provider => provider("$dir/store"),
        'target-id' => 'store',
        'guest-config' => "name: test\n",
        'fleecing-dir' => "$dir/fleecing",
        devices => [$image->devices_of],
        persistent => 1,
        log => sub (@) { },
    )->run_job;
    $image->stop;
    return;
}

sub make_archives () {
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    mkdir("$dir/$_") or die "$dir/$_: $!\n" for qw(store fleecing);
    img('create', '-q', '-f', 'qcow2', "$dir/disk.qcow2", '4M');
    back_up("$dir") for 1, 2;
    return $dir;
}

return sub ($block) {
    state $made = make_archives();
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    mkdir("$dir/empty") or die "$dir/empty: $!\n";
    system('cp', '-a', "$made/store", "$dir/store") == 0 or die "cannot copy $made/store\n";
    my $provider = provider("$dir/store");
    PBA::Test::DocCode::run_perl(
        $block,
        '$directory' => "$dir/store",
        '$provider' => $provider,
        '$volname' => $provider->list(100)->[-1]{volname},
        '$device' => 'drive-scsi0',
        '$dir' => "$dir/empty",
    );
};
