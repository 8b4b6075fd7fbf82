# A monitor serves one client at a time. During waits of several seconds, others can use it between two queries,
# which become less frequent. QEMU since 10.0 ends an export with a stuck reader at once, so there is no wait.

use v5.36;

use lib 't/lib';

use IO::Select;
use IO::Socket::UNIX;
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::Backend;
use PBA::Test::Command qw(start_command);
use PBA::Test::QMPProxy;
use PBA::Test::ScriptedQEMU;
use PBA::Test::VM;

my $Backend = 'PBA::Test::Backend';
my $VM = 'PBA::Test::VM';

my $MiB = 1 << 20;

sub in_child ($code) {
    my $pid = fork() // die "cannot fork: $!\n";
    return $pid if $pid;
    eval { $code->(); 1 };    # the connection of a reader is cut
    POSIX::_exit(0);
}

# The last command, apart from the handshake, and how often it was sent in a row.
sub last_in_row ($proxy) {
    my @names = map { $_->{name} } $proxy->commands;
    my $last = $names[-1] // '';
    my $count = 0;
    $count++ while $count < @names && $names[-1 - $count] eq $last;
    return ($last, $count);
}

sub receive ($socket, $length) {
    while ($length > 0) {
        $length -= sysread($socket, my $data, $length) || die "the NBD connection ended\n";
    }
    return;
}

# A reader that sends requests for more data than a socket's buffers hold, and never reads an answer. A Volume
# would not do: if the machine is busy, it may have got all answers before its callback runs.
sub start_stuck_reader ($device, $volumes) {
    my $pid = in_child(
        sub {
            my $socket = IO::Socket::UNIX->new(Peer => $volumes->{$device}{'nbd-path'});
            receive($socket, 18);
            my $option = pack('N a8 N N/a*', 3, 'IHAVEOPT', 1, $device);    # NBD_OPT_EXPORT_NAME
            syswrite($socket, $option);
            receive($socket, 10);
            syswrite($socket, pack('N n n Q> Q> N', 0x25609513, 0, 0, $_, $_ * $MiB, $MiB))
                for 0 .. 15;
            receive($socket, 1);
            kill(STOP => $$);
        }
    );
    waitpid($pid, POSIX::WUNTRACED());
    ok(POSIX::WIFSTOPPED(${^CHILD_ERROR_NATIVE}), 'a reader is stuck');
    return $pid;
}

# Runs in a separate process: waits until teardown waits for an export, then expects QEMU's greeting; then lets
# the reader continue in any case. Reports the result in one line.
sub watch ($proxy, $reader, $result) {
    my $until = time + 20;
    sleep(0.02) while (last_in_row($proxy))[1] < 6 && time < $until;
    my $socket = IO::Socket::UNIX->new(Peer => $proxy->socket_path);
    my $greeted = IO::Select->new($socket)->can_read(5) ? 'greeted' : 'not greeted';
    close($socket);
    my ($name, $before) = last_in_row($proxy);
    sleep(2);
    my $asked = (last_in_row($proxy))[1] - $before;
    syswrite($result, "$name $greeted " . ($asked <= 10 ? 'seldom' : "$asked times in 2 s"));
    kill(CONT => $reader);
    return;
}

for my $name ($Backend->names) {
    subtest "$name: teardown while a reader is stuck" => sub {
        my $backend = $Backend->start(
            name => $name,
            disks => [{ id => 'disk0', size => 64 * $MiB }],
            guest => 0,
        );
        plan skip_all => 'only for QEMU before 10.0' if $backend->vm->version->[0] >= 10;
        my $outside = $backend->outside;
        my $path = $backend->vm->dir . '/proxy.qmp';
        my $proxy = PBA::Test::QMPProxy->start(target => $backend->qmp_path, listen => $path);
        my $access = $backend->access(qmp => $proxy->socket_path);
        $access->setup($backend->devices('none'));
        my $reader = start_stuck_reader($backend->device('disk0'), $access->volumes('nbd'));
        pipe(my $from_watcher, my $result) or die "pipe: $!\n";
        my $watcher = in_child(sub { watch($proxy, $reader, $result) });
        close($result);
        $access->teardown(0);
        is(<$from_watcher>, 'query-block-exports greeted seldom', 'another client is served');
        waitpid($_, 0) for $reader, $watcher;
        is_deeply($backend->outside, $outside, 'nothing is left');
        $backend->check_manners;
    };
}

subtest 'a client that does not disconnect' => sub {
    my $backend = $Backend->start_paused(
        name => $VM->is_proxmox ? 'pve' : 'upstream',
        disks => [{ id => 'disk0', size => $MiB }],
    );
    my $client = IO::Socket::UNIX->new(Peer => $backend->qmp_path) or die "monitor: $!\n";
    readline($client);
    my @log;
    my $log = sub ($level, $message) {
        push(@log, "$level: $message");
        undef($client);
    };
    my $device = $backend->device('disk0');
    my $sizes = $backend->access(log => $log)->sizes($device);
    is($sizes->{$device}, $MiB, 'it is waited for');
    my $path = $backend->qmp_path;
    is(
        "@log",
        "info: waiting for the QMP monitor '$path': another client uses it, or QEMU is busy",
        'and the log says so'
    );
};

