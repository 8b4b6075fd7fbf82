package PBA::Test::Channel;

# Lines over a Unix socket. Every wait has a time limit, so that no test run hangs.

use v5.36;

use Exporter qw(import);
use IO::Select ();
use IO::Socket::UNIX ();
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

our @EXPORT_OK = qw(now);

# $alive is called during waits, so that the wait ends if the peer is dead.
sub new ($class, %opt) {
    my $self = bless {
        path => $opt{path},
        what => $opt{what} // $opt{path},
        alive => $opt{alive} // sub { 1 },
        buffer => '',
    }, $class;
    $self->_connect($opt{timeout} // 30);
    return $self;
}

sub now() {
    return clock_gettime(CLOCK_MONOTONIC);
}

sub _connect ($self, $timeout) {
    my $deadline = now() + $timeout;
    while (1) {
        my $socket = IO::Socket::UNIX->new(Peer => $self->{path});
        if ($socket) {
            $socket->blocking(0);
            $self->{socket} = $socket;
            $self->{select} = IO::Select->new($socket);
            return;
        }
        my $error = $!;
        die "$self->{what}: QEMU has ended\n" if !$self->{alive}->();
        die "$self->{what}: no connection within $timeout s: $error\n" if now() > $deadline;
        Time::HiRes::sleep(0.01);
    }
}

sub close ($self) {
    close(delete $self->{socket}) if $self->{socket};
    return;
}

sub send_line ($self, $line, $timeout = 30) {
    my $data = "$line\n";
    my $deadline = now() + $timeout;
    die "$self->{what}: closed\n" if !$self->{socket};
    local $SIG{PIPE} = 'IGNORE';
    while (length $data) {
        my $n = syswrite($self->{socket}, $data);
        if ($n) {
            substr($data, 0, $n, '');
            next;
        }
        die "$self->{what}: write: $!\n" if !$!{EAGAIN} && !$!{EINTR};
        die "$self->{what}: not writable within $timeout s\n" if now() > $deadline;
        $self->{select}->can_write(0.2);
    }
    return;
}

# Returns the next line without its line end, or undef if none arrives in time.
sub read_line ($self, $timeout) {
    my $deadline = now() + $timeout;
    while (1) {
        return $1 if $self->{buffer} =~ s/\A([^\n]*)\n//;
        die "$self->{what}: closed\n" if !$self->{socket};
        my $left = $deadline - now();
        my $ready = $self->{select}->can_read($left > 0 ? $left : 0);
        if (!$ready) {
            return undef if now() >= $deadline;
            next;
        }
        my $n = sysread($self->{socket}, $self->{buffer}, 65536, length $self->{buffer});
        next if !defined $n && ($!{EAGAIN} || $!{EINTR});
        die "$self->{what}: connection lost" . (defined $n ? '' : ": $!") . "\n" if !$n;
    }
}

1;
