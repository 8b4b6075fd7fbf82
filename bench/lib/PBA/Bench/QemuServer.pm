package PBA::Bench::QemuServer;

# A backup with the mechanism file-handle as qemu-server makes it today: a QMP connection for each command,
# nbdfuse polled every 100 ms after its start, the map parsed from nbdinfo's lines, and fixed sleeps at the
# end. The QMP commands are those of PBA::Bench::HandMade.
#
#   my $task = PBA::Bench::QemuServer->new(qmp => $path, disks => [...], dir => $directory,
#       bitmap => $name, sleeps => 0|1);     # 0: waits for events instead of sleeping
#   $task->add_bitmaps;                      # once, before the first backup
#   my $volumes = $task->setup(incremental => 1);    # { $disk_id => $volume }
#   PBA::Bench::QemuServer::copy($volumes->{disk0}, $file);
#   $task->teardown;

use v5.36;

use Fcntl qw(O_CREAT O_DIRECT O_RDWR);
use POSIX ();
use Time::HiRes ();

use PBA::Bench::HandMade;

my %fallocate = (x86_64 => 285, aarch64 => 47);
my $PUNCH_HOLE_KEEP_SIZE = 3;
my $piece = 4 << 20;

# access: one other than HandMade's for the disks.
sub new ($class, %options) {
    my $access = $options{access} // PBA::Bench::HandMade->new(
        execute => PBA::Bench::HandMade::connection_per_command($options{qmp}),
        map { $_ => $options{$_} } qw(disks dir bitmap),
    );
    return bless { %options, access => $access }, $class;
}

sub add_bitmaps ($self) { return $self->{access}->add_bitmaps }

sub setup ($self, %options) {
    $self->{access}->setup(%options);
    $self->{access}->export(with_bitmaps => $options{incremental});
    return { map { $_->{id} => $self->_virtual_file($_, $options{incremental}) }
            $self->{disks}->@* };
}

# ---- the virtual file and its map ----

sub _virtual_file ($self, $disk, $incremental) {
    my $next_dirty_region
        = $incremental ? $self->_regions_of_nbdinfo($disk) : _whole_disk($disk->{size});
    my $mount = "$self->{dir}/mount-$disk->{id}";
    my %file = (path => "$mount/disk", mount => $mount, pid_file => "$mount.pid");
    mkdir($mount) or die "$mount: $!\n";
    $self->_spawn('nbdfuse', '--pidfile', $file{pid_file}, $file{path},
        $self->{access}->uri($disk));
    Time::HiRes::sleep(0.1) while !-s $file{pid_file};
    sysopen(my $handle, $file{path}, O_RDWR | O_DIRECT) or die "$file{path}: $!\n";
    push $self->{files}->@*, { %file, handle => $handle };
    return {
        size => $disk->{size},
        handle => $handle,
        next_dirty_region => $next_dirty_region,
    };
}

sub _spawn ($self, @command) {
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        exec(@command) or POSIX::_exit(127);
    }
    push $self->{pids}->@*, $pid;
    return;
}

sub _regions_of_nbdinfo ($self, $disk) {
    my $access = $self->{access};
    my $pid = open(my $lines, '-|', 'nbdinfo', '--map=' . $access->context, $access->uri($disk))
        // die "cannot run nbdinfo: $!\n";
    return sub {
        while (my $line = <$lines>) {
            my ($offset, $length, $type) = $line =~ /^\s*(\d+)\s+(\d+)\s+(\d+)/
                or die "unexpected line from nbdinfo: $line";
            return (0 + $offset, 0 + $length) if $type & 1;
        }
        return;
    };
}

sub _whole_disk ($size) {
    my @regions = ([0, $size]);
    return sub { return @regions ? (shift @regions)->@* : () };
}

# ---- what a provider does with it ----

# Returns the bytes read. Without a file, the data is dropped. Zeroes are not written, because a new file has
# them already.
sub copy ($volume, $file = undef) {
    my $zeroes = "\0" x $piece;
    my ($bytes, $target) = (0);
    if (defined($file)) {
        sysopen($target, $file, O_RDWR | O_CREAT) or die "$file: $!\n";
        truncate($target, $volume->{size}) or die "$file: $!\n";
    }
    while (my ($offset, $left) = $volume->{next_dirty_region}->()) {
        while ($left > 0) {
            my $data = read_at($volume, $offset, $left < $piece ? $left : $piece);
            my $length = length($data);
            _write_at($target, $offset, $data)
                if $target && $data ne ($length == $piece ? $zeroes : "\0" x $length);
            _discard($volume, $offset, $length);
            $offset += $length;
            $left -= $length;
            $bytes += $length;
        }
    }
    return $bytes;
}

sub read_at ($volume, $offset, $length) {
    my $data = '';
    sysseek($volume->{handle}, $offset, 0) // die "seek: $!\n";
    while ($length > length($data)) {
        my $got = sysread($volume->{handle}, $data, $length - length($data), length($data));
        die 'read: ' . ($! || 'end of file') . "\n" if !$got;
    }
    return $data;
}

sub _write_at ($target, $offset, $data) {
    sysseek($target, $offset, 0) // die "seek: $!\n";
    my $written = syswrite($target, $data);
    die "write: $!\n" if ($written // -1) != length($data);
    return;
}

sub _discard ($volume, $offset, $length) {
    my $number = $fallocate{ (POSIX::uname())[4] } // return;
    my $fd = fileno($volume->{handle});
    syscall($number, $fd, $PUNCH_HOLE_KEEP_SIZE, $offset, $length) == 0 or die "discard: $!\n";
    return;
}

# ---- teardown ----

sub teardown ($self) {
    $self->{access}->teardown;
    $self->_unmount($_) for splice($self->{files}->@*);
    Time::HiRes::sleep(0.1) if $self->{sleeps};
    waitpid($_, 0) for splice($self->{pids}->@*);
    sleep(1) if $self->{sleeps};
    return;
}

sub _unmount ($self, $file) {
    close($file->{handle});
    unlink($file->{pid_file});
    system('umount', '--lazy', $file->{mount}) == 0 or die "cannot unmount $file->{mount}\n";
    rmdir($file->{mount});
    return;
}

1;
