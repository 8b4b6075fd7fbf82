package PBA::Test::Peer;

# A child process at a Unix socket in a private directory, for peers whose behaviour no real program has.
# Subclasses implement serve($listener), which runs in the child.

use v5.36;

use Errno qw(EAGAIN EINTR);
use File::Temp ();
use IO::Socket::UNIX;
use JSON::PP ();
use List::Util qw(max);
use POSIX ();
use Socket qw(SOCK_STREAM);
use Time::HiRes qw(time);

my $json = JSON::PP->new->canonical->utf8->allow_nonref;

# listen: another path than that in the private directory.
sub start ($class, %options) {
    my $dir = File::Temp->newdir('pba-peer-XXXXXXXX', TMPDIR => 1);
    my $socket = $options{listen} // "$dir/socket";
    my $self = bless { %options, owner => $$, dir => $dir, socket => $socket }, $class;
    open($self->{log}, '+>>', "$dir/log") or die "cannot create $dir/log: $!\n";
    my $listener = $self->_listen;
    pipe(my $lifeline, $self->{lifeline}) or die "cannot create a pipe: $!\n";
    my $pid = fork() // die "cannot fork: $!\n";
    $self->_child($listener, $lifeline) if !$pid;
    $self->{pid} = $pid;
    return $self;
}

sub socket_path ($self) { return $self->{socket} }
sub pid ($self) { return $self->{pid} }
sub dir ($self) { return "$self->{dir}" }

# The records of the peer so far: one hash per line, in chronological order.
sub records ($self, $kind = undef) {
    open(my $fh, '<', "$self->{dir}/log") or die "cannot read $self->{dir}/log: $!\n";
    local $/ = "\n";
    my @records = map { $json->decode($_) } grep { /\n\z/ } <$fh>;
    return grep { !defined($kind) || $_->{kind} eq $kind } @records;
}

# The peer runs in another process, so its record of the end of a connection may appear shortly after the client
# has seen that end.
sub wait_for_record ($self, $kind, $count = 1, $seconds = 10) {
    my $deadline = time + $seconds;
    while (1) {
        my @records = $self->records($kind);
        return $records[-1] if @records >= $count;
        die "peer recorded no '$kind' within $seconds seconds\n" if time > $deadline;
        select(undef, undef, undef, 0.01);
    }
}

sub running ($self) {
    return 0 if !defined($self->{pid});
    local $?;
    return waitpid($self->{pid}, POSIX::WNOHANG()) == 0;
}

sub stop ($self) {
    return if !defined($self->{pid}) || $self->{owner} != $$;
    local ($?, $!, $@);
    kill('TERM', $self->{pid}) if $self->running;
    waitpid($self->{pid}, 0);
    unlink($self->{socket});
    delete @$self{qw(pid lifeline)};
    return;
}

sub DESTROY ($self) {
    $self->stop;
    return;
}

sub _listen ($self) {
    my $listener = IO::Socket::UNIX->new(
        Type => SOCK_STREAM,
        Local => $self->{socket},
        Listen => 64,
    ) or die "cannot listen on $self->{socket}: $!\n";
    return $listener;
}

# Runs serve() and never returns. The peer must not inherit the signal handlers, END blocks and descriptors of
# the test: if it kept a connection of the test's client open, this would hide that the test has closed it.
sub _child ($self, $listener, $lifeline) {
    $SIG{$_} = 'DEFAULT' for qw(INT TERM HUP ALRM CHLD __DIE__ __WARN__);
    $SIG{PIPE} = 'IGNORE';
    delete $self->{lifeline};
    my %keep = map { $_ => 1 } 0 .. 2, map { fileno($_) } $listener, $lifeline, $self->{log};
    _let_go_of(grep { !$keep{$_} } _open_descriptors());
    @$self{qw(watch pid)} = ($lifeline, $$);
    my $ok = eval { $self->serve($listener); 1 };
    print STDERR 'peer died: ', $@ if !$ok;
    POSIX::_exit($ok ? 0 : 1);
}

# The descriptors are replaced, not closed: PerlIO counts the handles of each descriptor, and after a close that
# it did not see, a new handle with the same number would never be closed.
sub _let_go_of (@fds) {
    open(my $null, '+<', '/dev/null') or die "cannot open /dev/null: $!\n";
    POSIX::dup2(fileno($null), $_) for @fds;
    return;
}

sub _open_descriptors () {
    opendir(my $dh, '/proc/self/fd') or die "cannot read /proc/self/fd: $!\n";
    my @fds = grep { /^\d+\z/ } readdir($dh);
    closedir($dh);
    return @fds;
}

# ---- for subclasses, in the child ----

sub record ($self, $kind, %values) {
    my $line = $json->encode({ kind => $kind, time => time, %values }) . "\n";
    syswrite($self->{log}, $line) // die "cannot write the log: $!\n";
    return;
}

# Waits until $fh is ready ('read' or 'write'), or returns false if the time has passed. Ends the process when
# the test has ended in any way, which closes the other end of the pipe.
sub wait_ready ($self, $fh, $what, $seconds = undef) {
    my $deadline = defined($seconds) ? time + $seconds : undef;
    while (1) {
        my ($read, $write) = ('', '');
        vec($read, fileno($self->{watch}), 1) = 1;
        if (defined($fh)) {
            vec($what eq 'write' ? $write : $read, fileno($fh), 1) = 1;
        }
        my $left = defined($deadline) ? max(0, $deadline - time) : undef;
        my $n = select($read, $write, undef, $left);
        next if $n < 0 && $! == EINTR;
        POSIX::_exit(0) if $n > 0 && vec($read, fileno($self->{watch}), 1);
        return $n > 0 ? 1 : 0 if $n >= 0;
        die "select: $!\n";
    }
}

sub sleep_for ($self, $seconds) {
    $self->wait_ready(undef, 'read', $seconds);
    return;
}

# Returns the number of bytes that were sent: fewer than given if the client has disconnected, or reads nothing
# for $patience seconds.
sub send_bytes ($self, $fh, $bytes, $patience = 120) {
    my $sent = 0;
    while ($sent < length($bytes)) {
        my $n = syswrite($fh, $bytes, length($bytes) - $sent, $sent);
        if (defined($n)) {
            $sent += $n;
        }
        elsif ($! == EAGAIN) {
            last if !$self->wait_ready($fh, 'write', $patience);
        }
        elsif ($! != EINTR) {
            last;
        }
    }
    return $sent;
}

# Appends the available data to $$buffer. False at the end of the stream.
sub receive_more ($self, $fh, $buffer) {
    while (1) {
        $self->wait_ready($fh, 'read');
        my $n = sysread($fh, $$buffer, 1 << 18, length($$buffer));
        return $n > 0 ? 1 : 0 if defined($n);
        return 0 if $! != EAGAIN && $! != EINTR;
    }
}

1;
