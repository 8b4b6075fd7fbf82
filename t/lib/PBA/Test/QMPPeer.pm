package PBA::Test::QMPPeer;

# A scripted QMP peer, for replies that no real QEMU sends.
#
#   my $peer = PBA::Test::QMPPeer->start(
#       greeting => 'oob',     # or: plain none garbage slow close endless, an action
#       handler => sub ($command, $arguments, $n) { return $action },     # n counts from 1
#   );
#   PBA::Test::QMPPeer->start(replies => { 'query-version' => $action, stop => sub {...} });
#   PBA::Test::QMPPeer->start(script => [{ expect => 'stop', return => {} }, $action, ...]);
#
# An action is one of these hashes, a string (sent unchanged), or an array of both, executed in order:
#   { return => $value } { error => { class => ..., desc => ... } }     id => ..., or wrong_id => 1
#   { event => $name, data => {...} }
#   { sleep => $seconds } (also with others: before them) { silent => 1 } { close => 1 }
#   { quit => 1 } (the socket disappears)
#   { raw => $bytes } { garbage => 1 } { nul => 1 } (a NUL byte within a string)
#   { bulk => $bytes } (one reply line with a string that long) { depth => $levels } (nested arrays)
#   { endless => $limit } (a line without end, until the client closes; see endless_bytes)
# Any that sends may have trickle => 1: one byte per write.
#
# qmp_capabilities is accepted without calling the handler, unless capabilities => 0. Like QEMU, the peer serves
# one client at a time, and the next one waits in the queue.

use v5.36;

use parent 'PBA::Test::Peer';

use JSON::PP ();
use POSIX ();
use Time::HiRes qw(time);

my $json = JSON::PP->new->canonical->utf8->allow_nonref;

my $version = { qemu => { major => 7, minor => 2, micro => 22 }, package => 'scripted peer' };

sub _greeting (@capabilities) {
    my $qmp = { QMP => { version => $version, capabilities => \@capabilities } };
    return { raw => $json->encode($qmp) . "\r\n" };
}

my %greetings = (
    oob => _greeting('oob'),
    plain => _greeting(),
    none => { silent => 1 },
    garbage => { garbage => 1 },
    slow => [{ sleep => 2 }, { %{ _greeting('oob') }, trickle => 1 }],
    close => { close => 1 },
    endless => { endless => 1 << 30 },
);

# ---- in the test ----

# The commands received: { execute, arguments, id, connection, n, time }.
sub commands ($self) { return $self->records('command') }

# Their names, without those of the handshake, which few tests check.
sub names ($self) {
    return grep { $_ ne 'qmp_capabilities' } map { $_->{execute} } $self->commands;
}

sub connections ($self) { return scalar(() = $self->records('connected')) }

# Deviations from the script: unexpected commands, and input that is not QMP.
sub problems ($self) {
    return map { $_->{text} } $self->records('problem');
}

# How many bytes of an endless line the client read before it closed the connection.
sub endless_bytes ($self) { return $self->wait_for_record('endless')->{bytes} }

# ---- in the peer's process ----

sub serve ($self, $listener) {
    $self->{n} = 0;
    for (my $connection = 1;; $connection++) {
        $self->wait_ready($listener, 'read');
        my $client = $listener->accept or next;
        $client->blocking(0);
        $self->record('connected', connection => $connection);
        $self->{connection} = $connection;
        $self->_serve_client($client);
        $self->record('closed', connection => $connection);
    }
}

sub _serve_client ($self, $client) {
    my $greeting = $self->{greeting} // 'oob';
    $greeting = $greetings{$greeting} // $greeting if !ref($greeting);
    $self->_perform($client, $greeting, {}) or return;

    my ($parser, $buffer) = (JSON::PP->new->utf8, '');
    while ($self->receive_more($client, \$buffer)) {
        my @requests = eval { $parser->incr_parse($buffer) };
        if (my $error = $@) {
            $self->record('problem', text => "not JSON: $error");
            my $reply = { error => { class => 'GenericError', desc => 'JSON parse error' } };
            $self->_perform($client, $reply, {}) or return;
            $parser = JSON::PP->new->utf8;
        }
        $buffer = '';
        for my $request (@requests) {
            $self->_perform($client, $self->_answer($request), $request) or return;
        }
    }
    return;
}

