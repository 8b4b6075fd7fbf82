# The module against monitors that are slow, odd, broken or not QEMU's: an error that says what is
# wrong, in time, with everything undone; and never a guess.

use v5.36;

use lib 't/lib';

use File::Temp ();
use IO::Socket::UNIX ();
use JSON::PP ();
use POSIX ();
use Scalar::Util qw(refaddr);
use Test::More;
use Time::HiRes qw(alarm sleep time);

use PBA::Test::QMPPeer;
use PBA::Test::Watchdog;
use PVE::BackupAccess;

my $json = JSON::PP->new->canonical->utf8->allow_nonref;
my $dir = File::Temp->newdir('pba-qmp-XXXXXXXX', TMPDIR => 1);
my $run_dir = "$dir/run";
my $target = 'snapshot-access:mystore';
my $size = 64 << 20;

# ---- a QEMU that says what a QEMU says ----

my @upstream_commands = qw(
    query-version query-commands query-status query-block query-named-block-nodes
    x-debug-query-block-graph query-block-exports query-iothreads query-name query-uuid query-jobs nbd-server-start
    nbd-server-stop block-export-add block-export-del blockdev-add blockdev-del blockdev-reopen
    blockdev-backup block-dirty-bitmap-add block-dirty-bitmap-merge block-dirty-bitmap-remove
    transaction qom-set qom-get job-dismiss
);

sub commands (@names) {
    return [map { { name => $_ } } @names];
}

sub schema ($form) {
    my @members = $form eq 'devlist' ? qw(target-id devlist bitmap-name) : qw(target-id devices);
    return [
        { name => 'backup-access-setup', 'meta-type' => 'command', 'arg-type' => '17' },
        { name => '17', 'meta-type' => 'object', members => [map { { name => $_ } } @members] },
        { name => 'stop', 'meta-type' => 'command', 'arg-type' => '0' },
    ];
}

sub version ($major, $minor, $micro = 2) {
    my $qemu = { major => $major, minor => $minor, micro => $micro };
    return { qemu => $qemu, package => 'scripted' };
}

