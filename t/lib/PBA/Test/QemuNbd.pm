package PBA::Test::QemuNbd;

# qemu-nbd that serves an image on a socket in a private directory: a real server as a target, or a source with
# a real bitmap.
#
#   my $server = PBA::Test::QemuNbd->start(
#       file => $path, format => 'raw',     # or image_opts => 'driver=...'
#       bitmap => $name, readonly => 0|1, export => 'disk',
#   );
#   $server->uri; $server->pid; $server->stop;

use v5.36;

use Exporter qw(import);
use File::Temp ();
use FindBin ();
use IO::Socket::UNIX ();
use POSIX ();
use Time::HiRes ();

our @EXPORT_OK = qw(img);

my $START_SECONDS = 30;

sub start ($class, %options) {
    my $dir = File::Temp->newdir('pba-qemu-nbd-XXXXXXXX', TMPDIR => 1);
    my $self = bless({ format => 'raw', %options, dir => $dir, owner => $$ }, $class);
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        delete($ENV{LD_PRELOAD});    # the sanitizers report false errors in qemu-nbd's coroutines
        open(STDERR, '>', "$dir/log") or POSIX::_exit(127);
        exec($self->_command) or POSIX::_exit(127);
    }
    $self->{pid} = $pid;
    my $connect = sub () { IO::Socket::UNIX->new(Peer => "$self->{dir}/nbd") };
    wait_until_up($pid, $connect, sub () { $self->_log });
    return $self;
}

sub _command ($self) {
    return (
        $ENV{PBA_QEMU_NBD} // 'qemu-nbd',
        qw(--persistent --shared=8),
        '--export-name=' . ($self->{export} // 'disk'),
        "--socket=$self->{dir}/nbd",
        $self->{readonly} ? '--read-only' : '--discard=unmap',
        defined($self->{bitmap}) ? "--bitmap=$self->{bitmap}" : (),
        $self->{image_opts}
        ? ('--image-opts', $self->{image_opts})
        : ("--format=$self->{format}", $self->{file}),
    );
}

# Waits for the greeting of the server with this PID; $connect connects to it. qemu-nbd listens before it enters
# its main loop, and loses a SIGTERM that arrives in between.
sub wait_until_up ($pid, $connect, $log) {
    my $deadline = Time::HiRes::time() + $START_SECONDS;
    my $socket;
    while (!($socket = $connect->())) {
        die "qemu-nbd ended with status $?: ", $log->()
            if waitpid($pid, POSIX::WNOHANG()) != 0;
        die "qemu-nbd not up after $START_SECONDS seconds\n"
            if Time::HiRes::time() > $deadline;
        Time::HiRes::sleep(0.01);
    }
    sysread($socket, my $greeting, 8) or die 'qemu-nbd ended: ', $log->();
    return;
}

sub _log ($self) {
    open(my $fh, '<', "$self->{dir}/log") or return '';
    return join('', <$fh>);
}

sub socket_path ($self) { return "$self->{dir}/nbd" }
sub uri ($self) { return "nbd+unix:///disk?socket=$self->{dir}/nbd" }
sub pid ($self) { return $self->{pid} }

# After TERM, it writes the data that it still holds.
sub stop ($self, $signal = 'TERM') {
    my $pid = delete($self->{pid}) // return;
    local $?;
    kill($signal, $pid);
    waitpid($pid, 0);
    return;
}

sub DESTROY ($self) {
    $self->stop if $self->{owner} == $$;
    return;
}

# ---- images ----

sub img (@arguments) {
    delete local $ENV{LD_PRELOAD};
    local $SIG{CHLD} = 'DEFAULT';    # a test may ignore it
    system($ENV{PBA_QEMU_IMG} // 'qemu-img', @arguments) == 0 or die "qemu-img @arguments failed\n";
    return;
}

# The output of qemu-img.
sub output_of (@arguments) {
    delete local $ENV{LD_PRELOAD};
    local $SIG{CHLD} = 'DEFAULT';
    open(my $pipe, '-|', $ENV{PBA_QEMU_IMG} // 'qemu-img', @arguments) or die "qemu-img: $!\n";
    my $output = join('', <$pipe>);
    close($pipe) or die "qemu-img @arguments failed\n";
    return $output;
}

# A qcow2 image with a bitmap of any pattern: see PBA::Bench::BigMap.
sub write_map (%options) {
    require "$FindBin::Bin/../bench/lib/PBA/Bench/BigMap.pm";    ## no critic (BarewordIncludes)
    return PBA::Bench::BigMap->write(%options);
}

1;
