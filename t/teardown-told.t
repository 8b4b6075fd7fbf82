# The result of teardown(1) agrees with the state of the bitmaps. Every QMP command of it goes wrong once: the
# command or its reply is lost, the reply arrives too late or never, or a signal arrives. After that, the
# process dies, lives on for a while, or tries again; then another process makes the next backup. A model says
# which bits this backup must have (I2): never too few, and, after a success was reported, none of what was
# backed up.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use List::Util qw(min shuffle);
use POSIX ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QMPProxy;

my $size = 16 * 1024 * 1024;
my $block = 65536;

# All faults at all commands take long; PBA_FULL=1 includes all.
my $points = $ENV{PBA_FULL} ? undef : 2;
my $seed = 20261128;
srand($seed);

# The guest's writes before and after the instant of the faulty backup. A bit of Proxmox' bitmaps is 4 MiB.
my %offset = (old => 1 << 20, new => 9 << 20);
my $coarsest = 4 << 20;

my @faults = qw(lose stall drop refuse signal);
my @lives = qw(dies lives retries);

# The time limit in seconds for replies that never come; on a loaded machine, other replies take one second.
my $short = 3;

sub proxy ($backend, @fault) {
    return PBA::Test::QMPProxy->start(
        target => $backend->qmp_path,
        listen => $backend->vm->dir . '/proxy.qmp',
        @fault,
    );
}

sub write_disk ($backend, $which) {
    $backend->vm->qemu_io('disk0', "write -P 7 $offset{$which} $block");
    return;
}

# ---- the process that tears down ----