sub device ($name, $node) {
    my $inserted = { 'node-name' => $node, ro => JSON::PP::false, drv => 'raw' };
    $inserted->{image} = { 'virtual-size' => $size };
    return { device => $name, qdev => $name =~ s/^drive-//r, inserted => $inserted };
}

sub node ($name, @bitmaps) {
    my $node = { 'node-name' => $name, drv => 'raw', image => { 'virtual-size' => $size } };
    $node->{'dirty-bitmaps'}
        = [map { { name => $_, recording => JSON::PP::true, granularity => 65536 } } @bitmaps];
    return $node;
}

# What QEMU's NBD server looks like from outside: something listens at its socket.
sub nbd_server () {
    my $listener;
    my $start = sub ($arguments) {
        my $path = $arguments->{addr}{data}{path};
        $listener = IO::Socket::UNIX->new(Local => $path, Listen => 64)
            or die "cannot listen at $path: $!\n";
        return {};
    };
    my $stop = sub (@) {
        unlink($listener->hostpath) if $listener;
        undef $listener;
        return {};
    };
    return ('nbd-server-start' => $start, 'nbd-server-stop' => $stop);
}

# What each command returns, unless a test says otherwise. A code ref gets the arguments.
sub pve_returns (%more) {
    return (
        'query-version' => version(10, 0),
        'query-commands' => commands(@upstream_commands, 'backup-access-setup'),
        'query-qmp-schema' => schema('devices'),
        'query-block' => [device('drive-scsi0', '#block1'), device('drive-scsi1', '#block2')],
        'query-named-block-nodes' => [
            node('#block1', $target),
            node('#block2', $target),
            map { node("drive-scsi$_-fleecing") } 0, 1
        ],
        'query-block-exports' => [],
        'query-status' => { status => 'running' },
        'query-name' => { name => 'vm' },
        'query-uuid' => { UUID => 'a-b-c' },
        'backup-access-setup' => \&setup_reply,
        nbd_server(),
        map({ $_ => {} }
            qw(
                block-export-add block-export-del backup-access-teardown block-dirty-bitmap-remove
                blockdev-add blockdev-del
            )),
        %more,
    );
}

my %action_of = (none => undef, new => 'new', use => 'used');

sub setup_reply ($arguments) {
    my @reply;
    for my $device ($arguments->{devices}->@*) {
        my ($number) = $device->{device} =~ m/(\d+)/;
        my $info = { device => $device->{device}, 'node-name' => "#snap$number", size => $size };
        my $action = $action_of{ $device->{'bitmap-mode'} };
        if (defined($action)) {
            $info->{'bitmap-action'} = $action;
            $info->{'bitmap-name'} = $target;
            $info->{'bitmap-node-name'} = '#block' . ($number + 1);
        }
        push @reply, $info;
    }
    return \@reply;
}

sub upstream_returns (%more) {
    my $graph = { nodes => [{ id => 1, type => 'block-driver', name => '#block1' }], edges => [] };
    return (
        pve_returns(),
        'query-version' => version(8, 0),
        'query-commands' => commands(@upstream_commands),
        'x-debug-query-block-graph' => $graph,
        'query-iothreads' => [],
        map({ $_ => {} } qw(qom-set block-dirty-bitmap-add)),
        %more,
    );
}

sub value_of ($value, $arguments) { return ref($value) eq 'CODE' ? $value->($arguments) : $value }

# A peer lives as long as its object; these outlive the access that a test makes of them.
my @peers;

# Values of a peer: a plain value is returned; { action => ... } is one of QMPPeer's.
sub start_peer ($returns, %options) {
    my $handler = sub ($command, $arguments, $n) {
        return undef if !exists($returns->{$command});
        my $value = value_of($returns->{$command}, $arguments);
        return $value->{action} if ref($value) eq 'HASH' && exists($value->{action});
        return { return => $value };
    };
    push @peers, PBA::Test::QMPPeer->start(handler => $handler, %options);
    shift(@peers) if @peers > 4;
    return $peers[-1];
}

sub action ($action) { return { action => $action } }

sub new_access ($qmp, %options) {
    return PVE::BackupAccess->new(
        qmp => ref($qmp) eq 'CODE' ? $qmp : $qmp->socket_path,
        'target-id' => $target,
        'run-dir' => $run_dir,
        timeout => 5,
        %options,
    );
}

my @one = ({ device => 'drive-scsi0', 'bitmap-mode' => 'use' });

sub error_class ($error) {
    local $@;
    return ref($error) && eval { $error->isa('PVE::BackupAccess::Error') }
        ? $error->class
        : "no object: $error";
}

# The code dies with an error of ours, of one line, and leaves nothing on disk.
sub dies ($code, $class, $pattern, $name) {
    my $done = eval { $code->(); 1 };
    my $error = $@;
    return fail("$name: dies") if $done;
    my $ok = like(error_class($error), $class, "$name: class");
    $ok &= like("$error", $pattern, "$name: message");
    $ok &= unlike("$error", qr/[[:cntrl:]](?!\z)/, "$name: one line");
    diag("$error") if !$ok;
    is_deeply([glob("$run_dir/*")], [], "$name: nothing is left on disk");
    return $error;
}

sub capabilities ($peer, %options) {
    return PVE::BackupAccess->capabilities(qmp => $peer->socket_path, timeout => 5, %options);
}

# ---- greetings and the ways of a connection ----

subtest 'greetings' => sub {
    for my $greeting (qw(oob plain slow)) {
        my $peer = start_peer({ pve_returns() }, greeting => $greeting);
        is_deeply(
            eval { capabilities($peer) },
            { backend => 'pve', form => 'devices', 'qemu-version' => '10.0.2' },
            "greeting $greeting"
        ) or diag($@);
        my ($handshake) = grep { $_->{execute} eq 'qmp_capabilities' } $peer->commands;
        is_deeply($handshake->{arguments}, {}, 'oob is not asked for');
    }
    my %bad = (
        garbage => [qr/ProtocolError/, qr/control character|does not speak QMP/],
        close => [qr/ConnectionError/, qr/closed the QMP connection/],
        endless => [qr/ProtocolError/, qr/over 67108864 bytes/],
    );
    for my $greeting (sort keys %bad) {
        my $peer = start_peer({ pve_returns() }, greeting => $greeting);
        dies(sub { capabilities($peer) }, $bad{$greeting}->@*, "greeting $greeting");
        is_deeply([$peer->commands], [], "greeting $greeting: nothing was sent");
    }
    my %raw = (
        'another object' => [{ raw => "{\"hello\": \"world\"}\r\n" }, qr/does not greet like QMP/],
        'QMP without an object' => [{ raw => "{\"QMP\": 5}\r\n" }, qr/does not greet like QMP/],
        'a reply' => [{ raw => "{\"return\": {}}\r\n" }, qr/does not greet like QMP/],
        'SSH' => [{ raw => "SSH-2.0-OpenSSH_9.2\r\n" }, qr/does not speak QMP/],
        'half a greeting' => [[{ raw => '{"QMP": {"ver' }, { close => 1 }], qr/closed/],
    );
    for my $name (sort keys %raw) {
        my ($greeting, $pattern) = $raw{$name}->@*;
        my $peer = start_peer({ pve_returns() }, greeting => $greeting);
        dies(sub { capabilities($peer) }, qr/(?:Protocol|Connection)Error/, $pattern, $name);
    }
    my $peer = start_peer(
        { pve_returns() },
        greeting => [
            { event => 'STOP' },
            { raw => "{\"QMP\": {\"capabilities\": []}}\r\n", trickle => 1 },
            { event => 'RESUME' }
        ]
    );
    is(eval { capabilities($peer)->{backend} }, 'pve', 'events around the greeting') or diag($@);
};

subtest 'no peer' => sub {
    my %paths = (
        'no socket' => "$dir/nothing",
        'no socket, but a file' => $0,
        'a directory' => "$dir",
        'a path that is too long' => "$dir/" . 'x' x 200,
    );
    for my $name (sort keys %paths) {
        dies(
            sub { PVE::BackupAccess->capabilities(qmp => $paths{$name}) },
            qr/(?:Connection|Argument)Error/,
            qr/\Q$paths{$name}\E/, $name
        );
    }

    # One that takes connections, but never says anything.
    my $peer = start_peer({}, greeting => { sleep => 20 });
    my $started = time;
    dies(sub { capabilities($peer, timeout => 1) }, qr/TimeoutError/, qr/greeting/, 'a mute one');
    cmp_ok(time - $started, '<', 3, 'within the limit');
};

subtest 'a busy monitor' => sub {
    my $peer = start_peer({ pve_returns() });
    my $other = IO::Socket::UNIX->new(Peer => $peer->socket_path) or die "cannot connect: $!\n";
    <$other>;
    dies(sub { capabilities($peer, timeout => 1) }, qr/TimeoutError/, qr/another client/, 'busy');
    close($other);
    is(eval { capabilities($peer)->{backend} }, 'pve', 'free again') or diag($@);
};

subtest 'the monitor is given back' => sub {
    my $peer = start_peer({ pve_returns() });
    my $access = new_access($peer);
    is($peer->connections, 0, 'new: no connection');
    my $connections = 0;
    my @steps = (
        setup => sub { $access->setup(\@one) },
        volumes => sub { $access->volumes('nbd') },
        'volumes again' => sub { $access->volumes('nbd'); $connections-- },
        teardown => sub { $access->teardown(1) },
    );
    while (my ($name, $code) = splice(@steps, 0, 2)) {
        ok(eval { $code->(); 1 }, $name) or diag($@);
        $connections++;
        $peer->wait_for_record('closed', $connections);
        is($peer->connections, $connections, "$name: one connection, and closed");
    }
    is_deeply([$peer->problems], [], 'all of it was QMP');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
};

# ---- replies ----

# What a peer may answer to any command, and what is to come of it.
my %hostile = (
    'silence' => [{ silent => 1 }, qr/TimeoutError/, qr/timeout/],
    'silence and events' => [
        [map { { event => 'RTC_CHANGE', sleep => 0.05 } } 1 .. 200], qr/TimeoutError/, qr/timeout/
    ],
    'the end' => [{ close => 1 }, qr/ConnectionError/, qr/closed the QMP connection/],
    'the end of QEMU' => [{ quit => 1 }, qr/ConnectionError/, qr/closed the QMP connection/],
    'half a reply' =>
        [[{ raw => '{"return": [' }, { close => 1 }], qr/ConnectionError/, qr/closed/],
    'garbage' => [{ garbage => 1 }, qr/ProtocolError/, qr/QMP/],
    'NUL' => [{ nul => 1 }, qr/ProtocolError/, qr/control character/],
    'an escaped NUL' => [{ raw => "{\"return\": \"\\u0000\"}\r\n" }, qr/ProtocolError/, qr/UTF-8/],
    'bad UTF-8' => [{ raw => "{\"return\": \"\xff\xfe\"}\r\n" }, qr/ProtocolError/, qr/UTF-8/],
    'deep nesting' => [{ depth => 100_000 }, qr/ProtocolError/, qr/nested/],
    'no JSON' => [{ raw => "{return: 1}\r\n" }, qr/ProtocolError/, qr/JSON/],
    'an array' => [{ raw => "[1]\r\n" }, qr/ProtocolError/, qr/does not speak QMP/],
    "another command's reply" => [{ return => [], wrong_id => 1 }, qr/ProtocolError/, qr/another/],
    'an id of another type' => [{ return => [], id => 1 }, qr/ProtocolError/, qr/another/],
    'no id' => [{ raw => "{\"return\": []}\r\n" }, qr/ProtocolError/, qr/another/],
    "another command's error" => [
        { error => { class => 'GenericError', desc => 'x' }, wrong_id => 1 }, qr/ProtocolError/,
        qr/another/
    ],
    'neither result nor error' => [{ id => 'pba-2' }, qr/ProtocolError/, qr/./],
    'a second greeting' => [{ raw => "{\"QMP\": {}}\r\n" }, qr/ProtocolError/, qr/./],
    'an error' => [
        { error => { class => 'DeviceNotFound', desc => "Device 'x' not found" } },
        qr/DeviceNotFound/, qr/ - Device 'x' not found$/
    ],
    'an error with directives' => [
        { error => { class => 'GenericError', desc => '100%: %s%s%n%n%d %5$s' } },
        qr/GenericError/, qr/ - 100%: %s%s%n%n%d %5\$s$/
    ],
    'an error of many lines' => [
        { error => { class => "A\nB", desc => "one\ntwo\r\n\e[31mthree\e[0m\n" } },
        qr/A B/, qr/ - one two\b.*three/
    ],
    'an error without text' => [{ error => {} }, qr/GenericError/, qr/without a description/],
    'an error of other types' =>
        [{ error => { class => 5, desc => [] } }, qr/GenericError/, qr/without a description/],
    'an error that is none' => [{ error => 5 }, qr/ProtocolError/, qr/./],
);

for my $name (sort keys %hostile) {
    subtest "the answer is $name" => sub {
        my ($action, $class, $pattern) = $hostile{$name}->@*;
        my $peer = start_peer({ pve_returns('query-version' => action($action)) });
        my $started = time;
        my $error
            = dies(sub { capabilities($peer, timeout => 1) }, $class, $pattern, 'query-version');
        cmp_ok(time - $started, '<', 3, 'within the limit');
        like("$error", qr/\Aqmp command 'query-version' failed - /, 'the command is named');
        is(eval { $error->command }, 'query-version', 'and known');
    };
}

# At each stage of setup, the same object can be used again.
my @stages = qw(
    query-version query-commands query-qmp-schema query-status query-block query-named-block-nodes
    query-block-exports backup-access-setup nbd-server-start
);

for my $stage (@stages) {
    subtest "setup: $stage" => sub {
        for my $name ('the end', 'silence', 'garbage', "another command's reply",
            'an error', 'half a reply')
        {
            my ($action, $class, $pattern) = $hostile{$name}->@*;
            my $hostile = 1;
            my %returns = pve_returns();
            my $good = $returns{$stage};
            $returns{$stage} = sub ($arguments) {
                return $hostile-- > 0 ? action($action) : value_of($good, $arguments);
            };
            my $peer = start_peer(\%returns);
            my $access = new_access($peer, timeout => 1);
            my $started = time;
            my $error = dies(sub { $access->setup(\@one) }, $class, $pattern, $name);
            cmp_ok(time - $started, '<', 4, "$name: in time");
            is(eval { $error->command }, $stage, "$name: the command");
            my @names = $peer->names;
            my $asked = grep { $_ eq 'backup-access-setup' } @names;
            my $undone = grep { $_ eq 'backup-access-teardown' } @names;
            is($undone, $asked, "$name: undone where there is something to undo") or diag("@names");
            my ($teardown) = grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
            is_deeply(
                $teardown->{arguments},
                { 'target-id' => $target, success => JSON::PP::false },
                "$name: as a failure"
            ) if $undone;
            ok(!eval { $access->teardown(1); 1 } && $@->class eq 'StateError', "$name: not up");
            ok(eval { $access->setup(\@one); 1 }, "$name: the next setup works") or diag($@);
            ok(eval { $access->teardown(1); 1 }, "$name: and its teardown") or diag($@);
            is_deeply([glob("$run_dir/*")], [], "$name: nothing is left on disk");
        }
    };
}

subtest 'somebody else is at it' => sub {
    my $error = { class => 'GenericError', desc => "previous backup for target 'x' not finished" };
    my $peer = start_peer({ pve_returns('backup-access-setup' => action({ error => $error })) });
    dies(sub { new_access($peer)->setup(\@one) }, qr/GenericError/, qr/not finished/, 'setup');
    ok(!(grep { $_ eq 'backup-access-teardown' } $peer->names), "the other's access is left alone");
};

# ---- big and small ----

sub peak_rss_kib () {
    open(my $fh, '<', '/proc/self/status') or die "cannot read the status: $!\n";
    my ($kib) = map { m/^VmHWM:\s+(\d+)/ ? $1 : () } <$fh>;
    return $kib;
}

sub reset_peak () {
    open(my $fh, '>', '/proc/self/clear_refs') or return;
    print {$fh} 5;
    close($fh);
    return;
}

subtest 'sizes' => sub {

    # A megabyte of nodes in QEMU's way, all of which have to be looked at.
    my @nodes = map { node("#node$_") } 1 .. 20_000;
    my %returns = pve_returns();
    my $big = [@nodes, $returns{'query-named-block-nodes'}->@*];
    my $peer = start_peer({ %returns, 'query-named-block-nodes' => $big });
    my $access = new_access($peer, timeout => 60);
    ok(eval { $access->setup(\@one); 1 }, '20,000 nodes') or diag($@);
    ok(eval { $access->teardown(1); 1 }, 'and again at teardown') or diag($@);

    # 20 MB in one line.
    $peer = start_peer({ %returns, 'nbd-server-start' => action({ bulk => 20_000_000 }) });
    $access = new_access($peer, timeout => 60);
    ok(eval { $access->setup(\@one); 1 }, '20 MB in one line') or diag($@);
    ok(eval { $access->teardown(1); 1 }, 'teardown') or diag($@);

    reset_peak();
    my $before = peak_rss_kib();
    $peer = start_peer({ %returns, 'query-block' => action({ endless => 1 << 30 }) });
    my $started = time;
    dies(
        sub { new_access($peer, timeout => 120)->setup(\@one) },
        qr/ProtocolError/,
        qr/over 67108864 bytes/,
        'a line without end'
    );
    cmp_ok(time - $started, '<', 60, 'in time');
    cmp_ok($peer->endless_bytes, '<', 80 << 20, 'no more was taken than that');
    my $grown = peak_rss_kib() - $before;
    cmp_ok($grown, '<', 200 * 1024, "memory is bounded ($grown KiB)");

    my %trickle = map { $_ => action({ return => $returns{$_}, trickle => 1 }) }
        qw(query-version query-qmp-schema query-block);
    $peer = start_peer({ %returns, %trickle });
    $access = new_access($peer);
    ok(eval { $access->setup(\@one); 1 }, 'one byte at a time') or diag($@);
    ok(eval { $access->teardown(1); 1 }, 'teardown') or diag($@);
};

subtest 'slow, but not too slow' => sub {
    my %returns = pve_returns();
    $returns{$_} = action({ sleep => 0.7, return => $returns{$_} })
        for qw(query-version query-block);
    my $access = new_access(start_peer(\%returns), timeout => 1);
    ok(eval { $access->setup(\@one); 1 }, 'the limit is per command') or diag($@);
    $access->teardown(0);
};

subtest 'events' => sub {
    my %returns = pve_returns();
    for my $command (keys %returns) {
        my $good = $returns{$command};
        $returns{$command} = sub ($arguments) {
            my $event
                = { event => 'BLOCK_WRITE_THRESHOLD', data => { return => [], id => 'pba-1' } };
            my $line = "{\n  \"event\": \"X\",\r\n  \"data\": {\"error\": {}}\n}\n\n";
            my $reply = { return => value_of($good, $arguments) };
            return action([$event, { raw => $line }, $event, $reply, $event]);
        };
    }
    my $peer = start_peer(\%returns);
    my $access = new_access($peer);
    is(eval { $access->setup(\@one)->[0]{'bitmap-action'} }, 'used', 'setup') or diag($@);
    is(eval { $access->volumes('nbd')->{'drive-scsi0'}{'bitmap-mode'} }, 'reuse', 'volumes')
        or diag($@);
    ok(eval { $access->teardown(1); 1 }, 'teardown') or diag($@);
};

# ---- replies that lack something ----

my @of_any_type = (undef, JSON::PP::true, 5, 1.5, 'text', [], {}, [5], [undef], [[]], ['text']);

# What cannot be read is an error that names the command or the device; and it may never crash.
sub setup_dies ($returns, $command, $name, %options) {
    my $peer = start_peer($returns);
    my $access = new_access($peer, timeout => 3);
    my $done = eval { $access->setup(\@one); 1 };
    my $error = $@;
    ok(!$done, "$name: dies");
    like(error_class($error), qr/\A(?:Protocol|Unsupported|Argument|Incomplete)Error\z/,
        "$name: class")
        or diag($error);
    my $named = $options{named} // qr/\Q$command\E|drive-scsi0|QEMU/;
    like("$error", $named, "$name: message");
    is_deeply([glob("$run_dir/*")], [], "$name: nothing is left on disk");
    return $peer;
}

for my $command (
    qw(query-version query-commands query-qmp-schema query-block
    query-named-block-nodes backup-access-setup)
    )
{
    subtest "odd replies to $command" => sub {
        for my $value (@of_any_type) {
            my $text = $json->encode($value);
            my $peer = setup_dies({ pve_returns($command => $value) }, $command, $text);
            next if $command ne 'backup-access-setup';
            is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, "$text: torn down");
        }
    };
}

