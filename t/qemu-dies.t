# Events during a backup: the VM is killed, quits, is migrated or reset, its disk is unplugged or resized,
# another program uses its monitor; before setup, before the volumes, during the copy and before teardown. The
# backup continues if that is possible; otherwise, there is a clear error within the time limit, and no socket,
# mount, process or descriptor is left behind (I5, I6).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use IO::Socket::UNIX;
use List::Util qw(shuffle);
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::Backend;
use PBA::Test::Handle;

my $Handle = 'PBA::Test::Handle';

my $mib = 1024 * 1024;
my $size = 8 * $mib;
my $block = 65536;

# Time limits in seconds: of a QMP command, and of a whole step.
my $timeout = 2;
my $limit = 30;

my @phases = qw(setup volumes copy teardown);
my $has_fuse = -w '/dev/fuse';

# ---- what happens ----

# Returns code that ends this.
sub hold_monitor ($backend, $phase) {
    my $socket = IO::Socket::UNIX->new(Peer => $backend->qmp_path) or die "monitor: $!\n";
    sysread($socket, my $greeting, 4096);
    return sub { close($socket) };
}

sub migrate ($backend, $phase) {
    my $vm = $backend->vm;
    $vm->qmp('migrate', uri => 'exec:cat >/dev/null');
    for (1 .. 600) {
        return if ($vm->qmp('query-migrate')->{status} // '') =~ m/\A(?:completed|failed)\z/;
        select(undef, undef, undef, 0.1);
    }
    die "the migration does not end\n";
}

# The guest must cooperate.
sub unplug ($backend, $phase) {
    my $vm = $backend->vm;
    $vm->qmp('device_del', id => 'disk0-dev');
    $vm->wait_event('DEVICE_DELETED', timeout => 120);
}

sub reset_guest ($backend, $phase) {
    my $vm = $backend->vm;
    $vm->qmp('set-action', reboot => 'reset');
    $vm->qmp('system_reset');
    $vm->guest->wait_ready(180);
}

# Only possible before an access: a stock QEMU refuses it during one.
sub resize ($backend, $phase) {
    my $reply = $backend->vm->qmp_try('block_resize', 'node-name' => 'disk0', size => 2 * $size);
    is(!$reply->{error}, $phase eq 'setup', 'QEMU refuses it during an access only')
        if $backend->name eq 'upstream';
    return undef;
}

my @handed_over = (StateError => qr/the guest was migrated .*'postmigrate'/);

my $gone = qr/\A(?:ConnectionError|NbdError|SystemError|IncompleteError)\z/;

# The effect of each event on an access, by the phase before which it happens. Without an error, everything
# continues and succeeds.
my %events = (
    killed => { happens => sub ($backend, $phase) { $backend->vm->kill9; undef }, dies => 1 },
    quits => { happens => sub ($backend, $phase) { $backend->vm->quit; undef }, dies => 1 },
    migrated => {
        happens => \&migrate,

        # While nothing is exported, Proxmox' QEMU allows it.
        error => {
            setup => \@handed_over,
            PBA::Test::VM->is_proxmox ? (volumes => \@handed_over) : (),
        },
    },
    reset => { happens => \&reset_guest, guest => 1 },
    unplugged => {
        happens => \&unplug,
        guest => 1,
        error => {
            upstream =>
                { setup => [ArgumentError => qr/\Adevice disk0: there is no such block device/] },
            pve => {},
        },
    },
    resized => {
        happens => \&resize,
        error => {
            upstream => {},
            pve => { setup => [ArgumentError => qr/must have exactly the size of the device/] },
        },
    },
    'monitor held' => {
        happens => \&hold_monitor,
        error => {
            map { $_ => [TimeoutError => qr/qmp command .* failed - .*does another client hold/] }
                @phases
        },
    },
);

# The first expected error, and the step at which it occurs.
sub expected_error ($event, $name, $phase) {
    my $errors = $events{$event}{error} // return;
    return ($errors->{$name} // $errors)->{$phase};
}

# ---- a backup in steps ----

sub open_reader ($context) {
    my $volume = $context->{volumes}{disk0};
    return $Handle->new($volume, $mib) if $context->{mechanism} eq 'file-handle';
    return PVE::BackupAccess::Volume->open('disk0', $volume);
}

sub read_all ($context) {
    my $reader = $context->{reader};
    while (my ($offset, $length) = $reader->next_dirty_region) {
        for (my $at = $offset; $at < $offset + $length; $at += $block) {
            $reader->pread($at, $block);
        }
    }
}

my %steps = (
    setup => sub ($context) {
        $context->{access}->setup($context->{backend}->devices('use'));
    },
    volumes => sub ($context) {
        $context->{volumes} = $context->{access}->volumes($context->{mechanism});
        $context->{reader} = open_reader($context);
    },
    copy => \&read_all,
    teardown => sub ($context) {
        delete($context->@{qw(reader volumes)});
        $context->{access}->teardown(1);
    },
);

# Executes the steps until one dies; returns this step and its exception.
sub run_steps ($context, $phase) {
    my $happened = 0;
    for my $step (@phases) {
        if ($step eq $phase) {
            $context->{end_event}
                = $events{ $context->{event} }{happens}->($context->{backend}, $phase);
            $happened = 1;
        }
        my $began = time;
        my $done = eval { $steps{$step}->($context); 1 };
        my $error = $@;
        cmp_ok(time - $began, '<', $limit, "$step ends in time") if $happened;
        return ($step, $error) if !$done;
    }
    return;
}

# ---- the state afterwards ----

sub descriptors () { return scalar(() = glob('/proc/self/fd/*')) }

sub check_local ($context, $descriptors) {
    my $backend = $context->{backend};
    my $dir = $backend->work_dir('run');
    is_deeply([$backend->left_files], [], 'no file is left');
    is_deeply([$Handle->servers($dir)], [], 'no server is left');
    is_deeply([$Handle->mounts($dir)], [], 'no mount is left');
    is(descriptors(), $descriptors, 'no descriptor is left');
}

# QEMU has ended, and a new one runs with the same disk: nothing that cannot be trusted is used.
sub check_dead ($context, $step, $error) {
    my $backend = $context->{backend};
    ok(defined($step), 'there is an error') or return;
    ref($error)
        ? like($error->class, $gone, "$step: class")
        : like($error, qr/\Asysread: /, "$step: a reader's own error");
    if ($step ne 'setup' && $step ne 'teardown') {
        ok(!eval { $context->{access}->teardown(0); 1 }, 'teardown reports the lost QEMU, too');
        is($@->class, 'ConnectionError', 'teardown: class');
    }
    $backend->restart;
    my $access = $backend->access;
    my $info = $access->setup($backend->devices('use'))->[0];
    is($info->{'bitmap-action'}, 'missing-recreated', 'the next backup is full and says why');
    $access->teardown(1);
}

sub check_error ($step, $error, $expected) {
    my ($class, $pattern) = $expected->@*;
    is(ref($error) && $error->class, $class, "$step: class") or diag($error);
    like("$error", $pattern, "$step: the message");
}

# The access can still be ended.
sub check_end ($context) {
    my $backend = $context->{backend};
    my $access = $context->{access};
    delete($context->@{qw(reader volumes)});
    my $ended = eval { $access->teardown(0); 1 };
    ok($ended || "$@" =~ m/no access is set up/, 'it can be ended') or diag($@);
    my $status = $backend->status;
    is($status->{access}, undef, 'no access is active');
    is_deeply($status->{'left-overs'}, [], 'nothing is left over');
}

sub check_cell ($name, $event, $phase, $mechanism) {
    my $what = $events{$event};
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [{ id => 'disk0', size => $size, format => 'qcow2' }],
        guest => $what->{guest} // 0,
    );
    my $base = $backend->access;
    $base->setup($backend->devices('new'));
    $base->teardown(1);
    undef $base;
    $backend->vm->qemu_io('disk0', "write -P 0x41 0 $mib");

    local $SIG{__WARN__} = sub { };
    my $descriptors = descriptors();
    my $context = { backend => $backend, event => $event, mechanism => $mechanism };
    $context->{access} = $backend->access(timeout => $timeout);
    my ($step, $error) = run_steps($context, $phase);
    my $end_event = delete($context->{end_event});
    my $expected = expected_error($event, $name, $phase);
    if ($what->{dies}) {
        delete($context->@{qw(reader volumes)});
        check_dead($context, $step, $error);
    }
    else {
        my $met = $expected ? defined($step) : !defined($step);
        ok($met, $expected ? 'there is an error' : 'there is no error') or diag($error // '');
        $end_event->() if ref($end_event) eq 'CODE';
        check_error($step, $error, $expected) if $expected && $step;
        check_end($context);
    }
    delete($context->{access});
    check_local($context, $descriptors);
}

# ---- combinations ----

# Every event before every phase; if QEMU ends, with both mechanisms.
my @cells;
for my $name (PBA::Test::Backend->names) {
    for my $event (sort keys %events) {
        for my $phase (@phases) {
            push(@cells, [$name, $event, $phase, 'nbd']);
            push(@cells, [$name, $event, $phase, 'file-handle'])
                if $events{$event}{dies} && $has_fuse && $phase =~ m/\A(?:copy|teardown)\z/;
        }
    }
}

# A plain run includes a part, different ones on each QEMU; PBA_FULL=1 includes all.
my ($seed, $part) = (20261122 + !!$ENV{PBA_QEMU}, 8);
if (!$ENV{PBA_FULL}) {
    srand($seed);
    diag("$part of " . @cells . " cells, seed $seed");
    @cells = (shuffle(@cells))[0 .. $part - 1];
}
for my $cell (@cells) {
    my ($name, $event, $phase, $mechanism) = $cell->@*;
    subtest "backend $name, $mechanism: $event before $phase" => sub { check_cell($cell->@*) };
}

done_testing;
