# A code ref in place of the monitor: its arguments, what it may return, and how it may die.

use v5.36;

use lib 't/lib';

use File::Path qw(remove_tree);
use JSON::PP ();
use POSIX ();
use Scalar::Util qw(refaddr);
use Test::More;
use Time::HiRes qw(alarm);

use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;

subtest 'code ref: a whole access' => sub {
    my $calls = qmp_calls({ pve_returns() });
    my $access = new_access($calls->{code});
    my $infos = $access->setup([@one, { device => 'drive-scsi1' }]);
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
        'the result of setup'
    );
    my $volumes = $access->volumes('nbd');
    is($volumes->{'drive-scsi0'}{'bitmap-mode'}, 'reuse', 'the bitmap mode of the first device');
    is($volumes->{'drive-scsi1'}{'bitmap-mode'}, 'none', 'the status of the other device');
    like($volumes->{'drive-scsi0'}{'nbd-path'}, qr{\A\Q$run_dir\E/.+}, 'socket');
    $access->teardown(1);
};

subtest 'code ref: arguments' => sub {
    my $calls = qmp_calls({ pve_returns() });
    my $access = new_access($calls->{code});
    $access->setup([@one, { device => 'drive-scsi1' }]);
    my $volumes = $access->volumes('nbd');
    $access->teardown(1);
    my $encode = sub ($command) { $json->encode(arguments_of($calls, $command)) };
    is($encode->('query-version'), '{}', 'a command without arguments');
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
    cmp_ok(scalar(grep { $_ eq 'blockdev-add' } $calls->{names}->@*),
        '>', 1, 'the commands were reached');
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
        like($text, qr/"auto-dismiss":false[,}]/, "$name: false");
        like($text, qr/"granularity":65536[,}]/, "$name: an integer");
        like($text, qr/"size":$size[,}]/, "$name: a size");
        unlike($text, qr/"\d+"|JSON/, "$name: no numbers as text, no names of classes");
    }
    is_deeply([glob("$dir/*.raw")], [], 'no fleecing image is left');
};

# The limit is the longest time for which the guest waits if fleecing hangs; older QEMUs accept at most 4 s.
subtest 'code ref: the filter' => sub {
    for my $case ([7, 2, 4], [9, 0, 4], [9, 1, 45], [11, 0, 45]) {
        my ($major, $minor, $seconds) = $case->@*;
        my %ok = map { $_ => {} } qw(blockdev-reopen transaction);
        my $calls
            = qmp_calls({ upstream_returns(%ok, 'query-version' => version($major, $minor)) });
        my $access = new_access($calls->{code}, 'fleecing-dir' => "$dir");
        $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'none' }]);
        my ($filter) = grep { ($_->{driver} // '') eq 'copy-before-write' } $calls->{arguments}->@*;
        is($filter->{'cbw-timeout'}, $seconds, "QEMU $major.$minor: time limit");
        is($filter->{'on-cbw-error'},
            'break-snapshot', "QEMU $major.$minor: the guest's write is done");
        ok(!exists($filter->{bitmap}),
            "QEMU $major.$minor: the filter has no bitmap, which would be copied too early");
        $access->teardown(0);
    }
};

# Numbers as various decoders return them, and booleans of all kinds.
subtest 'code ref: numbers and booleans' => sub {
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
};

