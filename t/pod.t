# POD has the right form, and describes every public function.

use v5.36;

use Test::More;

eval { require Test::Pod; require Test::Pod::Coverage; 1 }
    or plan(skip_all => 'no Test::Pod and Test::Pod::Coverage');

my @modules = qw(
    PVE::BackupAccess PVE::BackupAccess::Volume PVE::BackupAccess::Error PVE::BackupAccess::Task
    PVE::BackupAccess::GuestAgent PVE::BackupAccess::Image PVE::BackupAccess::Libvirt
    PVE::BackupAccess::Retention PVE::BackupAccess::Provider::Qcow2Chain PVE::BackupAccess::Provider::RBD
);

Test::Pod::pod_file_ok($_) for Test::Pod::all_pod_files('lib');
Test::Pod::Coverage::pod_coverage_ok($_, { also_private => [qr/\A(?:CLONE_SKIP|DESTROY)\z/] })
    for @modules;
done_testing;
