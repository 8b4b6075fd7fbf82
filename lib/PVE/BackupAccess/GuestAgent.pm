package PVE::BackupAccess::GuestAgent;

use v5.36;

use Errno qw(EAGAIN EINTR);
use JSON::PP ();
use List::Util qw(min);
use Socket qw(AF_UNIX SOCK_STREAM SOL_SOCKET SO_SNDTIMEO pack_sockaddr_un);

use PVE::BackupAccess::Argument qw(check_code check_filled_text check_options check_positive);
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(attempt attempt_any deaths_of is_own rethrow worst_of);
use PVE::BackupAccess::Wait qw(slice);

my $default_timeout = 60;
my $silence_limit = 5;    # seconds, until an agent that does not answer is taken for none
my $max_reply = 65536;
my $delimiter = "\xff";

my %options = (
    socket => \&check_filled_text,
    timeout => \&check_positive,
    log => \&check_code,
);

# Whether it is not known what the agent did.
my sub is_lost ($error) {
    return is_own($error) && $error->class =~ m/\A(?:Timeout|Connection|Protocol)Error\z/;
}

my sub request ($command, $arguments = undef) {
    state $json = JSON::PP->new->ascii->canonical;
    my %request = (execute => $command, $arguments ? (arguments => $arguments) : ());
    return $json->encode(\%request) . "\n";
}

sub new ($class, @options) {
    my $options = check_options('new', \@options, \%options, 'socket');
    return bless(
        {
            timeout => $default_timeout,
            log => sub ($level, $message) { warn "$message\n" if $level eq 'warn' },
            $options->%*,
        },
        $class
    );
}

# Sent only after the agent has answered a ping: if the caller has stopped waiting, the guest must
# not be frozen later.
sub freeze ($self) {
    $self->{sent} = 0;
    my $session = $self->_begin_if_there('guest-fsfreeze-freeze');

    # A thaw would end the freeze of the other program, which relies on it.
    $self->_fail($session, 'StateError',
              'was not sent, because the file systems are already frozen - if no other program'
            . ' thaws them, thaw them by guest-fsfreeze-thaw')
        if $self->_status($session) eq 'frozen';
    $self->{sent} = 1;
    $self->_send($session, request($session->{command}));
    my $count;
    my $error = attempt { $count = $self->_result($session) } or return $count;
    close($session->{socket});    # QEMU serves one client at a time
    die $error if !is_lost($error) || !$self->_is_frozen($error);
    return undef;
}

# The state of the file systems, which the agent reports at once; '' if it does not know this
# command.
sub _status ($self, $session) {
    my $limit = min($silence_limit, $session->{seconds});
    my %query = (
        $session->%*,
        command => 'guest-fsfreeze-status',
        deadline => now() + $limit,
        seconds => $limit,
        before => ' (no freeze was sent)',
    );
    $self->_send(\%query, request($query{command}));
    my $status;
    my $error = attempt { $status = $self->_result(\%query) };
    die $error if $error && is_lost($error);
    $session->{buffer} = $query{buffer};
    return defined($status) && !ref($status) ? $status : '';
}

# Handles a freeze whose answer was lost. Dies with that error and its meaning if the outcome is
# unknown.
sub _is_frozen ($self, $error) {
    my $status = '';
    attempt { $status = $self->_status($self->_begin_if_there('guest-fsfreeze-status')) };
    return 1 if $status eq 'frozen';
    return 0 if $status eq 'thawed';
    PVE::BackupAccess::Error->throw(
        $error->class,
        "$error" =~ s/\s+\z//r . ' - the command was sent, and the guest may be frozen',
        command => $error->command
    );
}