subtest 'odd replies to x-debug-query-block-graph' => sub {
    for my $value (grep { ref($_) ne 'HASH' } @of_any_type) {
        my %returns = upstream_returns('x-debug-query-block-graph' => $value);
        setup_dies(\%returns, 'x-debug-query-block-graph', $json->encode($value));
    }
};

subtest 'odd replies to query-block-exports' => sub {
    for my $value (grep { ref($_) ne 'ARRAY' } @of_any_type) {
        my $odd = 0;
        my %returns = pve_returns(
            'block-export-add' => sub (@) { $odd = 1; return {} },
            'query-block-exports' => sub (@) { return $odd-- > 0 ? $value : [] },
        );
        my $peer = start_peer(\%returns);
        my $access = new_access($peer, timeout => 3);
        $access->setup(\@one);
        $access->volumes('nbd');
        my $text = $json->encode($value);
        my $done = eval { $access->teardown(1); 1 };
        ok(!$done, "$text: teardown dies");
        like("$@", qr/query-block-exports/, "$text: message");
        ok(!(grep { $_ eq 'backup-access-teardown' } $peer->names), "$text: QEMU is not crashed");
        ok(eval { $access->teardown(1); 1 }, "$text: a later one works") or diag($@);
        my ($last) = grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
        ok($last && !$last->{arguments}{success}, "$text: as a failure");
    }
};

