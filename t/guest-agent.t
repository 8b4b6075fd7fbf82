# Freezing and thawing through a guest agent: the protocol, time limits, and an agent that fails. The agent is
# scripted, because a real one would freeze this machine.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use File::Temp ();
use Test::More;
use Time::HiRes qw(ualarm);

use PBA::Test::AgentPeer;
use PVE::BackupAccess::GuestAgent;

my $AgentPeer = 'PBA::Test::AgentPeer';
my $GuestAgent = 'PVE::BackupAccess::GuestAgent';

my @sync = ('guest-sync-delimited');
my @status = (@sync, 'guest-fsfreeze-status');
my @freeze = (@status, 'guest-fsfreeze-freeze');
my @thaw = (@sync, 'guest-fsfreeze-thaw');

sub agent ($peer, %opt) {
    return $GuestAgent->new(socket => $peer->socket_path, %opt);
}

sub check_error ($name, $method, $agent, $class, $message) {
    ok(!eval { $agent->$method; 1 }, "$name: an error");
    my $error = $@;
    is(eval { $error->class }, $class, "$name: its class") or diag($error);
    like("$error", $message, "$name: the message");
}

{
    my $peer = $AgentPeer->start(
        before => qq({"return": 12}\n{"return": {}}\n{"retu),
        replies => { 'guest-fsfreeze-freeze' => { return => 3 } },
    );
    my $agent = agent($peer);
    is($agent->freeze, 3, 'freeze: input left by an earlier client is skipped');
    is($agent->thaw, 1, 'thaw');
    is_deeply([$peer->commands], [@freeze, @thaw], 'the commands');
}

{
    my $peer = $AgentPeer->start(before => qq(\xff{"return": 1}\n));
    is(agent($peer)->freeze, 1, "the answer to somebody else's synchronization is skipped");
}

{
    my $refusal = { error => { class => "Not\nHere", desc => "%s it's disabled\n" } };
    my $peer = $AgentPeer->start(replies => { 'guest-fsfreeze-freeze' => $refusal });
    check_error('refused', 'freeze', agent($peer), 'Not Here',
        qr/\Aguest agent at '\/.+': command 'guest-fsfreeze-freeze' failed - %s it's disabled \n\z/
    );
}

for my $case (
    ['garbage', "\x01garbage\n", 'ProtocolError', qr/not a JSON object/],
    ['a list', "[]\n", 'ProtocolError', qr/not a JSON object/],
    ['an endless line', 'x' x 100_000, 'ProtocolError', qr/too long/],
    ['nothing', 'close', 'ConnectionError', qr/the connection was closed/],
    )
{
    my ($name, $reply, $class, $message) = $case->@*;
    my $peer = $AgentPeer->start(replies => { 'guest-fsfreeze-thaw' => $reply });
    check_error($name, 'thaw', agent($peer), $class, $message);
}

{
    my $agent = $GuestAgent->new(socket => '/nowhere/agent');
    check_error('no agent', 'freeze', $agent, 'ConnectionError', qr!cannot connect to /nowhere/!);
}

{
    my $peer = $AgentPeer->start;
    my $tmp = File::Temp->newdir;
    my $bytes = "$tmp/Gr\xc3\xb6\xc3\x9fe";
    symlink($peer->socket_path, $bytes) or die "symlink: $!\n";
    utf8::decode(my $text = $bytes);
    for my $path ($bytes, $text) {
        is(eval { $GuestAgent->new(socket => $path)->thaw }, 1, 'an odd path')
            or diag($@);
    }
}

# The time limit of the freeze is over, but the agent still freezes: the thaw is sent after that.
{
    my $peer = $AgentPeer->start(replies => { 'guest-fsfreeze-freeze' => 'busy' });
    check_error('busy', 'freeze', agent($peer, timeout => 1),
        'TimeoutError',
        qr/no answer within 1 s - the command was sent, and the guest may be frozen$/);
    is(agent($peer)->thaw, 1, 'busy: thawed after that');
    is_deeply([$peer->commands], [@freeze, @status, @thaw], 'busy: the commands');
}

# The reply to a freeze is lost: the agent's state is queried.
for my $case (['frozen', 1], ['thawed', 0, qr/the connection was closed$/]) {
    my ($status, $is_frozen, $message) = $case->@*;
    my $peer = PBA::Test::AgentPeer->start(
        replies => {
            'guest-fsfreeze-freeze' => 'close',
            'guest-fsfreeze-status' => [{ return => 'thawed' }, { return => $status }],
        }
    );
    my $agent = agent($peer);
    if ($is_frozen) {
        my @count = eval { $agent->freeze };
        is_deeply(\@count, [undef], "$status: frozen") or diag($@);
    }
    else {
        check_error($status, 'freeze', $agent, 'ConnectionError', $message);
    }
    is_deeply([$peer->commands], [@freeze, @status], "$status: the commands");
}

# Another program has frozen the file systems, and relies on that until it thaws them.
{
    my $peer = $AgentPeer->start(replies => { 'guest-fsfreeze-status' => { return => 'frozen' } });
    check_error('frozen by another program',
        'freeze', agent($peer), 'StateError', qr/was not sent, because .* already frozen/);
    my @log;
    my %hooks = agent($peer, log => sub (@line) { push(@log, "@line") })->hooks;
    $hooks{$_}->() for qw(freeze thaw);
    like(
        "@log",
        qr/\Awarn could not freeze .* already frozen/,
        'frozen by another program: a warning'
    );
    is_deeply([$peer->commands], [@status, @status], 'frozen by another program: it is not thawed');
}

# An agent that does not report its state, and one that no longer answers when it is asked.
{
    my $unknown = { error => { class => 'CommandNotFound', desc => 'no such command' } };
    my $peer = $AgentPeer->start(replies => { 'guest-fsfreeze-status' => $unknown });
    is(eval { agent($peer)->freeze }, 1, 'no state: frozen') or diag($@);
    my $silent = $AgentPeer->start(replies => { 'guest-fsfreeze-status' => 'busy' });
    check_error('silent', 'freeze', agent($silent, timeout => 1),
        'TimeoutError', qr/no answer within 1 s \(no freeze was sent\)/);
    is_deeply([$silent->commands], [@status], 'silent: no freeze is sent');
}

# The reply to a thaw is lost: a frozen guest hangs, so it is sent again.
{
    my $peer
        = $AgentPeer->start(replies => { 'guest-fsfreeze-thaw' => ['close', { return => 0 }] });
    is(eval { agent($peer)->thaw }, 0, 'thaw, lost: sent again') or diag($@);
    is_deeply([$peer->commands], [@thaw, @thaw], 'thaw, lost: the commands');
}

# An agent that reads its commands only after nobody waits any more must not freeze, but must thaw.
{
    my $peer = $AgentPeer->start(asleep => 1);
    $peer->wait_for_record('asleep');
    my $agent = agent($peer, timeout => 1);
    check_error('asleep', 'freeze', $agent, 'TimeoutError',
        qr/no answer within 1 s \(only a ping was sent\)/);
    my $began = time();
    my @log;
    my %hooks = agent($peer, timeout => 60, log => sub (@line) { push(@log, "@line") })->hooks;
    $hooks{$_}->() for qw(freeze thaw);
    like("@log", qr/\Awarn could not freeze .* within 5 s \(only a ping was sent\)\z/,
        'one warning');
    cmp_ok(time() - $began, '<', 15, 'without a freeze, the thaw is not waited for');
    check_error('asleep', 'thaw', $agent, 'TimeoutError', qr/no answer within 1 s/);
    $peer->wake;
    is_deeply([$peer->wait_for_commands(4)], [@sync, @sync, @thaw], 'asleep: the commands');
}

# The exception of a signal handler ends the wait, but does not prevent the thaw.
{
    my $peer = $AgentPeer->start(
        replies => { map { $_ => 'busy' } qw(guest-fsfreeze-freeze guest-fsfreeze-thaw) });
    for my $method (qw(freeze thaw)) {
        local $SIG{ALRM} = sub { die { reason => 'alarm' } };
        ualarm(200_000);
        ok(!eval { agent($peer, timeout => 2)->$method; 1 }, "$method, signal: ended");
        is(ref($@), 'HASH', "$method, signal: by the handler's exception") or diag($@);
    }
    is_deeply([$peer->commands], [@freeze, @thaw, @thaw], 'signal: thawing is tried again');
}

# The hooks of a task: a failure of the agent is a warning, and the backup continues.
{
    my $refusal = { error => { class => 'GenericError', desc => 'no' } };
    my $peer = $AgentPeer->start(
        replies => {
            'guest-fsfreeze-freeze' => $refusal,
            'guest-fsfreeze-thaw' => $refusal
        }
    );
    my @log;
    my %hooks = agent($peer, log => sub (@line) { push(@log, "@line") })->hooks;
    $hooks{freeze}->();
    $hooks{thaw}->();
    like($log[0], qr/\Awarn could not freeze the guest, .* failed - no\z/, 'freeze: a warning');
    like($log[1], qr/\Awarn could not thaw the guest, .* failed - no\z/, 'thaw: a warning');
    is(scalar(@log), 2, 'there are no other log lines');

    local $SIG{ALRM} = sub { die "my own\n" };
    my $busy = $AgentPeer->start(replies => { 'guest-fsfreeze-freeze' => 'busy' });
    my %slow = agent($busy)->hooks;
    ualarm(200_000);
    ok(!eval { $slow{freeze}->(); 1 }, 'a signal ends freezing');
    is($@, "my own\n", "the exception is the handler's");
}

done_testing;
