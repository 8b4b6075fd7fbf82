# The image of a guest that is off: $file, qcow2, and $uuid; $fleecing_dir; $options, a hash with the options of
# a PVE::BackupAccess::Task except for qmp and devices.

use v5.36;

use File::Temp ();

use PBA::Test::DocCode;
use PBA::Test::QemuNbd qw(img);
use PVE::BackupAccess::Provider::Qcow2Chain;

return sub ($block) {
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    mkdir("$dir/$_") or die "$dir/$_: $!\n" for qw(store fleecing);
    img('create', '-q', '-f', 'qcow2', "$dir/disk.qcow2", '16M');
    my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => "$dir/store" },
        'store', sub (@) { });
    my %options = (
        vmid => 100,
        provider => $provider,
        'target-id' => 'store',
        'guest-config' => '',
        'load-note' => sub (@) { return },
        'store-note' => sub (@) { },
    );
    PBA::Test::DocCode::run_perl(
        $block,
        '$file' => "$dir/disk.qcow2",
        '$uuid' => '00000000-0000-4000-8000-000000000001',
        '$fleecing_dir' => "$dir/fleecing",
        '$options' => \%options,
    );
    die "there is no archive\n"
        if $block->{code} =~ m{run_job} && !glob("$dir/store/vm/100/*/manifest*");
};