# One member of a good reply left out, or of every other type.
sub spoiled ($value, $path, $change) {
    my $copy = $json->decode($json->encode($value));
    my $at = $copy;
    my @path = @$path;
    my $last = pop(@path);
    $at = ref($at) eq 'ARRAY' ? $at->[$_] : $at->{$_} for @path;
    $change->($at, $last);
    return $copy;
}

my %needed = (
    'query-version' => [['qemu'], map { ['qemu', $_] } qw(major minor micro)],
    'query-block' => [
        [0, 'inserted'],
        [0, 'inserted', 'node-name'],
        [0, 'inserted', 'image'],
        [0, 'inserted', 'image', 'virtual-size']
    ],
    'query-named-block-nodes' => [[2, 'node-name'], [2, 'image'], [2, 'image', 'virtual-size']],
    'query-qmp-schema' =>
        [[0, 'name'], [0, 'meta-type'], [0, 'arg-type'], [1, 'members'], [1, 'members', 1, 'name']],
    'backup-access-setup' =>
        [map { [0, $_] } qw(device node-name size bitmap-node-name bitmap-name)],
);

for my $command (sort keys %needed) {
    subtest "spoiled replies to $command" => sub {
        my %returns = pve_returns();
        my $good = value_of($returns{$command}, { devices => \@one });
        for my $path ($needed{$command}->@*) {
            my $name = join('.', @$path);
            my $missing = spoiled($good, $path, sub ($at, $key) { delete($at->{$key}) });
            setup_dies({ %returns, $command => $missing }, $command, "without $name");
            for my $value (undef, JSON::PP::false, -1, 1.5, [], {}) {
                my $odd = spoiled($good, $path, sub ($at, $key) { $at->{$key} = $value });
                my $what = "$name " . $json->encode($value);
                setup_dies({ %returns, $command => $odd }, $command, $what);
            }
        }
    };
}

subtest 'sizes that differ' => sub {
    my %returns = pve_returns();
    my $fleecing = spoiled(
        $returns{'query-named-block-nodes'},
        [2, 'image', 'virtual-size'],
        sub ($at, $key) { $at->{$key} = $size + 512 }
    );
    my $peer = setup_dies({ %returns, 'query-named-block-nodes' => $fleecing },
        'x', 'fleecing', named => qr/device drive-scsi0: .*67109376.*67108864/);
    ok(!(grep { $_ eq 'backup-access-setup' } $peer->names), 'setup was not tried');
    my $reply = spoiled(setup_reply({ devices => \@one }), [0, 'size'],
        sub ($at, $key) { $at->{$key} = 5 });
    $peer = setup_dies({ %returns, 'backup-access-setup' => $reply },
        'x', 'reply', named => qr/device drive-scsi0: .*67108864 to 5\b/);
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'torn down');
};

subtest 'unknown bitmap actions' => sub {
    for my $action ('', 'fresh', 'Used', 'used ', '%s%n', 'use', undef, 5, {}, [], JSON::PP::true) {
        my $reply = spoiled(
            setup_reply({ devices => \@one }),
            [0, 'bitmap-action'],
            sub ($at, $key) { $at->{$key} = $action }
        );
        my $name = $json->encode($action);
        my $peer = setup_dies({ pve_returns('backup-access-setup' => $reply) },
            'x', $name, named => qr/drive-scsi0: .*unknown bitmap action/);
        my ($teardown, @more) = map { $_->{arguments} }
            grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
        is_deeply(
            $teardown,
            { 'target-id' => $target, success => JSON::PP::false },
            "$name: torn down as a failure"
        );
        is(scalar(@more), 0, "$name: once");
    }
};

subtest 'strings that are no text' => sub {

    # Half of a surrogate pair: JSON can say it, UTF-8 cannot.
    my %returns = upstream_returns();
    my $block = $json->encode($returns{'query-block'}) =~ s/#block1/\\ud800x/r;
    my $nodes = $json->encode($returns{'query-named-block-nodes'}) =~ s/#block1/\\ud800x/r;
    my %text = ('query-block' => $block, 'query-named-block-nodes' => $nodes);
    my $peer = PBA::Test::QMPPeer->start(
        handler => sub ($name, $arguments, $n) {
            return { return => value_of($returns{$name}, $arguments) } if !$text{$name};
            return { raw => "{\"return\": $text{$name}, \"id\": \"pba-" . ($n + 1) . "\"}\r\n" };
        }
    );
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>', '/dev/null') or POSIX::_exit(126);
        my $access = new_access($peer, timeout => 3, 'fleecing-dir' => "$dir");
        my $done = eval { $access->setup(\@one); 1 };
        POSIX::_exit($done ? 1 : error_class($@) eq 'ProtocolError' ? 0 : 2);
    }
    waitpid($pid, 0);
    is($?, 0, 'an error of the protocol, no crash') or diag(join(' ', $peer->names));
};

# ---- QEMUs that will not do ----

