# The VM is restarted while A has an access, and B begins one: another process, or another object of the same
# process. After any step of A and B, A's later calls are refused and change nothing in QEMU, and B's bitmap
# contains what it must (I2, I7).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::QMP;
use PBA::Test::QMPProxy;
use PBA::Test::Share qw(share);

my $Client = 'PBA::Test::Client';
my $size = 16 * 1024 * 1024;

# The granularity of a bitmap.
my %grain = (upstream => 65536, pve => 4 << 20);
my $json = JSON::PP->new->canonical;

sub start_backend ($name, @ids) {
    return PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => [map { { id => $_, size => $size, format => 'qcow2' } } 'disk0', @ids],
    );
}

# All proxies have one path, so they are one VM, also for an object whose connection was lost.
sub proxy ($backend, @fault) {
    return PBA::Test::QMPProxy->start(
        target => $backend->qmp_path,
        listen => $backend->vm->dir . '/proxy.qmp',
        @fault,
    );
}

sub new_access ($backend, @more) {
    return $backend->access(
        qmp => $backend->vm->dir . '/proxy.qmp',
        log => sub { },
        @more
    );
}

# ---- the steps of A and of B ----

my @a_steps = qw(setup volumes copy half);
my @b_steps = qw(nothing setup volumes failure success killed);

sub go_to ($access, $backend, $last) {
    $access->setup($backend->devices('use'));
    return if $last eq 'setup';
    my $volume = $access->volume('disk0');
    return if $last eq 'volumes';
    while (my ($offset, $length) = $volume->next_dirty_region) {
        $volume->pread($offset, $length) if $length <= 1 << 20;
    }
    $volume->close;
    return;
}

sub take_a_steps ($backend, $last) {
    my $access = new_access($backend);
    my %proxy = (proxy => proxy($backend));
    go_to($access, $backend, $last);
    return ($access, %proxy) if $last ne 'half';
    (delete($proxy{proxy}))->stop;
    $proxy{proxy} = proxy($backend, fault => 'drop', at => 3);
    ok(!eval { $access->teardown(1); 1 }, 'the monitor is lost in the middle of A\'s teardown');
    $proxy{proxy}->stop;
    return ($access, proxy => proxy($backend));
}

sub take_b_steps ($backend, $last, $tell) {
    return if $last eq 'nothing';
    my $access = new_access($backend);
    $access->setup($backend->devices('use'));
    $access->volumes('nbd') if $last ne 'setup';
    $access->teardown($last eq 'success') if $last eq 'success' || $last eq 'failure';
    $tell->('up');
    $access->teardown(1) if $access->_is_up;
    return;
}

my %acts = (
    volumes => sub ($access) { $access->volumes('nbd') },
    'file handles' => sub ($access) { $access->volumes('file-handle') },
    'teardown(1)' => sub ($access) { $access->teardown(1) },
    'teardown(0)' => sub ($access) { $access->teardown(0) },
);

# Ignores A's directory, which may be removed, but nothing else.
sub state_of ($backend) {
    my $vm = $backend->vm;
    return $json->encode([$vm->graph, $vm->exports, $vm->bitmaps]);
}

# A's calls, up to the end of its object.
sub act ($backend, $held, $act) {
    my $access = delete($held->{access}) // return;
    my $before = state_of($backend);
    if ($acts{$act}) {
        ok(!eval { $acts{$act}->($access); 1 }, "A's $act: refused");
        is(ref($@) && $@->class, 'StateError', "A's $act: class") or diag($@);
        like("$@", qr/no longer exists in QEMU/, "A's $act: the error says why");
    }
    my @warnings;
    local $SIG{__WARN__} = sub ($text) { push(@warnings, $text) };
    undef $access;
    is(state_of($backend), $before, "A's $act: nothing was touched");
    return;
}

sub check_end ($backend, $outside, $b_step) {
    is_deeply($backend->outside, $outside, 'nothing is left');
    my ($bitmap) = $backend->target_bitmaps;
    return is($bitmap, undef, 'no bitmap') if $b_step eq 'nothing';
    my $all = $b_step eq 'failure' || $b_step eq 'killed';
    is(
        $bitmap->{count},
        $all ? $size : $grain{ $backend->name },
        'B\'s bitmap has what was written since its instant'
    );
    is($bitmap->{recording}, 1, "B's bitmap records");
    return;
}

