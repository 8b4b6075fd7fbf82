# What others do to the same QEMU. If something exists before an access that does not allow one, the access is
# refused before any change, with a message that says what it is and what to do; and it ends as it would have
# without us.
#
# One QEMU is enough for a plain run: PBA_FULL=1 runs on each.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use File::Temp ();
use JSON::PP ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Backend;
use PBA::Test::ScriptedQEMU;

my ($Backend, $VM) = ('PBA::Test::Backend', 'PBA::Test::VM');

my $mib = 1024 * 1024;
my $size = 8 * $mib;
my ($true, $false) = (JSON::PP::true, JSON::PP::false);

# Adds an image beside the disks, and a node of it.
sub add_node ($vm, $name, %opt) {
    my $file = $vm->dir . "/$name.raw";
    open(my $fh, '>', $file) or die "$file: $!\n";
    truncate($fh, $size) or die "$file: $!\n";
    my %image = (driver => 'file', filename => $file);
    $vm->qmp('blockdev-add', driver => 'raw', 'node-name' => $name, file => \%image, %opt);
    return $file;
}

# Gives the disk a backing file, and returns that.
sub add_overlay ($vm) {
    my $node = node_of($vm, 'disk0');
    $vm->qmp(
        'blockdev-snapshot-sync',
        'node-name' => $node,
        'snapshot-file' => $vm->dir . '/overlay.qcow2',
        'snapshot-node-name' => 'overlay'
    );
    return $node;
}

sub job ($vm) {
    my ($job) = grep { $_->{id} eq 'theirs' } $vm->qmp('query-jobs')->@*;
    return $job ? $job->{status} : 'gone';
}

sub wait_job ($vm, $wanted) {
    for (1 .. 600) {
        my $status = job($vm);
        return 1 if $status =~ $wanted;
        sleep(0.05);
    }
    return 0;
}

# At 1 byte a second, the job does not end by itself.
my %slow = ('job-id' => 'theirs', speed => 1);

