package PBA::Test::BitmapDisk;

# A disk with a dirty bitmap, but without a machine: a qcow2 image with a persistent bitmap that QEMU's tools
# maintain. qemu-nbd exports it as an access exports a snapshot. The expected content is known.
#
#   my $disk = PBA::Test::BitmapDisk->new(dir => $dir, device => 'drive-scsi0', size => $bytes);
#   $disk->write([$offset, $length, $byte], ...);
#   my $volume = $disk->open('use');     # frozen, as after setup: a volume of backup_vm()
#   $disk->close($success);              # as teardown
#   $disk->content;

use v5.36;

use POSIX ();

use PBA::Test::QemuNbd qw(img);

my $bitmap = 'bitmap0';

sub new ($class, %options) {
    my $self = bless({ %options, content => "\0" x $options{size}, has_bitmap => 0 }, $class);
    $self->{file} = "$self->{dir}/$self->{device}.qcow2";
    img('create', '-q', '-f', 'qcow2', $self->{file}, $self->{size});
    return $self;
}

sub device ($self) { return $self->{device} }
sub size ($self) { return $self->{size} }
sub content ($self) { return $self->{content} }

sub write ($self, @writes) {
    my @commands;
    for my $write (@writes) {
        my ($offset, $length, $byte) = $write->@*;
        push(@commands, $byte ? "write -P $byte $offset $length" : "write -z $offset $length");
        substr($self->{content}, $offset, $length, chr($byte) x $length);
    }
    $self->_io($self->{file}, @commands) if @commands;
    return;
}

sub _io ($self, $file, @commands) {
    my $log = "$self->{dir}/qemu-io.log";
    local $SIG{CHLD} = 'DEFAULT';
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        delete($ENV{LD_PRELOAD});
        CORE::open(STDOUT, '>', $log)
            && CORE::open(STDERR, '>&', \*STDOUT)
            && exec('qemu-io', '-f', 'qcow2', (map { ('-c', $_) } @commands), $file);
        POSIX::_exit(127);
    }
    waitpid($pid, 0);
    die "qemu-io failed: see $log\n" if $?;
    return;
}

sub _bitmap ($self, @what) {
    img('bitmap', @what, '-f', 'qcow2', $self->{file}, $bitmap);
    return;
}

# Offline tools cannot set bits, but can merge the bitmap of another image that was written to completely.
sub _new_bitmap ($self) {
    my $all = "$self->{dir}/all-$self->{size}.qcow2";
    if (!-e $all) {
        img('create', '-q', '-f', 'qcow2', $all, $self->{size});
        img('bitmap', '--add', '-f', 'qcow2', $all, $bitmap);
        $self->_io($all, "write -z 0 $self->{size}");
    }
    my @remove = $self->{has_bitmap} ? '--remove' : ();
    $self->_bitmap(@remove, '--add', '--disable', '--merge', $bitmap, '-b', $all, '-F', 'qcow2');
    $self->{has_bitmap} = 1;
    return;
}

# Mode none, new or use.
sub open ($self, $mode) {
    my $status = $mode eq 'none' ? 'none' : $mode eq 'use' && $self->{has_bitmap} ? 'reuse' : 'new';
    $self->_new_bitmap if $status eq 'new';
    $self->_bitmap('--disable') if $status eq 'reuse';
    $self->_bitmap('--remove') if $status eq 'none' && $self->{has_bitmap};
    $self->{has_bitmap} = $status ne 'none';
    my @bitmap = $status eq 'none' ? () : (bitmap => $bitmap);
    $self->{server} = PBA::Test::QemuNbd->start(
        file => $self->{file},
        format => 'qcow2',
        export => $self->{device},
        readonly => 1,
        @bitmap,
    );
    return {
        size => $self->{size},
        'nbd-path' => $self->{server}->socket_path,
        'bitmap-mode' => $status,
        @bitmap ? ('bitmap-name' => $bitmap) : (),
    };
}

sub close ($self, $success) {
    $self->{server}->stop;
    return if !$self->{has_bitmap};
    $self->_bitmap($success ? '--clear' : (), '--enable');
    return;
}

1;
