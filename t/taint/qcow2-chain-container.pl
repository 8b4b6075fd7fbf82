# A container's backup by Qcow2Chain in taint mode, with what a caller does before and after, for
# t/qcow2-chain-container.t: STORE DIRECTORY SOURCE PATTERN.

use v5.36;

use PVE::BackupAccess::Provider::Qcow2Chain;

my ($store, $directory, $source, $pattern) = @ARGV;
my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $store }, 'test');
my %info = (directory => $directory, sources => [$source], 'backup-user-id' => 0);
$provider->job_init(time());
my $name = $provider->backup_init(101, 'lxc', time())->{'archive-name'};
$provider->backup_container_prepare(101, \%info);
$provider->backup_container(101, "hostname: $directory\n", [$pattern], \%info);
$provider->backup_cleanup(101, 'lxc', 1, {});
$provider->backup_handle_log_file(101, __FILE__);

my ($read) = map { $_->{volname} } $provider->list(101)->@*;
my $problems = $provider->verify($read);
die join("\n", $problems->@*), "\n" if $problems->@*;
$provider->archive_get_guest_config($read);
my ($mechanism) = $provider->restore_get_mechanism($read);
die "restored by $mechanism\n" if $mechanism ne 'tar';
my $path = $provider->restore_container_init($read, 'test', {})->{'tar-path'};
die "no file: $path\n" if !-f $path;
$provider->restore_container_cleanup($read, 'test', {});
$provider->prune(101, 2);
