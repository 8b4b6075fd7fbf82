# recover or the next setup undoes the leftovers of a killed client, unless they belong to a live process, and
# does nothing that would crash QEMU (I2, I5). crash-points.t sweeps all points of a kill.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::Handle;

my $Backend = 'PBA::Test::Backend';
my $Client = 'PBA::Test::Client';
my $Handle = 'PBA::Test::Handle';

my $mib = 1024 * 1024;
my $size = 16 * $mib;

sub recover ($backend, $path) {
    return PVE::BackupAccess->recover($backend->options(qmp => $path), log => sub { });
}

sub same ($got, $expected) {
    state $json = JSON::PP->new->canonical;
    return $json->encode($got) eq $json->encode($expected);
}

# A client that has an access, runs the code, and is then killed.
sub leave_access ($backend, $code) {
    my $client = $Client->start(
        sub ($tell) {
            my $access = $backend->access;
            $access->setup($backend->devices('use'));
            my @keep = $code->($access);
            $tell->('up');
        }
    );
    is($client->next_word, 'up', 'a client has an access');
    return $client;
}

sub check_live ($backend) {
    my $outside = $backend->outside;
    my $client = $Client->start(
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
    ok(same($backend->vm->exports, $exports), 'its exports are unchanged');
    check_zombie($backend, $pid);
    ok(same($backend->outside, $outside), 'nothing is left');
    $client->wait_end;
}

# The process has not been waited for.
sub check_zombie ($backend, $pid) {
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
    like("$@", qr/left its access for .*call recover/, 'the error says what to do');

    # Prepares what a task prepares before a setup that recovers. On Proxmox, the filter stays above the disk.
    if ($backend->name eq 'upstream') {
        my @devices = map { $_->{device} } $backend->devices('use')->@*;
        my $sizes = eval { $backend->access->sizes(@devices) } or diag($@);
        is_deeply([sort keys(($sizes // {})->%*)], [sort @devices], 'sizes can be asked for');
    }
    my $lines = recover($backend, $backend->qmp_path);
    ok($lines->@* > 3, 'a zombie is dead: recover says what it did') or diag(explain($lines));
}

# The access of another object of this process, which uses another path of the socket.
sub check_own ($backend) {
    my $second = $backend->vm->dir . '/second.qmp';
    link($backend->qmp_path, $second) or die "link: $!\n";
    my $outside = $backend->outside;
    my $access = $backend->access;
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    my $during = $backend->outside;
    for my $target ('snapshot-access:test', 'another') {
        my %options = $backend->options(qmp => $second, 'target-id' => $target);
        refused(
            sub { PVE::BackupAccess->recover(%options) },
            qr/not finished: process $$ is already backing it up/,
            "recover of $target"
        );
        refused(
            sub { PVE::BackupAccess->new(%options)->setup($backend->devices('use')) },
            qr/not finished: process $$ is already backing it up/,
            "setup for $target"
        );
    }
    is_deeply($backend->outside, $during, 'the access is unchanged');
    ok(eval { $access->teardown(1); 1 }, 'it ends well') or diag($@);
    is_deeply($backend->outside, $outside, 'nothing is left');
}

sub check_danger () {
    my $backend
        = $Backend->start(name => 'pve', guest => 0, disks => [{ id => 'disk0', size => $size }]);
    plan(skip_all => 'not on a QEMU with Proxmox\' commands') if !$backend->front;
    my $client = $Client->start(
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
    like("$@", qr/its dirty bitmap was removed while the access was up/, 'the error says why');
    ok(!(grep { $_ eq 'backup-access-teardown' } $backend->front->names),
        'the command was not sent');
    ok($backend->vm->is_alive, 'the VM lives');
}

sub refused ($code, $pattern, $name) {
    ok(!eval { $code->(); 1 }, "$name: refused");
    is($@->class, 'StateError', "$name: class");
    like("$@", $pattern, "$name: the message");
}

sub check_unasked ($backend) {
    my $outside = $backend->outside;
    leave_access($backend, sub ($access) { $access->volumes('nbd') })->kill9;
    my $left = $backend->outside;
    my $access = $backend->access(recover => 0);
    refused(
        sub { $access->setup($backend->devices('use')) },
        qr/for target 'snapshot-access:test' not finished: .* left its access - call recover/,
        'setup told not to recover'
    );
    is_deeply($backend->outside, $left, 'nothing was changed');
    my @log;
    $access = $backend->access(log => sub ($level, $text) { push(@log, "$level: $text") });
    $access->setup($backend->devices('use'));
    like(
        "@log",
        qr/warn: undoing the access that a dead process left/,
        'a setup that may recover logs the leftover access'
    );
    like(
        "@log",
        qr/info: device disk0: export 'pba-exp-\S+ was removed/,
        'the log says what was done'
    ) if $backend->name eq 'upstream';
    $access->teardown(1);
    is_deeply($backend->outside, $outside, 'nothing is left');

    # A single mark does not disturb anything.
    leave_access($backend, sub ($access) { })->kill9;
    recover($backend, $backend->qmp_path);
    $access = $backend->access(recover => 0);
    $access->setup($backend->devices('use'));
    $access->teardown(1);
    pass('after recover that setup works, too');
}

# Two guests without a name, over code refs: nothing distinguishes the directories of one from those of the
# other.
sub check_namesakes ($backend) {
    my $vm = $backend->vm;
    my $other = $Backend->start(
        name => 'upstream',
        guest => 0,
        disks => [{ id => 'disk0', size => $size }]
    );
    my $code = sub ($command, $arguments) { return $vm->qmp($command, $arguments->%*) };
    my %other = $other->options(
        qmp => sub ($command, $arguments) { return $other->vm->qmp($command, $arguments->%*) },
        'run-dir' => $backend->work_dir('run')
    );
    my $mechanism = $Handle->missing ? 'nbd' : 'file-handle';
    my $client = $Client->start(
        sub ($tell) {
            my $access = $backend->access(qmp => $code);
            $access->setup($backend->devices('new'));
            my $volume = $access->volumes($mechanism)->{disk0};
            my $reader = PVE::BackupAccess::Volume->open('disk0', $volume);
            $tell->('up');
            $tell->(length($reader->pread(0, 65536)));
            $access->teardown(1);
            $tell->('down');
        }
    );
    is($client->next_word, 'up', 'a client has an access to one guest');
    my $lines = eval { PVE::BackupAccess->recover(%other) };
    is_deeply($lines, [], 'nothing of the other one is left') or diag($@);
    my $access = PVE::BackupAccess->new(%other);
    ok(eval { $access->setup($other->devices('new')); 1 }, 'the other guest can be backed up')
        or diag($@);
    ok(eval { $access->teardown(1); 1 }, 'to the end') or diag($@);
    $client->let_go_on;
    is($client->next_word, 65536, 'the client can still read its guest');
    $client->let_go_on;
    is($client->next_word, 'down', 'the access of the first guest ends normally');
    $client->let_go_on;
    $client->wait_end;
    check_dead_namesake($backend, $code, \%other, $other);
}

# The process is killed. The other guest has an NBD server of another program.
sub check_dead_namesake ($backend, $code, $options, $other) {
    my $client = $Client->start(
        sub ($tell) {
            my $access = $backend->access(qmp => $code);
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            $tell->('up');
        }
    );
    is($client->next_word, 'up', 'a client has an access to one guest');
    $client->kill9;
    my %address = (type => 'unix', data => { path => $other->vm->dir . '/foreign' });
    $other->vm->qmp('nbd-server-start', addr => \%address);
    my $lines = eval { PVE::BackupAccess->recover($options->%*) };
    is_deeply($lines, [], 'a dead process left nothing in the other guest') or diag($@);
    $other->vm->qmp('nbd-server-stop');
    my $access = PVE::BackupAccess->new($options->%*);
    ok(eval { $access->setup($other->devices('new')); $access->teardown(1) }, 'its next backup')
        or diag($@);
    my %first = $backend->options(qmp => $code, log => sub { });
    $lines = eval { PVE::BackupAccess->recover(%first) } // [$@];
    like("@$lines", qr/the NBD server at \S+ was stopped/, 'the first guest is recovered');
    is_deeply($backend->vm->exports, [], 'its exports are gone');
    return;
}

# A client by code ref and one by socket find what the other one left.
sub check_other_kind ($backend) {
    my ($vm, $path) = ($backend->vm, $backend->qmp_path);
    my %qmp = (
        socket => $path,
        'code ref' => sub ($command, $arguments) {
            return PBA::Test::QMP->once($path, $command, $arguments);
        },
    );
    for my $kind (sort keys %qmp) {
        my ($other) = grep { $_ ne $kind } keys %qmp;
        my $client = $Client->start(
            sub ($tell) {
                my $access = $backend->access(qmp => $qmp{$kind});
                $access->setup($backend->devices('use'));
                $access->volumes('nbd');
                $tell->('up');
            }
        );
        is($client->next_word, 'up', "$kind: a client has an access");
        $client->kill9;
        my $lines = recover($backend, $qmp{$other});
        like("@$lines", qr/the NBD server at \S+ was stopped/, "$kind: recovered by $other");
        my $access = $backend->access(qmp => $qmp{$kind}, log => sub { });
        ok(
            eval {
                $access->setup($backend->devices('use'));
                $access->volumes('nbd');
                $access->teardown(1);
            },
            "$kind: its next backup"
        ) or diag($@);
    }
    return;
}

# Several calls at the same time: each undoes the access, finds nothing more to undo, or names a process that
# backs up the guest.
sub check_concurrent ($backend) {
    my $outside = $backend->outside;
    for my $round (1 .. 3) {
        leave_access($backend, sub ($access) { $access->volumes('nbd') })->kill9;
        my @clients = map {
            $Client->start(
                sub ($tell) {
                    my $lines = eval { recover($backend, $backend->qmp_path) };
                    chomp(my $error = "$@");
                    $tell->($lines ? "done @{[scalar($lines->@*)]}" : $error);
                }
            )
        } 1 .. 4;
        my @words = map { $_->next_word } @clients;
        $_->let_go_on for @clients;
        $_->wait_end for @clients;
        my @strange = grep { !m/\Adone \d+\z|process \d+ is already backing it up/ } @words;
        is_deeply(\@strange, [],
            "round $round: each recover is done or refused because of another process");
        my $lines = recover($backend, $backend->qmp_path);
        ok(
            $lines->@* == 0 || !(grep { m/\Adone [1-9]/ } @words),
            "round $round: only one process has undone it"
        ) or diag(explain([\@words, $lines]));
        is_deeply($backend->outside, $outside, "round $round: nothing is left");
    }
}

# A simultaneous setup does the same as recover; and at most one of several setups gets an access.
sub check_concurrent_setups ($backend) {
    my $outside = $backend->outside;
    for my $round (1 .. 3) {
        leave_access($backend, sub ($access) { $access->volumes('nbd') })->kill9;
        my @clients = map {
            my $sets_up = $_;
            $Client->start(
                sub ($tell) {
                    my $access = $backend->access(log => sub { });
                    my $done = eval {
                              $sets_up
                            ? $access->setup($backend->devices('use'))
                            : recover($backend, $backend->qmp_path);
                    };
                    chomp(my $error = "$@");
                    $tell->(!$done ? $error : $sets_up ? 'up' : 'done');
                    $access->teardown(0) if $done && $sets_up;
                    $tell->('ended');
                }
            )
        } 0, 1, 0, 1;
        my @words = map { $_->next_word } @clients;
        my @strange = grep { !m/\A(?:up|done)\z|process \d+ is already backing it up/ } @words;
        is_deeply(\@strange, [],
            "round $round: each process is done or refused because of another one");
        cmp_ok(scalar(grep { $_ eq 'up' } @words), '<=', 1, "round $round: one access at most");
        $_->let_go_on for @clients;
        is_deeply(
            [map { $_->next_word } @clients],
            [('ended') x 4],
            "round $round: all processes end without an error"
        );
        $_->let_go_on for @clients;
        $_->wait_end for @clients;
        recover($backend, $backend->qmp_path);
        is_deeply($backend->outside, $outside, "round $round: nothing is left");
    }
}

# The servers are killed too, so that dead mounts stay behind.
sub check_mounts ($backend) {
    my $outside = $backend->outside;
    my $client = leave_access($backend, sub ($access) { $access->volumes('file-handle') });
    my $dir = $backend->work_dir('run');
    my @servers = $Handle->servers($dir);
    is(scalar(@servers), 1, 'a server of a virtual file');
    kill('STOP', $client->pid);
    kill('KILL', @servers);
    $client->kill9;
    is(scalar($Handle->mounts($dir)), 1, 'a dead mount is left');
    my $lines = recover($backend, $backend->qmp_path);
    is_deeply([$Handle->mounts($dir)], [], 'recover unmounts it');
    is_deeply($backend->outside, $outside, 'nothing is left');
    is_deeply(recover($backend, $backend->qmp_path), [], 'a second call has nothing to do');
}

for my $name ($Backend->names) {
    my $backend
        = $Backend->start(name => $name, guest => 0, disks => [{ id => 'disk0', size => $size }]);
    subtest "backend $name: a live client" => sub { check_live($backend) };
    subtest "backend $name: clients of two kinds" => sub { check_other_kind($backend) };
    subtest "backend $name: a live object" => sub { check_own($backend) };
    subtest "backend $name: told not to recover" => sub { check_unasked($backend) };
    subtest "backend $name: several at once" => sub { check_concurrent($backend) };
    subtest "backend $name: several setups at once" => sub { check_concurrent_setups($backend) };
    subtest 'two guests without a name' => sub { check_namesakes($backend) }

        if $name eq 'upstream';
    subtest "backend $name: dead virtual files" => sub {
        plan(skip_all => 'no /dev/fuse') if !-w '/dev/fuse';
        check_mounts($backend);
    };
    $backend->check_manners;
}
subtest 'a bitmap was removed during the access' => sub { check_danger() };

done_testing;
