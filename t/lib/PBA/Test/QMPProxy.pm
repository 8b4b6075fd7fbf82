package PBA::Test::QMPProxy;

# Stands between a QMP client and QEMU and lets one command go wrong:
#
#   my $proxy = PBA::Test::QMPProxy->start(target => $vm->qmp_path, fault => 'lose', at => 7);
#
# at counts commands over all connections, without the handshake. Faults: 'drop' ends the connection
# before the command reaches QEMU, 'lose' after QEMU has done it and before its reply, 'refuse'
# answers with an error in QEMU's place, 'deceive' lets QEMU do it and answers with an error.
# 'kill-before' and 'kill-after' kill the client, before the command reaches QEMU and after QEMU has
# done it. Without at nothing goes wrong.
#
# listen => a path of its own: several proxies, one after the other, are the same VM to a client.

use v5.36;

use parent 'PBA::Test::Peer';

use IO::Socket::UNIX;
use JSON::PP ();
use Socket qw(SOL_SOCKET SO_PEERCRED);

my $json = JSON::PP->new->utf8->canonical;

sub commands ($self) { return $self->records('command') }

# Whether the command to go wrong has come.
sub struck ($self) { return scalar(() = $self->records('fault')) }

# ---- in the proxy's process ----

sub serve ($self, $listener) {
    $self->{count} = 0;
    while (1) {
        $self->wait_ready($listener, 'read');
        my $client = $listener->accept or next;
        my $qemu = IO::Socket::UNIX->new(Peer => $self->{target}) or die "no QEMU: $!\n";
        $_->blocking(0) for $client, $qemu;
        $self->_converse($client, $qemu);
        close($_) for $client, $qemu;
    }
}

sub _converse ($self, $client, $qemu) {
    my ($from_client, $from_qemu) = ('', '');
    $self->_pass_reply($client, $qemu, \$from_qemu) or return;    # the greeting
    while (defined(my $line = $self->_next_line($client, \$from_client))) {
        my $command = $json->decode($line);
        my $fault = $self->_fault_for($command);
        return if $fault eq 'drop';
        return _kill($client) if $fault eq 'kill-before';
        if ($fault eq 'refuse') {
            $self->_send_error($client, $command);
            next;
        }
        $self->send_bytes($qemu, $line);
        $self->_pass_reply($fault ? undef : $client, $qemu, \$from_qemu) or return;
        return if $fault eq 'lose';
        return _kill($client) if $fault eq 'kill-after';
        $self->_send_error($client, $command) if $fault eq 'deceive';
    }
}

sub _kill ($client) {
    my ($pid) = unpack('i', getsockopt($client, SOL_SOCKET, SO_PEERCRED));
    kill('KILL', $pid);
    return;
}

sub _fault_for ($self, $command) {
    return '' if $command->{execute} eq 'qmp_capabilities';
    $self->record('command', name => $command->{execute});
    return '' if ++$self->{count} != ($self->{at} // 0);
    $self->record('fault', name => $command->{execute});
    return $self->{fault};
}

sub _send_error ($self, $client, $command) {
    my %error = (class => 'GenericError', desc => 'not today');
    $self->send_bytes($client, $json->encode({ error => \%error, id => $command->{id} }) . "\r\n");
}

# Everything up to and with the next line that is no event.
sub _pass_reply ($self, $client, $qemu, $buffer) {
    while (defined(my $line = $self->_next_line($qemu, $buffer))) {
        $self->send_bytes($client, $line) if $client;
        return 1 if !exists($json->decode($line)->{event});
    }
    return 0;
}

sub _next_line ($self, $fh, $buffer) {
    while ($$buffer !~ m/\n/) {
        $self->wait_ready($fh, 'read');
        $self->receive_more($fh, $buffer) or return undef;
    }
    $$buffer =~ s/\A([^\n]*\n)//;
    return $1;
}

1;
