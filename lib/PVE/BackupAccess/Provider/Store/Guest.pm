package PVE::BackupAccess::Provider::Store::Guest;

# All archives of one guest, wherever they are stored: what the next backup of a disk can build on. A subclass says which
# archives there are and what each is, by these methods:
#
#   names                    of the archives, the oldest first
#   archive($name)           one of them, a Store::Archive
#   checked_base($name, $device, $own, $size)    it, if the device can be stored on top of what it calls $own; else it dies
#   chain($name, $device[, $own])    the archives that the device's data of that one is in, the newest first
#   device_problem($name, $device)   why the device cannot be restored, undef if it can
#   restorable($name, $device)       (archive, why the device cannot be read, undef if it can)
#   is_protected($name)
#   is_built_on($name), remove($name), discard($name)    by which several are removed, see Prune.pm
#   is_there, make_place, has($name)    whether there is a place for the guest's archives, making it, whether it has that one
#   change_lock, try_change_lock, read_lock, removal_lock    what Qcow2Chain/Lock.pm says of them
#   clean                    takes away what a killed process left; returns what could not be ended, as texts
#   drop($lock)              for all processes that have it
#   give_up($archive)        takes away what there is of a new one
#   publish($archive, $notes)    gives a new one its name

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Disks qw(builders find_alias find_device missing);
use PVE::BackupAccess::Try qw(attempt);

my sub fail ($message, %context) {
    PVE::BackupAccess::Error->throw('ArchiveError', $message, %context);
}

# Those whose manifests can be read, the oldest first.
sub readable ($self) {
    my @archives;
    for my $name ($self->names) {
        attempt { push(@archives, $self->archive($name)) };
    }
    return @archives;
}

# ---- what the bitmaps are relative to ----

# The newest archive that has the disk, and what it calls it. guest: its UUID, of no other one; undef: of whichever.
my sub newest_of ($archives, $device, $about, $guest = undef) {
    my @archives = reverse($archives->@*);
    @archives = grep { ($_->guest // '') eq $guest } @archives if defined($guest);
    for my $find (\&find_device, \&find_alias) {
        for my $archive (@archives) {
            my $own = $find->($archive, $device, $about);
            return ($archive, $own) if defined($own);
        }
    }
    return;
}

# The archive that the device's bitmap can go on from, undef if there is none. Where the bitmap does not
# tell its backup, that can be the newest archive only: a newer one than is noted is another host's. archives are
# those that can be read, as below: they are the same for all devices of a backup.
sub base ($self, $archives, $notes, $device, $volume) {
    my $is_told = exists($volume->{base});
    my $id
        = $is_told
        ? $volume->{base} // $volume->{'alias-base'}
        : ($notes->ids->{$device} // {})->{id};
    return undef if !defined($id);
    my $base = $self->_base_of_id($archives, $id, $device, $volume);
    return $base if $is_told;
    my ($newest) = newest_of($archives, $device, $volume);
    fail('this host did not make the newest archive, ' . $newest->name) if $newest->id ne $id;
    return $base;
}

# The archive with that id, which the device's bitmap is relative to. Dies if there is none, or if it
# cannot be built on. Where another archive builds on it already, that backup's end did not reach QEMU,
# or the guest was taken back in time: two that build on one could not be told apart in a removal.
sub _base_of_id ($self, $archives, $id, $device, $about) {
    my ($archive) = grep { $_->id eq $id } $archives->@*;
    fail("the backup that its bitmap is relative to, $id, is not here") if !$archive;
    my $name = $archive->name;
    my $own = find_device($archive, $device, $about) // fail(missing($archive, $device, $about));
    fail("archive $name does not tell which of its disks $device was")
        if defined($about->{'alias-base'}) && !defined($archive->device($own)->{identity});
    fail("archive $name has been built on already")
        if grep { builders($_, $name, $own) } $archives->@*;
    return $self->checked_base($name, $device, $own, $about->{size});
}

# The archives, the newest first, that what is read in full can be compared with, so that only what differs
# is stored. Dies if there is no such chain, or if it cannot be built on.
sub comparable ($self, $archives, $device, $about, $guest) {
    my ($newest, $own) = newest_of($archives, $device, $about, $guest // '');
    if (!$newest) {
        my ($other) = newest_of($archives, $device, $about);
        fail(
            $other
            ? 'archive ' . $other->name . ' is of another guest'
            : 'there is none before it'
        );
    }
    my $base = $self->checked_base($newest->name, $device, $own, $about->{size});
    my @chain = $self->chain($base->name, $device, $own);
    my ($problem) = map { $_->digests_problem($device) // () } @chain;
    fail($problem) if defined($problem);
    return @chain;
}

1;
