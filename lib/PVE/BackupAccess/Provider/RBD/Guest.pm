package PVE::BackupAccess::Provider::RBD::Guest;

# All archives of one guest: an object whose values, by key, are
#
#   archive NAME           the manifest of the archive
#   damaged NAME DEVICE    exists if the last verification found damage
#
# and images whose names begin with the guest's place. A snapshot belongs to the archive with its name. If there is no
# manifest with this name, a killed process left the snapshot.

use v5.36;

use Scalar::Util qw(weaken);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(make_directory);
use PVE::BackupAccess::Provider::RBD::Archive;
use PVE::BackupAccess::Provider::RBD::Lock;
use PVE::BackupAccess::Provider::Store::Manifest qw($name_pattern safe_name);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Try qw(attempt reason rethrow);

use parent qw(PVE::BackupAccess::Provider::Store::Guest);

my $Archive = 'PVE::BackupAccess::Provider::RBD::Archive';
my $Lock = 'PVE::BackupAccess::Provider::RBD::Lock';

my sub fail ($message, %context) {
    PVE::BackupAccess::Error->throw('ArchiveError', $message, %context);
}

# ceph; store, the RBD::Store; place, such as vm/100; wait, how many seconds to wait for a lock.
sub new ($class, %options) {
    my $number = $options{place} =~ s!/!-!r;
    return bless({ %options, object => "pba.$number", prefix => "pba-$number-" }, $class);
}

sub ceph ($self) { return $self->{ceph} }

# A directory for files of this process. It is removed with the object.
sub directory ($self) {
    my $private = $self->{private}
        //= PVE::BackupAccess::Provider::Store::PrivateDir->new($ENV{TMPDIR} ? () : '/var/tmp');
    my $directory = $private->path . '/tree';
    make_directory($directory) if !-d $directory;
    return $directory;
}

sub log_of ($self, $name) { return "$self->{object}.$name.log" }

# Each full backup of a device gets a new image: a new one is neither damaged nor in use.
sub image_for ($self, $device, $name) {
    return $self->{prefix} . safe_name($device) . "-$name";
}

# ---- the guest's object ----

# Cached since the last lock was taken.
sub _values ($self) {
    return $self->{values} //= $self->{ceph}->values($self->{object}) // {};
}

sub _set ($self, $key, $value) {
    $self->{ceph}->set_value($self->{object}, $key, $value);
    $self->{values}{$key} = $value if $self->{values};
    return;
}

sub _unset ($self, $key) {
    $self->{ceph}->remove_value($self->{object}, $key);
    delete($self->{values}{$key}) if $self->{values};
    return;
}