subtest 'capabilities' => sub {
    my $ask = sub (%returns) { capabilities(start_peer(\%returns)) };
    is_deeply($ask->(upstream_returns('query-version' => version(7, 2, 22))),
        { backend => 'upstream', 'qemu-version' => '7.2.22' }, '7.2');
    is_deeply(
        $ask->(pve_returns('query-qmp-schema' => schema('devlist'))),
        { backend => 'pve', form => 'devlist', 'qemu-version' => '10.0.2' },
        'early form'
    );
    my @old = ([7, 1], [6, 2], [4, 0], [2, 12], [0, 15]);
    for my $old (@old) {
        my ($major, $minor) = @$old;
        my %returns = upstream_returns('query-version' => version($major, $minor, 50));
        dies(
            sub { $ask->(%returns) }, qr/UnsupportedError/,
            qr/$major\.$minor\.50.*\b7\.2\b/, "QEMU $major.$minor"
        );
        dies(sub { new_access(start_peer(\%returns))->setup(\@one) },
            qr/UnsupportedError/, qr/\b7\.2\b/, "setup on QEMU $major.$minor");
    }
    my @needed = qw(
        blockdev-reopen blockdev-backup block-export-add block-dirty-bitmap-merge
        x-debug-query-block-graph
    );
    for my $command (@needed) {
        my $commands = commands(grep { $_ ne $command } @upstream_commands);
        dies(sub { $ask->(upstream_returns('query-commands' => $commands)) },
            qr/UnsupportedError/, qr/\b$command\b/, "without $command");
    }
    dies(sub { $ask->(pve_returns('query-qmp-schema' => [])) },
        qr/UnsupportedError/, qr/backup-access-setup/, 'a form that is not in the schema');
    my $odd_form = schema('devices');
    $odd_form->[1]{members} = [{ name => 'target-id' }, { name => 'disks' }];
    dies(sub { $ask->(pve_returns('query-qmp-schema' => $odd_form)) },
        qr/UnsupportedError/, qr/backup-access-setup/, 'a form that is not known');
    my %lacks = pve_returns();
    delete $lacks{'query-qmp-schema'};
    dies(sub { $ask->(%lacks) }, qr/CommandNotFound/, qr/query-qmp-schema/, 'no schema');
};

subtest 'devices that will not do' => sub {
    my %returns = pve_returns();
    my $refused = sub ($name, $pattern, $devices, %more) {
        my $peer = start_peer({ %returns, %more });
        dies(sub { new_access($peer)->setup($devices) }, qr/ArgumentError/, $pattern, $name);
        ok(!(grep { m/setup|start|add/ } $peer->names), "$name: nothing was begun");
    };
    $refused->('unknown', qr/device drive-x: .*no such/, [{ device => 'drive-x' }]);
    my $empty = [{ device => 'drive-ide2', qdev => 'ide2', removable => JSON::PP::true }];
    $refused->(
        'no medium',
        qr/device drive-ide2: .*medium/,
        [{ device => 'drive-ide2' }],
        'query-block' => $empty
    );
    $refused->(
        'two names',
        qr/device #block1: .*twice/,
        [{ device => 'drive-scsi0' }, { device => '#block1' }]
    );
    $refused->('a qdev id', qr/device scsi0: .*'drive-scsi0'/, [{ device => 'scsi0' }]);
    my $no_fleecing
        = [grep { $_->{'node-name'} !~ m/0-fleecing/ } $returns{'query-named-block-nodes'}->@*];
    $refused->(
        'no fleecing',
        qr/device drive-scsi0: .*drive-scsi0-fleecing/,
        [{ device => 'drive-scsi0' }],
        'query-named-block-nodes' => $no_fleecing
    );
};

subtest 'what vanishes during the access' => sub {
    for my $case (['bitmap', qr/dirty bitmap/], ['node', qr/node/], ['device', qr/device/]) {
        my ($name, $pattern) = @$case;
        my ($gone, %returns) = (0, pve_returns());
        my $nodes = $returns{'query-named-block-nodes'};
        my %without = (
            bitmap => [node('#block1'), $nodes->@[1 .. 3]],
            node => [$nodes->@[1 .. 3]],
        );
        $returns{'query-named-block-nodes'} = sub (@) { return $gone && $without{$name} || $nodes };
        my $devices = $returns{'query-block'};
        $returns{'query-block'}
            = sub (@) { return $gone && $name eq 'device' ? [$devices->[1]] : $devices };
        my $calls = qmp_calls(\%returns);
        my $access = new_access($calls->{code});
        $access->setup(\@one);
        $gone = 1;
        my $done = eval { $access->teardown(1); 1 };
        ok(!$done, "$name: teardown dies");
        is(error_class($@), 'StateError', "$name: class");
        like("$@", qr/device drive-scsi0: .*$pattern/, "$name: message");
        ok(!(grep { $_ eq 'backup-access-teardown' } $calls->{names}->@*), "$name: no crash");
        $gone = 0;
        ok(eval { $access->teardown(0); 1 }, "$name: back again: torn down") or diag($@);
    }
};

# ---- a code ref for the monitor ----

sub qmp_calls ($returns) {
    my $calls = { names => [], arguments => [] };
    $calls->{code} = sub ($command, $arguments) {
        push $calls->{names}->@*, $command;
        push $calls->{arguments}->@*, $arguments;
        die "no such command\n" if !exists($returns->{$command});
        return value_of($returns->{$command}, $arguments);
    };
    return $calls;
}

sub arguments_of ($calls, $command) {
    my @found = grep { $calls->{names}[$_] eq $command } 0 .. $#{ $calls->{names} };
    return @found ? $calls->{arguments}[$found[0]] : undef;
}

subtest 'code ref: a whole access' => sub {
    my $calls = qmp_calls({ pve_returns() });
    my $access = new_access($calls->{code});
    my @devices = (@one, { device => 'drive-scsi1' });
    my $infos = $access->setup(\@devices);
    is_deeply(
        $infos,
        [
            {
                device => 'drive-scsi0',
                'node-name' => '#snap0',
                size => $size,
                'bitmap-action' => 'used',
                'bitmap-name' => $target,
                'bitmap-node-name' => '#block1'
            },
            { device => 'drive-scsi1', 'node-name' => '#snap1', size => $size },
        ],
        'what setup returns'
    );
    my $volumes = $access->volumes('nbd');
    is($volumes->{'drive-scsi0'}{'bitmap-mode'}, 'reuse', 'status of one');
    is($volumes->{'drive-scsi1'}{'bitmap-mode'}, 'none', 'and the other');
    like($volumes->{'drive-scsi0'}{'nbd-path'}, qr{\A\Q$run_dir\E/.+}, 'socket');
    $access->teardown(1);

    my $encode = sub ($command) { $json->encode(arguments_of($calls, $command)) };
    is($encode->('query-version'), '{}', 'no arguments');
    is($encode->('query-named-block-nodes'), '{"flat":true}', 'a boolean');
    is($encode->('backup-access-teardown'), "{\"success\":true,\"target-id\":\"$target\"}", 'two');
    is(
        $encode->('backup-access-setup'),
        '{"devices":[{"bitmap-mode":"use","device":"drive-scsi0"},'
            . '{"bitmap-mode":"none","device":"drive-scsi1"}],"target-id":"'
            . $target . '"}',
        'lists and strings'
    );
    like($encode->('block-export-add'), qr/"writable":true/, 'export');
    my $nested = arguments_of($calls, 'nbd-server-start');
    is($nested->{addr}{data}{path}, $volumes->{'drive-scsi0'}{'nbd-path'}, 'nested hashes');
    is(ref($nested), 'HASH', 'plain and not blessed');
};

