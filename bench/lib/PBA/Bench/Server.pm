package PBA::Bench::Server;

# qemu-nbd that serves an image, with its bitmap if it has one, on a Unix socket in a private directory, or,
# with tcp => 1, on a local port. With nbdkit => [...], a nbdkit with these arguments, as a server with almost
# no cost.

use v5.36;

use IO::Socket::INET;
use IO::Socket::UNIX;
use POSIX ();

use PBA::Test::QemuNbd;

sub start ($class, %options) {
    my $self = bless {
        export => 'disk',
        owner => $$,
        %options,
        socket => "$options{dir}/nbd",
    }, $class;
    $self->{port} = _free_port() if $self->{tcp};
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {

        # It warns about each client that ends early, which some clients here do.
        open(STDERR, '>', "$options{dir}/qemu-nbd.log") or POSIX::_exit(127);
        exec($self->_command) or POSIX::_exit(127);
    }
    $self->{pid} = $pid;
    PBA::Test::QemuNbd::wait_until_up($pid, sub () { $self->_connect }, sub () { $self->_log });
    return $self;
}

sub uri ($self) {
    return "nbd://127.0.0.1:$self->{port}/$self->{export}" if $self->{port};
    return "nbd+unix:///$self->{export}?socket=$self->{socket}";
}

sub context ($self) { return "qemu:dirty-bitmap:$self->{bitmap}" }

# Serves clients, one after the other, until it is ended.
sub _command ($self) {
    return ('nbdkit', '--foreground', "--unix=$self->{socket}", $self->{nbdkit}->@*)
        if $self->{nbdkit};
    return (
        $ENV{PBA_QEMU_NBD} // 'qemu-nbd',
        $self->{writable} ? '--discard=unmap' : '--read-only',
        qw(--persistent --shared=8),
        '--format=' . ($self->{format} // 'qcow2'),
        "--export-name=$self->{export}",
        defined($self->{bitmap}) ? "--bitmap=$self->{bitmap}" : (),
        $self->{port} ? ('--bind=127.0.0.1', "--port=$self->{port}") : "--socket=$self->{socket}",
        $self->{file},
    );
}

sub _connect ($self) {
    return IO::Socket::UNIX->new(Peer => $self->{socket}) if !$self->{port};
    return IO::Socket::INET->new(PeerAddr => '127.0.0.1', PeerPort => $self->{port});
}

sub _free_port () {
    my $socket = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 1)
        or die "no free port: $!\n";
    return $socket->sockport;
}

sub _log ($self) {
    open(my $fh, '<', "$self->{dir}/qemu-nbd.log") or return '';
    return join('', <$fh>);
}

sub DESTROY ($self) {
    return if $self->{owner} != $$ || !defined($self->{pid});
    local $?;
    kill('TERM', $self->{pid});
    waitpid($self->{pid}, 0);
    return;
}

1;
