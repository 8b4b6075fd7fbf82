# Qcow2Chain with running guests that write continuously: every archive, full or incremental, shows both disks
# as of one instant, whatever failed before.
#
# One QEMU is enough: a provider sees NBD, not QEMU; copy-guest.t runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Provider::Qcow2Chain::Image;
use PVE::BackupAccess::Provider::Qcow2Chain::Server;

$PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $ENV{PBA_QEMU_IMG} // 'qemu-img';
$PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $ENV{PBA_QEMU_NBD} // 'qemu-nbd';

my $mib = 1024 * 1024;
my $seed = 20261122;
my $blocks = 2048;
my %sizes = (disk0 => 32 * $mib, disk1 => 16 * $mib + 512);
my @ids = sort keys %sizes;

# With the name of a storage plugin, disks are restored from files, as for Proxmox VE.
sub new_provider ($context, $plugin = undef) {
    return PVE::BackupAccess::Provider::Qcow2Chain->new($plugin, { path => $context->{store} },
        'test', sub ($level, $message) { push($context->{log}->@*, $message) });
}

# Makes one backup in a job of its own. fails => code that is called during the copy. Returns the archive's
# name, or undef if the backup failed.
sub backup ($context, $provider, $fails = undef) {
    my $backend = $context->{backend};
    my $log = sub ($level, $message) { push($context->{log}->@*, $message) };
    my $task = $backend->task($provider, log => $log);
    $provider->on_progress($fails // sub (@) { });
    my $result = eval { $task->run_job };
    my $error = $@;
    die $error if !$result && !$fails;
    is_deeply($backend->outside, $context->{outside}, 'nothing is left');
    $backend->guest->wait_more_churn(20);
    return $result ? $result->{'archive-name'} : undef;
}

sub restore ($context, $provider, $name) {
    my %images;
    for my $id (@ids) {
        my $device = $context->{backend}->device($id);
        my $from = $provider->restore_vm_volume_init($name, $device, {})->{'qemu-img-path'};
        $images{$id} = "$context->{restored}/$id.raw";
        PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $from, $images{$id});
        $provider->restore_vm_volume_cleanup($name, $device, {});
    }
    return \%images;
}

sub check_archive ($context, $provider, $name, $text) {
    my ($write, $problem) = $context->{model}->check_images(restore($context, $provider, $name));
    is($problem, undef, "$text: $name is the disks after write $write");
    return $write;
}

sub check_backend ($name) {
    my $context = PBA::Test::Backend->start_with_model($name, \%sizes, $seed, $blocks);
    my $backend = $context->{backend};
    $context->{$_} = $backend->work_dir($_) for qw(restored store);
    $backend->guest->start_churn(seed => $seed, disks => \@ids, blocks => $blocks);
    $backend->guest->wait_churn(20);

    my $provider = new_provider($context);
    my @names = map { backup($context, $provider) } 1 .. 3;
    is(scalar(grep { m/storing an increment/ } $context->{log}->@*),
        4, 'two of three are incremental');
    is(backup($context, $provider, sub (@) { die "enough\n" }), undef, 'a backup that dies fails');
    push(@names, backup($context, $provider));
    $provider->audit_every(1);
    push(@names, backup($context, $provider));
    is(scalar(grep { m/its bitmap was right/ } $context->{log}->@*), 2, 'an audit finds no fault');
    $backend->guest->stop_churn;
    my @writes = map { check_archive($context, $provider, $_, 'restored') } @names;
    is_deeply(\@writes, [sort { $a <=> $b } @writes], 'the archives are in chronological order');

    $provider->remove($names[1]);
    is_deeply(
        [map { $_->{volname} } $provider->list(100)->@*],
        [@names[0, 2, 3, 4]],
        'one archive was removed'
    );
    check_archive($context, $provider, $_, 'after a removal') for @names[2, 3];
    is_deeply($provider->verify($names[3]), [], 'verify finds no damage');
    SKIP: {
        skip('no /dev/fuse', 1) if !-e '/dev/fuse';
        check_archive($context, new_provider($context, 'a storage plugin'), $names[3], 'by a file');
    }
    $backend->check_manners;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