subtest 'code ref: encoders' => sub {
    my $calls = qmp_calls({ upstream_returns() });
    my $access = new_access($calls->{code}, 'fleecing-dir' => "$dir");
    eval { $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'new' }]) };
    cmp_ok(scalar(grep { $_ eq 'blockdev-add' } $calls->{names}->@*), '>', 1, 'it came that far');
    my %encoders = ('JSON::PP' => ['JSON::PP'], 'JSON::PP, allow_blessed' => ['JSON::PP', 1]);
    for my $class (qw(JSON::XS Cpanel::JSON::XS JSON)) {
        $encoders{$class} = [$class] if eval "require $class; 1";    ## no critic (StringyEval)
    }
    for my $name (sort keys %encoders) {
        my ($class, $blessed) = $encoders{$name}->@*;
        my $encoder = $class->new->canonical->utf8;
        $encoder->allow_blessed->convert_blessed if $blessed;
        my $text = $encoder->encode($calls->{arguments});
        like($text, qr/"flat":true[,}]/, "$name: true");
        like($text, qr/"read-only":false[,}]/, "$name: false");
        like($text, qr/"granularity":65536[,}]/, "$name: an integer");
        like($text, qr/"size":$size[,}]/, "$name: a size");
        unlike($text, qr/"\d+"|JSON/, "$name: no numbers as text, no names of classes");
    }
    is_deeply([glob("$dir/*.raw")], [], 'no fleecing image is left');
};

subtest 'code ref: results' => sub {

    # Numbers as various decoders leave them, and booleans of all kinds.
    my @sizes = ($size, "$size" + 0, 0 + sprintf('%.0f', $size)); ## no critic (MismatchedOperators)
    my $printed = $size;
    my $text = "also used as text: $printed";
    push @sizes, $printed;
    for my $value (@sizes) {
        my $reply = spoiled(
            setup_reply({ devices => \@one }),
            [0, 'size'],
            sub ($at, $key) { $at->{$key} = $value }
        );
        my $access
            = new_access(qmp_calls({ pve_returns('backup-access-setup' => $reply) })->{code});
        is(eval { $access->setup(\@one)->[0]{size} }, $size, 'size') or diag($@);
        eval { $access->teardown(0) };
    }
    for my $true (JSON::PP::true, \1, 1 == 1, !!1) {
        my $block = [device('drive-scsi0', '#block1')];
        $block->[0]{inserted}{ro} = $true;
        my $access = new_access(qmp_calls({ pve_returns('query-block' => $block) })->{code});
        ok(eval { $access->setup(\@one); 1 }, 'a boolean') or diag($@);
        eval { $access->teardown(0) };
    }
    my $cyclic = [];
    $cyclic->[0] = $cyclic;
    my %odd = (
        'undef' => undef,
        'a text' => 'x',
        'a number' => 5,
        'a code ref' => sub { },
        'a ring' => $cyclic,
        'an object' => bless([], 'Foreign'),
        'a glob' => \*STDOUT,
        'a regex' => qr/x/,
        'inf' => 9**9**9,
        'bytes' => "\xff\xfe",
        'a NUL' => "a\0b",
        'no character' => chr(0xD800),
    );
    for my $name (sort keys %odd) {
        for my $value ($odd{$name}, [$odd{$name}], { qemu => $odd{$name} }) {
            my $calls = qmp_calls({ pve_returns('query-version' => sub (@) { $value }) });
            dies(sub { new_access($calls->{code})->setup(\@one) },
                qr/ProtocolError/, qr/query-version|QEMU/, "$name as a result");
        }
    }

    # Empty lists are what Perl code returns by mistake.
    my $empty = sub (@) { return };
    dies(sub { new_access($empty)->setup(\@one) }, qr/ProtocolError/, qr/query-version/, 'nothing');
    my $list = sub (@) { return (1, 2, 3) };
    dies(sub { new_access($list)->setup(\@one) }, qr/ProtocolError/, qr/query-version/, 'a list');
    my $bytes_id = [device('drive-scsi0', "#bl\xf6ck"), 5];
    my $nodes = [node("#bl\xf6ck", $target), node('drive-scsi0-fleecing')];
    my $calls = qmp_calls(
        {
            pve_returns(
                'query-block' => $bytes_id,
                'query-named-block-nodes' => $nodes
            )
        }
    );
    my $access = new_access($calls->{code});
    ok(eval { $access->setup([{ device => 'drive-scsi0' }]); 1 }, 'characters beyond ASCII')
        or diag($@);
    ok(eval { $access->teardown(0); 1 }, 'teardown') or diag($@);
};

subtest 'code ref: dying' => sub {
    my %deaths = (
        'mon_cmd' =>
            ["VM 100 qmp command 'x' failed - Device 'y' not found\n", qr/Device 'y' not found/],
        'no newline' => ['plain', qr/plain at \S+ line \d+/],
        'directives' => ["%s%n%n 100%\n", qr/%s%n%n 100%/],
        'wide characters' => ["\x{263a}\n", qr/\x{263a}/],
        'many lines' => ["one\ntwo\n", qr/one.*two/s],
    );
    for my $name (sort keys %deaths) {
        my ($death, $pattern) = $deaths{$name}->@*;
        for my $command (qw(query-version query-block backup-access-setup)) {
            my $calls = qmp_calls({ pve_returns($command => sub (@) { die $death }) });
            my $error = dies(sub { new_access($calls->{code})->setup(\@one) },
                qr/GenericError/, $pattern, "$name in $command");
            like("$error", qr/\Aqmp command '$command' failed - /, "$name: the command is named");
            is(eval { $error->command }, $command, "$name: and known");
            my $torn_down = grep { $_ eq 'backup-access-teardown' } $calls->{names}->@*;
            is($torn_down, $command eq 'backup-access-setup' ? 1 : 0, "$name: undone");
        }
    }

    # What is no text is not mon_cmd's, but a handler's or another module's: it goes on as it is.
    for my $object (bless({ text => 'as text' }, 'My::Error'), { code => 5 }, ['x']) {
        for my $command (qw(query-version backup-access-setup)) {
            my $calls = qmp_calls({ pve_returns($command => sub (@) { die $object }) });
            ok(!eval { new_access($calls->{code})->setup(\@one); 1 }, ref($object) . ': dies');
            is(ref($@) && refaddr($@), refaddr($object), ref($object) . ': with the object itself');
            my $torn_down = grep { $_ eq 'backup-access-teardown' } $calls->{names}->@*;
            is($torn_down, $command eq 'backup-access-setup' ? 1 : 0, 'undone');
            is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
        }
    }
    my $calls = qmp_calls({ pve_returns() });
    my $access = new_access($calls->{code});
    $access->setup(\@one);
    local $@ = 'kept';
    local $! = 5;
    $access->teardown(0);
    is($@, 'kept', '$@ is not touched by what goes well');
};

{

    package My::Error;
    use overload '""' => sub ($self, @) { $self->{text} }, fallback => 1;
}

