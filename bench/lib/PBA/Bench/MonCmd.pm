package PBA::Bench::MonCmd;

# QMP as qemu-server's mon_cmd speaks it: a connection for each command, decoded by JSON::PP or JSON::XS.
#
#   my $mon_cmd = PBA::Bench::MonCmd->new(path => $socket, json => 'JSON::PP');
#   $mon_cmd->code->($command, $arguments);    # for an option 'qmp'
#   $mon_cmd->count;                           # commands so far

use v5.36;

use IO::Socket::UNIX;
use JSON::PP ();

# Those that are installed.
sub decoders ($class) {
    return ('JSON::PP', eval { require JSON::XS; 1 } ? 'JSON::XS' : ());
}

sub new ($class, %options) {
    return bless({ %options, json => $options{json}->new->utf8, count => 0 }, $class);
}

sub count ($self) { return $self->{count} }

sub code ($self) {
    return sub ($command, $arguments = {}) { return $self->_run($command, $arguments) };
}

sub _run ($self, $command, $arguments) {
    $self->{count}++;
    my $socket = IO::Socket::UNIX->new(Peer => $self->{path}) or die "$self->{path}: $!\n";
    $self->_read($socket);    # the greeting
    $self->_ask($socket, 'qmp_capabilities', {});
    return $self->_ask($socket, $command, $arguments);
}

sub _ask ($self, $socket, $command, $arguments) {
    my %request = (execute => $command, arguments => $arguments);
    print {$socket} JSON::PP::encode_json(\%request);
    $socket->flush;
    while (1) {
        my $reply = $self->_read($socket);
        return $reply->{return} if exists($reply->{return});
        die "$command: $reply->{error}{desc}\n" if $reply->{error};
    }
}

sub _read ($self, $socket) {
    return $self->{json}->decode(scalar(<$socket>) // die "the monitor was closed\n");
}

1;
