package PBA::Test::Front::QEMU;

# The front's connection to the stock QEMU. Dies with { class, desc } if QEMU returns an error, and with { gone
# } if QEMU has ended.

use v5.36;

use IO::Socket::UNIX ();
use JSON::PP ();

my $json = JSON::PP->new->utf8->canonical->allow_nonref;

# on_event gets the text of each event that is not hidden.
sub connect ($class, %option) {
    my $self = bless { %option, buffer => '', recent => [], hide_pauses => 0 }, $class;
    my $path = $option{path};
    $self->{handle} = IO::Socket::UNIX->new($path) // die "cannot connect to $path: $!\n";
    $self->{handle}->blocking(0);
    $self->_line;
    $self->call('qmp_capabilities');
    return $self;
}

sub handle ($self) { return $self->{handle} }

# The client must not see events that the front itself causes by stopping the guest.
sub hide_pauses ($self, $hide) { $self->{hide_pauses} = $hide }
sub hide_export ($self, $id, $hide) { $self->{hidden_exports}{$id} = $hide }

# Sends a command and returns the text of its reply. Events before the reply are handled.
sub forward ($self, $command, $arguments) {
    my %request = (execute => $command);
    $request{arguments} = $arguments if ref($arguments) ne 'HASH' || %$arguments;
    my $text = $json->encode(\%request) . "\n";
    if ($self->{peer}->send_bytes($self->{handle}, $text) < length($text)) {
        die { gone => 'QEMU takes no commands any more' };
    }
    while (1) {
        my $line = $self->_line;
        return $line if !$self->_take_event($line);
    }
}

# The same for the front's own commands: returns the decoded value, or dies.
sub call ($self, $command, $arguments = {}) {
    my $reply = $json->decode($self->forward($command, $arguments));
    die { %{ $reply->{error} } } if $reply->{error};
    return $reply->{return};
}

# Also waits for an event that the command causes, which may precede the reply.
sub call_and_wait ($self, $command, $arguments, $match) {
    $self->{recent} = [];
    my $value = $self->call($command, $arguments);
    while (!grep { $match->($_) } @{ $self->{recent} }) {
        $self->_take_event($self->_line);
    }
    return $value;
}

# Must be called when the handle is readable and no command is being executed.
sub read_events ($self) {
    $self->_more;
    $self->drain;
    return;
}

# Handles lines that arrived together with a reply.
sub drain ($self) {
    while (defined(my $line = $self->_buffered_line)) {
        $self->_take_event($line);
    }
    return;
}

sub _line ($self) {
    while (1) {
        my $line = $self->_buffered_line;
        return $line if defined($line);
        $self->_more;
    }
}

sub _buffered_line ($self) {
    my $end = index($self->{buffer}, "\n");
    return undef if $end < 0;
    my $line = substr($self->{buffer}, 0, $end + 1, '');
    return $line =~ s/\s+\z//r;
}

sub _more ($self) {
    my $got = $self->{peer}->receive_more($self->{handle}, \$self->{buffer});
    die { gone => 'QEMU closed its monitor' } if !$got;
    return;
}

# True if the line was an event. Replies can be long, so this does not decode them.
sub _take_event ($self, $line) {
    return 0 if $line =~ /\A\{"(?:return|error|QMP)":/;
    my $event = $json->decode($line);
    return 0 if !exists($event->{event});
    push(@{ $self->{recent} }, $event);
    $self->{on_event}->($line) if !$self->_hidden($event);
    return 1;
}

sub _hidden ($self, $event) {
    my ($name, $data) = ($event->{event}, $event->{data} // {});
    return 1 if $self->{hide_pauses} && $name =~ /\A(?:STOP|RESUME)\z/;
    return 1 if grep { ($data->{$_} // '') =~ /\Afront-/ } qw(id device node-name);
    return 1 if $name eq 'BLOCK_EXPORT_DELETED' && $self->{hidden_exports}{ $data->{id} };
    return 0;
}

1;
