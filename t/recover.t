# A client is killed before and after every QMP command of a backup. After each the guest runs, one
# call of recover, or the next setup by itself, cleans up, and no bitmap lacks a bit (I2, I5).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::QMPProxy;

my $mib = 1024 * 1024;
my $size = 16 * $mib;
my @ids = qw(disk0 disk1);

# Every point takes minutes, so that a plain run takes one in four; PBA_FULL=1 takes all.
my $stride = $ENV{PBA_FULL} ? 1 : 4;
my $seed = 1;

# What must be dirty: written before the setup, and while it was up.
my ($before, $during) = (0, 8 * $mib);

sub make_base ($backend) {
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    $backend->guest->write($_, $before, 65536, 0x31) for @ids;
}

# One VM under one path, whatever the proxy does.
sub proxy ($backend, %fault) {
    return PBA::Test::QMPProxy->start(
        target => $backend->qmp_path,
        listen => $backend->vm->dir . '/proxy.qmp',
        %fault,
    );
}

# Returns the steps that were done, and the command that the client was killed at; undef for none.
sub killed_backup ($backend, $mode, $success, $fault, $at) {
    my $proxy = proxy($backend, fault => $fault, at => $at);
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access(qmp => $proxy->socket_path, timeout => 10);
            $access->setup($backend->devices($mode));
            $tell->('setup');
            $access->volumes('nbd');
            $tell->('volumes');
            $access->teardown($success);
            $tell->('teardown');
        }
    );
    my %done;
    while (defined(my $word = $client->next_word)) {
        $done{$word} = 1;
        $backend->guest->write($_, $during, 65536, 0x32) for $word eq 'volumes' ? @ids : ();
        $client->let_go_on;
    }
    $client->wait_end;
    my ($struck) = $proxy->records('fault');
    my @sent = map { $_->{name} } $proxy->commands;
    pop(@sent) if $struck && $fault eq 'kill-before';

    # From here on it was a success or not, whatever the client lived to see.
    my ($export) = grep { $sent[$_] eq 'block-export-add' } 0 .. $#sent;
    $done{teardown} = defined($export)
        && grep { m/\A(?:transaction|backup-access-teardown)\z/ } @sent[$export .. $#sent];
    return (\%done, $struck && $struck->{name});
}

sub recover ($backend, $path) {
    return PVE::BackupAccess->recover($backend->options(qmp => $path), log => sub { });
}

sub same ($got, $expected) {
    state $json = JSON::PP->new->canonical;
    return $json->encode($got) eq $json->encode($expected);
}

sub missing_writes ($dirty, $success, $done) {
    my @needed = ($done->{teardown} && $success ? () : $before, $done->{volumes} ? $during : ());
    my @problems;
    for my $device (sort keys $dirty->%*) {
        push(@problems, "$device: the write at $_ is in no bitmap")
            for grep { !$dirty->{$device}{$_} } @needed;
    }
    return @problems;
}

# How: by recover, or by the next setup.
sub check_after ($backend, $outside, $how, $success, $done, $name) {
    my $proxy = proxy($backend);
    my $path = $proxy->socket_path;
    my @problems;
    if ($how eq 'recover') {
        my $lines = eval { recover($backend, $path) };
        push(@problems, "recover: $@") if !$lines;
        push(@problems, $backend->problems($outside));
        my $again = eval { recover($backend, $path) } // [$@];
        push(@problems, "recover did something again: $again->@*") if $again->@*;
    }
    my @warnings;
    my $log = sub ($level, $text) { push(@warnings, $text) if $level eq 'warn' };
    my $dirty = eval { $backend->next_dirty(qmp => $path, log => $log) };
    push(@problems, "the next backup: $@") if !$dirty;
    push(@problems, "the next backup warns after recover: @warnings")
        if $how eq 'recover' && @warnings;
    push(@problems, $backend->problems($outside));
    push(@problems, missing_writes($dirty // {}, $success, $done));
    is("@problems", '', $name);
    return !@problems;
}

my $points = 0;

sub sweep ($name, $how, $mode, $success) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [map { { id => $_, size => $size, format => 'qcow2' } } @ids],
    );
    my $outside = $backend->outside;
    for my $fault (qw(kill-before kill-after)) {
        for (my $at = 1 + $seed % $stride;; $at += $stride) {
            make_base($backend);
            my ($done, $command) = killed_backup($backend, $mode, $success, $fault, $at);
            last if !$command;
            $points++;
            check_after($backend, $outside, $how, $success, $done, "$fault $command, number $at")
                or return;
        }
    }
    $backend->check_manners;
}

