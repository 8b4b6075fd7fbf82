package PBA::Test::QMP;

# A small QMP client for the tests, independent of the one under test. It keeps one connection open, on a
# monitor socket of its own.

use v5.36;

use JSON::PP ();

use PBA::Test::Channel qw(now);

my $JSON = JSON::PP->new->utf8->canonical->allow_nonref;

sub new ($class, %opt) {
    my $channel = PBA::Test::Channel->new(
        path => $opt{path},
        what => "monitor $opt{path}",
        timeout => $opt{timeout} // 30,
        alive => $opt{alive},
    );
    my $self = bless { channel => $channel, events => [], timeout => 60 }, $class;
    my $line = $channel->read_line(30) // die "monitor $opt{path}: no greeting\n";
    $self->{greeting} = $JSON->decode($line)->{QMP} // die "no greeting: $line\n";
    $self->execute('qmp_capabilities');
    return $self;
}

# QEMU's version as [major, minor, micro].
sub version ($self) {
    return [@{ $self->{greeting}{version}{qemu} }{qw(major minor micro)}];
}

# Runs one command over a connection of its own, as qemu-server does.
sub once ($class, $path, $command, $arguments) {
    my $self = $class->new(path => $path);
    my $value = eval { $self->execute($command, $arguments->%*) };
    my $error = $@;
    $self->close;
    die $error if $error;
    return $value;
}

# Runs a command and returns its value; dies with QEMU's error.
sub execute ($self, $command, %args) {
    my $reply = $self->try($command, %args);
    return $reply->{return} if !$reply->{error};
    die "qmp $command: $reply->{error}{class}: $reply->{error}{desc}\n";
}

# The same, but returns the whole reply: { return => ... } or { error => { class, desc } }.
sub try ($self, $command, %args) {
    my %message = (execute => $command, id => ++$self->{id});
    $message{arguments} = \%args if %args;
    $self->{channel}->send_line($JSON->encode(\%message));
    my $deadline = now() + $self->{timeout};
    while (1) {
        my $left = $deadline - now();
        my $message = $self->_next($left > 0 ? $left : 0)
            // die "qmp $command: no reply within $self->{timeout} s\n";
        return $message if ($message->{id} // '') eq $self->{id};
    }
}

# Returns the next message that is no event, or undef if none arrives in time. Events are stored.
sub _next ($self, $timeout) {
    my $deadline = now() + $timeout;
    while (1) {
        my $left = $deadline - now();
        my $line = $self->{channel}->read_line($left > 0 ? $left : 0) // return undef;
        my $message = $JSON->decode($line);
        return $message if !$message->{event};
        push $self->{events}->@*, $message;
    }
}

# All events so far, or those of one name, oldest first: { event, data, timestamp }.
sub events ($self, $name = undef) {

    # Messages that QEMU sent before it died can still be read.
    eval { $self->_next(0) };
    return grep { !defined $name || $_->{event} eq $name } $self->{events}->@*;
}

sub clear_events ($self) {
    $self->events;
    $self->{events} = [];
    return;
}

# Waits until there are $count events of that name (since clear_events) and returns them.
sub wait_event ($self, $name, %opt) {
    my $count = $opt{count} // 1;
    my $timeout = $opt{timeout} // 30;
    my $deadline = now() + $timeout;
    while (1) {
        my @events = grep { $_->{event} eq $name } $self->{events}->@*;
        return @events if @events >= $count;
        my $left = $deadline - now();
        die "no event $name within $timeout s\n" if $left <= 0;
        $self->_next($left < 0.2 ? $left : 0.2);
    }
}

sub close ($self) {
    $self->{channel}->close;
    return;
}

1;
