package PVE::BackupAccess::Provider::Store::Disks;

# Finds a disk among the devices of an archive. A name may move from one disk to another. The identity, which stays with
# the disk, is in a manifest if the caller of the backup passed it.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

use PVE::BackupAccess::Argument qw(bad_argument);

our @EXPORT_OK = qw(builders device_meant disk_keys find_alias find_device guest_device missing);

# The ID, undef if it has none, and the QOM path of a guest device, by the path that query-block shows:
# the device of a virtio disk, or of a usb-storage, contains the one that is shown.
sub guest_device ($shown) {
    my $path = $shown =~ s!/(?:virtio-backend|[^/]+/legacy\[0\])\z!!r;
    my ($id) = $path =~ m!\A/machine/peripheral/([^/]+)\z!;
    return ($id, $path);
}

# The names of a drive or of a guest device, as QEMU shows them.
my sub names_in ($identity) {
    my ($kind, $name) = $identity =~ m!\A(drive|device) (.+)\z!s or return;
    return $name if $kind eq 'drive';
    my ($id, $path) = guest_device($name);
    my $usb = defined($id) ? "$path/$id.0/legacy[0]" : undef;
    return ($id, $path, $name, "$path/virtio-backend", $usb);
}

# All names of a disk: in the backup, of its node, and of its drive or guest device.
my sub names_of ($device, $about) {
    return uniq(grep { defined } $device, $about->{node}, names_in($about->{identity} // ''));
}

# The disk's identity. QEMU numbers the guest devices that have no ID anew at each start, so that another disk may get
# the path of a device: then the name of the disk's node tells which disk it is.
my sub lasting_identity ($device, $about) {
    my $identity = $about->{identity} // return undef;
    return $identity if $identity !~ m!\Adevice /machine/(?:peripheral-anon|unattached)/!;
    return "$identity with " . ($about->{node} // $device);
}

# The disk's name in the archive, undef if the archive does not have it. The disk is found by the identity in about if
# that is known and the archive has identities, else by its name.
sub find_device ($archive, $device, $about) {
    my $identity = lasting_identity($device, $about);
    my $same = $archive->device($device);
    return $same ? $device : undef if !defined($identity);
    my ($found)
        = grep { (lasting_identity($_, $archive->device($_)) // '') eq $identity }
        $archive->devices;
    return $found // ($same && !defined($same->{identity}) ? $device : undef);
}

# The same for an archive without identities, by any of the disk's names. This is a guess: use it only for data that is
# compared anyway, or for a message.
sub find_alias ($archive, $device, $about) {
    my ($found)
        = grep { $archive->device($_) && !defined($archive->device($_)->{identity}) }
        names_of($device, $about);
    return $found;
}

# Why the archive does not have the disk.
sub missing ($archive, $device, $about) {
    my $same = lasting_identity($device, $archive->device($device) // {});
    return 'archive ' . $archive->name . " does not have the disk $device" if !defined($same);
    return
          "$device is another disk in archive "
        . $archive->name
        . ": $same, not "
        . lasting_identity($device, $about);
}

# The devices of the archive that build on $device of the archive $name.
sub builders ($archive, $name, $device) {
    return grep {
        my ($parent, $there) = $archive->parent_of($_);
        defined($parent) && $parent eq $name && $there eq $device
    } $archive->devices;
}

# Returns a function that maps a name to the identity of the only disk that had this name in these archives, or to undef
# if there is none or more than one.
my sub only_disks (@archives) {
    my %named;
    for my $archive (@archives) {
        for my $device ($archive->devices) {
            my $about = $archive->device($device);
            my $identity = lasting_identity($device, $about) // next;
            $named{$_}{$identity} = 1 for names_of($device, $about);
        }
    }
    return sub ($name) {
        my @known = keys(($named{$name} // {})->%*);
        return @known == 1 ? $known[0] : undef;
    };
}

# Returns a function ($archive, $device) whose result is the same for one disk in all of these archives: its identity.
# In an archive without identities, it is that of the only disk that had the name, or else the name.
sub disk_keys (@archives) {
    my $disk_of = only_disks(@archives);
    return sub ($archive, $device) {
        my $identity = lasting_identity($device, $archive->device($device)) // $disk_of->($device);
        return defined($identity) ? "disk $identity" : "name $device";
    };
}

# The probable name, in an archive without identities, of the disk that other archives have under $name, or undef.
my sub guess_called ($archive, $name, @archives) {
    my $disk_of = only_disks(@archives);
    my $identity = $disk_of->($name) // return undef;
    my @found
        = grep { !defined($archive->device($_)->{identity}) && ($disk_of->($_) // '') eq $identity }
        $archive->devices;
    return @found == 1 ? $found[0] : undef;
}

# The device of the archive that a name means: the device with this name, else the only one that also had this name.
# Dies if there is none; the message then has a guess from the guest's other archives.
sub device_meant ($archive, $name, $guest) {
    return $name if $archive->device($name);
    my $problem = $archive->manifest_problem;
    bad_argument("archive "
            . $archive->name
            . " has no device $name, and its devices' other names are unknown - $problem")
        if defined($problem);
    my @devices = $archive->devices;
    my @found = grep {
        my $device = $_;
        grep { $_ eq $name } names_of($device, $archive->device($device))
    } @devices;
    return $found[0] if @found == 1;
    my $guess = guess_called($archive, $name, $guest->readable);
    bad_argument(
              'archive '
            . $archive->name
            . " has no device $name - it has "
            . join(', ', @devices)
            . (
            defined($guess) ? "; according to other archives, $name is probably $guess here" : ''
            )
    );
}

1;
