# One backup by Qcow2Chain in taint mode, with what a caller does before and after, for
# t/qcow2-chain-api.t: STORE DEVICE KEY VALUE ... of the volume.

use v5.36;

use PVE::BackupAccess::Provider::Qcow2Chain;

my ($store, $device, %volume) = @ARGV;
my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new(undef,
    { path => $store, 'state-dir' => "$store/state" }, 'test');
$provider->job_init(time());
my $name = $provider->backup_init(100, 'qemu', time())->{'archive-name'};
$provider->backup_vm_query_incremental(100, { $device => { size => $volume{size} } });
$provider->backup_vm(100, "name: $device\n", { $device => \%volume }, {});
$provider->backup_cleanup(100, 'qemu', 1, {});
$provider->backup_handle_log_file(100, __FILE__);

my ($read) = map { $_->{volname} } reverse($provider->list(100)->@*);
my $problems = $provider->verify($read);
die join("\n", $problems->@*), "\n" if $problems->@*;
$provider->archive_get_guest_config($read);
$provider->restore_vm_init($read);
my $path = $provider->restore_vm_volume_init($read, $device, {})->{'qemu-img-path'};
die "no URI: $path\n" if index($path, 'nbd') != 0;
$provider->restore_vm_volume_cleanup($read, $device, {});
$provider->restore_vm_cleanup($read);
$provider->prune(100, 2);