sub node_of ($vm, $id) {
    my $device = $vm->disk($id)->{device};
    my ($found)
        = grep { $_->{device} eq $device || ($_->{inserted}{'node-name'} // '') eq $device }
        $vm->qmp('query-block')->@*;
    return $found->{inserted}{'node-name'};
}

sub start_job ($vm, $command, $device, %more) {
    my $file = add_node($vm, 'theirs-target');
    $vm->qmp(
        $command,
        %slow,
        device => $device,
        target => 'theirs-target',
        sync => 'full',
        %more
    );
    return $file;
}

# Ends the job as its owner would; the result must equal the disk.
sub complete ($vm, $id, $file, $command) {
    $vm->qmp('block-job-set-speed', device => 'theirs', speed => 0);
    $vm->qemu_io($id, "write -P 0x77 3M 64k") if $command eq 'blockdev-mirror';
    if ($command eq 'blockdev-mirror') {
        ok(wait_job($vm, qr/ready/), 'the mirror gets ready');
        $vm->qmp('job-complete', id => 'theirs');
    }
    ok(wait_job($vm, qr/gone|concluded/), 'the job ends');
    $vm->qmp('job-dismiss', id => 'theirs') if job($vm) eq 'concluded';
    open(my $fh, '<', $file) or die "$file: $!\n";
    seek($fh, ($command eq 'blockdev-mirror' ? 3 : 1) * $mib, 0);
    read($fh, my $data, 65536);
    my $byte = $command eq 'blockdev-mirror' ? "\x77" : "\x41";
    ok($data eq $byte x 65536, "the job's target has what the guest wrote");
    return;
}

sub set_drive ($vm, $node) {
    my %property = (path => $vm->disk('disk0')->{qdev}, property => 'drive');
    $vm->qmp('qom-set', %property, value => $node);
    return;
}

# What exists, how it is created, what the refusal says, and how it ends.
my %company;
%company = (
    'a backup job' => {
        begin => sub ($vm, $device) { start_job($vm, 'blockdev-backup', $device) },
        refusal => qr/block job 'theirs' \(backup, running\) uses this disk - /,
        end => sub ($vm, $file) { complete($vm, 'disk0', $file, 'blockdev-backup') },
    },
    'a mirror' => {
        begin => sub ($vm, $device) { start_job($vm, 'blockdev-mirror', $device) },
        refusal => qr/block job 'theirs' \(mirror, (?:running|ready)\) uses this disk - /,
        end => sub ($vm, $file) { $vm->qmp('block-job-cancel', device => 'theirs') },
        pivots => 1,
    },
    'a mirror that is ready' => {
        begin => sub ($vm, $device) {
            my $file = start_job($vm, 'blockdev-mirror', $device, speed => 0);
            wait_job($vm, qr/ready/);
            return $file;
        },
        refusal => qr/block job 'theirs' \(mirror, ready\) uses this disk - /,
        end => sub ($vm, $file) { complete($vm, 'disk0', $file, 'blockdev-mirror') },
        pivots => 1,
    },
    'a job that is concluded' => {
        begin => sub ($vm, $device) {
            my $file = start_job($vm, 'blockdev-backup', $device, 'auto-dismiss' => $false);
            $vm->qmp('block-job-cancel', device => 'theirs');
            wait_job($vm, qr/concluded/);
            return $file;
        },
        end => sub ($vm, $file) { $vm->qmp('job-dismiss', id => 'theirs') },
    },
    'a job on the backing file of the disk' => {
        begin => sub ($vm, $device) {
            start_job($vm, 'blockdev-backup', add_overlay($vm));
        },
        refusal => qr/block job 'theirs' \(backup, running\) uses this disk - /,
        end => sub ($vm, $file) { $vm->qmp('block-job-cancel', device => 'theirs') },
        shapes => { drive => 1 },
    },
    'a node of others on the disk' => {
        begin => sub ($vm, $device) {
            $vm->qmp(
                'blockdev-add',
                driver => 'throttle',
                'node-name' => 'theirs-filter',
                'throttle-group' => 'theirs-group',
                file => node_of($vm, 'disk0')
            );
        },
        refusal => qr/node 'theirs-filter' of another program is on top of this disk's node '/,
        end => sub ($vm, $file) { $vm->qmp('blockdev-del', 'node-name' => 'theirs-filter') },
    },
    'the same, while a job copies another disk' => {
        begin => sub ($vm, $device) {
            add_node($vm, 'theirs-source');
            start_job($vm, 'blockdev-backup', 'theirs-source');
            $company{'a node of others on the disk'}{begin}->($vm, $device);
        },
        refusal => qr/node 'theirs-filter' of another program is on top of this disk's node '/,
        end => sub ($vm, $file) {
            $vm->qmp('block-job-cancel', device => 'theirs');
            $company{'a node of others on the disk'}{end}->($vm, $file);
        },
        shapes => { blockdev => 1 },
    },
    'a filter of another program' => {
        begin => sub ($vm, $device) {
            my $node = node_of($vm, 'disk0');
            add_node($vm, 'theirs-target');
            $vm->qmp(
                'blockdev-add',
                driver => 'copy-before-write',
                'node-name' => 'theirs-filter',
                file => $node,
                target => 'theirs-target'
            );
            set_drive($vm, 'theirs-filter');
            return $node;
        },
        refusal => qr/node 'theirs-filter' of another program copies what the guest overwrites - /,
        end => sub ($vm, $node) {
            set_drive($vm, $node);
            $vm->qmp('blockdev-del', 'node-name' => 'theirs-filter');
        },
        calls => ['setup'],
        shapes => { drive => 1 },
        backends => { upstream => 1 },
    },
    'a second guest device' => {
        begin => sub ($vm, $device) {
            $vm->qmp(
                'device_add',
                driver => 'virtio-blk-pci',
                id => 'second',
                drive => node_of($vm, 'disk0'),
                'share-rw' => $true
            );
        },
        impossible => qr/Conflicts with/,
        refusal => qr/guest device '(?:second|disk0-dev)' also uses this disk's node '\S+'/,
        end => sub ($vm, $file) { $vm->qmp('device_del', id => 'second') },
        keeps => 1,
        shared => 1,
    },
);

# Each of the calls that check disks; none may change anything.
sub refusals ($backend, $device) {
    my $access = $backend->access;
    my %calls = (
        setup => sub { $access->setup([{ device => $device, 'bitmap-mode' => 'use' }]) },
        sizes => sub { $access->sizes($device) },
        bases => sub { $access->bases($device) },
    );
    my %error;
    for my $name (sort keys %calls) {
        $error{$name} = eval { $calls{$name}->(); 1 } ? 'none' : "$@";
        $access->teardown(0) if $access->_is_up;
    }
    return \%error;
}

# Two disks of that shape, or undef if QEMU itself does not allow this.
sub start_in_company ($name, $shape, $company) {
    my $shared = $company->{shared} ? 'share-rw=on' : undef;
    my %disk = (size => $size, shape => $shape, format => 'qcow2', device_args => $shared);
    my $backend = $Backend->start(
        name => $name,
        guest => 0,
        disks => [map { { id => $_, %disk } } qw(disk0 disk1)],
        args => [-object => 'throttle-group,id=theirs-group'],
    );
    my $vm = $backend->vm;
    $vm->qemu_io('disk0', 'write -P 0x41 1M 64k');
    my $there = eval { $company->{begin}->($vm, $backend->device('disk0')) };
    return ($backend, $there) if defined($there);
    die $@ if $@ !~ ($company->{impossible} // qr/\A\z/);
    return;
}

sub check_refused ($backend, $refusal, @calls) {
    my $device = $backend->device('disk0');
    my $error = refusals($backend, $device);
    like($error->{$_}, qr/\Adevice $device: $refusal/, "$_ is refused") for @calls;
    return;
}

sub back_up ($backend, $device, %options) {
    my $access = $backend->access(%options);
    $access->setup([{ device => $device, 'bitmap-mode' => 'new' }]);
    $access->teardown(1);
    return 1;
}

sub check ($name, $shape, $what) {
    my $company = $company{$what};
    my ($backend, $there) = start_in_company($name, $shape, $company);
    return pass('QEMU itself does not have it') if !$backend;
    my $before = $backend->outside;
    check_refused($backend, $company->{refusal}, ($company->{calls} // [qw(bases setup sizes)])->@*)
        if $company->{refusal};
    is_deeply($backend->outside, $before, 'nothing is changed');
    back_up($backend, $backend->device('disk1'), 'allow-shared' => 1);
    is_deeply($backend->outside, $before, 'another disk can be backed up');
    $company->{end}->($backend->vm, $there);
    wait_job($backend->vm, qr/gone/);
    return if $company->{keeps};
    my $pivoted = $company->{pivots} && $shape eq 'blockdev';
    return if $pivoted && $name eq 'pve';    # there, a node with another name is another disk
    ok(eval { back_up($backend, $pivoted ? 'disk0-dev' : $backend->device('disk0')) },
        'afterwards it is backed up')
        or diag($@);
    return;
}

# A disk to which others may write has no consistent instant.
sub check_shared ($name) {
    my $backend = $Backend->start(
        name => $name,
        guest => 0,
        disks => [{ id => 'disk0', size => $size, device_args => 'share-rw=on' }],
    );
    my $before = $backend->outside;
    my $error = refusals($backend, 'disk0');
    my $refusal = qr/\Adevice disk0: others may write to this disk .*--allow-shared/;
    like($error->{$_}, $refusal, "$_ is refused") for sort keys %$error;
    is_deeply($backend->outside, $before, 'nothing is changed');
    ok(eval { back_up($backend, 'disk0', 'allow-shared' => 1) },
        'with allow-shared, the disk is backed up');
    return;
}

# Another program exports the node that is below the guest's device during an access.
sub check_export_of_raw () {
    my %disk = (id => 'disk0', size => $size, shape => 'drive');
    my $backend = $Backend->start(name => 'upstream', guest => 0, disks => [\%disk]);
    my ($vm, $before) = ($backend->vm, $backend->outside);
    my $access = $backend->access(log => sub { });
    $access->setup($backend->devices('new'));
    my $raw = node_of($vm, 'disk0');
    my %export = (id => 'theirs', type => 'nbd', 'node-name' => $raw, name => 'theirs');
    $vm->qmp('block-export-add', %export);
    $access->teardown(1);
    my $overlay = $vm->dir . '/overlay.qcow2';
    ok(
        $vm->qmp_try(
            'blockdev-snapshot-sync',
            device => 'drive-disk0',
            'snapshot-file' => $overlay
        )->{error},
        'QEMU makes no overlay over our node, whose header would have its options'
    );
    my $error = eval {
        back_up($backend, 'drive-disk0', log => sub { });
    } ? 'none' : "$@";
    like(
        $error,
        qr/node '\Q$raw\E' of an earlier access is still there, because an export/,
        'the next setup is refused, and says why'
    );
    $vm->qmp('block-export-del', id => 'theirs', mode => 'hard');
    $vm->qmp('nbd-server-stop');
    ok(
        eval {
            back_up($backend, 'drive-disk0', log => sub { });
        },
        'afterwards it is backed up'
    ) or diag($@);
    is_deeply($backend->outside, $before, 'nothing is left');
    return;
}

# While the access is up, QEMU must not load a snapshot of the disk's node, in any bitmap mode: the data below the
# filter would change.
sub check_snapshot_load ($mode) {
    my %disk = (size => $size, format => 'qcow2');
    my $backend = $Backend->start_paused(name => 'upstream', disks => [{ id => 'disk0', %disk }]);
    my ($vm, $before) = ($backend->vm, $backend->outside);
    my %snapshot = ('job-id' => 'theirs', tag => 's1', vmstate => 'disk0', devices => ['disk0']);
    my $run = sub ($command) {
        $vm->qmp($command, %snapshot);
        wait_job($vm, qr/concluded/);
        my ($job) = $vm->qmp('query-jobs')->@*;
        $vm->qmp('job-dismiss', id => 'theirs');
        return $job->{error} // 'done';
    };
    $vm->qemu_io('disk0', 'write -P 0x41 1M 64k');
    is($run->('snapshot-save'), 'done', 'a snapshot');
    $vm->qemu_io('disk0', 'write -P 0x42 1M 64k');
    my @warnings;
    my $log = sub ($level, $line) { push(@warnings, $line) if $level eq 'warn' };
    my $access = $backend->access(log => $log);
    $access->setup($backend->devices($mode));
    my $volume = $access->volume('disk0');
    like($run->('snapshot-load'), qr/active dirty bitmaps/, 'QEMU does not load it');
    is($volume->pread(1 << 20, 65536), "\x42" x 65536, 'the volume has the disk at its instant');
    undef $volume;
    $access->teardown(1);
    is_deeply(\@warnings, [], 'no warning');
    is_deeply($backend->outside, $before, 'nothing is left');
    is_deeply($backend->other_bitmaps, [], 'no bitmap of ours is left');
    return;
}

# QEMU lets others write to the flash chips of a UEFI guest, but nothing does.
sub check_flash ($name) {
    my $dir = File::Temp->newdir('pba-flash-XXXXXXXX', TMPDIR => 1);
    my $flash_size = 256 << 10;
    my $blockdev = sub ($node, $is_fixed) {
        my $file = "$dir/$node";
        open(my $fh, '>', $file) or die "$file: $!\n";
        truncate($fh, $flash_size) or die "$file: $!\n";
        my %file = (driver => 'file', filename => $file, discard => 'unmap');
        my %raw = (driver => 'raw', 'node-name' => $node, file => \%file, discard => 'unmap');
        $raw{'read-only'} = JSON::PP::true if $is_fixed;
        return \%raw;
    };
    my $backend = $Backend->start_paused(
        name => $name,
        machine => 'pc,pflash0=firmware,pflash1=variables',
        disks => [{ id => 'disk0', size => $size }],
        args => [
            map { ('-blockdev', JSON::PP->new->encode($_)) } $blockdev->('firmware', 1),
            $blockdev->('variables', 0)
        ],
    );
    $backend->vm->qmp('blockdev-add', $blockdev->('variables-fleecing', 0)->%*) if $name eq 'pve';
    my $before = $backend->outside;
    ok(eval { back_up($backend, 'variables') }, 'the variables of the firmware') or diag($@);
    is_deeply($backend->outside, $before, 'nothing is left');
    return;
}

# The guest device has an ID that other objects have, too.
sub check_ambiguous_id () {
    my $backend = $Backend->start(
        name => 'upstream',
        guest => 0,
        disks => [{ id => 'disk0', size => $size, bus => 'scsi', shape => 'drive' }],
        args => [-chardev => 'null,id=disk0-dev', -object => 'secret,id=disk0-dev,data=x'],
    );
    my $before = $backend->outside;
    ok(eval { back_up($backend, 'drive-disk0') }, 'it is backed up') or diag($@);
    is_deeply($backend->outside, $before, 'nothing is left');
    return;
}

# Version 2 of qcow2 cannot store bitmaps.
sub check_old_qcow2 () {
    my $dir = File::Temp->newdir;
    my @create = ($VM->qemu_img, qw(create -q -f qcow2 -o compat=0.10));
    system(@create, "$dir/old.qcow2", $size) == 0 or die "qemu-img: $?\n";
    my %disk = (id => 'disk0', format => 'qcow2', file => "$dir/old.qcow2");
    my $backend = $Backend->start(name => 'upstream', guest => 0, disks => [\%disk]);
    my @log;
    my %options = (persistent => 1, log => sub ($level, $line) { push(@log, $line) });
    ok(eval { back_up($backend, 'disk0', %options) }, 'it is backed up') or diag($@);
    my ($bitmap) = $backend->target_bitmaps;
    ok(!$bitmap->{persistent}, 'the bitmap is not persistent');
    is(scalar(grep { m/disk0: its bitmap cannot be persistent.*compat=1\.1/ } @log),
        1, 'the log says that the bitmap cannot be persistent');
    return;
}

# What QEMU reports about disks whose guest sends SCSI commands itself: on a Proxmox QEMU, and on a stock one.
# QEMU 7.2 has a property 'scsi' of virtio disks.
sub check_passed_through ($type, $returns) {
    my $has_scsi = $type eq 'virtio-blk-device' ? $true : $false;
    my $nodes = $returns->{'query-named-block-nodes'};
    my @nodes = map {
        { $_->%*, drv => 'host_device' }
    } $nodes->@*;
    my @objects = map { { name => $_, type => "child<$type>" } } qw(scsi0 scsi1);
    my %returns = (
        $returns->%*,
        'query-named-block-nodes' => \@nodes,
        'qom-list' => \@objects,
        'qom-get' => $has_scsi
    );
    my $calls = qmp_calls(\%returns);
    my $access = new_access($calls->{code}, 'fleecing-dir' => "$dir");
    my $done = eval { $access->setup(\@one); 1 };

    if ($type eq 'scsi-hd') {
        $access->teardown(0) if $done;
        unlike("$@", qr/bypass QEMU/, 'a SCSI disk that QEMU emulates does not bypass QEMU');
        return;
    }
    ok(!$done, 'setup refuses it');
    like(
        "$@",
        qr/\Adevice drive-scsi0: its guest device is a (?:$type|virtio-blk with scsi=on), .*exclude the disk/,
        'the error says why'
    );
    ok(!(grep { m/\A(?:blockdev-|nbd-|qom-set|backup-)/ } $calls->{names}->@*), 'nothing is sent');
    return;
}

subtest "backend $_: a shared disk" => sub { check_shared($_) }
    for $Backend->names;
subtest "backend $_: a flash chip" => sub { check_flash($_) }
    for $Backend->names;
if (!$VM->is_proxmox) {
    subtest 'an ID that several objects have' => sub { check_ambiguous_id() };
    subtest 'an export of our node' => sub { check_export_of_raw() };
    subtest "a load of a snapshot, mode $_" => sub { check_snapshot_load($_) }
        for qw(none new);
    subtest 'an old qcow2 image' => sub { check_old_qcow2() };
}
for my $type (qw(scsi-block scsi-generic scsi-hd virtio-blk-device)) {
    subtest "$type, Proxmox" => sub { check_passed_through($type, { pve_returns() }) };
    subtest "$type, stock" => sub { check_passed_through($type, { upstream_returns() }) };
}

my @cells;
for my $what (sort keys %company) {
    for my $shape (qw(drive blockdev)) {
        next if $company{$what}{shapes} && !$company{$what}{shapes}{$shape};
        my $backends = $company{$what}{backends};
        push(@cells, [$_, $shape, $what])
            for grep { !$backends || $backends->{$_} } $Backend->names;
    }
}
for my $cell (@cells) {
    my ($name, $shape, $what) = $cell->@*;
    subtest "backend $name, $shape: $what" => sub { check($cell->@*) };
}

done_testing;