sub is_there ($self) { return defined($self->{values} //= $self->{ceph}->values($self->{object})) }

sub make_place ($self) {
    return if $self->is_there;
    my $object = $self->{object};

    # Otherwise clean would take the images for leftovers of a killed process and remove them.
    fail(
        "the object $object, which lists the archives of $self->{place}, is missing, but there are images"
            . " $self->{prefix}* - remove these images, or restore the object")
        if $self->_snapshots->%*;

    # The guest's own object is the last: where it exists, nothing of this is repeated.
    $self->{store}->add_place($self->{place});
    $self->{ceph}->make_object($_) for (map { "$object.$_" } $Lock->kinds), $object;
    return;
}

sub names ($self) {
    return sort map { m/\Aarchive $name_pattern\z/ ? $1 : () } keys $self->_values->%*;
}

sub has ($self, $name) { return exists($self->_values->{"archive $name"}) }

sub archive ($self, $name) {
    my $text = $self->_values->{"archive $name"}
        // fail("there is no archive $self->{place}/$name");
    return $Archive->load($self, $name, $text);
}

sub is_known_damaged ($self, $name, $own) {
    return exists($self->_values->{ _damage_key($name, $own) }) ? 1 : 0;
}

sub _damage_key ($name, $own) {
    utf8::encode(my $bytes = $own);
    return "damaged $name " . $bytes =~ s/([^!-~]|%)/sprintf('%%%02X', ord($1))/ger;
}

sub note_damage ($self, $name, $own, $is_damaged) {
    return if $is_damaged == $self->is_known_damaged($name, $own);
    my $key = _damage_key($name, $own);
    return $is_damaged ? $self->_set($key, "yes\n") : $self->_unset($key);
}

# ---- locks: see Lock.pm ----

# Readers note damage, but do not change snapshots: the lock for removals is taken under that for changes.
sub _take ($self, $how, $kind, @wait) {
    my $lock = $Lock->$how($self->@{qw(ceph object)}, $kind, @wait);
    delete($self->@{ $kind eq 'removal' ? 'values' : qw(values snapshots some) });
    return $lock;
}

# The guest remembers the lock, but does not keep it.
sub _take_change ($self, $how, @wait) {
    my $lock = $self->_take($how, 'change', @wait);
    weaken($self->{changing} = $lock) if $lock;
    return $lock;
}

sub try_change_lock ($self) { return $self->_take_change('try') }
sub change_lock ($self) { return $self->_take_change('take', $self->{wait}) }

# To be called before each step that would do harm beside another backup or prune.
sub check_lock ($self) {
    $self->{changing}->check if $self->{changing};
    return;
}

sub removal_lock ($self) { return $self->_take('take', 'removal', $self->{wait}) }

sub read_lock ($self) {
    return $self->is_there ? $self->_take('take', 'read', $self->{wait}) : undef;
}

sub drop ($self, $lock) {
    $lock->drop if $lock;
    return;
}

sub leave ($self, $lock) {
    $lock->leave;
    return $lock;
}

# ---- images ----

# { image => [{ name, size, protected }] } of the guest's.
sub _snapshots ($self) {
    return $self->{snapshots} //= {
        map { $_ => $self->{ceph}->snapshots($_) // [] }
            map { m/\A(\Q$self->{prefix}\E[A-Za-z0-9%._-]+-$name_pattern)\z/ ? $1 : () }
            $self->{ceph}->images
    };
}

sub _snapshots_of ($self, $image) {
    return $self->{snapshots}{$image} if $self->{snapshots};
    return $self->{some}{$image} //= $self->{ceph}->snapshots($image) // [];
}

my sub snapshot_of ($snapshots, $name) {
    my ($found) = grep { $_->{name} eq $name } ($snapshots // [])->@*;
    return $found;
}

# Why there is no snapshot of an image with that name and size, or undef. Does not read the data.
sub snapshot_problem ($self, $name, $image, $size) {
    my $snapshot = snapshot_of($self->_snapshots_of($image), $name)
        // return "the snapshot $image\@$name is missing";
    return undef if $snapshot->{size} == $size;
    return "the snapshot $image\@$name has $snapshot->{size} bytes, not $size";
}

sub image_problem ($self, $archive, $device) {
    return $self->snapshot_problem($archive->name, $archive->device($device)->@{qw(image size)});
}

# The lock is lost if this host does not respond for half a minute. Then another process may have removed the snapshot while it
# was read, and reads return zeroes. If the snapshot is there now, it was there all the time.
sub reading_problem ($self, $name, $device) {
    delete($self->@{qw(snapshots some)});
    my $problem = $self->image_problem($self->archive($name), $device) // return undef;
    return
        "$problem: the archive was removed during that time, because this host did not respond for half a minute";
}

# ---- completion and removal ----

sub publish ($self, $archive, $notes = undef) {
    $self->check_lock;
    my $text = $archive->text;
    $Archive->load($self, $archive->name, $text);    # dies if it would be refused
    $archive->note_in($notes) if $notes;
    my $key = 'archive ' . $archive->name;
    $self->_set($key, $text);

    # If the lock was lost just before that, another process may have removed the snapshots, as those of a killed one.
    my $lost = attempt { $self->check_lock };
    return if !$lost;
    $self->_unset($key) if $lost->class eq 'StateError';
    rethrow($lost);
}

# If publish was ended while the cluster stored the manifest, the archive may exist: then clean leaves it as it is.
sub give_up ($self, $archive) {
    delete($self->@{qw(values snapshots)});
    $self->clean;
    return;
}

# An administrator protects snapshots in order to clone them, or to keep them.
sub is_protected ($self, $name) {
    return scalar(
        grep { $_->{protected} }
        map { snapshot_of($_, $name) // () } values $self->_snapshots->%*
    ) ? 1 : 0;
}

# The same, but asks again: removals of other archives may have taken long.
sub _is_protected_now ($self, $name) {
    my $all = $self->_snapshots;
    for my $image (grep { snapshot_of($all->{$_}, $name) } keys $all->%*) {
        $all->{$image} = $self->{ceph}->snapshots($image) // [];
    }
    return $self->is_protected($name);
}

# The keys of notes about archives that do not exist any more.
sub _lone_notes ($self) {
    return grep { m/\Adamaged $name_pattern / && !$self->has($1) } sort keys $self->_values->%*;
}

# The objects with digests that are left of an archive's snapshots if another program has removed these.
sub _lone_digests ($self, $name) {
    my $archive;
    attempt { $archive = $self->archive($name) };
    return if !$archive;
    my @lone = grep { !snapshot_of($self->_snapshots_of($_->{image}), $name) }
        map { $archive->device($_) } $archive->devices;
    return map {
        my ($size) = $_->{size} =~ m/\A([0-9]+)\z/;
        $Archive->digest_objects($_->{image}, $name, $size)
    } @lone;
}

# First removes the manifest, so that this is not an archive any more. Then clean removes the snapshots with their digests,
# and the images, as it does for those of a killed process.
sub remove ($self, $name) {
    fail("archive $name is protected - unprotect its snapshots first (rbd snap unprotect)")
        if $self->_is_protected_now($name);
    my @digests = $self->_lone_digests($name);
    $self->check_lock;

    # Before the notes about damage: as long as the archive is listed, nothing may build on it.
    $self->_unset("archive $name");
    $self->_unset($_) for $self->_lone_notes;
    $self->{ceph}->remove_object($_) for $self->log_of($name), @digests;
    my @problems = $self->clean;
    fail("archive $name is removed, but the next backup, prune or removal has to complete that - "
            . join('; ', @problems))
        if @problems;
    return;
}

# The snapshots of an image that belong to no archive.
sub _lone_snapshots ($self, $image) {
    return
        grep { $_->{name} =~ m/\A$name_pattern\z/ && !$self->has($1) && !$_->{protected} }
        $self->_snapshots->{$image}->@*;
}

# The lock is checked when it is known what there is: then nothing that is removed can be of a backup that began after the
# lock was lost.
sub clean ($self) {
    my @images = grep { !$self->_snapshots->{$_}->@* || $self->_lone_snapshots($_) }
        sort keys $self->_snapshots->%*;
    my @notes = $self->_lone_notes;
    return if !@images && !@notes;
    my $lost = attempt { $self->check_lock };
    return reason($lost) if $lost;
    my @problems;
    for my $note (@notes) {
        my $error = attempt { $self->_unset($note) };
        push(@problems, "cannot remove what a removal left - " . reason($error)) if $error;
    }
    for my $image (@images) {
        my $error = attempt { $self->_clean_image($image) };
        push(@problems,
            "cannot remove what a backup or removal left of image $image - " . reason($error))
            if $error;
    }
    return @problems;
}

# The digests first, because the snapshot is what leads to them.
sub _clean_image ($self, $image) {
    my $ceph = $self->{ceph};
    for my $snapshot ($self->_lone_snapshots($image)) {
        my ($name) = $snapshot->{name} =~ m/\A$name_pattern\z/;
        my ($size) = $snapshot->{size} =~ m/\A([0-9]+)\z/;
        $ceph->remove_object($_) for $Archive->digest_objects($image, $name, $size);
        $ceph->remove_snapshot($image, $name);
        $self->{snapshots}{$image}
            = [grep { $_ != $snapshot } $self->{snapshots}{$image}->@*];
    }
    return if $self->{snapshots}{$image}->@*;
    $ceph->remove_image($image);
    delete($self->{snapshots}{$image});
    return;
}

1;