sub check_live ($name) {
    my $backend
        = PBA::Test::Backend->start(name => $name, disks => [{ id => 'disk0', size => $size }]);
    my $outside = $backend->outside;
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access;
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            $tell->('up');
            $access->teardown(1);
        }
    );
    is($client->next_word, 'up', 'a client has an access');
    my $exports = $backend->vm->exports;
    my $pid = $client->pid;
    for my $target ('snapshot-access:test', 'another') {
        my %options = $backend->options('target-id' => $target);
        ok(!eval { PVE::BackupAccess->recover(%options); 1 }, "recover of $target: refused");
        is($@->class, 'StateError', "recover of $target: class");
        like("$@", qr/\bprocess $pid\b/, "recover of $target: names the process");
        my $access = $backend->access('target-id' => $target);
        ok(!eval { $access->setup($backend->devices('use')); 1 }, "setup for $target: refused");
        like("$@", qr/\bprocess $pid\b/, "setup for $target: names the process");
    }
    ok(same($backend->vm->exports, $exports), 'its exports were not touched');
    kill('KILL', $pid);
    for (1 .. 500) {
        open(my $stat, '<', "/proc/$pid/stat") or last;
        last if (<$stat>) =~ m/\) Z /;
        select(undef, undef, undef, 0.01);
    }
    my $other = $backend->access('target-id' => 'another');
    ok(
        !eval { $other->setup($backend->devices('use')); 1 },
        'setup for another target than the dead one\'s: refused'
    );
    like("$@", qr/left its access for .*call recover/, 'and says what to do');
    my $lines = recover($backend, $backend->qmp_path);
    ok($lines->@* > 3, 'a zombie is dead: recover says what it did') or diag(explain($lines));
    ok(same($backend->outside, $outside), 'nothing is left');
    $client->wait_end;
    $backend->check_manners;
}

sub check_danger () {
    my $backend
        = PBA::Test::Backend->start(name => 'pve', disks => [{ id => 'disk0', size => $size }]);
    plan(skip_all => 'not on a QEMU with Proxmox\' commands') if !$backend->front;
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access;
            my $infos = $access->setup($backend->devices('new'));
            $access->volumes('nbd');
            $tell->(JSON::PP->new->encode($infos->[0]));
        }
    );
    my $info = JSON::PP->new->decode($client->next_word);
    $client->kill9;
    $backend->vm->qmp('block-export-del', id => $backend->vm->exports->[0]{id}, mode => 'hard');
    $backend->vm->wait_event('BLOCK_EXPORT_DELETED');
    $backend->vm->qmp(
        'block-dirty-bitmap-remove',
        node => $info->{'bitmap-node-name'},
        name => $info->{'bitmap-name'}
    );
    ok(!eval { recover($backend, $backend->qmp_path); 1 }, 'the bitmap is gone: recover refuses');
    like("$@", qr/its dirty bitmap was removed while the access was up/, 'and says why');
    ok(!(grep { $_ eq 'backup-access-teardown' } $backend->front->names), 'it was not sent');
    ok($backend->vm->is_alive, 'the VM lives');
}

diag("one point in $stride, seed $seed") if $stride > 1;
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name: a live client" => sub { check_live($name) };
    for my $how ('recover', 'the next setup') {
        for my $case ([use => 1], [new => 0]) {
            my ($mode, $success) = $case->@*;
            subtest "backend $name, $how, mode $mode, success $success" =>
                sub { sweep($name, $how, $mode, $success) };
        }
    }
}
subtest 'a bitmap was removed meanwhile' => sub { check_danger() };
diag("$points points");

done_testing;
