package PVE::BackupAccess::Image::InUse;

# Whether another process may change an image while it is read. QEMUs see each other by their locks; this is
# about everybody else: a loop device, a mounted file system, qemu-nbd without locks.

use v5.36;

use Exporter qw(import);
use Fcntl qw(F_RDLCK F_SETLEASE F_UNLCK O_ACCMODE O_EXCL O_RDONLY S_ISBLK S_ISREG);

use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(check_unused);

my sub fail ($message) {
    PVE::BackupAccess::Error->throw('SystemError', $message);
}

my sub fail_as_open ($file) {
    fail(
        "$file is open for writing in another process, such as a running QEMU - end that process, or"
            . ' back up the running guest');
}

# The kernel gives no read lease on a file that any process has open for writing, QEMU or not. Where there
# are no leases, as on some network file systems, QEMU's own locks tell of QEMUs.
my sub check_file ($file) {
    open(my $fh, '<', $file) or fail("cannot open $file - $!");
    fail_as_open($file) if !fcntl($fh, F_SETLEASE, F_RDLCK) && $!{EAGAIN};
    fcntl($fh, F_SETLEASE, F_UNLCK);
    return;
}

# A descriptor of another process that may write. Only what is below /dev is looked at: to look at a file of a
# server that does not answer takes forever.
my sub is_writer ($descriptor, $device) {
    return 0 if (readlink($descriptor) // '') !~ m{\A/dev/};
    my @found = stat($descriptor) or return 0;
    return 0 if !S_ISBLK($found[2]) || $found[6] != $device;
    open(my $fh, '<', $descriptor =~ s{/fd/}{/fdinfo/}r) or return 0;
    my ($flags) = join('', <$fh>) =~ m/^flags:\s*([0-7]+)$/m or return 0;
    return (oct($flags) & O_ACCMODE) != O_RDONLY;
}

# There are no leases on block devices. What holds one for itself, such as a file system or a volume group,
# shows; of processes, those that we may look at.
my sub check_device ($file, $device) {
    sysopen(my $fh, $file, O_RDONLY | O_EXCL)
        or fail(
        $!{EBUSY}
        ? "$file is mounted or used by another device - unmount it"
        : "cannot open $file - $!"
        );
    close($fh);
    fail_as_open($file) if grep { is_writer($_, $device) } glob('/proc/[0-9]*/fd/*');
    return;
}

sub check_unused ($file) {
    my @found = stat($file) or fail("cannot open $file - $!");
    return check_file($file) if S_ISREG($found[2]);
    return check_device($file, $found[6]) if S_ISBLK($found[2]);
    fail("$file is neither a file nor a block device");
}

1;
