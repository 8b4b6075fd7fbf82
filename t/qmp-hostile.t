# Monitors that are slow, unusual or broken: the module reports in time what is wrong, undoes everything, and
# never guesses.

use v5.36;

use lib 't/lib';

use IO::Socket::UNIX ();
use JSON::PP ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;
use PVE::BackupAccess;

# ---- greetings and connections ----

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
};

subtest 'invalid greetings' => sub {
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
        'another object' =>
            [{ raw => "{\"hello\": \"world\"}\r\n" }, qr/did not send a QMP greeting/],
        'QMP without an object' => [{ raw => "{\"QMP\": 5}\r\n" }, qr/did not send a QMP greeting/],
        'a reply' => [{ raw => "{\"return\": {}}\r\n" }, qr/did not send a QMP greeting/],
        'SSH' => [{ raw => "SSH-2.0-OpenSSH_9.2\r\n" }, qr/does not speak QMP/],
        'half a greeting' => [[{ raw => '{"QMP": {"ver' }, { close => 1 }], qr/closed/],
    );
    for my $name (sort keys %raw) {
        my ($greeting, $pattern) = $raw{$name}->@*;
        my $peer = start_peer({ pve_returns() }, greeting => $greeting);
        dies(sub { capabilities($peer) }, qr/(?:Protocol|Connection)Error/, $pattern, $name);
    }
};

subtest 'events around a greeting' => sub {
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

# If a client disconnects during a command, the next client gets the reply.
subtest 'replies to a client that has gone' => sub {
    my %replies = (
        'a value' => '{"return": {"a": [1]}, "id": "7"}',
        'an id of another type' => '{"return": {}, "id": 1}',
        'a usual id' => '{"return": {"a": [1]}, "id": "1"}',
        'an error, with a usual id' =>
            '{"error": {"class": "GenericError", "desc": "x"}, "id": "1"}',
        'no id' => '{"return": {}}',
        'an error' => '{"error": {"class": "GenericError", "desc": "x"}, "id": "7"}',
        'an error without an id' => '{"error": {"class": "GenericError", "desc": "x"}}',
    );
    for my $name (sort keys %replies) {
        my $greeting = "{\"QMP\": {\"capabilities\": []}}\r\n";
        my $peer = start_peer({ pve_returns() },
            greeting => { raw => $greeting . "$replies{$name}\r\n" x 2 });
        is(eval { capabilities($peer)->{backend} }, 'pve', "$name: does no harm") or diag($@);
    }
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

    # A monitor that accepts connections, but never sends anything.
    my $peer = start_peer({}, greeting => { sleep => 20 });
    my $started = time;
    dies(sub { capabilities($peer, timeout => 1) },
        qr/TimeoutError/, qr/greeting/, 'a monitor that sends no greeting');
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

subtest 'the monitor is released' => sub {
    my $peer = start_peer({ pve_returns() });
    my $access = new_access($peer);
    is($peer->connections, 0, 'new opens no connection');
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
        is($peer->connections, $connections, "$name: one connection, which is closed");
    }
    is_deeply([$peer->problems], [], 'all input was QMP');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
};

# ---- replies ----

# Possible answers of a peer to any command, and the expected results.
my %hostile = (
    'silence' => [
        { silent => 1 },
        qr/TimeoutError/,
        qr/timeout while waiting for the reply - check that QEMU runs and that its storage answers/
    ],
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
    'neither result nor error' => [{ id => '2' }, qr/ProtocolError/, qr/./],
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

# On a busy machine, correct replies take a while, too.
sub limit_for ($class) { return 'TimeoutError' =~ $class ? 3 : 30 }

for my $name (sort keys %hostile) {
    subtest "the answer is $name" => sub {
        my ($action, $class, $pattern) = $hostile{$name}->@*;
        my $peer = start_peer({ pve_returns('query-version' => action($action)) });
        my $started = time;
        my $timeout = limit_for($class);
        my $error = dies(sub { capabilities($peer, timeout => $timeout) },
            $class, $pattern, 'query-version');
        cmp_ok(time - $started, '<', $timeout + 2, 'within the limit');
        like("$error", qr/\Aqmp command 'query-version' failed - /, 'the command is named');
        like("$error", qr/'\Q@{[$peer->socket_path]}\E'/, 'so is the socket')
            if $error->class =~ m/\A(?:Connection|Protocol|Timeout)Error\z/;
        is(eval { $error->command }, 'query-version', 'the error has the command');
    };
}

# After a failure at any stage of setup, the same object can be used again.
my @stages = qw(
    query-version query-commands query-qmp-schema query-status query-block query-named-block-nodes
    backup-access-setup nbd-server-start
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
            my $timeout = limit_for($class);
            my $access = new_access($peer, timeout => $timeout);
            my $started = time;
            my $error = dies(sub { $access->setup(\@one) }, $class, $pattern, $name);
            cmp_ok(time - $started, '<', $timeout + 3, "$name: the error arrives in time");
            is(eval { $error->command }, $stage, "$name: the command");
            my @names = $peer->names;
            my $asked = grep { $_ eq 'backup-access-setup' } @names;
            $asked = 0 if $stage eq 'backup-access-setup' && $name eq 'an error';
            my $undone = grep { $_ eq 'backup-access-teardown' } @names;
            is($undone, $asked, "$name: undone where there is something to undo") or diag("@names");
            my ($teardown) = grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
            is_deeply(
                $teardown->{arguments},
                { 'target-id' => $target, success => JSON::PP::false },
                "$name: torn down as a failure"
            ) if $undone;
            ok(!eval { $access->teardown(1); 1 } && $@->class eq 'StateError',
                "$name: no access is active");
            ok(eval { $access->setup(\@one); 1 }, "$name: the next setup works") or diag($@);
            ok(eval { $access->teardown(1); 1 }, "$name: and its teardown") or diag($@);
            is_deeply([glob("$run_dir/*")], [], "$name: nothing is left on disk");
        }
    };
}

