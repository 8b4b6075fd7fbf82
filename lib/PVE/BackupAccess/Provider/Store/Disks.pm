package PVE::BackupAccess::Provider::Store::Disks;

# Which device of an archive is which disk. Names may go from one disk to another; what tells a disk from others, its
# identity, is in the manifests of callers that tell it.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

use PVE::BackupAccess::Argument qw(bad_argument);

our @EXPORT_OK = qw(builders device_meant disk_keys find_alias find_device missing);

# What a disk is called: by the backup, its node, and by the drive or the guest's device that it is.
my sub names_of ($device, $about) {
    my ($of) = ($about->{identity} // '') =~ m!\A(?:drive |device /machine/peripheral/)(.+)\z!s;
    return uniq(grep { defined } $device, $about->{node}, $of);
}

# What the archive calls the disk, undef if it does not have it. about: its identity, where that is known. An archive
# that tells no identity has it by its name.
sub find_device ($archive, $device, $about) {
    my $identity = $about->{identity};
    my $same = $archive->device($device);
    return $same ? $device : undef if !defined($identity);
    my ($found) = grep { ($archive->device($_)->{identity} // '') eq $identity } $archive->devices;
    return $found // ($same && !defined($same->{identity}) ? $device : undef);
}

# Of an archive that tells no identity: what it calls a disk that it does not have by that name, but by another of its
# names. That is a guess, good for what is compared or said.
sub find_alias ($archive, $device, $about) {
    my ($found)
        = grep { $archive->device($_) && !defined($archive->device($_)->{identity}) }
        names_of($device, $about);
    return $found;
}

# Why the archive does not have the disk.
sub missing ($archive, $device, $about) {
    my $same = ($archive->device($device) // {})->{identity};
    return 'archive ' . $archive->name . " does not have the disk $device" if !defined($same);
    return
          'archive '
        . $archive->name
        . " has another disk as $device: $same, not $about->{identity}";
}

# What of the archive builds on that device of the archive of that name.
sub builders ($archive, $name, $device) {
    return grep {
        my ($parent, $there) = $archive->parent_of($_);
        defined($parent) && $parent eq $name && $there eq $device
    } $archive->devices;
}

# A function that gives the identity of the only disk that has had a name in these archives, undef if there is none, or
# several.
my sub only_disks (@archives) {
    my %named;
    for my $archive (@archives) {
        for my $device ($archive->devices) {
            my $about = $archive->device($device);
            my $identity = $about->{identity} // next;
            $named{$_}{$identity} = 1 for names_of($device, $about);
        }
    }
    return sub ($name) {
        my @known = keys(($named{$name} // {})->%*);
        return @known == 1 ? $known[0] : undef;
    };
}

# A function ($archive, $device) that gives what is the same for one disk in all of these archives: its identity. Of an
# archive that tells none it is that of the only disk that has had the name; else the name.
sub disk_keys (@archives) {
    my $disk_of = only_disks(@archives);
    return sub ($archive, $device) {
        my $identity = $archive->device($device)->{identity} // $disk_of->($device);
        return defined($identity) ? "disk $identity" : "name $device";
    };
}

# What an archive that tells no identities may call the disk that has the name in others; undef: nothing that is known.
my sub guess_called ($archive, $name, @archives) {
    my $disk_of = only_disks(@archives);
    my $identity = $disk_of->($name) // return undef;
    my @found
        = grep { !defined($archive->device($_)->{identity}) && ($disk_of->($_) // '') eq $identity }
        $archive->devices;
    return @found == 1 ? $found[0] : undef;
}

# The device of an archive that a name means: its own one, else the only one that had that name as well. Dies if there
# is none. A guess by the other archives of the guest is said, and no more.
sub device_meant ($archive, $name, $guest) {
    return $name if $archive->device($name);
    my @devices = $archive->devices;
    my @found = grep {
        my $device = $_;
        grep { $_ eq $name } names_of($device, $archive->device($device))
    } @devices;
    return $found[0] if @found == 1;
    my $guess = guess_called($archive, $name, $guest->readable);
    bad_argument("the archive has no device $name - it has "
            . join(', ', @devices)
            . (defined($guess) ? "; as far as other archives tell, that is $guess here" : ''));
}

1;
