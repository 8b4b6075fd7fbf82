package PVE::BackupAccess::Provider::Store::Guest;

# All archives of one guest, wherever they are stored, and what the next backup of a disk can build on. A subclass
# implements:
#
#   names                    the names of the archives, the oldest first
#   archive($name)           returns a Store::Archive
#   image_problem($archive, $device)    why the archive's device cannot be read, undef if it can; does not read its data
#   is_protected($name)      whether the archive must not be removed
#   remove($name)
#   is_there, make_place     whether the store has a place for the guest's archives; makes it
#   has($name)               whether there is such an archive
#   change_lock, try_change_lock, read_lock, removal_lock    see DirectoryLock.pm
#   is_clean                 whether there is nothing for clean to do
#   clean                    removes what a killed process left; returns what could not be completed, as texts
#   drop($lock)              releases the lock for all processes that have it
#   leave($lock)             leaves the lock to a forked process; returns what to keep until that has ended, by default nothing
#   give_up($archive)        removes an incomplete new archive
#   publish($archive, $notes)    gives a new archive its name, and before that notes it if there are notes
#
# and, if an archive can depend on another one:
#
#   chain($name, $device[, $own])    the archives that hold the device's data as of that archive, the newest first
#   checked_base($name, $device, $own, $size)    returns the archive if the device, which it calls $own, can build on it; else dies
#   device_problem($name, $device)   why the device cannot be restored, undef if it can; dies if that cannot be determined
#   restorable($name, $device)       (archive, why the device cannot be read, undef if it can)
#   note_damage_in($name, $device, $ranges)    notes which archives the damage in these ranges is in
#   being_removed(\@unread)  the archives whose removal has begun; see readable_of
#   is_built_on($name), discard($name)    for the removal of several archives, see Prune.pm

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Content qw(is_damage problem_of);
use PVE::BackupAccess::Provider::Store::Disks qw(builders find_alias find_device missing);
use PVE::BackupAccess::Try qw(attempt reason);

my sub fail ($message, %context) {
    PVE::BackupAccess::Error->throw('ArchiveError', $message, %context);
}

# The archives whose manifests can be read, the oldest first.
sub readable ($self, $unread = []) { return $self->readable_of($unread, $self->names) }

# Those with these names. The reasons why others cannot be read are added to unread, except if the manifest is damaged: one
# that cannot be read for a moment, or was made by a newer version, may build on another archive.
sub readable_of ($self, $unread, @names) {
    my @archives;
    for my $name (@names) {
        my $error = attempt { push(@archives, $self->archive($name)) };
        push($unread->@*, reason($error)) if $error && !is_damage($error);
    }
    return @archives;
}

# Why what was read from the archive's device under the read lock may be wrong; undef if it is right. A file's lock is not
# lost.
sub reading_problem ($self, $name, $device) { return undef }

# To close its handle is enough.
sub leave ($self, $lock) { return undef }

# ---- archives that depend on no other ----

sub being_removed ($self, $unread) { return }
sub is_built_on ($self, $name) { return 0 }
sub discard ($self, $name) { return $self->remove($name) }

# The chain is the archive alone.
sub chain ($self, $name, $device, $own = $device) {
    my $archive = $self->archive($name);
    $archive->answer_to($device, $own);
    fail("archive $name cannot be used - it has no device $own", device => $device)
        if !$archive->device($device);
    return $archive;
}

sub checked_base ($self, $name, $device, $own, $size) {
    my ($archive) = $self->chain($name, $device, $own);
    my $old_size = $archive->device($device)->{size};
    fail("the disk's size changed from $old_size to $size bytes") if $old_size != $size;
    my $problem = $self->image_problem($archive, $device) // $archive->digests_problem($device);
    fail($problem) if defined($problem);
    fail("archive $name is damaged, according to its last verification")
        if $archive->is_known_damaged($device);
    return $archive;
}

sub restorable ($self, $name, $device) {
    my ($archive) = $self->chain($name, $device);
    return ($archive, $self->image_problem($archive, $device));
}

sub device_problem ($self, $name, $device) {
    return problem_of(sub () { ($self->restorable($name, $device))[1] });
}

sub note_damage_in ($self, $name, $device, $ranges) {
    my ($archive) = $self->chain($name, $device);
    $archive->note_damage($device, 1);
    return;
}

# ---- what the bitmaps are relative to ----

# Returns the newest archive that has the disk, and the disk's name there. With guest, a UUID, only archives of that
# guest count.
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

# The archive that the device's bitmap is relative to, undef if none is known. If the caller does not pass its ID, it is
# the noted one, which must be the newest archive: a newer one was made by another host. archives are the readable ones,
# removed those that are being removed; the caller reads them once for all devices of a backup.
sub base ($self, $archives, $removed, $notes, $device, $volume) {
    my $is_told = exists($volume->{base});
    my $id
        = $is_told
        ? $volume->{base} // $volume->{'alias-base'}
        : ($notes->ids->{$device} // {})->{id};
    return undef if !defined($id);
    my $base = $self->_base_of_id($archives, $removed, $id, $device, $volume);
    return $base if $is_told;
    my ($newest) = newest_of($archives, $device, $volume);
    fail('the newest archive, ' . $newest->name . ', is not the one that this host made last')
        if $newest->id ne $id;
    return $base;
}

# Dies if one of the others builds on the archive's device. Those that are being removed count too: what builds on one of them
# will build on this archive.
my sub check_unused ($archive, $own, @others) {
    my $name = $archive->name;
    fail("another archive already builds on archive $name")
        if grep { builders($_, $name, $own) } @others;
    return;
}

# The archive with that ID, which the device's bitmap is relative to. Dies if there is none, or if nothing can build on
# it. If another archive already builds on it, QEMU was not told that this backup succeeded, or the guest was rolled
# back. A removal can merge an archive into one other only, so a second one must not build on it.
sub _base_of_id ($self, $archives, $removed, $id, $device, $about) {
    my ($archive) = grep { $_->id eq $id } $archives->@*;
    fail("the archive that its bitmap is relative to, ID $id, is not in this store") if !$archive;
    my $name = $archive->name;
    my $own = find_device($archive, $device, $about) // fail(missing($archive, $device, $about));
    fail("archive $name has no identities of disks, so it is unknown which of them $device was")
        if defined($about->{'alias-base'}) && !defined($archive->device($own)->{identity});
    check_unused($archive, $own, $archives->@*, $removed->@*);
    return $self->checked_base($name, $device, $own, $about->{size});
}

# The chain of archives, the newest first, that a device that is read in full can be compared with, so that only
# differences are stored. Dies if there is no such chain, or if nothing can build on it.
sub comparable ($self, $archives, $removed, $device, $about, $guest) {
    my ($newest, $own) = newest_of($archives, $device, $about, $guest // '');
    if (!$newest) {
        my ($other) = newest_of($archives, $device, $about);
        fail(
            $other
            ? 'archive ' . $other->name . ' is of another guest'
            : 'this store has no earlier archive of the disk'
        );
    }
    check_unused($newest, $own, $archives->@*, $removed->@*);
    my $base = $self->checked_base($newest->name, $device, $own, $about->{size});
    my @chain = $self->chain($base->name, $device, $own);
    my ($problem) = map { $_->digests_problem($device) // () } @chain;
    fail($problem) if defined($problem);
    return @chain;
}

1;
