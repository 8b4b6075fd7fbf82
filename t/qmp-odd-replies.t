# Replies that are valid JSON but wrong, and unsuitable QEMUs: an error that names the command or the device,
# with everything undone; and never a crash.

use v5.36;

use lib 't/lib';

use JSON::PP ();
use POSIX ();
use Test::More;

use PBA::Test::QMPPeer;
use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;

# ---- replies that lack something ----

my @of_any_type = (undef, JSON::PP::true, 5, 1.5, 'text', [], {}, [5], [undef], [[]], ['text']);

# A reply that cannot be understood is an error that names the command or the device; it must never crash.
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
        my $class = eval { $access->teardown(1); 'none' } // $@->class;
        is($class, 'StateError', "$text: a later one undoes the rest, and says so") or diag($@);
        my ($last) = grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
        ok($last && !$last->{arguments}{success}, "$text: torn down as a failure");
    }
};

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
        is(scalar(@more), 0, "$name: teardown was sent once");
    }
};

subtest 'strings that are not valid text' => sub {

    # Half of a surrogate pair: valid in JSON, but not in UTF-8.
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

# Names come from QEMU: they are sent back to it unchanged, and used nowhere else.
subtest 'names' => sub {
    my %names = (
        'directives' => '%s%n%n%5$s',
        'a path' => '../../../../tmp/x',
        'a command' => '$(touch /tmp/x); `id` | "\'',
        'lines' => "a\nb\r\e[31m",
        'a megabyte' => 'x' x (1 << 20),
        'beyond ASCII' => "\x{fc}\x{1f600}",
        'nothing' => '',
    );
    for my $name (sort keys %names) {
        my $node = $names{$name};
        my %returns = upstream_returns(
            'query-block' => [device('drive-scsi0', $node)],
            'query-named-block-nodes' => [node($node)],
            'x-debug-query-block-graph' =>
                { nodes => [{ id => 1, type => 'block-driver', name => $node }], edges => [] },
        );
        my $calls = qmp_calls(\%returns);
        my $access = new_access($calls->{code}, 'fleecing-dir' => "$dir");
        my $devices = [{ device => 'drive-scsi0', 'bitmap-mode' => 'new' }];
        dies(sub { $access->setup($devices) }, qr/\w/, qr/device drive-scsi0: /, $name);
        my @raw = grep { ($_->{driver} // '') eq 'raw' } $calls->{arguments}->@*;
        is($raw[0] && $raw[0]{file}, $node, "$name: the name is sent back unchanged");
        is_deeply([grep { !m/\Q$run_dir\E\z/ } glob("$dir/*")], [], "$name: no file was created");
    }
};

# If all values were accepted, they would take some gigabytes.
subtest 'small values by the million' => sub {
    reset_peak();
    my $raw = '{"return": [' . ('[],{},' x 1_000_000) . "0], \"id\": \"pba-2\"}\r\n";
    my $peer = start_peer({ pve_returns('query-version' => action({ raw => $raw })) });
    undef $raw;
    dies(
        sub { capabilities($peer, timeout => 60) },
        qr/ProtocolError/,
        qr/over 1048576 values/,
        'two million values'
    );
    my $kib = peak_rss_kib();
    cmp_ok($kib, '<', 300 * 1024, "memory is bounded ($kib KiB)");
};

# A bitmap that covers more or less than the whole disk.
subtest 'counts' => sub {
    for my $count (0, $size - 1, -1, '5', 1e30, undef) {
        my $bitmap = { name => 'all-dirty', recording => JSON::PP::true, count => $count };
        my %returns = upstream_returns();
        my @added;
        my $nodes = sub (@) {
            my ($source)
                = map { $_->{'node-name'} =~ m/\Apba-null-/ ? $_->{'node-name'} : () } @added;
            return [
                $returns{'query-named-block-nodes'}->@*,
                $source ? { 'node-name' => $source, 'dirty-bitmaps' => [$bitmap] } : ()
            ];
        };
        my $calls = qmp_calls(
            {
                %returns,
                'query-named-block-nodes' => $nodes,
                'blockdev-add' => sub ($arguments) { push(@added, $arguments); return {} },
                'blockdev-backup' => {},
                'job-dismiss' => {},
                'query-jobs' => [],
            }
        );
        my $access = new_access($calls->{code}, 'fleecing-dir' => "$dir");
        my $devices = [{ device => 'drive-scsi0', 'bitmap-mode' => 'new' }];
        my $text = $json->encode($count);
        dies(sub { $access->setup($devices) }, qr/ProtocolError/, qr/count|every bit set/, $text);
        my @transactions = grep { $_ eq 'transaction' } $calls->{names}->@*;
        is(scalar(@transactions), 0, "$text: no bitmap is used");
    }
};

# ---- unsuitable QEMUs ----

sub ask (%returns) { return capabilities(start_peer(\%returns)) }

subtest 'capabilities' => sub {
    is_deeply(ask(upstream_returns('query-version' => version(7, 2, 22))),
        { backend => 'upstream', 'qemu-version' => '7.2.22' }, '7.2');
    is_deeply(
        ask(pve_returns('query-qmp-schema' => schema('devlist'))),
        { backend => 'pve', form => 'devlist', 'qemu-version' => '10.0.2' },
        'early form'
    );
    my $package = 'pve-qemu-kvm_9.2.0-4';
    is(
        ask(
            pve_returns(
                'query-version' => version(9, 2, 0, $package),
                'query-qmp-schema' => schema('devlist')
            )
        )->{form},
        'devlist',
        "$package: the schema tells its form"
    );
    $package = 'pve-qemu-kvm_10.0.2-4';
    my %returns = pve_returns('query-version' => version(10, 0, 2, $package));
    delete $returns{'query-qmp-schema'};
    is(ask(%returns)->{form}, 'devices', "$package: QEMU is spared listing its schema");
};

subtest 'unsuitable versions and commands' => sub {
    for my $old ([7, 1], [6, 2], [4, 0], [2, 12], [0, 15]) {
        my ($major, $minor) = @$old;
        my %returns = upstream_returns('query-version' => version($major, $minor, 50));
        dies(
            sub { ask(%returns) }, qr/UnsupportedError/,
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
        dies(sub { ask(upstream_returns('query-commands' => $commands)) },
            qr/UnsupportedError/, qr/\b$command\b/, "without $command");
    }
};

subtest 'unsuitable forms' => sub {
    dies(sub { ask(pve_returns('query-qmp-schema' => [])) },
        qr/UnsupportedError/, qr/backup-access-setup/, 'a form that is not in the schema');
    my $odd_form = schema('devices');
    $odd_form->[1]{members} = [{ name => 'target-id' }, { name => 'disks' }];
    dies(sub { ask(pve_returns('query-qmp-schema' => $odd_form)) },
        qr/UnsupportedError/, qr/backup-access-setup/, 'a form that is not known');
    my %lacks = pve_returns();
    delete $lacks{'query-qmp-schema'};
    dies(sub { ask(%lacks) }, qr/CommandNotFound/, qr/query-qmp-schema/, 'the schema is missing');
};

subtest 'unsuitable devices' => sub {
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

# QEMU may answer block-export-del before the export has ended, and would then abort at the teardown.
subtest 'an export that ends slowly' => sub {
    my ($asked, @exports) = (0);
    my $calls = qmp_calls(
        {
            pve_returns(
                'block-export-add' => sub ($arguments) { push(@exports, $arguments); return {} },
                'block-export-del' => sub (@) { $asked = 4; return {} },
                'query-block-exports' => sub (@) {
                    @exports = () if $asked > 0 && --$asked == 0;
                    return [@exports];
                },
            )
        }
    );
    my $access = new_access($calls->{code});
    $access->setup(\@one);
    $access->volumes('nbd');
    $access->teardown(1);
    my @names = grep { !m/\Aquery-(?!block-exports)/ } $calls->{names}->@*;
    my ($deleted) = grep { $names[$_] eq 'block-export-del' } 0 .. $#names;
    is_deeply(
        [@names[$deleted + 1 .. $deleted + 4]],
        [('query-block-exports') x 4],
        'is waited for'
    );
    ok((grep { $_ eq 'backup-access-teardown' } @names[$deleted + 5 .. $#names]),
        'teardown follows');
};

subtest 'nodes and bitmaps that vanish during the access' => sub {
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
        ok(
            !(grep { $_ eq 'backup-access-teardown' } $calls->{names}->@*),
            "$name: the command that would crash QEMU is not sent"
        );
        $gone = 0;
        ok(eval { $access->teardown(0); 1 }, "$name: back again: torn down") or diag($@);
    }
};

done_testing();
