# Calls that kill a VM of pve-qemu: the module never makes them, whatever its caller does. The front dies of
# them as the real QEMU does.
#
# One QEMU is enough: this test checks what is sent, not what QEMU does.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QMP;

my $QMP = 'PBA::Test::QMP';

my @disks = map { { id => $_, size => 16 * 1024 * 1024 } } qw(disk0 disk1);

# The guest is needed only to unplug one of its devices.
sub start (%options) {
    my $backend = PBA::Test::Backend->start(
        name => 'pve',
        disks => \@disks,
        empty_cdrom => 1,
        guest => 0,
        %options,
    );
    plan(skip_all => 'not on a QEMU with Proxmox\' commands') if !$backend->front;
    return $backend;
}

sub survived ($backend, $name) {
    $backend->check_manners;
    ok($backend->vm->is_alive, "$name: the VM lives");
}

# The names of the commands that were sent since the last call.
my $seen = 0;

sub sent ($backend) {
    my @names = $backend->front->names;
    my @new = @names[$seen .. $#names];
    $seen = @names;
    return @new;
}

subtest '1. teardown while the bitmap is exported' => sub {
    my $backend = start();
    for my $success (1, 0) {
        my $access = $backend->access;
        $access->setup($backend->devices('use'));
        my $reader = $access->volume($backend->device('disk0'));
        $reader->next_dirty_region;
        sent($backend);
        $access->teardown($success);
        my @commands = sent($backend);
        my ($stop) = grep { $commands[$_] eq 'nbd-server-stop' } 0 .. $#commands;
        my ($teardown) = grep { $commands[$_] eq 'backup-access-teardown' } 0 .. $#commands;
        cmp_ok($stop, '<', $teardown, "success $success: exports and server end before the access");
        is_deeply($backend->vm->exports, [], "success $success: no export is left");
    }
    survived($backend, 'teardown');
};

subtest '2. no devices; 3. an empty removable drive; 6. a device twice' => sub {
    my $backend = start();
    my $good = $backend->devices('new', 'disk0')->[0];
    my %bad = (
        'no devices' => [],
        'an empty removable drive' => [$good, { device => 'ide2' }],
        'the same device twice' => [$good, $good],
        'no fleecing image on a later device' => [$good, { device => 'disk1-dev' }],
        'an unknown later device' => [$good, { device => 'disk9' }],
    );
    sent($backend);
    for my $name (sort keys %bad) {
        ok(!eval { $backend->access->setup($bad{$name}); 1 }, "$name: refused");
        ok(!(grep { $_ eq 'backup-access-setup' } sent($backend)), "$name: never sent");
    }
    survived($backend, 'bad lists');
};

# The default name is that of the target's bitmap.
sub remove_bitmap ($name) {
    my $backend = start();
    my $access = $backend->access;
    my $infos = $access->setup($backend->devices('new'));
    $backend->vm->qmp(
        'block-dirty-bitmap-remove',
        node => $infos->[0]{'bitmap-node-name'},
        name => $name // $infos->[0]{'bitmap-name'}
    );
    sent($backend);
    ok(!eval { $access->teardown(1); 1 }, 'teardown without the bitmap is refused');
    like(
        "$@",
        qr/\Adevice disk0: .*its dirty bitmap was removed while the access was up/,
        'the error says why'
    );
    ok(!(grep { $_ eq 'backup-access-teardown' } sent($backend)), 'the command was not sent');
    is_deeply($backend->vm->exports, [], 'what is safe was done: the exports are gone');
    survived($backend, 'removed bitmap');
    local $SIG{__WARN__} = sub { };
    undef $access;
    survived($backend, 'removed bitmap, object gone');
    ok(
        !eval {
            PVE::BackupAccess->recover($backend->options, log => sub { });
            1;
        },
        'recover refuses it, too'
    );
    survived($backend, 'removed bitmap, recovery');
    return;
}

subtest '4. the bitmap is removed during the access' => sub { remove_bitmap(undef) };
subtest '4. the background bitmap is removed' => sub {
    remove_bitmap('backup-access-background-bitmap');
};

# The hold keeps the disk's node; without one, as with other programs, QEMU would crash.
sub unplug ($backend, $is_held) {
    my $access = $backend->access;
    $access->setup($backend->devices('none'));
    $access->volumes('nbd');
    my @holds = grep { m/\Apba-hold-/ }
        map { $_->{'node-name'} } $backend->vm->qmp('query-named-block-nodes')->@*;
    is(scalar(@holds), 2, 'each disk has a hold');
    $backend->vm->qmp('blockdev-del', 'node-name' => $_) for $is_held ? () : @holds;
    $backend->vm->qmp('device_del', id => 'disk1-dev');
    $backend->vm->wait_event('DEVICE_DELETED');
    sent($backend);
    return $access;
}

subtest '4. the disk is unplugged during the access' => sub {
    my $backend = start(guest => 1);
    my $access = unplug($backend, 1);
    ok(eval { $access->teardown(1); 1 }, 'teardown ends it') or diag($@);
    ok(
        !(
            grep { m/\Apba-/ }
            map { $_->{'node-name'} } $backend->vm->qmp('query-named-block-nodes')->@*
        ),
        'nothing is left'
    );
    survived($backend, 'unplugged disk');
};

subtest '4. the disk is unplugged, and nothing holds its node' => sub {
    my $backend = start(guest => 1);
    my $access = unplug($backend, 0);
    ok(!eval { $access->teardown(1); 1 }, 'teardown without the disk is refused');
    like("$@", qr/\Adevice disk1: .*the guest device or its node was removed/,
        'the error says why');
    ok(!(grep { $_ eq 'backup-access-teardown' } sent($backend)), 'the command was not sent');
    survived($backend, 'unplugged disk');
    local $SIG{__WARN__} = sub { };
    undef $access;
};

subtest '5. target ids that QEMU cannot tear down' => sub {
    my $backend = start();
    sent($backend);
    for my $id ('Proxmox', 'Proxmox VE', '') {
        ok(!eval { $backend->access('target-id' => $id); 1 }, "'$id' is refused");
        like("$@", qr/\Atarget-id '\Q$id\E' /, "'$id': the message names it");
    }
    ok(!eval { $backend->access('target-id' => 'x' x 1024); 1 }, '1024 bytes are refused');
    is_deeply([sent($backend)], [], 'nothing was sent');
    survived($backend, 'target ids');
};

subtest 'an access of another client is up' => sub {
    my $backend = start();
    my $first = $backend->access;
    $first->setup($backend->devices('use'));
    $first->volumes('nbd');
    for my $id ('snapshot-access:test', 'another') {
        my $second = $backend->access('target-id' => $id, 'run-dir' => $backend->work_dir('run2'));
        ok(!eval { $second->setup($backend->devices('use')); 1 }, "target $id: refused");
        like("$@", qr/previous backup .* not finished/, "target $id: says why");
    }
    my ($offset, $length) = $first->volume('disk0')->next_dirty_region;
    is($length, 16 * 1024 * 1024, 'the first access works on');
    $first->teardown(1);
    survived($backend, 'two clients');
};

# The access of another program for the same target, made only by QEMU's commands: its exports have other names.
sub foreign_access ($backend) {
    my $qmp = $QMP->new(path => $backend->qmp_path);
    my %devices = (
        devices => [
            map {
                { $_->%* }
            } $backend->devices('use', 'disk0')->@*
        ]
    );
    my ($info)
        = $qmp->execute('backup-access-setup', 'target-id' => 'snapshot-access:test', %devices)->@*;
    my %address = (type => 'unix', data => { path => $backend->work_dir('foreign') . '/nbd' });
    eval { $qmp->execute('nbd-server-start', addr => \%address) }; # unless the server of our setup runs
    $qmp->execute(
        'block-export-add',
        id => 'foreign',
        type => 'nbd',
        'node-name' => $info->{'node-name'},
        bitmaps => [{ node => $info->{'bitmap-node-name'}, name => $info->{'bitmap-name'} }],
    );
    $qmp->close;
    return;
}

sub end_foreign_access ($backend) {
    my $qmp = $QMP->new(path => $backend->qmp_path);
    $qmp->execute('block-export-del', id => 'foreign', mode => 'hard');
    $qmp->execute('nbd-server-stop');
    $qmp->execute('backup-access-teardown', 'target-id' => 'snapshot-access:test', success => $_)
        for JSON::PP::false;
    $qmp->close;
    return;
}

# The other program acts at once, or right before the command.
sub meet_foreign ($backend, $words, $when) {
    my $arrive = sub { foreign_access($backend) };
    $arrive->() if $when eq 'before setup';
    my $access = $backend->access(
        log => sub { },
        qmp => sub ($command, $arguments) {
            my $is_setup = $command eq 'backup-access-setup';
            $arrive->() if $is_setup && $when eq 'during setup';
            my $qmp = $QMP->new(path => $backend->qmp_path);
            my $value = eval { $qmp->execute($command, $arguments->%*) };
            my $error = $@;
            $qmp->close;
            return $value if !$error;
            die(($is_setup ? $words : undef) // $error, "\n");
        },
    );
    ok(!eval { $access->setup($backend->devices('use')); 1 }, 'refused');
    local $SIG{__WARN__} = sub { };
    undef $access;
    return;
}

subtest 'an access of another program is active, with any message of QEMU' => sub {
    for my $when ('before setup', 'during setup') {
        for my $words ('previous backup not finished', 'das geht nicht') {
            my $backend = start();
            meet_foreign($backend, $words, $when);
            survived($backend, "$when, '$words'") or next;
            is(scalar($backend->vm->exports->@*),
                1, "$when, '$words': the other program's export stays");
            ok(
                (grep { $_->{background} } $backend->status->{bitmaps}->@*),
                "$when, '$words': the other program's access stays"
            );
            end_foreign_access($backend);
        }
    }
};

done_testing;
