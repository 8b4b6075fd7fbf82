package PVE::BackupAccess::Image::InUse;

# Checks whether another process could change an image while it is read. QEMU processes detect each other by
# their image locks. This module detects all other users: loop devices, mounted file systems, qemu-nbd without
# locks.

use v5.36;

use Exporter qw(import);
use Fcntl qw(F_RDLCK F_SETLEASE F_UNLCK O_ACCMODE O_EXCL O_NONBLOCK O_RDONLY S_ISBLK S_ISREG);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(device_number);

our @EXPORT_OK = qw(check_unused devices_over has_writer);

my $Error = 'PVE::BackupAccess::Error';

my $sys = '/sys';    # see sysfs(5)

my sub fail ($message) {
    $Error->throw('SystemError', $message);
}

# The kernel grants no read lease on a file that any process, QEMU or not, has open for writing. File systems
# without leases, such as some network file systems, leave only QEMU's own locks, which show other QEMU
# processes.
my sub file_has_writer ($file) {
    sysopen(my $fh, $file, O_RDONLY | O_NONBLOCK) or fail("cannot open $file - $!");
    return 1 if !fcntl($fh, F_SETLEASE, F_RDLCK) && $!{EAGAIN};
    fcntl($fh, F_SETLEASE, F_UNLCK);
    return 0;
}

# ---- block devices ----

my sub last_part ($path) { return $path =~ s{.*/}{}sr }

my sub content_of ($file) {
    open(my $fh, '<', $file) or return '';
    chomp(my $line = <$fh> // '');
    return $line;
}

# { number of a device => names of the loop devices whose backing file it is }. The kernel itself has it open then: no process
# shows it, nor does O_EXCL. Only files in /dev are examined, as below.
my sub loops () {
    my %loops;
    for my $file (glob("$sys/block/loop*/loop/backing_file")) {
        my ($backing) = content_of($file) =~ m{\A(/dev/.+)} or next;
        my @found = stat($backing) or next;
        my ($name) = $file =~ m{/(loop[0-9]+)/loop/};
        push($loops{ device_number($found[6]) }->@*, $name) if S_ISBLK($found[2]);
    }
    return \%loops;
}

# The devices that consist of this device's data, or of a part of it: its partitions, and what LVM, the device mapper or a
# loop device has put on top of them. As { name => number }.
sub _over ($name, $loops = loops()) {
    my $dir = "$sys/class/block/$name";
    my @names = (
        (map { m{([^/]+)/partition\z} } glob("$dir/*/partition")),
        (map { last_part($_) } glob("$dir/holders/*")),
        ($loops->{ content_of("$dir/dev") } // [])->@*,
    );
    return { map { ($_ => content_of("$sys/class/block/$_/dev"), _over($_, $loops)->%*) } @names };
}

# The device's name in sysfs, '' if it is unknown.
my sub name_of ($device) {
    return last_part(readlink("$sys/dev/block/" . device_number($device)) // '');
}

# The disk that has the partition, '' if the device is no partition.
my sub disk_of ($name) {
    return '' if !-e "$sys/class/block/$name/partition";
    return (readlink("$sys/class/block/$name") // '') =~ m{([^/]+)/[^/]+\z} ? $1 : '';
}

# The names of the devices that show the data of a block device, or of the disk that it is a partition of, to others: LVM's, loop
# devices, and so on.
sub devices_over ($file) {
    my $name = name_of((stat($file))[6]);
    return if $name eq '';
    my $on_disk = loops()->{ content_of("$sys/class/block/" . disk_of($name) . '/dev') } // [];
    return sort grep { !-e "$sys/class/block/$_/partition" } keys _over($name)->%*, $on_disk->@*;
}

# Whether a file descriptor of another process is open for writing on one of the devices. Only descriptors of files in
# /dev are examined: stat on a file of a server that does not answer would hang.
my sub is_writer ($descriptor, $numbers) {
    return 0 if (readlink($descriptor) // '') !~ m{\A/dev/};
    my @found = stat($descriptor) or return 0;
    return 0 if !S_ISBLK($found[2]) || !$numbers->{ device_number($found[6]) };
    open(my $fh, '<', $descriptor =~ s{/fd/}{/fdinfo/}r) or return 0;
    my ($flags) = join('', <$fh>) =~ m/^flags:\s*([0-7]+)$/m or return 0;
    return (oct($flags) & O_ACCMODE) != O_RDONLY;
}

# Block devices have no leases, and QEMU does not open them exclusively. Only processes whose descriptors this
# user may read are found. Who writes to a partition, to the disk of a partition, or to a device over the device writes to the
# device.
my sub device_has_writer ($device) {
    my $name = name_of($device);
    my $disk = disk_of($name);
    my %over = $name ne '' ? _over($name)->%* : ();
    my @numbers = (device_number($device), values %over, content_of("$sys/class/block/$disk/dev"));
    my %numbers = map { $_ => 1 } grep { $_ ne '' } @numbers;
    return grep { is_writer($_, \%numbers) } grep { !m{\A/proc/$$/} } glob('/proc/[0-9]*/fd/*');
}

# Whether another process has the file or block device open for writing.
sub has_writer ($file) {
    my @found = stat($file) or fail("cannot open $file - $!");
    return S_ISBLK($found[2]) ? device_has_writer($found[6]) : file_has_writer($file);
}

# Detects exclusive users of a device, such as a mounted file system or a volume group.
my sub check_exclusive ($file) {
    sysopen(my $fh, $file, O_RDONLY | O_EXCL)
        or fail(
        $!{EBUSY}
        ? "$file is mounted or used by another device - unmount it"
        : "cannot open $file - $!"
        );
    return;
}

sub check_unused ($file) {
    my @found = stat($file) or fail("cannot open $file - $!");
    fail("$file is neither a file nor a block device")
        if !S_ISREG($found[2]) && !S_ISBLK($found[2]);
    if (S_ISBLK($found[2])) {
        check_exclusive($file);
        my ($over) = grep { content_of("$sys/block/$_/ro") eq '0' } devices_over($file);
        $Error->throw('StateError',
            "$file is used by the device $over, which may be written to - detach that first")
            if defined($over);
    }
    $Error->throw('StateError',
        "$file is open for writing in another process, such as a running QEMU - end that process, or"
            . ' back up the running guest')
        if has_writer($file);
    return;
}

1;