# The words that it reports: the result of teardown(1), log messages, that a signal arrived.
sub tear_down ($access, $life) {
    my (@words, $done);
    my $signals = 0;
    local $SIG{USR1} = sub { $signals++; die "the signal\n" };
    my $caught = !eval {
        $done = eval { $access->teardown(1); 1 };
        push(@words, 'error: ' . $@ =~ s/\n.*//sr) if !$done;
        1;
    };
    push(@words, "a signal after teardown: $@" =~ s/\n//gr) if $caught;
    my $told = $done ? 'success' : 'failure';
    push(@words, "told: $told", "up: " . ($access->_is_up ? 1 : 0), "signals: $signals");
    if ($life eq 'retries' && $access->_is_up) {
        my $again = eval { $access->teardown(1); 1 };
        push(@words, 'again: ' . ($again ? 'success' : $@ =~ s/\n.*//sr));
        push(@words, 'class: ' . (ref($@) ? $@->class : '')) if !$again;
    }
    return @words;
}

sub run_client ($backend, $path, $life, $fault) {
    pipe(my $from, my $to) or die "pipe: $!\n";
    pipe(my $wait, my $go) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($_) for $from, $go;
        my @words = eval {
            local $SIG{__WARN__} = sub { };
            my @log;
            my $access = $backend->access(
                qmp => $path,
                log => sub ($level, $text) { push(@log, "$level: $text") },
                $fault eq 'stall' ? (timeout => $short) : (),
            );
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            kill('STOP', $$);
            @log = ();
            my @words = tear_down($access, $life);
            (@words, map { "log $_" } @log);
        };
        syswrite($to, join("\n", @words, $@ ? "died: $@" : ()) . "\n-\n");
        sysread($wait, my $byte, 1) if $life eq 'lives';
        POSIX::_exit(0);
    }
    close($_) for $to, $wait;
    return { pid => $pid, from => $from, go => $go };
}

# ---- one point ----

# A backup that begins with a clean bitmap: { proxy, words }.
sub backup_with_fault ($backend, $fault, $at, $life, $then = undef) {
    write_disk($backend, 'old');
    my $proxy = proxy($backend);
    my $client = run_client($backend, $proxy->socket_path, $life, $then ? 'stall' : $fault);
    waitpid($client->{pid}, POSIX::WUNTRACED());
    write_disk($backend, 'new');
    $proxy->stop;
    $proxy = proxy($backend, fault => $fault, at => $at, then => $then // {});
    kill('CONT', $client->{pid});
    my @words;

    while (defined(my $line = readline($client->{from}))) {
        chomp($line);
        last if $line eq '-';
        push(@words, $line);
    }
    $proxy->stop;
    return { client => $client, proxy => $proxy, words => \@words };
}

sub finish_client ($client) {
    local $SIG{PIPE} = 'IGNORE';
    syswrite($client->{go}, '.');
    waitpid($client->{pid}, 0);
    return;
}

# { block => 1 } of the next backup, or undef if it is a full one. It uses the path by which the client knew
# QEMU, because the path identifies the client's directory.
sub next_blocks ($backend) {
    my $proxy = proxy($backend);
    my $all = $backend->next_dirty(log => sub { }, qmp => $proxy->socket_path);
    $proxy->stop;
    my $dirty = $all->{disk0} // return undef;
    return $dirty;
}

sub old_blocks ($dirty) {
    return grep { $_ < $offset{new} - $offset{new} % $coarsest } keys $dirty->%*;
}

sub check_bits ($backend, $told, $fault, $name) {
    my $dirty = next_blocks($backend);
    my @missing;
    if ($dirty) {
        my @must = $told eq 'success' ? qw(new) : qw(old new);
        @missing = grep { !$dirty->{ $offset{$_} } } @must;
    }
    is("@missing", '', "$name: told a $told: no bit is missing");
    is_deeply([old_blocks($dirty)], [], "$name: told a success: and none is too many")
        if $told eq 'success' && $dirty;
    return;
}

sub word ($run, $pattern) {
    my ($value) = map { m/\A$pattern(.*)/ ? $1 : () } $run->{words}->@*;
    return $value;
}

# The commands that change the bitmaps, after the exports have been removed.
sub is_commit ($name) { return $name =~ m/\A(?:transaction|backup-access-teardown)\z/ }

sub check_told ($run, $fault, $life, $name) {
    my @names = map { $_->{name} } $run->{proxy}->commands;
    my ($struck) = $run->{proxy}->records('fault');
    my $at = $struck && $run->{at};
    my ($commit) = grep { is_commit($names[$_]) } 0 .. $#names;
    my $told = word($run, 'told: ') // return fail("$name: the process says what it was told");
    is($told, 'success', "$name: an event after the commit does not make it a failure")
        if $struck && defined($commit) && $at > $commit + 1;
    if ($fault eq 'signal') {
        is(word($run, 'signals: '), 1, "$name: the signal is not swallowed");
        is(
            !!word($run, 'a signal after teardown: '),
            $told eq 'success',
            "$name: the signal arrived after teardown"
        );
    }
    is(word($run, 'up: '), 0, "$name: after a success it is down") if $told eq 'success';
    isnt(word($run, 'again: '), 'success', "$name: a second teardown does not report success");
    if (defined(word($run, 'again: ')) && !$run->{then}) {
        like(
            word($run, 'again: '),
            qr/as after a failed backup/,
            "$name: a second one says failure"
        );
        is(word($run, 'class: '), 'StateError', "$name: the class of the error");
    }
    return $told;
}

sub point ($backend, $fault, $at, $life, $then = undef) {
    my $run = backup_with_fault($backend, $fault, $at, $life, $then);
    $run->{at} = $at;
    $run->{then} = $then;
    my ($struck) = $run->{proxy}->records('fault');
    my $name = "$fault, number $at" . ($struck ? " ($struck->{name})" : '') . ", $life";
    $name .= join('', map { ", then $then->{$_}, number $_" } sort(keys(($then // {})->%*)));
    my $told = check_told($run, $fault, $life, $name) // 'failure';
    if ($life eq 'lives') {
        my $busy = !eval {
            PVE::BackupAccess->recover($backend->options, log => sub { });
            1;
        };
        like("$@", qr/process $run->{client}{pid} is/, "$name: no other process undoes it")
            if $busy;
    }
    finish_client($run->{client});
    check_bits($backend, $told, $fault, $name);
    diag(join("\n", $name, $run->{words}->@*)) if !Test::More->builder->is_passing;
    return $struck;
}

sub outcome_of_good ($backend) {
    my $run = backup_with_fault($backend, '', 0, 'dies');
    finish_client($run->{client});
    is(word($run, 'told: '), 'success', 'without a fault, the backup is a success');
    is(scalar(grep { m/^log (?:warn|err)/ } $run->{words}->@*), 0, 'without a warning');
    my $dirty = next_blocks($backend);
    ok($dirty->{ $offset{new} } && !old_blocks($dirty), 'the bitmap has the new writes only');
    return scalar($run->{proxy}->commands);
}

sub sweep ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => [{ id => 'disk0', size => $size, format => 'qcow2' }]
    );
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    my $outside = $backend->outside;
    my $total = outcome_of_good($backend);
    for my $fault (@faults) {
        my @places = shuffle(1 .. $total);
        @places = sort { $a <=> $b } @places[0 .. min($points // $total, $total) - 1];
        for my $at (@places) {
            for my $life ($points ? $lives[int(rand(@lives))] : @lives) {
                point($backend, $fault, $at, $life) or last;
            }
        }
    }
    pairs($backend, $total);
    is_deeply($backend->outside, $outside, 'nothing is left');
    $backend->check_manners;
    return;
}

# A second fault during the handling of the first one, which mostly consists of the next few commands.
sub pairs ($backend, $total) {
    my @kinds = qw(lose stall drop refuse);
    for my $number (1 .. ($points ? 4 : 200)) {
        my $at = 1 + int(rand($total));
        my %then = ($at + 1 + int(rand(4)) => $kinds[int(rand(@kinds))]);
        point($backend, $kinds[$number % @kinds], $at, $lives[int(rand(@lives))], \%then);
    }
    return;
}

diag("$points places of each fault, seed $seed") if $points;
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { sweep($name) };
}

done_testing;
