# The command's own queries to a monitor that sends wrong replies: the command reports this, in time and with
# bounded memory, and begins no backup.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::Command qw(start_command);
use PBA::Test::QMPPeer;
use PBA::Test::Watchdog;

my $mib = 1024 * 1024;

# The peak memory of a process, in bytes.
sub peak_memory ($pid) {
    open(my $status, '<', "/proc/$pid/status") or return 0;
    my ($kib) = map { m/\AVmHWM:\s+(\d+) kB/ ? $1 : () } <$status>;
    return ($kib // 0) * 1024;
}

# How the command ends with that peer.
sub back_up ($peer) {
    my $store = File::Temp->newdir('pba-store-XXXXXXXX', TMPDIR => 1);
    my $command = start_command('backup', "$store", '--vmid', 100, '--qmp', $peer->socket_path);
    my $result = $command->finish;
    is_deeply([glob("$store/vm/*/*")], [], 'no archive was begun');
    return $result;
}

sub is_refused ($name, $pattern, %peer) {
    subtest $name => sub {
        my $peer = PBA::Test::QMPPeer->start(%peer);
        my $result = back_up($peer);
        is($result->{signal}, 0, 'no signal ended it');
        is($result->{status}, 1, 'exit status');
        like(
            $result->{err},
            qr/\Apve-backup-access backup: [^\n]*$pattern[^\n]*\n\z/,
            'the error is one line that says why'
        );
    };
}

is_refused("the greeting is $_->[0]", $_->[1], greeting => $_->[0])
    for ['garbage', qr/does not speak QMP/], ['close', qr/closed the QMP connection/];

# [description of the answer to query-block, the action, the expected message]
my @answers = (
    ['JSON that is nested deep', { depth => 100_000 }, qr/nested deeper than/],
    ['a NUL byte', { nul => 1 }, qr/control character/],
    ['no object', { raw => "[1]\r\n" }, qr/does not speak QMP/],
    ['another reply', { wrong_id => 1, return => [] }, qr/sent the reply to another command/],
    ['an error without a text', { error => {} }, qr/'query-block' failed/],
    ['an error that is none', { error => [1] }, qr/without a result/],
    ['the end of the connection', { close => 1 }, qr/closed the QMP connection/],
    ['not an array', { return => { device => 'disk0' } }, qr/is not an array of objects/],
    ['an array of numbers', { return => [1] }, qr/is not an array of objects/],
    ['a medium that is none', { return => [{ inserted => 1 }] }, qr/is not an array of objects/],
    ['nothing', { return => [] }, qr/no disk that can be backed up/],
    ['disks without a name', { return => [{}, { inserted => {} }] }, qr/no disk that can be/],
    [
        'format directives',
        { error => { class => 'GenericError', desc => '%s%n%1000000000d' } },
        qr/'query-block' failed - %s%n%1000000000d/
    ],
);
is_refused("query-block: $_->[0]", $_->[2], replies => { 'query-block' => $_->[1] }) for @answers;

my %killed = (inserted => { 'node-name' => 'pba-raw-1' }, device => '');
is_refused(
    "the graph: $_->[0]",
    $_->[2],
    replies => {
        'query-block' => { return => [\%killed] },
        'x-debug-query-block-graph' => { return => $_->[1] },
    }
    )
    for (
    ['not an object', [], qr/is not an array of objects/],
    ['without nodes', { edges => [] }, qr/is not an array of objects/],
    ['edges of nothing', { nodes => [{}], edges => [{}, { name => 'file' }] }, qr/no disk that/],
    [
        'a circle',
        {
            nodes => [{ id => 1, name => 'pba-raw-1', type => 'block-driver' }],
            edges => [{ parent => 1, child => 1, name => 'file' }],
        },
        qr/no disk that/
    ],
    );

subtest 'a line without an end' => sub {
    my $peer = PBA::Test::QMPPeer->start(replies => { 'query-block' => { endless => 1 << 30 } });
    my $store = File::Temp->newdir('pba-store-XXXXXXXX', TMPDIR => 1);
    my $command = start_command('backup', "$store", '--vmid', 100, '--qmp', $peer->socket_path);
    my $most = 0;
    while ($command->goes_on) {
        my $now = peak_memory($command->pid);
        $most = $now if $now > $most;
    }
    like($command->finish->{err}, qr/sent a message of over 67108864 bytes/, 'is refused');
    cmp_ok($peer->endless_bytes, '<', 80 * $mib, 'soon');
    cmp_ok($most, '>', 8 * $mib, 'the memory was measured');
    cmp_ok($most, '<', 400 * $mib, 'the memory is bounded');
};

done_testing;
