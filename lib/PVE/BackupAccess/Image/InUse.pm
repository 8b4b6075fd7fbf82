package PVE::BackupAccess::Image::InUse;

# Checks whether another process could change an image while it is read. QEMU processes detect each other by
# their image locks. This module detects all other users: loop devices, mounted file systems, qemu-nbd without
# locks.

use v5.36;

use Exporter qw(import);
use Fcntl qw(F_RDLCK F_SETLEASE F_UNLCK O_ACCMODE O_EXCL O_RDONLY S_ISBLK S_ISREG);

use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(check_unused has_writer);

my sub fail ($message) {
    PVE::BackupAccess::Error->throw('SystemError', $message);
}

# The kernel grants no read lease on a file that any process, QEMU or not, has open for writing. File systems
# without leases, such as some network file systems, leave only QEMU's own locks, which show other QEMU
# processes.
my sub file_has_writer ($file) {
    open(my $fh, '<', $file) or fail("cannot open $file - $!");
    return 1 if !fcntl($fh, F_SETLEASE, F_RDLCK) && $!{EAGAIN};
    fcntl($fh, F_SETLEASE, F_UNLCK);
    return 0;
}

# Whether a file descriptor of another process is open for writing on the device. Only descriptors of files in
# /dev are examined: stat on a file of a server that does not answer would hang.
my sub is_writer ($descriptor, $device) {
    return 0 if (readlink($descriptor) // '') !~ m{\A/dev/};
    my @found = stat($descriptor) or return 0;
    return 0 if !S_ISBLK($found[2]) || $found[6] != $device;
    open(my $fh, '<', $descriptor =~ s{/fd/}{/fdinfo/}r) or return 0;
    my ($flags) = join('', <$fh>) =~ m/^flags:\s*([0-7]+)$/m or return 0;
    return (oct($flags) & O_ACCMODE) != O_RDONLY;
}

# Block devices have no leases, and QEMU does not open them exclusively. Only processes whose descriptors this
# user may read are found.
my sub device_has_writer ($device) {
    return grep { is_writer($_, $device) } grep { !m{\A/proc/$$/} } glob('/proc/[0-9]*/fd/*');
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
    check_exclusive($file) if S_ISBLK($found[2]);
    PVE::BackupAccess::Error->throw('StateError',
        "$file is open for writing in another process, such as a running QEMU - end that process, or"
            . ' back up the running guest')
        if has_writer($file);
    return;
}

1;