# ---- pairs ----

sub pair ($backend, $a_step, $b_step, $act, $elsewhere) {
    my $outside = $backend->outside;
    my ($a_access, %keep) = take_a_steps($backend, $a_step);
    my %held = (access => $a_access);
    undef $a_access;
    $keep{proxy}->stop;
    $backend->restart;
    $keep{proxy} = proxy($backend);
    my $write = sub { $backend->vm->qemu_io('disk0', "write -P 7 2M 64k") };
    my $b_goes = sub ($tell) { take_b_steps($backend, $b_step, $tell) };

    if (!$elsewhere) {
        $b_goes->(sub ($word) { $write->(); act($backend, \%held, $act) });
        act($backend, \%held, $act);
    }
    else {
        my $client = $Client->start($b_goes);
        is($client->next_word, $b_step eq 'nothing' ? undef : 'up', 'B is as far');
        $write->();
        $client->kill9 if $b_step eq 'killed';
        act($backend, \%held, $act);
        $client->let_go_on;
        is($client->next_word, undef, 'B continues to its end') if $b_step ne 'killed';
        $client->wait_end;
    }
    if ($b_step eq 'killed') {
        PVE::BackupAccess->recover($backend->options(qmp => $keep{proxy}->socket_path),
            log => sub { });
    }
    check_end($backend, $outside, $b_step);
    return;
}

# Pairs with one call each, such that all calls are included; PBA_FULL=1 combines all pairs with all calls.
sub sweep ($name) {
    my $backend = start_backend($name);
    my @acts = (sort(keys(%acts)), 'DESTROY');
    shift(@acts) if !-w '/dev/fuse';
    my $number = 0;
    my @pairs = map {
        my $a_step = $_;
        map { [$a_step, $_] } @b_steps
    } @a_steps;
    for my $pair (share(@pairs)) {
        my ($a_step, $b_step) = $pair->@*;
        for my $turn ($ENV{PBA_FULL} ? 0 .. 2 * $#acts + 1 : $number++) {
            my $act = $acts[$turn % @acts];
            my $elsewhere = $b_step eq 'killed' || ($turn / 2) % 2;
            next if $a_step ne 'setup' && $act =~ m/volumes|file/;    # it was exported before
            my $where = $elsewhere ? 'another process' : 'this process';
            subtest "A: $a_step, B: $b_step, in $where, $act" =>
                sub { pair($backend, $a_step, $b_step, $act, $elsewhere) };
        }
    }
    $backend->check_manners;
    return;
}

# ---- between two commands ----

# A reaches QEMU through a code ref, with a connection for each command. Right before the command, the VM is
# restarted, and B begins. Both use the same node names.
sub late_command ($name, $command) {
    my $backend = start_backend($name);
    my ($b_access, $before);
    my $is_late = 0;
    my $asks = sub ($asked, $arguments) {
        if ($is_late && !$b_access && $asked eq $command) {
            $backend->restart;
            $b_access = new_access($backend, qmp => $backend->qmp_path);
            $b_access->setup($backend->devices('use'));
            $b_access->volumes('nbd') if $command eq 'blockdev-del';
            $before = state_of($backend);
        }
        return PBA::Test::QMP->once($backend->qmp_path, $asked, $arguments);
    };
    my $access = new_access($backend, qmp => $asks);
    $access->setup($backend->devices('use'));
    $is_late = 1;
    ok(!eval { $access->teardown(1); 1 }, "A is late before $command: refused");
    local $SIG{__WARN__} = sub { };
    undef $access;
    is(state_of($backend), $before, "B's access was not touched");
    ok(eval { $b_access->teardown(1); 1 }, 'B comes to its end') or diag($@);
    return;
}

# ---- recovery, and another process at the same time ----

