# The caller's code during a call: signal handlers, log callbacks, destructors, a fork.

use v5.36;

use lib 't/lib';

use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;

# ---- signals ----

# The peer sends the signal when it gets the command, and answers that many seconds later.
my $late = 4;

sub interrupted ($signal, $code, $name, $limit = $late) {
    my $exception = { signal => $signal };
    local $SIG{$signal} = sub { die $exception };
    my $started = time;
    my $done = eval { $code->(); sleep(1); 1 };
    my $error = $@;
    my $took = time - $started;
    ok(!$done, "$name: dies");
    is($error, $exception, "$name: the exception is the handler's");
    cmp_ok($took, '<', $limit, "$name: does not wait for the answer") or diag("$took seconds");
    return;
}

sub late_peer ($command, $signal) {
    my %returns = pve_returns();
    my ($good, $left) = ($returns{$command}, 1);
    my $main = $$;
    $returns{$command} = sub ($arguments) {
        my $reply = { return => value_of($good, $arguments) };
        return action($reply) if --$left;
        kill($signal, $main);
        return action([{ sleep => $late }, $reply]);
    };
    return start_peer(\%returns);
}

subtest 'handlers that die' => sub {
    for my $signal (qw(ALRM INT TERM)) {
        for my $command (qw(query-version query-block query-named-block-nodes)) {
            my $peer = late_peer($command, $signal);
            my $access = new_access($peer, timeout => 10);
            interrupted($signal, sub { $access->setup(\@one) }, "$signal in $command");
            is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
            ok(eval { $access->setup(\@one); 1 }, 'setup works afterwards') or diag($@);
            ok(eval { $access->teardown(1); 1 }, 'and teardown') or diag($@);
        }
    }
    my $mute = start_peer({}, greeting => { sleep => 3 });
    Time::HiRes::ualarm(400_000);
    interrupted('ALRM', sub { capabilities($mute, timeout => 10) }, 'waiting for the greeting');
};

# Setup was sent, so it must be undone, however long the monitor is busy.
subtest 'a handler that dies in setup' => sub {
    my $peer = late_peer('backup-access-setup', 'INT');
    my $access = new_access($peer, timeout => 10);
    interrupted('INT', sub { $access->setup(\@one) }, 'INT in backup-access-setup', 9);
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'the setup was undone');
};

# The access is still active and can be torn down.
subtest 'handlers that die in volumes and teardown' => sub {
    for my $command (
        qw(block-export-add query-block-exports nbd-server-stop backup-access-teardown))
    {
        my $peer = late_peer($command, 'INT');
        my $access = new_access($peer, timeout => 10);
        $access->setup(\@one);
        my $use = sub { $access->volumes('nbd'); $access->teardown(1) };
        interrupted('INT', $use, "INT in $command");
        my $class = eval { $access->teardown(1); 'none' } // $@->class;
        is($class, $command eq 'block-export-add' ? 'none' : 'StateError', 'teardown afterwards');
        my @teardowns = grep { $_->{execute} eq 'backup-access-teardown' } $peer->commands;
        cmp_ok(scalar(@teardowns), '>=', 1, 'teardown was sent');
        is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
    }
};

subtest 'an access that is destroyed after a handler died' => sub {
    my $peer = late_peer('block-export-add', 'INT');
    my $access = new_access($peer, timeout => 10);
    $access->setup(\@one);
    interrupted('INT', sub { $access->volumes('nbd') }, 'INT in block-export-add');
    my @warnings;
    local $SIG{__WARN__} = sub ($text) { push @warnings, $text };
    undef $access;
    like(
        "@warnings",
        qr/not torn down/,
        'destroyed: a warning says that the access was not torn down'
    );
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'the access is torn down');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
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
    cmp_ok($handled, '>', 3, "the handlers ran ($handled times)");
    is($kept, 'kept', '$@ is left alone');
};

# ---- callbacks ----

# If the undo fails too, this is logged. The next one works.
sub logged_returns () {
    my $refusal = sub ($text) { action({ error => { class => 'GenericError', desc => $text } }) };
    my $refuse = 1;
    my $odd = spoiled(
        setup_reply({ devices => \@one }),
        [0, 'bitmap-action'],
        sub ($at, $key) { $at->{$key} = 'odd %s%n' }
    );
    return pve_returns(
        'backup-access-setup' => $odd,
        'backup-access-teardown' =>
            sub (@) { return $refuse-- > 0 ? $refusal->("cannot\nundo %s%n") : {} },
    );
}

# Leftovers of a setup whose undo failed can be torn down; then nothing is left.
sub ends_well ($access, $peer) {
    ok(eval { $access->teardown(0); 1 } || error_class($@) eq 'StateError', 'nothing more is left')
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
    like("$@", qr/odd %s%n/, 'the exception is the first error');
    is((grep { $_->[0] eq 'warn' && $_->[1] =~ m/cannot undo %s%n/ } @logged),
        1, 'the error while undoing was logged');
    ok(!(grep { $_->[1] =~ m/\n/ || @$_ != 2 } @logged), 'level and line');
    ends_well($access, $peer);

    @logged = ();
    local $SIG{__WARN__} = sub ($text) { push @logged, $text };
    $peer = start_peer({ logged_returns() });
    $access = new_access($peer);
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies without log');
    like("@logged", qr/cannot undo %s%n/, 'a warning was logged');
    ends_well($access, $peer);
};

subtest 'a log callback that dies' => sub {
    my $exception = { from => 'log' };
    my $peer = start_peer({ logged_returns() });
    my $access = new_access($peer, log => sub ($level, @) { die $exception if $level eq 'warn' });
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies');
    is($@, $exception, "the exception is the callback's");
    ends_well($access, $peer);

    # At teardown, while there is another program's export.
    my $exports = [{ id => 'other', type => 'nbd', 'node-name' => 'x' }];
    $peer = start_peer({ pve_returns('query-block-exports' => $exports) });
    $access = new_access($peer, log => sub ($level, @) { die $exception if $level eq 'warn' });
    $access->setup(\@one);
    ok(!eval { $access->teardown(1); 1 }, 'teardown dies');
    is($@, $exception, "the exception is the callback's");
    eval { $access->teardown(1) };
    eval { $access->teardown(1) };
    is((grep { $_ eq 'backup-access-teardown' } $peer->names), 1, 'torn down once');
    ok(
        !(grep { $_ eq 'nbd-server-stop' } $peer->names),
        "the other program's NBD server keeps running"
    );
};

subtest 'a warning handler that dies' => sub {
    my $peer = start_peer({ logged_returns() });
    my $access = new_access($peer);
    local $SIG{__WARN__} = sub (@) { die "warned\n" };
    ok(!eval { $access->setup(\@one); 1 }, 'setup dies');
    ends_well($access, $peer);

    # The object goes out of scope: the teardown is still done.
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
    like($warnings[0], qr/not torn down/, 'a warning says that the access was not torn down');
    like($warnings[1], qr/not now/, 'the warning says why it failed');
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
    is($?, 0, 'every call in the child dies with a StateError');
    is_deeply([$peer->names], \@before, 'the child has sent nothing');
    ok(eval { $access->teardown(1); 1 }, 'the parent tears down') or diag($@);
    is_deeply([glob("$run_dir/*")], [], 'nothing is left on disk');
};

done_testing();