subtest 'code ref: invalid results' => sub {
    my $cyclic = [];
    $cyclic->[0] = $cyclic;
    my $twice = { a => [] };
    $twice->{a} = [$twice, $twice];
    my %odd = (
        'undef' => undef,
        'a text' => 'x',
        'a number' => 5,
        'a code ref' => sub { },
        'a ring' => $cyclic,
        'what contains itself twice' => $twice,
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
};

subtest 'code ref: lists and characters' => sub {

    # Perl code may return empty lists by mistake.
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

subtest 'code ref: dying with a text' => sub {
    my %deaths = (
        'mon_cmd' =>
            ["VM 100 qmp command 'x' failed - Device 'y' not found\n", qr/Device 'y' not found/],
        'no newline' => ['plain', qr/plain at \S+ line \d+/],
        'directives' => ["%s%n%n 100%\n", qr/%s%n%n 100%/],
        'wide characters' => ["\x{263a}\n", qr/\x{263a}/],
        'many lines' => ["one\ntwo\e[31m\n", qr/ - one two \[31m\n\z/],
    );
    for my $name (sort keys %deaths) {
        my ($death, $pattern) = $deaths{$name}->@*;
        for my $command (qw(query-version query-block backup-access-setup)) {
            my $calls = qmp_calls({ pve_returns($command => sub (@) { die $death }) });
            my $error = dies(sub { new_access($calls->{code})->setup(\@one) },
                qr/GenericError/, $pattern, "$name in $command");
            like("$error", qr/\Aqmp command '$command' failed - /, "$name: the command is named");
            is(eval { $error->command }, $command, "$name: the error's command");
            my $torn_down = grep { $_ eq 'backup-access-teardown' } $calls->{names}->@*;
            is($torn_down, 0, "$name: nothing is undone where QEMU shows nothing");
        }
    }
};

subtest 'code ref: dying with an object' => sub {

    # An exception that is not text is not mon_cmd's, but a signal handler's or another module's: it is passed
    # on unchanged.
    for my $object (bless({ text => 'as text' }, 'My::Error'), { code => 5 }, ['x']) {
        for my $command (qw(query-version backup-access-setup)) {
            my $calls = qmp_calls({ pve_returns($command => sub (@) { die $object }) });
            ok(!eval { new_access($calls->{code})->setup(\@one); 1 }, ref($object) . ': dies');
            is(ref($@) && refaddr($@),
                refaddr($object), ref($object) . 'the exception is the object itself');
            my $torn_down = grep { $_ eq 'backup-access-teardown' } $calls->{names}->@*;
            is($torn_down, $command eq 'backup-access-setup' ? 1 : 0, 'undone');
            is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
        }
    }
};

subtest 'code ref: going well' => sub {
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

subtest 'code ref: using the access inside it' => sub {
    my ($access, @inner);
    my $answer = answers({ pve_returns() });
    my $code = sub ($command, $arguments) {
        if ($command eq 'query-block') {
            for my $use (sub { $access->setup(\@one) }, sub { $access->teardown(0) }) {
                push @inner, eval { $use->(); 1 } ? 'done' : error_class($@);
            }
        }
        return $answer->($command, $arguments);
    };

    # In a child process, because a fault here would end the process.
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

# Code of a program that leaves a call of teardown by exit, and calls it again in an END block.
our $at_exit;
END { $at_exit->() if $at_exit }

# The code ref exits at the command with that number in teardown(1), before or after QEMU gets it; then teardown
# is called again. Prints the result: "success", or the class of the error.
sub ask_again_after_exit ($number, $is_after) {
    my $calls = qmp_calls({ pve_returns() });
    my $commands = -1;
    my $access = new_access(
        sub (@command) {
            my $exits = $commands >= 0 && $commands++ == $number;
            exit(0) if $exits && !$is_after;
            my $reply = $calls->{code}->(@command);
            exit(0) if $exits;
            return $reply;
        }
    );
    $access->setup(\@one);
    $at_exit = sub () {
        my $end = eval { $access->teardown(1); 1 } ? 'success' : error_class($@);
        my @told = map { $_->{success} ? 'success' : 'failure' }
            map { $calls->{arguments}[$_] }
            grep { $calls->{names}[$_] eq 'backup-access-teardown' } 0 .. $#{ $calls->{names} };
        say "$end @told";
        POSIX::_exit(0);
    };
    $commands = 0;
    $access->teardown(1);
    $at_exit->();
    return;
}

# The first line that a child process writes.
sub line_of_child ($code) {
    my $pid = open(my $out, '-|') // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>', '/dev/null') or POSIX::_exit(126);
        $code->();
        POSIX::_exit(1);
    }
    my $line = <$out> // '';
    close($out);
    chomp($line);
    return $line;
}

subtest 'code ref: a program that ends within teardown' => sub {
    my %ends;
    for my $number (0 .. 20) {
        for my $is_after (0, 1) {
            my $line = line_of_child(sub { ask_again_after_exit($number, $is_after) });
            $ends{$line}++;
            my ($end, @told) = split(m/ /, $line);
            my $committed = ($told[0] // '') eq 'success';
            ok(
                $end eq 'success' ? $committed : $end eq 'StateError',
                "command $number: the result agrees with the state"
            ) or diag($line);
            is(scalar(grep { $_ eq 'success' } @told), $committed ? 1 : 0, 'told once');
        }
    }
    cmp_ok($ends{'success success'} // 0, '>', 1, 'a success is never reported as a failure later');
    cmp_ok($ends{'StateError failure'} // 0,
        '>', 1, 'what was not reported as a success is a failure');
    remove_tree(glob("$run_dir/*"));
};

done_testing();