# QEMU's state after a refusal decides.
subtest 'setup: refused, with something left' => sub {
    my %returns = pve_returns();
    my $nodes = $returns{'query-named-block-nodes'};
    my %node = ('node-name' => '#block418', drv => 'snapshot-access', ro => JSON::PP::false);
    my $is_asked;
    $returns{'backup-access-setup'} = sub (@) {
        $is_asked = 1;
        return action({ error => { class => 'GenericError', desc => 'half way' } });
    };
    $returns{'query-named-block-nodes'} = sub ($arguments) {
        return [value_of($nodes, $arguments)->@*, $is_asked ? \%node : ()];
    };
    my $peer = start_peer(\%returns);
    dies(sub { new_access($peer)->setup(\@one) }, qr/GenericError/, qr/half way/, 'setup');
    is(scalar(grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'the setup is undone');
};

subtest 'an access of another program' => sub {
    my $error = { class => 'GenericError', desc => "previous backup for target 'x' not finished" };
    my $peer = start_peer({ pve_returns('backup-access-setup' => action({ error => $error })) });
    dies(sub { new_access($peer)->setup(\@one) }, qr/GenericError/, qr/not finished/, 'setup');
    ok(!(grep { $_ eq 'backup-access-teardown' } $peer->names),
        "the other program's access is left alone");
};

# ---- big and small ----

subtest 'sizes' => sub {

    # Megabytes of nodes in QEMU's format, all of which must be checked.
    my @nodes = map { node("#node$_") } 1 .. 4_000;
    my %returns = pve_returns();
    my $big = [@nodes, $returns{'query-named-block-nodes'}->@*];
    my $peer = start_peer({ %returns, 'query-named-block-nodes' => $big });
    my $access = new_access($peer, timeout => 60);
    ok(eval { $access->setup(\@one); 1 }, '4,000 nodes') or diag($@);
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
    cmp_ok(time - $started, '<', 60, 'the error arrives in time');
    cmp_ok($peer->endless_bytes, '<', 80 << 20, 'no more was read than the limit');
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
                = { event => 'BLOCK_WRITE_THRESHOLD', data => { return => [], id => '1' } };
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

done_testing();