subtest 'code ref: using the access within' => sub {
    my ($access, @inner);
    my %returns = pve_returns();
    my $code = sub ($command, $arguments) {
        if ($command eq 'query-block') {
            for my $use (sub { $access->setup(\@one) }, sub { $access->teardown(0) }) {
                push @inner, eval { $use->(); 1 } ? 'done' : error_class($@);
            }
        }
        return value_of($returns{$command}, $arguments);
    };

    # In a child, since what goes wrong here ends the process.
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>', '/dev/null') or POSIX::_exit(126);
        alarm(10);
        $access = new_access($code);
        my $done = eval { $access->setup(\@one); $access->teardown(1); 1 };
        POSIX::_exit(!$done ? 2 : grep({ $_ ne 'StateError' } @inner) ? 1 : 0);
    }
    waitpid($pid, 0);
    is($?, 0, 'is refused and does no harm');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
};

# ---- the early form ----

sub early_setup_reply ($actions, $arguments) {
    my @reply;
    for my $device (split(/,/, $arguments->{devlist})) {
        my ($number) = $device =~ m/(\d+)/;
        my $info = { device => $device, 'node-name' => "#snap$number", size => $size };
        if (defined(my $name = $arguments->{'bitmap-name'})) {
            $info->{'bitmap-name'} = $name;
            $info->{'bitmap-node-name'} = '#block' . ($number + 1);
            $info->{'bitmap-action'} = $actions->{$name} // 'new';
        }
        push @reply, $info;
    }
    return \@reply;
}

sub early_peer ($bitmaps, $actions = {}, %more) {
    my @bitmaps = @$bitmaps;
    my $nodes = sub (@) {
        my @disks = map { node("#block$_", @bitmaps) } 1, 2;
        return [@disks, map { node("drive-scsi$_-fleecing") } 0, 1];
    };
    my $setup = sub ($arguments) {
        push @bitmaps, $arguments->{'bitmap-name'} // ();
        return early_setup_reply($actions, $arguments);
    };
    return start_peer(
        {
            pve_returns(
                'query-qmp-schema' => schema('devlist'),
                'query-named-block-nodes' => $nodes,
                'backup-access-setup' => $setup,
                %more,
            )
        }
    );
}

sub setup_arguments ($peer) {
    my ($setup) = grep { $_->{execute} eq 'backup-access-setup' } $peer->commands;
    return $setup && $setup->{arguments};
}

subtest 'early form' => sub {
    my @both = map { { device => "drive-scsi$_", 'bitmap-mode' => 'use' } } 0, 1;

    my $peer = early_peer([$target], { $target => 'used' });
    my $access = new_access($peer);
    my $infos = $access->setup(\@both);
    is_deeply(
        setup_arguments($peer),
        { 'target-id' => $target, devlist => 'drive-scsi0,drive-scsi1', 'bitmap-name' => $target },
        'use: the same name again'
    );
    is_deeply([map { $_->{'bitmap-action'} } @$infos], ['used', 'used'], 'actions');
    $access->teardown(1);

    $peer = early_peer(['gen-2'], { 'gen-2' => 'used' });
    $access = new_access($peer, 'bitmap-name' => 'gen-2');
    is($access->setup(\@one)->[0]{'bitmap-name'}, 'gen-2', 'use: another name');
    is_deeply(
        setup_arguments($peer),
        { 'target-id' => $target, devlist => 'drive-scsi0', 'bitmap-name' => 'gen-2' },
        'its arguments'
    );
    $access->teardown(1);

    $peer = early_peer([$target, 'gen-3'], { 'gen-3' => 'new' });
    my @new = ({ device => 'drive-scsi0', 'bitmap-mode' => 'new' });
    dies(
        sub { new_access($peer)->setup(\@new) },
        qr/UnsupportedError/,
        qr/'\Q$target\E' exists/,
        'new: a name in use'
    );
    is(setup_arguments($peer), undef, 'nothing was begun');
    $peer = early_peer([$target, 'gen-4'], { 'gen-4' => 'new' });
    dies(
        sub { new_access($peer, 'bitmap-name' => 'gen-4')->setup(\@new) },
        qr/UnsupportedError/,
        qr/'gen-4' exists/,
        'new: another name in use'
    );
    $peer = early_peer([$target], {});
    $access = new_access($peer, 'bitmap-name' => 'gen-5');
    is(eval { $access->setup(\@new)->[0]{'bitmap-action'} }, 'new', 'new: a name not in use');
    is(setup_arguments($peer)->{'bitmap-name'}, 'gen-5', 'is sent');
    is(eval { $access->volumes('nbd')->{'drive-scsi0'}{'bitmap-name'} }, 'gen-5', 'and told');
    $access->teardown(0);

    $peer = early_peer([]);
    $access = new_access($peer);
    $infos = $access->setup([map { { device => "drive-scsi$_" } } 0, 1]);
    is_deeply(
        setup_arguments($peer),
        { 'target-id' => $target, devlist => 'drive-scsi0,drive-scsi1' },
        'none: no name'
    );
    ok(!exists($infos->[0]{'bitmap-name'}), 'and no bitmap');
    $access->teardown(1);

    $peer = early_peer([]);
    my @mixed = ($both[0], { device => 'drive-scsi1', 'bitmap-mode' => 'none' });
    dies(
        sub { new_access($peer)->setup(\@mixed) },
        qr/UnsupportedError/, qr/device drive-scsi1: .*one bitmap mode.*'none'.*'use'.*drive-scsi0/,
        'mixed modes'
    );
    is(setup_arguments($peer), undef, 'nothing was begun');

    for my $separator (',', ';', ':') {
        my $odd = "drive-scsi0${separator}x";
        my $block = [device($odd, '#block1')];
        my $nodes = [node('#block1', $target), node("$odd-fleecing")];
        $peer = early_peer([], {}, 'query-block' => $block, 'query-named-block-nodes' => $nodes);
        dies(
            sub { new_access($peer)->setup([{ device => $odd }]) },
            qr/UnsupportedError/,
            qr/device \Q$odd\E: .*list of devices/,
            "name with '$separator'"
        );
        is(setup_arguments($peer), undef, 'nothing was begun');
    }
};

# ---- signals ----

sub interrupted ($signal, $code, $name, $limit = 1.5) {
    my $exception = { signal => $signal };
    local $SIG{$signal} = sub { die $exception };
    my $main = $$;
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        sleep(0.4);
        kill($signal, $main);
        POSIX::_exit(0);
    }
    my $started = time;
    my $done = eval { $code->(); sleep(1); 1 };
    my $error = $@;
    my $took = time - $started;
    waitpid($pid, 0);
    ok(!$done, "$name: dies");
    is($error, $exception, "$name: with the handler's own exception");
    cmp_ok($took, '<', $limit, "$name: within a second") or diag("$took seconds");
    return;
}

