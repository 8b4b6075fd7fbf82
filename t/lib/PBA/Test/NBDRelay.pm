package PBA::Test::NBDRelay;

# A relay between NBD clients and QEMU's NBD server, which kills a client at one of its connections or discards.
# PBA::Test::QMPProxy starts it in its own process.
#
#   my $relay = PBA::Test::NBDRelay->start($proxy, $path, 'kill-before-nbd', 3);
#
# Further arguments are handles that the relay's process closes. The relay replaces the server's socket at
# $path, and restores it before it kills and when it ends. Connections and discards are counted together.
# 'kill-before-nbd' kills before QEMU receives the message; 'kill-after-nbd' kills when the connection exists,
# or when QEMU has answered the discard.

use v5.36;

use IO::Socket::UNIX;
use POSIX ();
use Socket qw(SOCK_STREAM SOL_SOCKET SO_PEERCRED);

my $TRIM = 4;
my $WRITE = 1;

sub start ($class, $peer, $path, $fault, $at, @handles) {
    my $self = bless({ peer => $peer, path => $path, fault => $fault, at => $at }, $class);
    rename($path, "$path.q") or die "rename $path: $!\n";
    my $listener = IO::Socket::UNIX->new(Type => SOCK_STREAM, Local => $path, Listen => 64)
        or die "cannot listen on $path: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($_) for @handles;
        eval { $self->_serve($listener); 1 } or print STDERR 'NBD relay died: ', $@;
        POSIX::_exit(1);
    }
    $self->{pid} = $pid;
    return $self;
}

sub stop ($self) {
    kill('KILL', $self->{pid});
    waitpid($self->{pid}, 0);
    $self->_give_back;
    return;
}

sub _give_back ($self) {
    rename("$self->{path}.q", $self->{path}) if -S "$self->{path}.q";
    return;
}

# ---- in the relay's process ----

sub _serve ($self, $listener) {
    my @pairs;
    $self->{count} = 0;
    while (1) {
        my @ready = $self->_wait($listener, map { $_->@{qw(client server)} } @pairs);
        for my $fh (@ready) {
            if ($fh == $listener) {
                my $client = $listener->accept or next;
                push(@pairs, $self->_new_pair($client));
                next;
            }
            my ($pair) = grep { $_->{client} == $fh || $_->{server} == $fh } @pairs;
            next if !$pair || $self->_pass($pair, $fh);
            $self->_kill($pair) if $pair->{kill_at_next};
            close($_) for $pair->@{qw(client server)};
            @pairs = grep { $_ != $pair } @pairs;
        }
    }
}

sub _wait ($self, @handles) {
    my $ready = '';
    vec($ready, fileno($_), 1) = 1 for $self->{peer}{watch}, @handles;
    select($ready, undef, undef, undef);
    POSIX::_exit(0) if vec($ready, fileno($self->{peer}{watch}), 1);
    return grep { vec($ready, fileno($_), 1) } @handles;
}

sub _new_pair ($self, $client) {
    my ($pid) = unpack('i', getsockopt($client, SOL_SOCKET, SO_PEERCRED));
    my $pair = { client => $client, pid => $pid, from_client => '', from_server => '' };
    my $struck = $self->_strikes('connect');
    $self->_kill($pair) if $struck && $self->{fault} eq 'kill-before-nbd';
    $pair->{kill_at_next} = $struck;
    $pair->{server} = IO::Socket::UNIX->new(Peer => "$self->{path}.q") or die "no QEMU: $!\n";
    return $pair;
}

sub _strikes ($self, $name) {
    $self->{peer}->record('nbd', name => $name);
    return 0 if ++$self->{count} != $self->{at};
    $self->{peer}->record('fault', name => $name);
    return 1;
}

sub _kill ($self, $pair) {
    $self->_give_back;
    kill('KILL', $pair->{pid});
    POSIX::_exit(0);
}

# Forwards the available data, message by message. False if one side has ended.
sub _pass ($self, $pair, $fh) {
    my ($side, $to)
        = $fh == $pair->{client} ? ('client', $pair->{server}) : ('server', $pair->{client});
    my $buffer = \$pair->{"from_$side"};
    sysread($fh, $$buffer, 1 << 20, length($$buffer)) or return 0;
    while (defined(my $length = _message_length($$buffer))) {
        last if length($$buffer) < $length;
        my $message = substr($$buffer, 0, $length, '');
        $side eq 'client'
            ? $self->_look_at_request($pair, $message)
            : $self->_look_at_reply($pair, $message);
        $self->{peer}->send_bytes($to, $message);
    }
    return 1;
}

sub _look_at_request ($self, $pair, $message) {
    my ($type, $cookie) = _request($message) or return;
    $self->_kill($pair) if $pair->{kill_at_next};
    return if $type != $TRIM || !$self->_strikes('discard');
    $self->_kill($pair) if $self->{fault} eq 'kill-before-nbd';
    $pair->{kill_at_reply} = $cookie;
    return;
}

sub _look_at_reply ($self, $pair, $message) {
    my $cookie = $pair->{kill_at_reply} // return;
    my $magic = unpack('N', $message);
    return if $magic != 0x67446698 && $magic != 0x668e33ef && $magic != 0x6e8a278c;
    $self->_kill($pair) if substr($message, 8, 8) eq $cookie;
    return;
}

# The type and the cookie of a request in the transmission phase.
sub _request ($message) {
    my $magic = unpack('N', $message);
    return if $magic != 0x25609513 && $magic != 0x21e41c71;
    return (unpack('x6 n', $message), substr($message, 8, 8));
}

# NBD messages are recognized by their magic numbers. Returns undef while the length is not known yet.
sub _message_length ($buffer) {
    return undef if length($buffer) < 4;
    my $magic = unpack('N', $buffer);
    my $header = {
        0x4e42444d => 18,    # NBDMAGIC: the greeting
        0x49484156 => 16,    # IHAVEOPT: an option
        0x0003e889 => 20,    # its reply
        0x25609513 => 28,    # a request
        0x21e41c71 => 32,    # the same with extended headers
        0x67446698 => 16,    # a simple reply
        0x668e33ef => 20,    # a chunk of a structured one
        0x6e8a278c => 32,    # the same with extended headers
    }->{$magic};
    return 4 if !$header;    # the client's flags
    return undef if length($buffer) < $header;
    return $header + _payload_length($magic, $buffer);
}

sub _payload_length ($magic, $buffer) {
    return unpack('x12 N', $buffer) if $magic == 0x49484156;
    return unpack('x16 N', $buffer) if $magic == 0x0003e889 || $magic == 0x668e33ef;
    return unpack('x24 Q>', $buffer) if $magic == 0x6e8a278c;
    return unpack('x24 N', $buffer) if $magic == 0x25609513 && unpack('x6 n', $buffer) == $WRITE;
    return 0;
}

1;
