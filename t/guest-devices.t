# The disks of each kind of guest device: every name finds the disk, its identity stays the same after a restart,
# and the command calls the disk by a name that lasts, although its node has one of libvirt's numbers.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use File::Temp ();
use JSON::PP ();
use List::Util qw(uniq);

use PBA::Test::Backend;
use PBA::Test::VM;
use PVE::BackupAccess;
use PVE::BackupAccess::CLI::Disks qw(choose_disks);

my $size = 1 << 20;
my $json = JSON::PP->new->utf8->canonical;
my $dir = File::Temp->newdir('pba-devices-XXXXXXXX', TMPDIR => 1);

# [id, the guest device, what it needs]
my @kinds = (
    ['ide', 'ide-hd,bus=ide.0'],
    ['sata', 'ide-hd,bus=ahci.0', 'ich9-ahci,id=ahci'],
    ['lsi', 'scsi-hd,bus=hba.0', 'lsi53c895a,id=hba'],
    ['usb', 'usb-storage,bus=xhci.0', 'qemu-xhci,id=xhci'],
    ['uas', 'scsi-hd,bus=uasp.0', 'usb-uas,id=uasp,bus=xhci.0'],
    ['nvme', 'nvme,serial=nvme'],
    ['ns', 'nvme-ns,bus=ctrl', 'nvme,id=ctrl,serial=ctrl'],
    ['virtio', 'virtio-blk-pci-non-transitional'],
);
my @ids = map { $_->[0] } @kinds;

sub file ($id) { return "$dir/$id.raw" }

# QEMU's arguments, with nodes that are numbered from $first on.
sub arguments ($first) {
    my @arguments;
    for my $kind (@kinds) {
        my ($id, $device, @needed) = $kind->@*;
        my $node = 'libvirt-' . $first++ . '-format';
        my %file = (driver => 'file', filename => file($id));
        my %blockdev = (driver => 'raw', 'node-name' => $node, file => \%file);
        push(@arguments, '-blockdev', $json->encode(\%blockdev));
        push(@arguments, map { ('-device', $_) } @needed, "$device,id=$id,drive=$node");
    }
    return \@arguments;
}

# { id => { node, shown: query-block's qdev, names } }
sub disks ($vm) {
    my %disks;
    for my $device ($vm->qmp('query-block')->@*) {
        my ($id) = ($device->{inserted}{file} // '') =~ m{\A\Q$dir\E/(\w+)\.raw\z} or next;
        my ($node, $qdev) = ($device->{inserted}{'node-name'}, $device->{qdev});
        my $path = "/machine/peripheral/$id";
        my $shown = $qdev =~ m{/} ? $qdev : $path;
        $disks{$id}
            = { node => $node, shown => $qdev, names => [uniq($id, $node, $path, $shown)] };
    }
    return \%disks;
}

# One backup: its result for the disk, and what it read of a block that the guest overwrote during the access.
sub backup ($backend, $disk, $byte, $request, $id) {
    my $vm = $backend->vm;
    $vm->qemu_io("-d $disk->{shown}", "write -P $byte 0 64k");
    my $access = $backend->access(log => sub { });
    my ($info) = $access->setup([$request])->@*;
    $vm->qemu_io("-d $disk->{shown}", 'write -P 0xff 0 64k');
    my $data = $access->volume($request->{device})->pread(0, 65536);
    $access->teardown(1, $id);
    return ($info, $data);
}

sub check_names ($backend, $id, $disk) {
    my ($base, $identity);
    my $byte = 0;
    for my $name ($disk->{names}->@*, $id) {
        my %request = (device => $name, 'bitmap-mode' => 'use', base => $base);
        $request{identity} = $identity if defined($identity);
        my ($info, $data)
            = eval { backup($backend, $disk, ++$byte, \%request, PVE::BackupAccess->new_id) };
        is($@, '', "$name: a backup") or next;
        is($info->{'bitmap-action'}, defined($base) ? 'used' : 'missing-recreated', "$name: mode");
        is($data eq chr($byte) x 65536, 1, "$name: the data from before the guest's write");
        is($info->{identity}, $identity //= "device /machine/peripheral/$id", "$name: identity");
        my $seen = $backend->access->_sizes_and_bases($name)->{$name};
        $base = $seen->{base};
    }
    return;
}

for my $id (@ids) {
    open(my $fh, '>', file($id)) or die file($id) . ": $!\n";
    truncate($fh, $size) or die file($id) . ": $!\n";
}
my $backend = PBA::Test::Backend->start_paused(
    name => 'upstream',
    disks => [],
    args => arguments(1),
);
my $vm = $backend->vm;
my $disks = disks($vm);
is_deeply([sort keys $disks->%*], [sort @ids], 'every disk is there');
note("$_: $disks->{$_}{shown}") for @ids;
for my $id (@ids) {
    subtest $id => sub { check_names($backend, $id, $disks->{$id}) };
}
is_deeply([choose_disks($backend->qmp_path)], [\@ids, []], 'the names that the command chooses');

my %identity = map { $_ => $backend->access->_sizes_and_bases($_)->{$_}{identity} } @ids;
$vm->{opt}{args} = arguments(20);
$vm->restart;
is_deeply(
    [choose_disks($backend->qmp_path)],
    [\@ids, []],
    'the same names after a restart with other nodes'
);
is_deeply({ map { $_ => $backend->access->_sizes_and_bases($_)->{$_}{identity} } @ids },
    \%identity, 'the same identities');

done_testing;
