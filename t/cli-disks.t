# Which disks the command backs up without --device, and what it says about the others.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use JSON::PP ();
use Test::More;

use PBA::Test::QMPPeer;
use PVE::BackupAccess::CLI::Disks qw(choose_disks);

my ($true, $false) = (JSON::PP::true, JSON::PP::false);

sub disk ($name, $qdev, %more) {
    my $medium = $more{medium}
        // { 'node-name' => $more{node} // "#$name", ro => $more{ro} // $false };
    return {
        device => $name,
        defined($qdev) ? (qdev => $qdev) : (),
        removable => $more{removable} // $false,
        $more{empty} ? () : (inserted => $medium),
    };
}

sub graph (@chain) {
    my @nodes
        = map { { id => $_ + 1, type => 'block-driver', name => $chain[$_] } } 0 .. $#chain;
    my @edges = map { { parent => $_, child => $_ + 1, name => 'file' } } 1 .. $#chain;
    return { nodes => \@nodes, edges => \@edges };
}

# ([names], [lines]), or the error.
sub chosen ($disks, $types, %more) {
    my $commands = [{ name => $more{pve} ? 'backup-access-setup' : 'blockdev-reopen' }];
    push(
        $commands->@*,
        map { { name => $_ } }
            qw(blockdev-backup block-export-add block-dirty-bitmap-merge x-debug-query-block-graph)
    );
    my %objects = map { ("/machine/$_" => []) } qw(peripheral peripheral-anon);
    for my $name (sort keys $types->%*) {
        my $parent = $name =~ m/\[/ ? '/machine/peripheral-anon' : '/machine/peripheral';
        push($objects{$parent}->@*, { name => $name, type => "child<$types->{$name}>" });
    }
    my %version = (
        qemu => { major => 10, minor => 1, micro => 0 },
        package => $more{pve} ? 'pve-qemu-kvm_10' : '',
    );
    my $peer = PBA::Test::QMPPeer->start(
        replies => {
            'query-block' => { return => $disks },
            'qom-list' =>
                sub ($, $arguments, $) { return { return => $objects{ $arguments->{path} } } },
            'qom-get' => sub (@) {
                return $more{scsi}
                    ? { return => $true }
                    : { error => { class => 'GenericError', desc => 'no such property' } };
            },
            'query-named-block-nodes' => { return => $more{nodes} // [] },
            'query-version' => { return => \%version },
            'query-commands' => { return => $commands },
            'x-debug-query-block-graph' => { return => $more{graph} // graph() },
        }
    );
    my @result = eval { choose_disks($peer->socket_path, ($more{exclude} // [])->@*) };
    return @result ? \@result : "$@";
}

my @good = (
    disk('drive-scsi0', 'scsi0'),
    disk('drive-virtio1', '/machine/peripheral/virtio1/virtio-backend'),
);
my %types = (scsi0 => 'scsi-hd', virtio1 => 'virtio-blk-pci', hw => 'virtio-scsi-pci');
my @names = qw(drive-scsi0 drive-virtio1);

is_deeply(chosen(\@good, \%types), [\@names, []], 'disks');

# [description, additional disks, their types, the lines about them]
my @left_out = (
    ['an empty drive is no disk', [disk('drive-ide2', 'ide2', empty => 1, removable => $true)], {}],
    [
        'a removable disk',
        [disk('drive-ide2', 'ide2', removable => $true, ro => $true)],
        {}, 'drive-ide2 is left out: it is removable'
    ],
    [
        'a read-only one', [disk('iso', 'scsi5', ro => $true)],
        {}, 'iso is left out: it is read-only'
    ],
    [
        'a disk without a guest device',
        [disk('spare', undef, removable => $true)],
        {},
        'spare is left out: no device of the guest uses it'
    ],
    map({
            my $type = $_;
            [
                "a $type",
                [disk('lun', '/machine/peripheral/lun-dev')],
                { 'lun-dev' => $type },
                "lun is left out: it passes SCSI commands through, so QEMU's dirty bitmaps do not"
                    . ' record its writes'
            ]
    } qw(scsi-block scsi-generic)),
    [
        'a scsi-block without an ID',
        [disk('lun', '/machine/peripheral-anon/device[3]')],
        { 'device[3]' => 'scsi-block' },
        "lun is left out: it passes SCSI commands through, so QEMU's dirty bitmaps do not record its writes"
    ],
    map({
            my $type = $_;
            [
                "a disk that another process serves: $type",
                [],
                { ssd => $type, 'device[1]' => $type },
                map { "$_ is left out: another process serves it, and QEMU does not see its data" }
                    '/machine/peripheral-anon/device[1]',
                'ssd'
            ]
    } qw(vhost-user-blk-pci vhost-user-blk-pci-non-transitional vhost-user-scsi-ccw)),
    [
        'a controller that the kernel serves',
        [],
        { host => 'vhost-scsi-pci-transitional' },
        'host is left out: the kernel serves it, and QEMU does not see its data'
    ],
);
for my $case (@left_out) {
    my ($what, $disks, $more_types, @lines) = $case->@*;
    my $chosen = chosen([@good, $disks->@*], { %types, $more_types->%* });
    is_deeply($chosen, [\@names, \@lines], $what);
}

subtest 'a virtio disk with scsi=on' => sub {
    my $disk = disk('', '/machine/peripheral/v0/virtio-backend', node => 'n0');
    my $nodes = sub ($driver) {
        return [{ 'node-name' => 'n0', drv => 'raw' }, { 'node-name' => 'n1', drv => $driver }];
    };
    my @more = (scsi => 1, graph => graph('n0', 'n1'));
    is_deeply(
        chosen([$disk], {}, @more, nodes => $nodes->('host_device')),
        [
            [],
            [
                "n0 is left out: it passes SCSI commands through, so QEMU's dirty bitmaps do not record its writes"
            ]
        ],
        'a device of the host'
    );
    is_deeply(chosen([$disk], {}, @more, nodes => $nodes->('file')), [['n0'], []], 'a file');
};

subtest 'names' => sub {
    my $none = { %types, n0 => 'virtio-blk-pci' };
    my @two = map { disk('', "/machine/peripheral/$_/virtio-backend", node => 'n0') } qw(p1 p2);
    is_deeply(chosen(\@two, $none), [['n0'], []], 'a node of two devices is one disk');
    my $filtered = disk('', '/machine/peripheral/v0/virtio-backend', node => '#block7');
    is_deeply(
        chosen([$filtered], {}, graph => graph('#block7', 'pba-raw-x', 'n1')),
        [['n1'], []],
        "below a job's filter and nodes of ours"
    );
    is_deeply(
        chosen([$filtered], {}, graph => graph('#block7', '#block8')),
        [['v0'], []],
        'a disk whose nodes have no names has that of its device'
    );
    my $nameless = disk('', '/machine/peripheral-anon/device[0]/virtio-backend', node => '#block7');
    is_deeply(
        chosen([$nameless], {}),
        [['/machine/peripheral-anon/device[0]'], []],
        'a device without a name is called by its path'
    );
    my @crossed = map { disk('', "/machine/peripheral/$_->[0]/virtio-backend", node => $_->[1]) }
        ['a', 'b'], ['b', 'c'];
    is_deeply(
        chosen(\@crossed, {}),
        [['/machine/peripheral/a', 'c'], []],
        "a name that another disk has is not used"
    );
    my @libvirt = map { disk('', $_, node => 'libvirt-3-format') }
        '/machine/peripheral/virtio-disk0/virtio-backend', '/machine/peripheral-anon/device[0]';
    is_deeply(chosen([$libvirt[0]], {}), [['virtio-disk0'], []], "libvirt's: the device's id");
    is_deeply(
        chosen([$libvirt[1]], {}),
        [['libvirt-3-format'], []],
        "the node's where the device has none"
    );
};

subtest 'empty drives and USB disks' => sub {
    my $tray = disk('', 'n1', empty => 1, removable => $true);
    my $beside = disk('', '/machine/peripheral/v1/virtio-backend', node => 'n1');
    is_deeply(
        chosen([$tray, $beside], {}),
        [['/machine/peripheral/v1'], []],
        'a name that an empty drive has is not used'
    );
    my $usb = disk('', '/machine/peripheral/stick/stick.0/legacy[0]', node => 'libvirt-2-format');
    is_deeply(chosen([$usb], {}), [['stick'], []], "libvirt's USB disk: the device's id");
};

subtest 'fleecing' => sub {
    my @disks = (@good, disk('drive-scsi0-fleecing', 'f0'));
    is_deeply(
        chosen(\@disks, \%types),
        [[@names, 'drive-scsi0-fleecing'], []],
        'a stock QEMU: a disk'
    );
    is_deeply(
        chosen(\@disks, \%types, pve => 1),
        [\@names, []],
        'a Proxmox QEMU: the fleecing image is not a disk'
    );
};

subtest '--exclude' => sub {
    for my $name ('drive-scsi0', 'scsi0', '#drive-scsi0', '/machine/peripheral/scsi0') {
        is_deeply(chosen(\@good, \%types, exclude => [$name]),
            [['drive-virtio1'], ['drive-scsi0 is left out: --exclude names it']], $name);
    }
    is_deeply(chosen(\@good, \%types, exclude => [@names])->[0], [], 'all disks are excluded');
    my $empty = disk('drive-ide2', 'ide2', empty => 1, removable => $true);
    for my $name (qw(drive-ide2 ide2 /machine/peripheral/ide2)) {
        is_deeply(
            chosen([@good, $empty], \%types, exclude => [$name]),
            [\@names, []],
            "$name: a drive without a medium"
        );
    }
    my @crossed = (disk('', 'a', node => 'b'), disk('', 'b', node => 'c'));
    is(
        chosen(\@crossed, {}, exclude => ['b']),
        "--exclude: 'b' is the name of several disks - give another name: /machine/peripheral/a, c\n",
        'a name of two disks'
    );
    is(
        chosen(\@good, \%types, exclude => ['drive-scsi1']),
        "--exclude: the guest has no disk 'drive-scsi1' - it has drive-scsi0, drive-virtio1\n",
        'a name of no disk'
    );
};

done_testing;
