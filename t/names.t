# A disk has many names and one identity. Under each of its names, the disk is found, is counted once, and its
# base is found even if that was made under another name. Results and archives contain the given name.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use JSON::PP ();
use List::Util qw(uniq);

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command);
use PBA::Test::Life::Chain;
use PBA::Test::QemuNbd qw(img);
use PVE::BackupAccess::CLI::Disks qw(choose_disks);

my $Backend = 'PBA::Test::Backend';
my $mib = 1024 * 1024;
my $json = JSON::PP->new->utf8;
my $new_id = sub () { PVE::BackupAccess->new_id };
my @disks = (
    { id => 'plain', size => $mib, format => 'qcow2' },
    { id => 'lun', size => $mib, bus => 'scsi', shape => 'drive' },
    { id => 'nameless', size => $mib, anonymous => 1 },
    { id => 'old', size => $mib, anonymous => 1, shape => 'drive' },
);

# The names of each disk as a user finds them in QEMU, by the disk's ID; a Proxmox QEMU accepts the first ones.
sub names_of ($vm) {
    my %names;
    for my $device ($vm->qmp('query-block')->@*) {
        my $qdev = $device->{qdev} // next;
        my $node = $device->{inserted}{'node-name'} // next;
        my ($id) = grep { $vm->disk($_)->{qdev} eq $qdev } $vm->disk_ids;
        my @paths = $qdev =~ m!/! ? $qdev : "/machine/peripheral/$qdev";
        push(@paths, $1) if $qdev =~ m!\A(.*)/virtio-backend\z!;
        my @ids = map { m!\A/machine/peripheral/([^/]+)\z! ? $1 : () } @paths;
        $names{$id} = [uniq(grep { $_ ne '' } $device->{device}, $node, @ids, @paths)];
    }
    return \%names;
}

sub is_drive ($backend, $id, $name) {
    return $name eq $backend->device($id) || $name =~ m/\A#/;
}

my sub refusal ($code) {
    return eval { $code->(); 1 } ? 'none' : "$@";
}

# Makes one backup of a disk: (setup's result, the volumes of the access).
sub backup ($backend, $request, @end) {
    my $access = $backend->access(log => sub { });
    my ($info) = $access->setup([$request])->@*;
    my $volumes = $access->volumes('nbd');
    $access->teardown(@end);
    return ($info, $volumes);
}

