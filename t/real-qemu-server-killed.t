# The real PVE::VZDump with the code of doc/qemu-server.md, on a real Proxmox QEMU: stopped or killed at each QMP command of
# a backup, qemu-server's own commands and ours. After that, the guest runs, and the next backup succeeds without a repair and
# has all bytes. After today's code has been killed, this needs recover with 'foreign'.
#
# PBA_FULL=1 takes about an hour; a plain run includes some points, chosen by a seed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use List::Util qw(shuffle);
use Test::More;

use PBA::Test::QMPProxy;
use PBA::Test::VZDump::Guest;
use PVE::BackupAccess;

my ($seed, $share) = (20261130, 2);
my @mechanisms = ('nbd', 'file-handle');
my $guest = PBA::Test::VZDump::Guest->start;
my ($vm, $agent) = ($guest->vm, $guest->agent);
my $socket = '/run/qemu-server/' . $guest->vmid . '.qmp';
my $byte = 0;
srand($seed);

my $proxy;

# Whatever happens, a client sees the same VM: a proxy always has the socket.
sub listen_with (%fault) {
    undef($proxy);
    unlink($socket);
    $proxy = PBA::Test::QMPProxy->start(
        target => $vm->qmp_path,
        listen => $socket,
        group => 1,
        %fault
    );
    return;
}

# The names of all commands of a backup that succeeds.
sub commands_of ($form, $mechanism) {
    listen_with();
    my $made = $guest->backup($form, $mechanism);
    is($made->{state}, 'ok', "$form, $mechanism") or diag($made->{msg} // $made->{status});
    return map { $_->{name} } $proxy->commands;
}

# Returns [fault, number of the command] for each point. A query changes nothing that a killed process leaves in QEMU.
sub points ($form, $mechanism, @faults) {
    my @commands = commands_of($form, $mechanism);
    my @points;
    for my $at (1 .. @commands) {
        my $is_query = $commands[$at - 1] =~ m/\Aquery-/;
        push(@points, map { [$_, $at] } grep { !$is_query || !m/\Akill/ } @faults);
    }
    diag("$form, $mechanism: " . @commands . ' commands, ' . @points . ' points');
    return $ENV{PBA_FULL} ? @points : (shuffle(@points))[0 .. $share - 1];
}

sub spoil () {
    $byte = 1 + $byte % 255;
    $guest->spoil($byte);
    return;
}

# The last of freeze and thaw that the guest's agent has got.
sub last_of_agent () {
    my ($last) = reverse(grep { m/-(?:freeze|thaw)\z/ } $agent->commands);
    return $last // '';
}

sub guest_runs ($what) {
    is($vm->qmp('query-status')->{status}, 'running', "$what: the guest runs");
    return;
}

# qemu-server runs some of its own commands in evals, which also catch the exception of a signal, and it changes the text of
# that exception.
sub check_stopped ($made, $struck, $what) {
    is($made->{status}, 0, "$what: VZDump ends by itself");
    like($made->{msg} // '', qr/interrupted by signal$/, "$what: it fails because of the signal")
        if $made->{state} ne 'ok';
    is($made->{died} // $made->{state}, "interrupted by signal\n", "$what: VZDump stops")
        if $made->{state} ne 'ok' && !grep { $_ eq $struck } $made->{qmp}->@*;
    isnt(last_of_agent(), 'guest-fsfreeze-freeze', "$what: the guest is not frozen");
    $guest->is_outside($what, qr/snapshot|pba/);
    return;
}

# Ends the backup at this point; returns its name.
sub strike ($form, $mechanism, $fault, $at) {
    spoil();
    listen_with(fault => $fault, at => $at);
    my $made = $guest->backup($form, $mechanism);
    my ($struck) = map { $_->{name} } $proxy->records('fault');
    my $what = "$form, $mechanism, $fault, command $at, " . ($struck // 'not reached');
    ok(defined($struck), "$what: reached");
    guest_runs($what);
    if ($fault =~ m/\Akill/) {
        is($made->{status}, 9, "$what: killed");
        $guest->unlock;
    }
    else {
        check_stopped($made, $struck, $what);
    }
    spoil();
    listen_with();
    return ($what, $made);
}

sub check_next ($form, $mechanism, $what) {
    my $made = $guest->backup($form, $mechanism);
    is($made->{state}, 'ok', "$what: the next backup") or diag($made->{msg} // $made->{status});
    guest_runs("$what, the next backup");
    $guest->stored_all($form, $mechanism, "$what, the next backup");
    $guest->is_outside("$what, the next backup");
    is(last_of_agent(), 'guest-fsfreeze-thaw', "$what, the next backup: the guest is not frozen");
    return;
}

sub check_point ($form, $mechanism, $fault, $at) {
    my ($what) = strike($form, $mechanism, $fault, $at);
    return check_next($form, $mechanism, $what);
}

# The forms take turns.
sub check_today ($form, $mechanism, $fault, $at) {
    my ($what, $made) = strike('today', $mechanism, $fault, $at);
    my $target = 'snapshot-access:' . $guest->vzdump->storage('today', $mechanism);
    my $lines
        = eval { PVE::BackupAccess->recover(qmp => $socket, foreign => 1, 'target-id' => $target) };
    ok($lines, "$what: undone as foreign") or diag($@);
    $guest->is_outside("$what, undone", qr/snapshot/);
    check_next($_, $mechanism, "$what, undone, $_") for 'today', $form;
    $guest->vzdump->end_group($made->{group});
    return;
}

my @faults = qw(kill-before kill-after terminate interrupt);
my @forms = ('one object', 'call by call');
for my $mechanism (@mechanisms) {
    for my $form (@forms) {
        check_point($form, $mechanism, $_->@*) for points($form, $mechanism, @faults);
    }
    for my $point (points('today', $mechanism, @faults[0, 1])) {
        check_today($forms[0], $mechanism, $point->@*);
        @forms = reverse(@forms);
    }
}

done_testing;