# The command says that it waits, whatever it does first, unless it is to be quiet.
subtest 'the command, while a client does not disconnect' => sub {
    my $backend = $Backend->start_paused(
        name => $VM->is_proxmox ? 'pve' : 'upstream',
        disks => [{ id => 'disk0', size => $MiB }],
    );
    my $path = $backend->qmp_path;
    my $store = $backend->vm->dir . '/store';
    mkdir($store) or die "$store: $!\n";
    my @guest = ('--qmp', $path);
    my $line
        = qr/^waiting for the QMP monitor '\Q$path\E': another client uses it, or QEMU is busy$/m;
    my %commands = (
        backup => ['backup', $store, @guest, '--guest', 'web1', '--exclude', 'none'],
        status => ['status', @guest],
        recover => ['recover', @guest, '--target-id', 'none'],
        forget => ['forget', @guest, '--target-id', 'none'],
        map => ['map', 'disk0', @guest],
    );
    for my $name (sort keys %commands) {
        my $client = IO::Socket::UNIX->new(Peer => $path) or die "monitor: $!\n";
        readline($client);
        my $command = start_command($commands{$name}->@*);
        $command->wait_for(err => $line);
        undef($client);
        my @lines = $command->finish->{err} =~ m/$line/g;
        is(scalar(@lines), 1, "$name: one line");
    }
    my $client = IO::Socket::UNIX->new(Peer => $path) or die "monitor: $!\n";
    readline($client);
    my $command = start_command($commands{backup}->@*, '--quiet');
    sleep(3);
    undef($client);
    unlike($command->finish->{err}, $line, 'backup --quiet: none');
};

# QEMU sends the reply to a command of a client that has disconnected to the next client.
subtest 'after a client that disconnected during a command' => sub {
    my $backend = $Backend->start(
        name => $VM->is_proxmox ? 'pve' : 'upstream',
        guest => 0,
        disks => [{ id => 'disk0', size => $MiB }],
        args => ['-m', 512],
    );
    my $slow
        = '"execute": "pmemsave", "arguments": {"val": 0, "size": 536870912, "filename": "/dev/null"}';
    my @errors;
    for (1 .. 5) {
        my $client = IO::Socket::UNIX->new(Peer => $backend->qmp_path) or die "monitor: $!\n";
        readline($client);
        syswrite($client, qq({"execute": "qmp_capabilities"}\n));
        readline($client);
        syswrite($client, "{$slow, \"id\": \"2\"}\n");
        sleep(0.02);
        close($client);
        eval { $backend->status; 1 } or push(@errors, "$@");
    }
    is("@errors", '', 'no command gets the reply of another one');
};

# After a command that begins something, each of that many queries uses a connection of its own.
sub check_polls ($peer, $begin, $command, $times) {
    my ($begun) = grep { $_->{execute} eq $begin } $peer->commands;
    my @polls = grep { $_->{execute} eq $command && $_->{n} > $begun->{n} } $peer->commands;
    splice(@polls, $times);
    my %connections = map { $_->{connection} => 1 } @polls;
    is(scalar(@polls), $times, "$command was polled");
    is(scalar(keys %connections), $times, 'each query has its own connection');
    cmp_ok($polls[-1]{time} - $polls[-2]{time}, '>', 0.06, 'less and less often');
    return;
}

subtest 'an export that ends slowly' => sub {
    my $asks = 0;
    my $deleted = 0;
    my $export = { id => '', type => 'nbd', 'node-name' => '#snap0', 'shutting-down' => \1 };
    my %returns = pve_returns(
        'block-export-add' => sub ($arguments) { $export->{id} = $arguments->{id}; return {} },
        'block-export-del' => sub (@) { $deleted = 1; return {} },
        'query-block-exports' =>
            sub (@) { return $export->{id} && (!$deleted || $asks++ < 8) ? [$export] : [] },
    );
    my $peer = start_peer(\%returns);
    my $access = new_access($peer);
    $access->setup(\@one);
    $access->volumes('nbd');
    $access->teardown(1);
    check_polls($peer, 'block-export-del', 'query-block-exports', 9);
};

subtest 'a job that does not end' => sub {
    my $id;
    my $asked = 0;
    my %returns = upstream_returns(
        'blockdev-backup' => sub ($arguments) { $id = $arguments->{'job-id'}; return {} },
        'query-jobs' => sub (@) {
            return $id
                && $asked++ < 8 ? [{ id => $id, type => 'backup', status => 'running' }] : [];
        },
    );
    my $peer = start_peer(\%returns);
    mkdir("$dir/fleecing");
    my $access = new_access($peer, 'fleecing-dir' => "$dir/fleecing");
    ok(!eval { $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'new' }]); 1 },
        'setup fails, because this peer has no bitmaps');
    check_polls($peer, 'blockdev-backup', 'query-jobs', 8);
};

done_testing();
