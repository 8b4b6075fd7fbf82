package PBA::Test::QMPProxy;

# A proxy between a QMP client and QEMU that makes one command go wrong:
#
#   my $proxy = PBA::Test::QMPProxy->start(target => $vm->qmp_path, fault => 'lose', at => 7);
#
# at counts commands over all connections, without the handshake. Faults: 'drop' ends the connection before the
# command reaches QEMU. 'lose' ends it after QEMU has executed the command, before its reply. 'refuse' answers
# with an error instead of passing the command on. 'deceive' lets QEMU execute it and answers with an error.
# 'kill-before' and 'kill-after' kill the client, before the command reaches QEMU or after QEMU has executed it.
# 'stall' lets QEMU execute it and withholds the reply. 'signal' sends the client SIGUSR1 when QEMU has executed
# it, and the reply a while later. Without at, nothing goes wrong. then => { 9 => 'drop' } adds faults by the
# number of the command. refuse => NAME refuses the first command with that name. terminate => NAME sends the
# client SIGTERM, like 'signal'; 'terminate' and 'interrupt' are faults, too. group => 1 sends signals to the client's
# process group, as Proxmox VE does to stop a task.
#
# 'kill-before-nbd' and 'kill-after-nbd' kill the client at an NBD connection or discard instead, and at counts
# those: see PBA::Test::NBDRelay.
#
# listen => a path of its own: a client sees several successive proxies as the same VM.

use v5.36;

use parent 'PBA::Test::Peer';

use IO::Socket::UNIX;
use JSON::PP ();
use Socket qw(SOL_SOCKET SO_PEERCRED);

use PBA::Test::NBDRelay;

my $json = JSON::PP->new->utf8->canonical;

my $longest_event = 65_536;
my %signals = (signal => 'USR1', terminate => 'TERM', interrupt => 'INT');

sub commands ($self) { return $self->records('command') }

# Whether the faulty command has arrived.
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
    $self->send_bytes($client, $self->_reply($qemu, \$from_qemu) // return);    # the greeting
    while (defined(my $line = $self->_next_command($client, \$from_client))) {
        my $command = $json->decode($line);
        my $name = $command->{execute};
        my $fault = $self->_fault_for($command);
        return if $fault eq 'drop';
        return $self->_kill($client) if $fault eq 'kill-before';
        if ($fault eq 'refuse') {
            $self->_send_error($client, $command);
            next;
        }
        (delete($self->{relay}))->stop if $self->{relay} && $name eq 'nbd-server-stop';
        $self->send_bytes($qemu, $line);
        my $reply = $self->_reply($qemu, \$from_qemu) // return;
        $self->_start_relay($command, $client, $qemu) if $name eq 'nbd-server-start';
        my $signal = $signals{$fault};
        $self->_signal($client, $signal) if $signal;
        $self->send_bytes($client, $reply) if !$fault || $signal;
        return if $fault eq 'lose';
        return $self->_kill($client) if $fault eq 'kill-after';
        return $self->wait_ready($client, 'read') if $fault eq 'stall';
        $self->_send_error($client, $command) if $fault eq 'deceive';
    }
}

sub _client_pid ($client) {
    my ($pid) = unpack('i', getsockopt($client, SOL_SOCKET, SO_PEERCRED));
    return $pid;
}

sub _kill ($self, $client) {
    kill('KILL', _client_pid($client));
    return;
}

# Longer than the time after which a client checks for signals.
sub _signal ($self, $client, $signal) {
    my $pid = _client_pid($client);
    kill($signal, $self->{group} ? -getpgrp($pid) : $pid);
    $self->sleep_for(0.3);
    return;
}

sub _start_relay ($self, $command, @handles) {
    my $path = $command->{arguments}{addr}{data}{path};
    return if ($self->{fault} // '') !~ m/-nbd\z/ || !-S $path;
    $self->{relay}
        = PBA::Test::NBDRelay->start($self, $path, $self->{fault}, $self->{at} // 0, @handles);
    return;
}

sub _fault_for ($self, $command) {
    return '' if $command->{execute} eq 'qmp_capabilities';
    $self->record('command', name => $command->{execute});
    my $number = ++$self->{count};
    my $fault = ($self->{then} // {})->{$number} // '';
    $fault = $self->{fault} if $number == ($self->{at} // 0) && $self->{fault} !~ m/-nbd\z/;
    $fault = 'refuse' if $command->{execute} eq ($self->{refuse} // '') && !$self->{refused}++;
    $fault = 'terminate'
        if $command->{execute} eq ($self->{terminate} // '') && !$self->{terminated}++;
    $self->record('fault', name => $command->{execute}) if $fault;
    return $fault;
}

sub _send_error ($self, $client, $command) {
    my %error = (class => 'GenericError', desc => 'not today');
    $self->send_bytes($client, $json->encode({ error => \%error, id => $command->{id} }) . "\r\n");
}

# Everything up to the next line that is no event, including that line. A line as long as QEMU's schema is no
# event, and JSON::PP would take too long to decode it.
sub _reply ($self, $qemu, $buffer) {
    my $reply = '';
    while (defined(my $line = $self->_next_line($qemu, $buffer))) {
        $reply .= $line;
        return $reply if length($line) > $longest_event || !exists($json->decode($line)->{event});
    }
    return undef;
}

# A command is a line. qemu-server omits its end, and waits for the reply.
sub _next_command ($self, $client, $buffer) {
    until ($$buffer =~ m/\n/ || eval { $json->decode($$buffer) }) {
        $self->wait_ready($client, 'read');
        $self->receive_more($client, $buffer) or return undef;
    }
    $$buffer =~ s/\A([^\n]*\n?)//;
    return $1;
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
