package PVE::BackupAccess::Provider::Qcow2Chain::Guest;

# All archives of one guest: a directory. Whoever changes something holds its lock.

use v5.36;

use Fcntl qw(LOCK_EX LOCK_NB O_CREAT O_RDWR);
use JSON::PP ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Qcow2Chain::Archive;
use PVE::BackupAccess::Provider::Qcow2Chain::File;

my $Archive = 'PVE::BackupAccess::Provider::Qcow2Chain::Archive';
my $json = JSON::PP->new->utf8->canonical->pretty;

sub new ($class, $dir) {
    return bless({ dir => $dir }, $class);
}

sub dir ($self) { return $self->{dir} }

# A handle that holds the lock until it is closed, undef if somebody else has it.
sub try_lock ($self) {
    my $path = "$self->{dir}/.lock";
    sysopen(my $fh, $path, O_RDWR | O_CREAT, 0600)
        or PVE::BackupAccess::Error->throw('SystemError', "cannot open $path - $!");
    return flock($fh, LOCK_EX | LOCK_NB) ? $fh : undef;
}

sub lock ($self) {
    return $self->try_lock // PVE::BackupAccess::Error->throw('StateError',
        "$self->{dir} is in use by another backup or prune - try again when it has ended");
}

my sub entries ($dir) {
    opendir(my $dh, $dir) or return ();
    return sort readdir($dh);
}

# The archives, the oldest first.
sub names ($self) {
    my $pattern = $Archive->name_pattern;
    return grep { $Archive->exists($self->{dir}, $_) }
        map { m/\A$pattern\z/ ? $1 : () } entries($self->{dir});
}

sub archive ($self, $name) { return $Archive->load($self->{dir}, $name) }

# The archive that has the device's data, then those it builds on, down to a full one. Dies if one is
# not there.
sub chain ($self, $name, $device) {
    my (@chain, %seen, $id);
    while (defined($name)) {
        my $archive = $self->archive($name);
        my $entry = $archive->device($device);
        my $problem
            = $seen{$name}++ ? 'its chain has no end'
            : !$entry ? "it has no device $device"
            : defined($id) && $id ne $archive->id ? 'it is another one than it was'
            : @chain && $entry->{size} != $chain[0]->device($device)->{size} ? 'its size differs'
            : undef;
        PVE::BackupAccess::Error->throw(
            'ArchiveError',
            "archive $self->{dir}/$name cannot be used - $problem",
            device => $device
        ) if defined($problem);
        push(@chain, $archive);
        ($name, $id) = $entry->@{qw(parent parent-id)};
    }
    return @chain;
}

# ---- after a crash ----

# Takes away what a killed process left, and ends what it began. Needs the lock.
sub clean ($self) {
    my $pattern = $Archive->name_pattern;
    for my $entry (entries($self->{dir})) {
        if ($entry =~ m/\A(\.(?:tmp|del)-$pattern)\z/) {
            PVE::BackupAccess::Provider::Qcow2Chain::File::remove_tree("$self->{dir}/$1");
        }
        elsif ($entry =~ m/\A$pattern\z/ && $Archive->is_half_removed($self->{dir}, $1)) {
            $self->_finish_removal($self->archive($1));
        }
    }
    return;
}

# ---- what the bitmaps are relative to ----

sub _bitmaps_file ($self) { return "$self->{dir}/bitmaps.json" }

# { storage => { device => { archive, id } } }. A file that cannot be read is as good as none.
sub _bitmaps ($self) {
    my $bitmaps = eval {
        $json->decode(PVE::BackupAccess::Provider::Qcow2Chain::File::read($self->_bitmaps_file));
    };
    return ref($bitmaps) eq 'HASH' ? $bitmaps : {};
}

# The archive that the device's bitmap is relative to and that an incremental one can build on; or
# undef and why there is none.
sub base ($self, $storage, $device, $size) {
    my $bitmaps = $self->_bitmaps->{$storage};
    my $base = ref($bitmaps) eq 'HASH' ? $bitmaps->{$device} : undef;
    return (undef, 'there is no backup before') if ref($base) ne 'HASH';
    my $pattern = $Archive->name_pattern;
    my ($name) = ($base->{archive} // '') =~ m/\A$pattern\z/
        or return (undef, 'the last backup is not known');
    return (undef, "the last backup, $name, is not there any more")
        if !$Archive->exists($self->{dir}, $name);
    my @chain = eval { $self->chain($name, $device) };
    return (undef, $@ =~ s/\n\z//r) if !@chain;
    return (undef, "the last backup, $name, is another one than it was")
        if $chain[0]->id ne ($base->{id} // '');
    my $old_size = $chain[0]->device($device)->{size};
    return (undef, "its size was $old_size and is $size") if $old_size != $size;

    for my $archive (@chain) {
        my $problem = $archive->file_problem($archive->device($device)->{file}, 0)
            // $archive->header_problem($device);
        return (undef, $problem) if defined($problem);
    }
    return ($chain[0], undef);
}

# Gives the archive its name. Before that it is noted as what the bitmaps are relative to: a crash
# in between makes the next backup a full one.
sub publish ($self, $archive, $storage) {
    my $bitmaps = $self->_bitmaps;
    my $own = $bitmaps->{$storage};
    $own = $bitmaps->{$storage} = {} if ref($own) ne 'HASH';
    for my $device ($archive->devices) {
        my $has_bitmap = $archive->device($device)->{'bitmap-mode'} ne 'none';
        delete($own->{$device});
        $own->{$device} = { archive => $archive->name, id => $archive->id } if $has_bitmap;
    }
    PVE::BackupAccess::Provider::Qcow2Chain::File::replace($self->_bitmaps_file,
        $json->encode($bitmaps));
    $archive->publish;
    return;
}

# ---- removal ----

# Takes an archive away. What others need of it becomes theirs. Needs the lock.
sub remove ($self, $name) {
    my $archive = $self->archive($name);
    my $children = $self->_children($archive);
    for my $device (sort keys $children->%*) {
        for my $image ($archive, $children->{$device}) {
            my $problem = $image->file_problem($image->device($device)->{file}, 0)
                // $image->header_problem($device);
            PVE::BackupAccess::Error->throw(
                'ArchiveError',
                "archive $name cannot be merged into " . $children->{$device}->name . " - $problem",
                device => $device
            ) if defined($problem);
        }
    }
    $archive->mark_removed;
    $self->_finish_removal($archive);
    return;
}

# { device => the archive that builds on this one's }
sub _children ($self, $archive) {
    my %children;
    for my $name ($self->names) {
        my $other = $self->archive($name);
        for my $device ($other->devices) {
            next if ($other->device($device)->{parent} // '') ne $archive->name;
            PVE::BackupAccess::Error->throw(
                'ArchiveError',
                'archive ' . $archive->name . ' cannot be removed - more than one builds on it',
                device => $device
            ) if $children{$device};
            $children{$device} = $other;
        }
    }
    return \%children;
}

sub _finish_removal ($self, $archive) {
    my $children = $self->_children($archive);
    $children->{$_}->absorb($_, $archive) for sort keys $children->%*;
    $archive->delete;
    return;
}

1;
