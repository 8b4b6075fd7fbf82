package PBA::Bench::QMPProxy;

# Stands between a QMP client and QEMU and notes how long each command took, from when it was passed
# on to when QEMU's reply came. What the client makes of the reply is no part of it. Descriptors
# passed along with a command are not passed on.
#
#   my $proxy = PBA::Bench::QMPProxy->start(target => $vm->qmp_path);
#   ... let the client use $proxy->socket_path ...
#   $proxy->commands;     # { command, seconds, time, error }, in the order of the replies

use v5.36;

use parent 'PBA::Test::Peer';

use IO::Socket::UNIX;
use POSIX ();
use Time::HiRes qw(time);

# Events may come at any time; the other lines answer the commands in their order.
my $is_reply = qr/\A\s*\{"(?:return|error|id)"/;
my $first_command = qr/\A.*?"execute"\s*:\s*"([^"]+)"/s;

sub commands ($self, $since = 0) {
    return grep { $_->{time} >= $since } $self->records('answered');
}

# ---- in the proxy's process ----

# One client at a time, as with QEMU itself.
sub serve ($self, $listener) {
    while (1) {
        $self->wait_ready($listener, 'read');
        my $client = $listener->accept or next;
        my $qemu = IO::Socket::UNIX->new(Peer => $self->{target})
            or die "cannot connect to $self->{target}: $!\n";
        $_->blocking(0) for $client, $qemu;
        $self->_pass_on($client, $qemu);
        $self->record('closed');
    }
}

sub _pass_on ($self, $client, $qemu) {
    my ($commands, $replies, @waiting) = ('', '');
    while (my @ready = $self->_wait_for_either($client, $qemu)) {
        for my $from (@ready) {
            my $before = time;
            my $chunk = '';
            $self->receive_more($from, \$chunk) or return;
            if ($from == $client) {
                $commands .= $chunk;
                while ($commands =~ s/$first_command//) {
                    push @waiting, { command => $1, sent => $before };
                }
                $self->send_bytes($qemu, $chunk);
            }
            else {
                my $now = time;
                $self->send_bytes($client, $chunk);
                $replies .= $chunk;
                while ($replies =~ s/\A([^\n]*)\n//) {
                    $self->_note_reply($1, $now, \@waiting);
                }
            }
        }
    }
    return;
}

sub _note_reply ($self, $line, $now, $waiting) {
    return if $line !~ $is_reply || !@$waiting;
    my $command = shift @$waiting;
    $self->record(
        'answered',
        command => $command->{command},
        time => $command->{sent},
        seconds => $now - $command->{sent},
        error => $line =~ /\A\s*\{(?:"id": [^,]*, )?"error"/ ? 1 : 0,
    );
    return;
}

sub _wait_for_either ($self, @handles) {
    my $bits = '';
    vec($bits, fileno($_), 1) = 1 for @handles, $self->{watch};
    my $n = select(my $ready = $bits, undef, undef, undef);
    return () if $n < 0;
    POSIX::_exit(0) if vec($ready, fileno($self->{watch}), 1);
    return grep { vec($ready, fileno($_), 1) } @handles;
}

1;
