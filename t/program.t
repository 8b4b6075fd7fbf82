# Programs that the module runs to their end: none outlives the work for which it runs.
#
# One QEMU is enough: none is run.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use IO::Socket::INET;
use POSIX qw(SIGPIPE SIGUSR1 SIGUSR2 WNOHANG);
use Test::More;
use Time::HiRes qw(sleep time);

use PVE::BackupAccess::Program qw(new_pipe run_program start_program);

# The number of seconds distinguishes this process from all others.
my $forever = 100_000 + $$;
my @sleeper = ('sleep', $forever);

sub is_sleeper ($pid) {
    open(my $fh, '<', "/proc/$pid/cmdline") or return 0;
    local $/ = undef;
    return (<$fh> // '') eq join("\0", @sleeper) . "\0";
}

sub sleepers () {
    return grep { is_sleeper($_) } map { m{(\d+)\z} } glob('/proc/[0-9]*');
}

# Whether that many processes exist after a while.
sub eventually ($count) {
    my $deadline = time + 20;
    while (time < $deadline) {
        return 1 if sleepers() == $count;
        sleep(0.01);
    }
    return 0;
}

subtest 'the result of a program' => sub {
    is_deeply([run_program('echo', 'a b')], [0, "a b\n", ''], 'status and output');
    is_deeply(
        [run_program('sh', '-c', 'echo oops >&2; exit 3')],
        [3 << 8, '', "oops\n"],
        'status and standard error of a failed program'
    );
    is((run_program('sh', '-c', 'kill -9 $$'))[0], 9, 'a signal');
    is((run_program('cat'))[1], '', 'a program has no input');
    my $error = eval { run_program('no-such-program'); 1 } ? undef : $@;
    is($error->class, 'UnsupportedError', 'a program that does not exist: the class');
    like(
        $error,
        qr/cannot run no-such-program - No such file/,
        'a program that does not exist: the message'
    );
};

# A program that does not look whether it could print: what is missing would be taken for what is not there.
subtest 'no space for temporary files' => sub {
    my $dir = File::Temp->newdir('pba-full-XXXXXXXX', TMPDIR => 1);
    system("mount -t tmpfs -o size=4k tmpfs $dir 2>/dev/null") == 0
        or plan(skip_all => 'needs root');
    open(my $fh, '>', "$dir/all") or die "$dir/all: $!\n";
    syswrite($fh, 'x' x 8192);
    close($fh);
    local $ENV{TMPDIR} = "$dir";
    is_deeply(
        [run_program('perl', '-e', 'print STDERR "b\n"; print "a\n"; exit(0)')],
        [0, "a\n", "b\n"],
        'it has what was printed'
    );
    system('umount', "$dir");
};

subtest 'what it has' => sub {
    local $SIG{__DIE__} = sub { print {*STDERR} 'a handler in the child' };
    local $SIG{PIPE} = 'IGNORE';
    local $ENV{PBA_TEST} = 'given';
    local @SIG{qw(USR1 USR2)} = ('IGNORE', sub { die "handler\n" });
    my (undef, $environment) = run_program('env');
    unlike($environment, qr/PBA_TEST/, "a program does not get the caller's environment");
    my (undef, $status) = run_program('cat', '/proc/self/status');
    my ($blocked) = $status =~ m/^SigBlk:\s*([0-9a-f]+)$/m;
    is(hex($blocked), 0, 'a program has no blocked signals');
    my ($ignored) = $status =~ m/^SigIgn:\s*([0-9a-f]+)$/m;
    is_deeply(
        [map { hex($ignored) & 1 << $_ - 1 ? 1 : 0 } SIGPIPE, SIGUSR1, SIGUSR2],
        [0, 1, 0],
        "it ignores what the caller ignores, but not a terminal's signals"
    );
    my (undef, $session) = run_program('sh', '-c', 'ps -o sid= -p $$; echo $$');
    my ($sid, $pid) = $session =~ m/(\d+)/g;
    is($sid, $pid, "the program has its own session");
};

# A handle may have the number that another one gets in the program, which must not lose either of them.
subtest 'handles and a listener' => sub {
    my $listener = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1');
    my ($in, $to) = new_pipe();
    my ($from, $out) = new_pipe();
    syswrite($to, 'given');
    close($to);
    my $script = 'cat; echo " $(( LISTEN_PID == $$ )) $LISTEN_FDS"; readlink /proc/$$/fd/3';
    start_program(\my $pid, { in => $in, out => $out, listener => $listener }, 'sh', '-c', $script);
    close($out);
    my $said = join('', <$from>);
    waitpid($pid, 0);
    like($said, qr/\Agiven 1 1\nsocket:/, 'it has them');

    my $child = fork() // die "fork: $!\n";
    if (!$child) {
        close(STDIN);
        open(my $zero, '+>', undef) or die "open: $!\n";
        start_program(\$pid, { out => $zero, err => $zero }, 'sh', '-c', 'echo out; echo err >&2');
        waitpid($pid, 0);
        seek($zero, 0, 0);
        POSIX::_exit(!fileno($zero) && join('', <$zero>) eq "out\nerr\n" ? 0 : 1);
    }
    waitpid($child, 0);
    is($?, 0, 'also one that is descriptor 0');
};

subtest 'no descriptor is free' => sub {
    my $child = fork() // die "fork: $!\n";
    if (!$child) {
        my @all;
        while (open(my $fh, '<', '/dev/null')) { push(@all, $fh) }
        POSIX::_exit(eval { start_program(\my $pid, {}, 'true'); 1 }
                || "$@" !~ m/Too many open files/);
    }
    waitpid($child, 0);
    is($?, 0, 'it is said');
};

for my $chld ('DEFAULT', 'IGNORE', sub { 1 while waitpid(-1, WNOHANG) > 0 }) {
    subtest "with SIGCHLD $chld" => sub {
        local $SIG{CHLD} = $chld;
        is((run_program('false'))[0], 1 << 8, 'the status is known');
        local $SIG{ALRM} = sub { die "enough\n" };
        Time::HiRes::alarm(0.3);
        my $began = time;
        ok(!eval { run_program(@sleeper); 1 }, 'a handler that dies ends the call');
        is($@, "enough\n", "the exception is the handler's");
        cmp_ok(time - $began, '<', 10, 'soon');

        # On a busy machine, a killed program may take longer to end than the call waits for it.
        ok(eventually(0), 'and the program')
            or diag(qx(ps -o pid,stat,wchan,args --ppid $$));
        isnt(waitpid(-1, WNOHANG), 0, 'no child goes on');
    };
}

subtest 'a handler that does not die' => sub {
    my $seen = 0;
    local $SIG{ALRM} = sub { $seen++ };
    Time::HiRes::alarm(0.1, 0.1);
    is((run_program('sleep', 0.5))[0], 0, 'the program comes to its end');
    Time::HiRes::alarm(0);
    cmp_ok($seen, '>', 1, 'the handler ran');
};

subtest 'a program that ignores signals' => sub {
    my @deaf = ('sh', '-c', "trap '' TERM INT HUP; exec sleep $forever");
    local $SIG{ALRM} = sub { die "enough\n" };
    Time::HiRes::alarm(0.3);
    eval { run_program(@deaf) };
    is($@, "enough\n", "the exception is the caller's");
    ok(eventually(0), 'it ends the program');
};

subtest 'the caller is killed' => sub {
    my $caller = fork() // die "fork: $!\n";
    if (!$caller) {
        eval { run_program(@sleeper) };
        POSIX::_exit(0);
    }
    ok(eventually(1), 'while the program runs');
    kill(KILL => $caller);
    waitpid($caller, 0);
    ok(eventually(0), 'the program ends, too');
};

# Each signal at a different moment, also around the fork.
subtest 'signals at every moment' => sub {
    local $SIG{ALRM} = sub { die "enough\n" };
    for my $step (1 .. 60) {
        eval {
            Time::HiRes::alarm($step * 0.0002);
            run_program(@sleeper);
        };
        Time::HiRes::alarm(0);
        die "$@" if $@ ne "enough\n";
    }
    ok(eventually(0), 'no program stays');
};

done_testing;
