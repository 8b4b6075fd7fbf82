# The number of NBD clients is not limited, while QEMU's default is 100.

use v5.36;

use lib 't/lib';

use IO::Socket::UNIX ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Backend;

my $Backend = 'PBA::Test::Backend';
my $Volume = 'PVE::BackupAccess::Volume';
my $count = 120;

# A client that sends nothing: QEMU before 8.2 would wait for it in nbd-server-stop, with the guest stopped.
sub check_half_connected ($backend) {
    my $access = $backend->access;
    $access->setup($backend->devices('use'));
    my ($volume) = values $access->volumes('nbd')->%*;
    my $path = $volume->{'nbd-path'};
    my $client = IO::Socket::UNIX->new(Peer => $path) or die "$path: $!\n";
    my ($major, $minor) = $backend->vm->version->@*;
    my $waits = $major < 8 || ($major == 8 && $minor < 2);
    my $done = eval { $access->teardown(1); 1 };
    is($done ? 1 : 0, $waits ? 0 : 1, 'a client that says nothing: teardown');
    my $why = $@;
    ok($backend->vm->qmp('query-status'), 'QEMU keeps running');
    return if !$waits;
    like(
        $why,
        qr/has connected to the NBD server at '.*' and sends nothing more - .*: end it/,
        'the error says why'
    );
    close($client);
    ok(eval { $access->teardown(0); 1 }, 'after its end, as after a failed backup') or diag($@);
    return;
}

# A client that connects at the last moment, right before nbd-server-stop.
sub check_late_client ($backend) {
    my ($path, $client);
    my $late = sub ($command, $arguments) {
        $client = IO::Socket::UNIX->new(Peer => $path) if $command eq 'nbd-server-stop';
        local $SIG{ALRM} = sub { die "QEMU hangs in $command\n" };
        alarm(20);
        my $reply = $backend->vm->qmp($command, $arguments->%*);
        alarm(0);
        return $reply;
    };
    my $access = $backend->access(qmp => $late);
    $access->setup($backend->devices('use'));
    my ($volume) = values $access->volumes('nbd')->%*;
    $path = $volume->{'nbd-path'};
    my $done = eval { $access->teardown(1); 1 };
    ok($done, 'a client that connects right before nbd-server-stop: teardown') or diag($@);
    my ($major, $minor) = $backend->vm->version->@*;
    ok(!$client, 'the client could not connect') if $major < 8 || ($major == 8 && $minor < 2);
    return;
}

sub in_child ($code) {
    my $pid = fork() // die "fork: $!\n";
    return $pid if $pid;
    $code->();
    POSIX::_exit(0);
}

# A copy's second connection comes while QEMU drains the disk for a reset, as at a guest's boot: QEMU (10.2) waits
# until this connection ends. A slow read of another client makes the drain long enough.
sub check_connection_during_drain ($mechanism, $open, $read) {
    my $size = 1 << 20;
    my $slow = 'drive.drive-disk0.file';
    my $backend = $Backend->start_paused(
        name => 'pve',
        disks => [{ id => 'disk0', size => $size, shape => 'drive', file => 'null-co://' }],
        args => [
            qw(-action reboot=reset),
            ('-set', "$slow.size=$size"),
            ('-set', "$slow.latency-ns=1500000000"),
        ],
    );
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    my $device = $backend->device('disk0');
    my $volume = $access->volumes($mechanism)->{$device};
    my $nbd = $access->volumes('nbd')->{$device};
    my $opened = $open->($device, $volume);
    my $reader = in_child(sub { $Volume->open($device, $nbd)->pread(0, 4096) });
    sleep(0.3);
    my $resetter = in_child(sub { $backend->vm->qmp('system_reset') });
    sleep(0.3);
    local $SIG{ALRM} = sub { die "no answer\n" };
    alarm(30);
    my $length = eval { $read->($opened) };
    is($length, $size, "$mechanism: all data is read") or diag($@);
    ok(eval { $backend->vm->qmp('query-status') }, "$mechanism: QEMU goes on");
    alarm(0);
    waitpid($_, 0) for $reader, $resetter;
    undef($opened);
    $access->teardown(1);
    return;
}

sub copy_volume ($volume) {
    my $length = 0;
    $volume->copy(to => sub ($offset, $data) { $length += length($data) });
    return $length;
}

# Asks for data first, for which the file's server makes another connection.
sub read_file ($handle) {
    my $seek_data = 3;
    sysseek($handle, 0, $seek_data) // die "lseek: $!\n";
    my $length = 0;
    while (my $count = sysread($handle, my $data, 1 << 20)) {
        $length += $count;
    }
    return $length;
}

for my $name ($Backend->names) {
    subtest $name => sub {

        # If a client connects while QEMU (to 10.2) drains the disk, as at a reset of its controller by the firmware, QEMU
        # waits until the client has gone (doc/reliability.md).
        my $backend = $Backend->start_paused(
            name => $name,
            disks => [{ id => 'disk0', size => 1 << 20 }],
        );
        my $access = $backend->access;
        $access->setup($backend->devices('new'));
        my $device = $backend->device('disk0');
        my $volumes = $access->volumes('nbd');
        my @open;
        for my $n (1 .. $count) {
            local $SIG{ALRM} = sub { die "no answer\n" };
            alarm(10);
            my $volume = eval { $Volume->open($device, $volumes->{$device}) }
                or last;
            alarm(0);
            push(@open, $volume);
        }
        is(scalar(@open), $count, "$count clients at a time");
        is(length($_->pread(0, 4096)), 4096, 'each is served') for $open[0], $open[-1];
        undef(@open);
        $access->teardown(1);
        if ($name eq 'upstream') {
            check_half_connected($backend);
            check_late_client($backend);
        }
        $backend->check_manners;
    };
}

if (PBA::Test::VM->is_proxmox) {
    my $open_volume = sub (@volume) { return $Volume->open(@volume) };
    check_connection_during_drain('nbd', $open_volume, \&copy_volume);
    my $open_file = sub ($device, $volume) { return $volume->{'file-handle'} };
    check_connection_during_drain('file-handle', $open_file, \&read_file);
}

done_testing();
