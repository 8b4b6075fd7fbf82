# The scripted QMP peer sends what it is told to send, to a client that is a plain socket.

use v5.36;

use lib 't/lib';

use IO::Socket::UNIX;
use JSON::PP ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::QMPPeer;

my $QMPPeer = 'PBA::Test::QMPPeer';

my $json = JSON::PP->new->utf8;

sub connect_to ($peer) {
    return IO::Socket::UNIX->new(Peer => $peer->socket_path) // die "connect: $!\n";
}

sub send_command ($socket, $command, %more) {
    syswrite($socket, $json->encode({ execute => $command, %more }) . "\n");
    return;
}

sub ask ($socket, $command, %more) {
    send_command($socket, $command, %more);
    return $json->decode(scalar(<$socket>));
}

subtest 'handshake, handler and record' => sub {
    my $peer = $QMPPeer->start(
        handler => sub ($command, $arguments, $n) {
            return { return => { n => $n, command => $command } } if $command ne 'fail';
            return {
                error => { class => 'DeviceNotFound', desc => "no '$arguments->{device}' %s%n" } };
        },
    );
    my $socket = connect_to($peer);
    is_deeply($json->decode(scalar(<$socket>))->{QMP}{capabilities}, ['oob'], 'greeting');
    is_deeply(ask($socket, 'qmp_capabilities', id => 7), { id => 7, return => {} }, 'handshake');
    is_deeply(ask($socket, 'one')->{return}, { n => 1, command => 'one' }, 'first command');
    my $reply = ask($socket, 'fail', id => 'a', arguments => { device => 'x' });
    is($reply->{error}{desc}, "no 'x' %s%n", 'error with format directives');
    is($reply->{id}, 'a', 'id returned');
    close($socket);
    $peer->wait_for_record('closed');
    is_deeply([$peer->names], ['one', 'fail'], 'names');
    my @commands = $peer->commands;
    is_deeply($commands[2]{arguments}, { device => 'x' }, 'arguments recorded');
    is_deeply([$peer->problems], [], 'no problems');

    $socket = connect_to($peer);
    <$socket>;
    is(ask($socket, 'again')->{return}{n}, 3, 'second connection, same count');
    is($peer->connections, 2, 'connections counted');
};

subtest 'script and replies' => sub {
    my $peer = $QMPPeer->start(
        greeting => 'plain',
        script => [{ expect => 'stop', return => {} }, { expect => 'cont', return => {} }],
    );
    my $socket = connect_to($peer);
    is_deeply($json->decode(scalar(<$socket>))->{QMP}{capabilities}, [], 'plain greeting');
    is_deeply(ask($socket, 'stop'), { return => {} }, 'an expected command');
    is(ask($socket, 'quit')->{error}{class}, 'GenericError', 'another command than expected');
    is(ask($socket, 'more')->{error}{class}, 'CommandNotFound', 'after the end');
    is(scalar($peer->problems), 2, 'both are recorded as problems');

    $peer = $QMPPeer->start(replies => { stop => sub (@got) { { return => \@got } } });
    $socket = connect_to($peer);
    <$socket>;
    is_deeply(ask($socket, 'stop')->{return}, ['stop', {}, 1], 'code ref as reply');
    is(ask($socket, 'cont')->{error}{class}, 'CommandNotFound', 'others are not found');
};

subtest 'actions' => sub {
    my %actions = (
        event => [{ event => 'STOP', data => { a => 1 } }, { return => {} }],
        wrong => { return => {}, wrong_id => 1 },
        trickle => { return => 'slowly', trickle => 1 },
        late => [{ sleep => 0.3 }, { return => {} }],
        later => { sleep => 0.3, return => {} },
        nul => { nul => 1 },
        deep => { depth => 100_000 },
        bulk => { bulk => 20 << 20 },
        garbage => { garbage => 1 },
        silent => { silent => 1 },
        bye => [{ raw => '{"ret' }, { close => 1 }],
    );
    my $peer = $QMPPeer->start(replies => \%actions);
    my $socket = connect_to($peer);
    <$socket>;
    is(ask($socket, 'event')->{event}, 'STOP', 'event before the reply');
    is(scalar(<$socket>), "{\"return\":{}}\r\n", 'the reply follows');
    isnt(ask($socket, 'wrong', id => 1)->{id}, 1, 'wrong id');
    is(ask($socket, 'trickle')->{return}, 'slowly', 'byte by byte');

    for my $name (qw(late later)) {
        my $start = time;
        ask($socket, $name);
        cmp_ok(time - $start, '>=', 0.3, $name);
    }
    send_command($socket, 'nul', id => 3);
    is(scalar(<$socket>), qq({"return": "before\0after", "id": 3}\r\n), 'NUL byte');
    send_command($socket, 'deep');
    is(length(scalar(<$socket>)), 200_000 + length("{\"return\": }\r\n"), 'deep');
    send_command($socket, 'bulk');
    cmp_ok(length(scalar(<$socket>)), '>', 20 << 20, 'bulk');
    send_command($socket, 'garbage');
    ok(!eval { $json->decode(scalar(<$socket>)) }, 'garbage');
    send_command($socket, 'silent');
    send_command($socket, 'bye');
    is(scalar(<$socket>), '{"ret', "no reply to 'silent', then half a reply");
};

subtest 'greetings' => sub {
    my %first = (garbage => qr/not a monitor/, close => qr/\A\z/, endless => qr/\A\{"return": "/);
    for my $name (sort keys %first) {
        my $peer = $QMPPeer->start(greeting => $name);
        my $socket = connect_to($peer);
        sysread($socket, my $bytes, 1000);
        like($bytes, $first{$name}, $name);
        next if $name ne 'endless';
        read($socket, my $more, 100_000);
        close($socket);
        cmp_ok($peer->endless_bytes, '>=', 100_000, 'size of the endless line recorded');
    }
    my $start = time;
    my $peer = $QMPPeer->start(greeting => 'slow');
    my $socket = connect_to($peer);
    like(scalar(<$socket>), qr/"QMP"/, 'slow');
    cmp_ok(time - $start, '>', 1, 'the peer took its time');
};

subtest 'quit' => sub {
    my $peer = $QMPPeer->start(replies => { quit => [{ return => {} }, { quit => 1 }] });
    my $socket = connect_to($peer);
    <$socket>;
    ask($socket, 'quit');
    is(scalar(<$socket>), undef, 'end of stream');
    ok(!-e $peer->socket_path, 'socket gone');
};

done_testing();
