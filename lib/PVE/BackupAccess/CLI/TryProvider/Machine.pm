package PVE::BackupAccess::CLI::TryProvider::Machine;

# The QEMU of try-provider, in a private directory that is removed with the object. It has four disks
# and no guest system. The monitor command 'qemu-io' writes to the guest's devices, so dirty bitmaps
# and copy-before-write handle these writes like those of a guest.

use v5.36;

use File::Copy ();
use File::Temp ();
use JSON::PP ();
use POSIX qw(WNOHANG);
use Time::HiRes qw(sleep);

use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::Monitor;
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Program qw(kill_child);
use PVE::BackupAccess::Try qw(attempt);

my $mib = 1024 * 1024;
my $timeout = 60;
my $seconds_to_end = 10;    # after it was killed

# The disks with the EFI variables and the TPM state are small, and their sizes are not multiples of the
# bitmap's granularity.
my %sizes = (
    'drive-scsi0' => 32 * $mib,
    'drive-scsi1' => 12 * $mib + 4096,
    'drive-efidisk0' => 528 * 1024,
    'drive-tpmstate0-backup' => 4608,
);

# The fleecing image has a write error at this offset. So a write to the disk here, after the instant
# of a backup, breaks the snapshot, as a full fleecing file system does.
my $trap = 28 * $mib;

my $json = JSON::PP->new->utf8->canonical;

sub devices ($class) { return sort keys %sizes }
sub size_of ($self, $device) { return $self->{sizes}{$device} }
sub trap ($class) { return $trap }

sub start ($class) {
    my $dir = File::Temp->newdir('pve-backup-access-try.XXXXXX', TMPDIR => 1);
    my $self = bless({ tmp => $dir, dir => "$dir", owner => $$, sizes => {%sizes} }, $class);
    for my $device ($class->devices) {
        $self->make_file($_, $sizes{$device}) for "$device.raw", "$device-fleecing.raw";
    }
    mkdir("$dir/run", 0700) or die "$dir/run: $!\n";
    $self->launch;
    return $self;
}

sub make_file ($self, $name, $size) {
    open(my $fh, '>', "$self->{dir}/$name") or die "$self->{dir}/$name: $!\n";
    truncate($fh, $size) && close($fh) or die "$self->{dir}/$name: $!\n";
    return;
}

# ---- the process ----

my sub disk_arguments ($self, $device) {
    my $dir = text($self->{dir});
    my %disk = (
        driver => 'raw',
        'node-name' => $device,
        discard => 'unmap',
        file => { driver => 'file', filename => "$dir/$device.raw", discard => 'unmap' },
    );
    my %fleecing = (
        driver => 'raw',
        'node-name' => "$device-fleecing",
        discard => 'unmap',
        file => {
            driver => 'blkdebug',
            discard => 'unmap',
            image =>
                { driver => 'file', filename => "$dir/$device-fleecing.raw", discard => 'unmap' },
            'inject-error' =>
                [{ event => 'none', iotype => 'write', errno => 28, sector => $trap / 512 }],
        },
    );
    my $id = $device =~ s/\Adrive-//r;
    return (
        (map { ('-blockdev', $json->encode($_)) } \%disk, \%fleecing),
        '-device', "scsi-hd,id=$id,drive=$device,bus=scsi.0",
    );
}

my sub command ($self) {
    return (
        qw(setpriv --pdeathsig KILL stdbuf -oL --),
        $ENV{PBA_QEMU} // 'qemu-system-x86_64',
        qw(-name try-provider -machine pc -accel tcg -m 32 -nodefaults -display none),
        '-qmp',
        "unix:$self->{dir}/qmp,server=on,wait=off",
        '-device',
        'virtio-scsi-pci,id=scsi',
        map { disk_arguments($self, $_) } $self->devices,
    );
}

sub launch ($self) {
    my $log = "$self->{dir}/qemu.log";
    my @command = command($self);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(STDIN, '<', '/dev/null') or POSIX::_exit(126);
        open(STDOUT, '>>', $log) or POSIX::_exit(126);
        open(STDERR, '>&', \*STDOUT) or POSIX::_exit(126);
        { no warnings 'exec'; exec(@command) }
        print {*STDERR} "$command[0]: $!\n";
        POSIX::_exit(127);
    }
    $self->{pid} = $pid;
    my $deadline = now() + $timeout;
    while (attempt { $self->qmp('query-status') }) {
        die "QEMU does not start: " . $self->log if !$self->is_alive || now() > $deadline;
        sleep(0.05);
    }
    return;
}

sub is_alive ($self) {
    local $?;
    delete($self->{pid}) if $self->{pid} && waitpid($self->{pid}, WNOHANG) != 0;
    return defined($self->{pid});
}

sub log ($self) {
    open(my $fh, '<', "$self->{dir}/qemu.log") or return '';
    local $/ = undef;
    return <$fh> // '';
}

sub end ($self) {
    my $pid = $self->{pid} // return;
    kill_child($pid, $seconds_to_end);
    delete($self->{pid});
    return;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    local ($@, $!, $?);
    $self->end;
    delete($self->{tmp});
    return;
}

sub qmp ($self, @question) {
    return PVE::BackupAccess::CLI::Monitor::ask("$self->{dir}/qmp", @question);
}

# ---- disks ----

# Fills a range with a byte, as a write of the guest would.
sub write ($self, $device, $offset, $length, $byte) {
    my $id = $device =~ s/\Adrive-//r;
    my $line = sprintf('qemu-io -d %s "write -P %d %d %d"', $id, $byte, $offset, $length);
    my $said = $self->qmp('human-monitor-command', 'command-line' => $line);
    open(my $fh, '<:raw', $self->file($device)) or die $self->file($device) . ": $!\n";
    seek($fh, $offset, 0);
    read($fh, my $data, $length);
    die "QEMU did not write to $device: $said" . $self->log if $data ne chr($byte) x $length;
    return;
}

# ---- what happens between backups ----

# Rolls the disks back to older contents, { device => file }. As on Proxmox VE, a new QEMU process
# then runs the guest.
sub roll_back ($self, $files) {
    $self->end;
    for my $device ($self->devices) {
        File::Copy::copy($files->{$device}, $self->file($device))
            or die $self->file($device) . ": $!\n";
    }
    $self->launch;
    return;
}

sub lose_bitmap ($self, $device) {
    my ($node)
        = grep { $_->{'node-name'} eq $device }
        $self->qmp('query-named-block-nodes', flat => JSON::PP::true)->@*;
    $self->qmp('block-dirty-bitmap-remove', node => $device, name => $_->{name})
        for ($node->{'dirty-bitmaps'} // [])->@*;
    return;
}

sub resize ($self, $device, $size) {
    $self->qmp('block_resize', 'node-name' => $_, size => $size) for $device, "$device-fleecing";
    $self->{sizes}{$device} = $size;
    return;
}

sub file ($self, $device) { return "$self->{dir}/$device.raw" }

# The options of an access to this guest.
sub access_options ($self) {
    return (
        qmp => "$self->{dir}/qmp",
        'run-dir' => "$self->{dir}/run",
        fleecing => { map { $_ => "$_-fleecing" } $self->devices },
    );
}

1;