# A frozen guest hangs. So the exception of a signal handler waits until a second try, and if the
# connection was lost, the second try shows the outcome: thawing twice does no harm. After a
# time-out, the agent still has the command.
sub thaw ($self) {
    my $count;
    my $thaw = sub { $count = $self->_thaw };
    my ($first) = deaths_of($thaw) or return $count;
    my ($error, $by_signal) = $first->@*;
    rethrow($error) if !$by_signal && (!is_lost($error) || $error->class eq 'TimeoutError');
    my ($second) = deaths_of($thaw);
    return $count if !$second && !$by_signal;
    rethrow(worst_of($first, $second // ())->[0]);
}

# Sent at once: even if the agent is busy for longer than we wait, it will execute this.
sub _thaw ($self) {
    my $session = $self->_begin('guest-fsfreeze-thaw');
    $self->_synchronize($session, request($session->{command}));
    return $self->_result($session);
}

sub hooks ($self) {
    return (
        freeze => sub {
            $self->_try('freeze',
                'could not freeze the guest, so its disks will be as after a power failure');
        },
        thaw => sub {
            $self->_try('thaw',
                'could not thaw the guest, which may still be frozen - thaw it by guest-fsfreeze-thaw'
            ) if $self->{sent};
        },
    );
}

# A failing agent does not prevent a backup. Anything else, such as the exception of a signal
# handler, is passed on.
sub _try ($self, $method, $problem) {
    my $error = attempt { $self->$method };
    return if !$error;
    $self->{log}->('warn', "$problem - $error" =~ s/\s+\z//r);
    return;
}

# ---- the protocol (QEMU: docs/interop/qemu-ga) ----

sub _begin ($self, $command) {
    my $session = {
        command => $command,
        deadline => now() + $self->{timeout},
        seconds => $self->{timeout},
        buffer => '',
    };
    $self->_connect($session);
    return $session;
}

# Once the agent has answered, the command has the whole time limit. A missing agent is only noticed
# by its silence, because QEMU's socket accepts connections anyway.
sub _begin_if_there ($self, $command) {
    my $session = $self->_begin($command);
    my $limit = min($silence_limit, $self->{timeout});
    $session->@{qw(deadline seconds)} = (now() + $limit, $limit);
    $session->{before} = ' (only a ping was sent)';
    $self->_synchronize($session);
    $session->@{qw(deadline seconds)} = (now() + $self->{timeout}, $self->{timeout});
    delete($session->{before});
    return $session;
}

# Waits until the agent has answered to us, and not to an earlier client. The command is sent
# together with this request.
sub _synchronize ($self, $session, $following = '') {
    my $id = int(rand(2**31));
    $self->_send($session,
        $delimiter . request('guest-sync-delimited', { id => $id }) . $following);
    my $answered = '';
    while ($answered ne $id) {
        $self->_skip_to_delimiter($session);
        $answered = $self->_read_reply($session)->{return} // '';
    }
    return;
}

sub _result ($self, $session) {
    my $reply = $self->_read_reply($session);
    return $reply->{return} if exists($reply->{return});
    my $error = ref($reply->{error}) eq 'HASH' ? $reply->{error} : {};
    $self->_fail(
        $session,
        $error->{class} // 'GenericError',
        'failed - ' . ($error->{desc} // 'no reason was given')
    );
}

sub _fail ($self, $session, $class, $problem) {
    my $before = $session->{before} // '';
    PVE::BackupAccess::Error->throw(
        $class,
        "guest agent at '$self->{socket}': command '$session->{command}' $problem$before",
        command => $session->{command}
    );
}

# ---- the socket ----

# QEMU serves one client at a time; the next ones wait in connect.
sub _connect ($self, $session) {
    socket(my $socket, AF_UNIX, SOCK_STREAM, 0)
        or $self->_fail($session, 'SystemError', "failed - socket: $!");
    setsockopt($socket, SOL_SOCKET, SO_SNDTIMEO, pack('l!l!', $self->{timeout}, 0))
        or $self->_fail($session, 'SystemError', "failed - setsockopt: $!");

    # Text, or the bytes of a file's name.
    utf8::decode(my $path = $self->{socket});
    utf8::encode($path);
    while (!connect($socket, pack_sockaddr_un($path))) {
        $self->_fail($session, 'TimeoutError', "failed - $self->{socket} is in use")
            if $! == EAGAIN;
        $self->_fail($session, 'ConnectionError', "failed - cannot connect to $self->{socket}: $!")
            if $! != EINTR;
    }
    $socket->blocking(0);
    $session->{socket} = $socket;
    return;
}

# A few bytes always fit.
sub _send ($self, $session, $data) {
    local $SIG{PIPE} = 'IGNORE';
    my $sent = syswrite($session->{socket}, $data) // 0;
    $self->_fail($session, 'ConnectionError', "could not be sent - $!") if $sent != length($data);
    return;
}

# Waits for more input.
sub _receive ($self, $session) {
    my $fd = fileno($session->{socket});
    while (1) {
        my $left = $session->{deadline} - now();
        $self->_fail($session, 'TimeoutError', "had no answer within $session->{seconds} s")
            if $left <= 0;
        vec(my $ready = '', $fd, 1) = 1;
        next if select($ready, undef, undef, slice($left)) < 1;
        my $got = sysread($session->{socket}, $session->{buffer}, 4096, length($session->{buffer}));
        next if !defined($got) && ($! == EAGAIN || $! == EINTR);
        $self->_fail($session, 'ConnectionError',
            'had no answer - ' . (defined($got) ? 'the connection was closed' : $!))
            if !$got;
        return;
    }
}

# Answers to an earlier client arrive before the delimiter.
sub _skip_to_delimiter ($self, $session) {
    while ((my $end = index($session->{buffer}, $delimiter)) != 0) {
        substr($session->{buffer}, 0, $end < 0 ? length($session->{buffer}) : $end, '');
        $self->_receive($session) if $end < 0;
    }
    substr($session->{buffer}, 0, 1, '');
    return;
}

sub _read_reply ($self, $session) {
    my $end;
    while (($end = index($session->{buffer}, "\n")) < 0) {
        $self->_fail($session, 'ProtocolError', 'had an answer that is too long')
            if length($session->{buffer}) > $max_reply;
        $self->_receive($session);
    }
    my $line = substr($session->{buffer}, 0, $end + 1, '');
    my $reply;
    attempt_any { $reply = JSON::PP->new->utf8->decode($line) };
    $self->_fail($session, 'ProtocolError', 'had an answer that is not a JSON object')
        if ref($reply) ne 'HASH';
    return $reply;
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::GuestAgent - freeze and thaw a guest's file systems through the QEMU guest agent

=head1 SYNOPSIS

=for run task

    use PVE::BackupAccess::GuestAgent;
    use PVE::BackupAccess::Task;

    my $agent = PVE::BackupAccess::GuestAgent->new(socket => $agent_socket);
    my $task = PVE::BackupAccess::Task->new($options->%*, $agent->hooks);
    $task->run_job;

=head1 DESCRIPTION

If the file systems are frozen at the instant of a backup, they are clean in the backup; otherwise they are as after a power
failure. The agent is reached through the Unix socket that QEMU creates for its virtio-serial port. Each call
makes a new connection.

=head1 ERRORS

The methods die with a L<PVE::BackupAccess::Error>: C<ConnectionError> if the socket cannot be connected to or the
connection is lost, C<TimeoutError> if the agent does not answer in time, C<ProtocolError> if the answer is not
valid, and the agent's own class (such as C<GenericError>) if the agent refuses the command. What your signal handlers die
with is passed on unchanged.

=head1 METHODS

=head2 new

=for run task

    use PVE::BackupAccess::GuestAgent;

    my $agent = PVE::BackupAccess::GuestAgent->new(
        socket => $agent_socket,
        timeout => 30,
        log => sub ($level, $message) { warn "$level: $message\n" },
    );

Checks the options and returns the agent. Connects to nothing. The options are:

=over

=item socket

Required. The path of the agent's socket.

=item timeout

Seconds that a call may take. The default is 60.

=item log

    log => sub ($level, $message) { ... },

A code ref that is called with each error of L</hooks>, with level C<warn>. Without this option, errors go to C<warn>.

=back

Errors: C<ArgumentError> if an option is unknown, missing or wrong.

=head2 freeze

=for run task

    use PVE::BackupAccess::GuestAgent;

    my $agent = PVE::BackupAccess::GuestAgent->new(socket => $agent_socket);
    my $count = $agent->freeze;
    $agent->thaw;

Freezes all file systems. Takes no arguments. Returns how many file systems were frozen, or undef if the answer was lost
and the agent reports (C<guest-fsfreeze-status>) that they are frozen.

First the agent must answer a ping within five seconds. If it does not, no freeze is sent, and the message says so. If the
freeze was sent and its outcome is unknown, the message says that the guest may be frozen. So call L</thaw> after every
L</freeze>, even if freeze dies, except with C<StateError>.

Errors: as above; C<StateError> if the file systems are already frozen, because another program froze them, or because a
backup was killed meanwhile. No freeze is sent then.

=head2 thaw

=for run task

    use PVE::BackupAccess::GuestAgent;

    my $agent = PVE::BackupAccess::GuestAgent->new(socket => $agent_socket);
    my $count = $agent->thaw;

Thaws all file systems. Takes no arguments. Returns how many file systems were thawed. If the agent does not answer in
time, it still has the command and executes it after the commands before it. If the connection is lost, thaw tries once more.
If a signal handler dies meanwhile, thaw tries once more before it passes on the exception.

Errors: as above.

=head2 hooks

=for run task

    use PVE::BackupAccess::GuestAgent;

    my $agent = PVE::BackupAccess::GuestAgent->new(socket => $agent_socket);
    my %hooks = $agent->hooks;    # (freeze => sub { ... }, thaw => sub { ... })

Returns the options C<freeze> and C<thaw> of L<PVE::BackupAccess::Task/new> and L<PVE::BackupAccess/setup>. Takes no
arguments. The hooks log errors of the agent and continue, because a backup without a freeze is better than no backup. If no
freeze was sent to the guest, no thaw is sent either.

=cut
