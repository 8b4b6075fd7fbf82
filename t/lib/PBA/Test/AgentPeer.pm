package PBA::Test::AgentPeer;

# A scripted QEMU guest agent. It freezes nothing.
#
#   my $peer = PBA::Test::AgentPeer->start(
#       before => $bytes,                              # left over from an earlier client
#       replies => { 'guest-fsfreeze-freeze' => $action },
#   );
#   PBA::Test::AgentPeer->start(asleep => 1)->wake;    # accepts no connection before wake
#
# An action is a reply as a hash, a string (sent unchanged), 'busy' (no answer while the client is connected) or
# 'close'; a list is one action for each time, the last one for all later ones. A command without an action is answered with { return => 1 }.

use v5.36;

use parent 'PBA::Test::Peer';

use JSON::PP ();

my $json = JSON::PP->new->canonical->utf8;

# The names of the commands received.
sub commands ($self) {
    return map { $_->{execute} } $self->records('command');
}

# Waits until the peer has recorded that many commands.
sub wait_for_commands ($self, $count) {
    $self->wait_for_record('command', $count);
    return $self->commands;
}

sub wake ($self) {
    kill('USR1', $self->pid);
    return;
}

# ---- in the peer's process ----

sub serve ($self, $listener) {
    $self->_sleep if $self->{asleep};
    while (1) {
        $self->wait_ready($listener, 'read');
        my $client = $listener->accept or next;
        $client->blocking(0);
        $self->_serve_client($client);
    }
}

sub _sleep ($self) {
    my $awake = 0;
    local $SIG{USR1} = sub { $awake = 1 };
    $self->record('asleep');
    $self->sleep_for(0.05) while !$awake;
    return;
}

# Like the real agent, it answers nothing that precedes the delimiter.
sub _serve_client ($self, $client) {
    my $buffer = '';
    $self->send_bytes($client, delete($self->{before})) if defined($self->{before});
    do {
        while ($buffer =~ s/\A\xff*([^\n]+)\n//) {
            my $request = $json->decode($1);
            $self->record('command', execute => $request->{execute});
            $self->_answer($client, $request, \$buffer) or return;
        }
    } while ($self->receive_more($client, \$buffer));
    return;
}

sub _answer ($self, $client, $request, $buffer) {
    my ($command, $arguments) = $request->@{qw(execute arguments)};
    if ($command eq 'guest-sync-delimited') {
        $self->send_bytes($client, "\xff" . $json->encode({ return => $arguments->{id} }) . "\n");
        return 1;
    }
    my $action = $self->{replies}{$command} // { return => 1 };
    $action = $action->@* > 1 ? shift($action->@*) : $action->[0] if ref($action) eq 'ARRAY';
    return 0 if $action eq 'close';
    if ($action eq 'busy') {
        1 while $self->receive_more($client, $buffer);
        return 1;
    }
    $self->send_bytes($client, ref($action) ? $json->encode($action) . "\n" : $action);
    return 1;
}

1;