sub _answer ($self, $request) {
    my $command = ref($request) eq 'HASH' ? $request->{execute} // $request->{'exec-oob'} : undef;
    if (!defined($command)) {
        $self->record('problem', text => 'not a command: ' . $json->encode($request));
        return { error => { class => 'GenericError', desc => "QMP input lacks member 'execute'" } };
    }
    my $arguments = $request->{arguments} // {};
    $self->record(
        'command',
        execute => $command,
        arguments => $arguments,
        id => $request->{id},
        n => ++$self->{n},
        connection => $self->{connection},
    );
    return { return => {} } if $command eq 'qmp_capabilities' && ($self->{capabilities} // 1);
    $self->{count}++;
    return $self->_scripted($command, $arguments) // _not_found($command);
}

sub _not_found ($command) {
    my $desc = "The command $command has not been found";
    return { error => { class => 'CommandNotFound', desc => $desc } };
}

sub _scripted ($self, $command, $arguments) {
    my $count = $self->{count};
    return $self->{handler}->($command, $arguments, $count) if $self->{handler};
    if (my $replies = $self->{replies}) {
        my $reply = $replies->{$command};
        return ref($reply) eq 'CODE' ? $reply->($command, $arguments, $count) : $reply;
    }
    return $self->_next_of_script($command, $arguments);
}

sub _next_of_script ($self, $command, $arguments) {
    my $action = shift(@{ $self->{script} // [] });
    if (!defined($action)) {
        $self->record('problem', text => "command '$command' after the end of the script");
        return undef;
    }
    return $action->($command, $arguments, $self->{count}) if ref($action) eq 'CODE';
    my $expected = ref($action) eq 'HASH' ? $action->{expect} : undef;
    return $action if !defined($expected) || $expected eq $command;
    $self->record('problem', text => "got command '$command', the script expected '$expected'");
    return { error => { class => 'GenericError', desc => "script expected '$expected'" } };
}

# Executes the actions. False if the connection must be closed.
sub _perform ($self, $client, $actions, $request) {
    for my $action (ref($actions) eq 'ARRAY' ? @$actions : $actions) {
        $action = { raw => $action } if !ref($action);
        return 0 if $action->{close};
        $self->_quit if $action->{quit};
        next if $action->{silent};
        $self->sleep_for($action->{sleep}) if defined($action->{sleep});
        next if defined($action->{sleep}) && keys(%$action) == 1;
        return $self->_send_endless($client, $action->{endless}) if defined($action->{endless});
        my $bytes = _bytes($action, $request);
        return 0 if $self->_send($client, $bytes, $action->{trickle}) < length($bytes);
    }
    return 1;
}

sub _quit ($self) {
    unlink($self->{socket});
    POSIX::_exit(0);
}

sub _send ($self, $client, $bytes, $trickle) {
    return $self->send_bytes($client, $bytes) if !$trickle;
    my $sent = 0;
    for my $byte (split(//, $bytes)) {
        $sent += $self->send_bytes($client, $byte) or last;
        $self->sleep_for(0.0005);
    }
    return $sent;
}

sub _send_endless ($self, $client, $limit) {
    $limit = 1 << 30 if $limit < 2;
    my $chunk = 'x' x 65536;
    my $sent = $self->send_bytes($client, '{"return": "');
    while ($sent < $limit) {
        my $n = $self->send_bytes($client, $chunk, 30);
        $sent += $n;
        last if $n < length($chunk);
    }
    $self->record('endless', bytes => $sent);
    return 0;
}

sub _bytes ($action, $request) {
    return $action->{raw} if defined($action->{raw});
    return "\x01\xfe\x00 not a monitor %s%n\x7f\r\n" if $action->{garbage};
    return _event($action) if defined($action->{event});

    my %reply;
    $reply{id} = $request->{id} if exists($request->{id});
    $reply{id} = $action->{id} if exists($action->{id});
    $reply{id} = 'nobody-asked-this' if $action->{wrong_id};
    $reply{error} = $action->{error} if $action->{error};
    $reply{return} = $action->{return} if exists($action->{return});
    return $json->encode(\%reply) . "\r\n" if !grep { exists($action->{$_}) } qw(bulk depth nul);
    return _line(\%reply, _odd_value($action));
}

sub _odd_value ($action) {
    return '"' . 'x' x $action->{bulk} . '"' if defined($action->{bulk});
    return '[' x $action->{depth} . ']' x $action->{depth} if defined($action->{depth});
    return "\"before\0after\"";
}

# Built as text, because no JSON encoder would write these values.
sub _line ($reply, $value) {
    my $id = exists($reply->{id}) ? ', "id": ' . $json->encode($reply->{id}) : '';
    return "{\"return\": $value$id}\r\n";
}

sub _event ($action) {
    my $now = time;
    my $stamp = { seconds => int($now), microseconds => int(($now - int($now)) * 1_000_000) };
    my $event = { event => $action->{event}, timestamp => $stamp };
    $event->{data} = $action->{data} if $action->{data};
    return $json->encode($event) . "\r\n";
}

1;