sub check_setup ($backend, @names) {
    my ($base, $identity);
    for my $name (@names, reverse(@names)) {
        my $id = $new_id->();
        my %request = (device => $name, 'bitmap-mode' => 'use', base => $base);
        $request{identity} = $identity if defined($base);
        my ($info, $volumes) = backup($backend, \%request, 1, $id);
        my $action = defined($base) ? 'used' : 'missing-recreated';
        is_deeply([$info->@{qw(device bitmap-action)}], [$name, $action], "$name: $action");
        is_deeply([keys $volumes->%*], [$name], "$name: the volume has the name that was given");
        is($info->{identity}, $identity //= $info->{identity}, "$name: the identity is the same");
        $base = $id;
    }
}

sub check_twice ($backend, @names) {
    for my $i (0 .. $#names) {
        my ($one, $other) = @names[$i - 1, $i];
        my @requests = map { { device => $_ } } $one, $other;
        my $twice
            = $one eq $other ? qr/is listed twice$/ : qr/is listed twice - also as '\Q$one\E'/;
        my $error = refusal(sub { $backend->access->setup(\@requests) });
        like($error, qr/\Adevice \Q$other\E: $twice/, "$one, $other: they are one disk");
    }
}

# Backs up under each name in turn, with the provider that identifies disks by their identities.
sub check_task ($backend, $id, @names) {
    my $vm = $backend->vm;
    my $store = $backend->work_dir("store-$id");
    my $provider = PBA::Test::Life::Chain->new(undef, { path => $store }, 'names', sub { });
    my $full = 1;
    for my $name (@names, $names[0]) {
        my $byte = sprintf('0x%02x', 1 + int(rand(255)));
        $vm->qemu_io($id, "write -P $byte 64k 64k");
        my $result = $backend->task($provider, devices => [$name])->run_job;
        my $mode = $full ? 'new' : 'reuse';
        is($result->{devices}{$name}{'bitmap-mode'}, $mode, "$name: task: $mode");
        my ($format, $from) = $provider->content_of($result->{'archive-name'}, $name);
        my $restored = $vm->dir . '/restored.raw';
        img('convert', '-f', $format, '-O', 'raw', $from, $restored);
        is(system('cmp', '-s', $vm->raw_image($id), $restored), 0, "$name: task: the disk's data");
        $full = 0;
        next if $name ne $names[1];
        PVE::BackupAccess->forget($backend->options, log => sub { });
        $full = 1;
    }
    my $parents = grep { $_->{parent} } map { values $_->{devices}->%* } $provider->list(100)->@*;
    is($parents, scalar(@names), "$id: each archive except the first has its base");
}

sub command ($backend, @arguments) {
    my $store = $backend->work_dir('command');
    return run_command('backup', $store, guest($backend), '--vmid', 100, '--json', @arguments);
}

sub guest ($backend) {
    my @guest = ('--qmp', $backend->qmp_path, '--run-dir', $backend->work_dir('run'));
    push(@guest, '--fleecing-dir', $backend->work_dir('fleecing')) if $backend->name eq 'upstream';
    return @guest;
}

sub devices_in ($run) {
    return [sort keys(($json->decode($run->{out} || '{}')->{devices} // {})->%*)];
}

sub check_exclude ($backend, $id, @names) {
    my $others = [sort map { $backend->device($_) } grep { $_ ne $id } $backend->vm->disk_ids];
    for my $name (@names) {
        my ($devices, $lines) = eval { choose_disks($backend->qmp_path, $name) };
        is_deeply([sort(($devices // [])->@*)], $others, "--exclude $name") or diag($@);
        is(scalar(($lines // [])->@*), 1, "--exclude $name: says which disk");
    }
}

sub check_device ($backend, $id, @names) {
    for my $name (@names) {
        my $run = command($backend, '--device', $name);
        is_deeply(devices_in($run), [$name], "--device $name") or diag($run->{err});
        my $archive
            = $backend->work_dir('command') . '/' . $json->decode($run->{out})->{'archive-name'};
        check_restore($backend, $archive, $id, @names)
            if $name eq $names[0] && $backend->name eq 'upstream';
    }
    PVE::BackupAccess->forget($backend->options, log => sub { });
    for my $name (@names) {
        my $run = run_command('map', $name, guest($backend));
        like($run->{out}, qr/\A\Q$name\E, target command\@/, "map $name") or diag($run->{err});
    }
}

sub check_restore ($backend, $archive, $id, @names) {
    my $dir = $backend->work_dir('out');
    for my $name (@names) {
        my $run = run_command('restore', $archive, $dir, '--device', $name);
        my ($file) = split(m/\n/, $run->{out});
        is(system('cmp', '-s', $backend->vm->raw_image($id), $file // 'none'),
            0, "restore --device $name")
            or diag($run->{err});
        unlink(glob("$dir/*"));
    }
}

# The ID of a new guest device is the name of another disk's node.
sub check_ambiguous ($backend) {
    my $vm = $backend->vm;
    my %null = (driver => 'null-co', size => $mib, 'read-zeroes' => JSON::PP::true);
    $vm->qmp('blockdev-add', %null, 'node-name' => 'other');
    $vm->qmp('device_add', driver => 'virtio-blk-pci', id => 'plain', drive => 'other');
    my $path = '/machine/peripheral/plain-dev';

    my $several = qr/is the name of several disks - give another name/;
    my $access = $backend->access;
    for my $call (sub { $access->setup([{ device => 'plain' }]) }, sub { $access->bases('plain') })
    {
        my $error = refusal($call);
        like($error, qr/\Adevice plain: $several of the one to back up: /, 'two disks: refused');
        like($error, qr/: (?:plain-dev, \S+|\S+, plain-dev)\n\z/, 'the error names other names');
    }
    my ($info) = backup($backend, { device => 'plain-dev', base => undef }, 1);
    is($info->{identity}, "device $path", 'a clear name of the first');
    ($info) = backup($backend, { device => 'other', base => undef }, 1);
    is($info->{identity}, 'device /machine/peripheral/plain', 'a unique name of the second disk');

    like(command($backend, '--exclude', 'plain')->{err}, qr/'plain' $several: /, '--exclude plain');
    my $all = [sort $path, 'other', 'nameless', 'drive-lun', 'drive-old'];
    is_deeply(devices_in(command($backend)), $all, 'the command itself takes clear names');
}

# The ID of a new guest device is the name of another disk's drive.
sub check_drive_name ($backend) {
    my $vm = $backend->vm;
    my %null = (driver => 'null-co', size => $mib, 'read-zeroes' => JSON::PP::true);
    $vm->qmp('blockdev-add', %null, 'node-name' => 'crossed');
    my %device = (driver => 'scsi-hd', bus => 'scsihw-lun.0', 'scsi-id' => 1);
    $vm->qmp('device_add', %device, id => 'drive-lun', drive => 'crossed');
    for my $name (qw(crossed lun-dev)) {
        my %request = (device => $name, 'bitmap-mode' => 'new', base => undef);
        my ($info) = eval { backup($backend, \%request, 1) };
        is($@, '', "$name: a backup");
        is($info->{'bitmap-node-name'}, node_of($vm, $name), "$name: of its disk");
    }
    my $error = refusal(sub { $backend->access->setup([{ device => 'drive-lun' }]) });
    like($error, qr/\Adevice drive-lun: is the name of several disks/, 'a name of both');
    my $run = command($backend);
    is($run->{status}, 0, 'the command itself takes clear names') or diag($run->{err});
}

# The node of the disk whose node or guest device has this name.
sub node_of ($vm, $name) {
    my ($device) = grep { ($_->{qdev} // '') eq $name || $_->{inserted}{'node-name'} eq $name }
        grep { $_->{inserted} } $vm->qmp('query-block')->@*;
    return $device->{inserted}{'node-name'};
}

# Another program limits the disk's throughput by a filter.
sub check_filter () {
    my $backend = $Backend->start_paused(
        name => 'upstream',
        disks => [{ id => 'disk0', size => $mib }],
        args => [-object => 'throttle-group,id=group'],
    );
    my $vm = $backend->vm;
    backup($backend, { device => 'disk0', 'bitmap-mode' => 'new' }, 1);
    my %filter = ('node-name' => 'filter', 'throttle-group' => 'group', file => 'disk0');
    $vm->qmp('blockdev-add', driver => 'throttle', %filter);
    my $path = $vm->disk('disk0')->{qdev};
    $vm->qmp('qom-set', path => $path, property => 'drive', value => 'filter');
    for my $name (qw(disk0 filter)) {
        my ($info) = eval { backup($backend, { device => $name, 'bitmap-mode' => 'use' }, 1) };
        is($@, '', "$name: a backup");
        is($info->{'bitmap-action'}, 'used', "$name: the bitmap is used");
    }
    return;
}

for my $name ($Backend->names) {
    my $backend = $Backend->start_paused(
        name => $name,
        disks => \@disks,
    );
    my $names = names_of($backend->vm);
    is_deeply([sort keys $names->%*], [sort map { $_->{id} } @disks], "$name: every disk is found");
    for my $id (sort keys $names->%*) {
        my @all = $names->{$id}->@*;
        my @usable = $name eq 'upstream' ? @all : $backend->device($id);
        cmp_ok(scalar(@all), '>=', 3, "$name: $id: @all");
        subtest "$name: $id: setup" => sub { check_setup($backend, @usable) };
        subtest "$name: $id: twice" => sub { check_twice($backend, @usable) };
        PVE::BackupAccess->forget($backend->options, log => sub { });
        subtest "$name: $id: task" => sub { check_task($backend, $id, @usable) }
            if $name eq 'upstream';
        subtest "$name: $id: --exclude" => sub { check_exclude($backend, $id, @all) };
        subtest "$name: $id: --device" => sub { check_device($backend, $id, @usable) }

            if $id eq 'nameless';
        for my $other (grep { !is_drive($backend, $id, $_) } $name eq 'pve' ? @all : ()) {
            my $request = { device => $other };
            like(
                refusal(sub { $backend->access->setup([$request]) }),
                qr/\Adevice \Q$other\E: .* give the name of its block device, '\Q$all[0]\E'$/,
                "$name: $other: refused, with the name that QEMU accepts"
            );
        }
    }
    next if $name ne 'upstream';
    subtest 'an ambiguous name' => sub { check_ambiguous($backend) };
    subtest 'the name of a drive' => sub { check_drive_name($backend) };
    subtest 'a filter above the node' => sub { check_filter() };
}

done_testing;