# A process is killed while its exports exist. Recovery removes the exports of any process; between two of its
# commands, the VM is restarted, and B begins. Each disk has an export.
sub recover_late ($name) {
    my $backend = start_backend($name, 'disk1');
    my $client = $Client->start(
        sub ($tell) {
            my $access = new_access($backend, qmp => $backend->qmp_path);
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            $tell->('up');
        }
    );
    is($client->next_word, 'up', 'an access is up');
    $client->kill9;

    my ($b_access, $before);
    my $asks = sub ($command, $arguments) {
        my $value = PBA::Test::QMP->once($backend->qmp_path, $command, $arguments);
        return $value if $command ne 'block-export-del' || $b_access;
        $backend->restart;
        $b_access = new_access($backend, qmp => $backend->qmp_path);
        $b_access->setup($backend->devices('use'));
        $b_access->volumes('nbd');
        $before = state_of($backend);
        return $value;
    };
    ok(
        !eval {
            PVE::BackupAccess->recover($backend->options(qmp => $asks), log => sub { });
            1;
        },
        'recover: refused'
    );
    like("$@", qr/no longer exists in QEMU/, 'the error says why');
    is(state_of($backend), $before, 'nothing of B was touched');
    ok(eval { $b_access->teardown(1); 1 }, 'B comes to its end') or diag($@);
    return;
}

# ---- the marker is deleted by hand ----

sub delete_mark ($backend) {
    for my $node ($backend->vm->qmp('query-named-block-nodes', flat => JSON::PP::true)->@*) {
        next if $node->{'node-name'} !~ m/\Apba-owner-/;
        $backend->vm->qmp('blockdev-del', 'node-name' => $node->{'node-name'});
    }
    return;
}

# While A lives, its directory is not removed, because it could belong to another guest with the same name and
# UUID.
sub others_before_it_ends ($backend, $pid) {
    my $next = eval {
        $backend->next_dirty(log => sub { });
    };
    is($next, undef, 'the next setup while A lives: refused');
    like("$@", qr/already running.*process $pid, whose marker was deleted/, 'the error says why')
        if !$next;
    return;
}

# The process of A: its step, its calls after the marker is gone, and its end.
sub without_mark ($backend, $a_step, $act, $tell) {
    local $SIG{__WARN__} = sub { };
    my $access = $backend->access(log => sub { });
    go_to($access, $backend, $a_step);
    $tell->('up');
    eval { $acts{$act}->($access) } if $acts{$act};
    $tell->('error: ' . "$@" =~ s/\n//gr) if $acts{$act};
    undef $access;
    $tell->('ended');
    return;
}

sub mark_deleted ($backend, $a_step, $act) {
    my $outside = $backend->outside;
    $backend->vm->qemu_io('disk0', 'write -P 7 2M 64k');
    my $client
        = $Client->start(sub ($tell) { without_mark($backend, $a_step, $act, $tell) });
    is($client->next_word, 'up', 'A is as far');
    delete_mark($backend);
    $backend->vm->qemu_io('disk0', 'write -P 7 9M 64k');
    others_before_it_ends($backend, $client->pid) if $act eq 'lives';
    if ($act eq 'killed' || $act eq 'lives') { $client->kill9 }
    else {
        $client->let_go_on;
        like($client->next_word, qr/no longer exists in QEMU/, "A's $act: refused") if $acts{$act};
        $client->let_go_on if $acts{$act};
        is($client->next_word, 'ended', 'A continues to its end');
        $client->let_go_on;
    }

    # By recover, or by the next setup.
    PVE::BackupAccess->recover($backend->options(log => sub { })) if $a_step ne 'volumes';
    my $next = eval {
        $backend->next_dirty(log => sub { });
    } or diag($@);
    ok($next, 'the next backup is made');
    my $dirty = ($next // {})->{disk0};
    ok(!$dirty || ($dirty->{ 2 << 20 } && $dirty->{ 9 << 20 }), 'the backup lacks nothing');
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

sub marks_deleted ($name) {
    my $backend = start_backend($name);
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    my @ends = ('teardown(1)', 'DESTROY', 'killed', 'lives');
    my @cells = map {
        my $a_step = $_;
        map { [$a_step, $_] } @ends
    } qw(setup volumes copy);
    for my $cell (share(@cells)) {
        my ($a_step, $act) = $cell->@*;
        subtest "A: $a_step, $act" => sub { mark_deleted($backend, $a_step, $act) };
    }
    $backend->check_manners;
    return;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { sweep($name) };
    subtest "backend $name, the marker is deleted" => sub { marks_deleted($name) };
    subtest "backend $name, recovery" => sub { recover_late($name) };
    next if $name eq 'pve';    # its only command contains nothing but the target
    for my $command (qw(blockdev-del blockdev-reopen transaction)) {
        subtest "backend $name, late $command" => sub { late_command($name, $command) };
    }
}

done_testing;