subtest 'handlers that die' => sub {

    # Answers late once, then at once. The first query-block-exports is setup's.
    my $late = sub ($command, $seconds) {
        my %returns = pve_returns();
        my ($good, $left) = ($returns{$command}, $command eq 'query-block-exports' ? 2 : 1);
        $returns{$command} = sub ($arguments) {
            my $reply = { return => value_of($good, $arguments) };
            return action(--$left == 0 ? [{ sleep => $seconds }, $reply] : $reply);
        };
        return start_peer(\%returns);
    };
    for my $signal (qw(ALRM INT TERM)) {
        for my $command (qw(query-version query-block query-named-block-nodes)) {
            my $peer = $late->($command, 1.6);
            my $access = new_access($peer, timeout => 10);
            interrupted($signal, sub { $access->setup(\@one) }, "$signal in $command");
            is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
            ok(eval { $access->setup(\@one); 1 }, 'setup works afterwards') or diag($@);
            ok(eval { $access->teardown(1); 1 }, 'and teardown') or diag($@);
        }
    }
    my $mute = start_peer({}, greeting => { sleep => 3 });
    interrupted('ALRM', sub { capabilities($mute, timeout => 10) }, 'waiting for the greeting');

    # Setup was sent: it has to be undone, however long the monitor takes to come free.
    my $peer = $late->('backup-access-setup', 1.2);
    my $access = new_access($peer, timeout => 10);
    interrupted('INT', sub { $access->setup(\@one) }, 'INT in backup-access-setup', 3);
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'it was undone');

    # In volumes and teardown: the access is still up and can be torn down.
    for my $command (
        qw(block-export-add query-block-exports nbd-server-stop backup-access-teardown))
    {
        $peer = $late->($command, 1.6);
        $access = new_access($peer, timeout => 10);
        $access->setup(\@one);
        my $use = sub { $access->volumes('nbd'); $access->teardown(1) };
        interrupted('INT', $use, "INT in $command");
        ok(eval { $access->teardown(1); 1 }, 'teardown works afterwards') or diag($@);
        my @teardowns = grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
        cmp_ok(scalar(@teardowns), '>=', 1, 'and was sent');
        is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
    }
    {
        $peer = $late->('block-export-add', 1.6);
        $access = new_access($peer, timeout => 10);
        $access->setup(\@one);
        interrupted('INT', sub { $access->volumes('nbd') }, 'INT in block-export-add');
        my @warnings;
        local $SIG{__WARN__} = sub ($text) { push @warnings, $text };
        undef $access;
        like("@warnings", qr/not torn down/, 'destroyed: says so');
        is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'and tears down');
        is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
    }
};

subtest 'handlers that do not die' => sub {
    my $handled = 0;
    my %returns = pve_returns();
    for my $command (qw(query-version query-block nbd-server-start)) {
        my $good = $returns{$command};
        $returns{$command} = sub ($arguments) {
            return action({ sleep => 0.3, return => value_of($good, $arguments) });
        };
    }
    local $SIG{ALRM} = sub {
        eval { die "inner\n" };
        $handled++;
        Time::HiRes::ualarm(7_000);
    };
    my $access = new_access(start_peer(\%returns), timeout => 10);
    $@ = 'kept';
    Time::HiRes::ualarm(7_000);
    $access->setup(\@one);
    my $kept = $@;
    $access->volumes('nbd');
    $access->teardown(1);
    Time::HiRes::ualarm(0);
    cmp_ok($handled, '>', 3, "they ran ($handled times)");
    is($kept, 'kept', '$@ is left alone');
};

# ---- callbacks ----

# An undo that fails, too, is one of the things that are logged. The next one works.
sub logged_returns () {
    my $refusal = sub ($text) { action({ error => { class => 'GenericError', desc => $text } }) };
    my $refuse = 1;
    return pve_returns(
        'nbd-server-start' => $refusal->('NBD server already running %s%n'),
        'backup-access-teardown' =>
            sub (@) { return $refuse-- > 0 ? $refusal->("cannot\nundo %s%n") : {} },
    );
}

# What is left after a setup whose undo failed can be torn down; then nothing is left.
sub ends_well ($access, $peer) {
    ok(eval { $access->teardown(0); 1 } || error_class($@) eq 'StateError', 'no more is left')
        or diag($@);
    cmp_ok(scalar(grep { $_ eq 'backup-access-teardown' } $peer->names), '>=', 1, 'undone');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
    return;
}

subtest 'log' => sub {
    my @logged;
    my $peer = start_peer({ logged_returns() });
    my $access = new_access($peer, log => sub (@got) { push @logged, [@got] });
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies');
    like("$@", qr/already running %s%n/, 'with the first error');
    is((grep { $_->[0] eq 'warn' && $_->[1] =~ m/cannot undo %s%n/ } @logged), 1, 'it was told');
    ok(!(grep { $_->[1] =~ m/\n/ || @$_ != 2 } @logged), 'level and line');
    ends_well($access, $peer);

    @logged = ();
    local $SIG{__WARN__} = sub ($text) { push @logged, $text };
    $peer = start_peer({ logged_returns() });
    $access = new_access($peer);
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies without log');
    like("@logged", qr/cannot undo %s%n/, 'it was warned');
    ends_well($access, $peer);
};

subtest 'a log callback that dies' => sub {
    my $exception = { from => 'log' };
    my $peer = start_peer({ logged_returns() });
    my $access = new_access($peer, log => sub ($level, @) { die $exception if $level eq 'warn' });
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies');
    is($@, $exception, "with the callback's exception");
    ends_well($access, $peer);

    # At teardown, with somebody else's export there.
    my $exports = [{ id => 'other', type => 'nbd', 'node-name' => 'x' }];
    $peer = start_peer({ pve_returns('query-block-exports' => $exports) });
    $access = new_access($peer, log => sub ($level, @) { die $exception if $level eq 'warn' });
    $access->setup(\@one);
    ok(!eval { $access->teardown(1); 1 }, 'teardown dies');
    is($@, $exception, "with the callback's exception");
    eval { $access->teardown(1) };
    eval { $access->teardown(1) };
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'torn down once');
    ok(!(grep { $_ eq 'nbd-server-stop' } $peer->names), "the other's NBD server stays up");
};

subtest 'a warning handler that dies' => sub {
    my $peer = start_peer({ logged_returns() });
    my $access = new_access($peer);
    local $SIG{__WARN__} = sub (@) { die "warned\n" };
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies');
    ends_well($access, $peer);

    # Out of scope: the teardown is done all the same.
    $peer = start_peer({ pve_returns() });
    $access = new_access($peer);
    $access->setup(\@one);
    undef $access;
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'torn down out of scope');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
};

subtest 'out of scope' => sub {
    my @warnings;
    local $SIG{__WARN__} = sub ($text) { push @warnings, $text };
    my $refusal = { error => { class => 'GenericError', desc => 'not now' } };
    my $access
        = new_access(start_peer({ pve_returns('backup-access-teardown' => action($refusal)) }));
    $access->setup(\@one);
    undef $access;
    like($warnings[0], qr/not torn down/, 'says so');
    like($warnings[1], qr/not now/, 'and why it could not be done');
    unlink(glob("$run_dir/*/*"));
    rmdir($_) for glob("$run_dir/*");
};

subtest 'a forked child' => sub {
    my $peer = start_peer({ pve_returns() });
    my $access = new_access($peer);
    $access->setup(\@one);
    my @before = $peer->names;
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        my @classes = map {
            eval { $_->(); 1 }
                ? 'done'
                : error_class($@)
            } sub { $access->teardown(1) },
            sub { $access->volumes('nbd') }, sub { $access->setup(\@one) };
        undef $access;
        POSIX::_exit(grep({ $_ ne 'StateError' } @classes) ? 1 : 0);
    }
    waitpid($pid, 0);
    is($?, 0, 'cannot use it');
    is_deeply([$peer->names], \@before, 'and sent nothing');
    ok(eval { $access->teardown(1); 1 }, 'the parent tears down') or diag($@);
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
};

done_testing();
