package PVE::BackupAccess::Provider::Qcow2Chain::Guest;

# All archives of one guest: a directory.

use v5.36;

use List::Util qw(sum0);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain::Archive;
use PVE::BackupAccess::Provider::Store::Content qw(is_damage problem_of);
use PVE::BackupAccess::File qw(file_exists remove_tree);
use PVE::BackupAccess::Provider::Qcow2Chain::Content qw(content_problem merge_damage note_ranges);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(check_opening);
use PVE::BackupAccess::Try qw(attempt reason);

use parent qw(PVE::BackupAccess::Provider::Store::DirectoryGuest);

my $Archive = 'PVE::BackupAccess::Provider::Qcow2Chain::Archive';
my $Error = 'PVE::BackupAccess::Error';

my sub fail ($message, %context) {
    $Error->throw('ArchiveError', $message, %context);
}

sub archive ($self, $name) { return $Archive->load($self->{dir}, $name) }

# The archive $name, then those that it builds on, down to the full one. Each answers to the name $device, whatever name
# it has for the disk. Dies if one does not exist.
sub chain ($self, $name, $device, $own = $device) {
    my (@chain, %seen, $id);
    while (defined($name)) {
        my $archive = $self->archive($name);
        $archive->answer_to($device, $own);
        my $entry = $archive->device($device);
        my $problem
            = $seen{$name}++ ? 'its chain leads back to itself'
            : !$entry ? "it has no device $own"
            : defined($id)
            && $id ne $archive->id ? 'another archive has replaced it'
            : @chain
            && $entry->{size} != $chain[0]->device($device)->{size} ? "its $own has another size"
            : undef;
        $Error->throw(
            'ArchiveError',
            "archive $self->{dir}/$name cannot be used - $problem",
            device => $device
        ) if defined($problem);
        push(@chain, $archive);
        $id = $entry->{'parent-id'};
        ($name, $own) = $archive->parent_of($own);
    }
    return @chain;
}

# Why the images of a chain do not match the manifests, or undef. Reads only the headers, and the content of files whose
# size or time has changed since the backup.
sub chain_problem ($self, $device, @chain) {
    for my $archive (@chain) {
        my $problem = $archive->device_problem($device);
        return $problem if defined($problem);
    }
    my $problem = $self->headers_problem($device, @chain);
    for my $archive (grep { $_->is_touched($device) } @chain) {
        $problem //= $self->_content_problem($archive, $device);
    }
    return $problem;
}

# The content of each image is read once, however many archives build on it: in a copied store, all files may have new times.
sub _content_problem ($self, $archive, $device) {
    my $known = $self->{content}{ $archive->revision } //= {};
    my $own = $archive->own($device);
    return $known->{$own} if exists($known->{$own});
    $known->{$own} = content_problem($archive, $device);
    $archive->put_times_back($device) if !defined($known->{$own});
    return $known->{$own};
}

# Why the archive's device cannot be restored, undef if it can. Reads what chain_problem reads. Dies if that cannot be
# determined.
sub device_problem ($self, $name, $device) {
    return problem_of(sub () { $self->chain_problem($device, $self->chain($name, $device)) });
}

# (archive, why the device cannot be read from it, or undef). Does not read the data.
sub restorable ($self, $name, $device) {
    my @chain = $self->chain($name, $device);
    return ($chain[0], $self->headers_problem($device, @chain));
}

sub note_damage_in ($self, $name, $device, $ranges) {
    return note_ranges($ranges, $device, $self->chain($name, $device));
}

sub headers_problem ($self, $device, @chain) {
    return problem_of(
        sub () {
            my ($problem) = map { $_->header_problem($_->own($device)) // () } @chain;
            check_opening($chain[0]->image($device)) if !defined($problem);
            return $problem;
        }
    );
}

# ---- after a crash ----

# The archives whose removal has begun, and was not completed. They are no archives any more, so names does not have them.
sub _half_removed ($self) {
    return grep { $Archive->is_half_removed($self->{dir}, $_) } $self->archive_directories;
}

sub being_removed ($self, $unread) { return $self->readable_of($unread, $self->_half_removed) }

sub is_clean ($self) { return $self->SUPER::is_clean && !$self->_half_removed }

# The newest first: an archive that another half-removed one builds on has to wait for that one.
sub complete_removals ($self) {
    return $self->tried(
        sub ($name) { "cannot complete the removal of archive $name" },
        sub ($name) { $self->_finish_removal($name) },
        reverse($self->_half_removed)
    );
}

# ---- what a backup builds on ----

# Each image takes time and descriptors to open: 100 images take 0.1 s; 500 take 1.2 s, and half of the 1024 descriptors
# that a process may usually have.
our $longest_chain = 100;

# Returns the archive $name if a backup of the device, which the archive calls $own, can build on it. Else dies.
sub checked_base ($self, $name, $device, $own, $size) {
    my @chain = $self->chain($name, $device, $own);
    fail("the chain of archive $name has $longest_chain archives, which is the limit")
        if @chain >= $longest_chain;
    my $old_size = $chain[0]->device($device)->{size};
    fail("the disk's size changed from $old_size to $size bytes") if $old_size != $size;
    my $problem = $self->chain_problem($device, @chain);
    fail($problem) if defined($problem);
    fail("archive $name is of version 0.1: it has no digests of what was read")
        if !defined($chain[0]->digests($device));
    fail("the chain of archive $name has digests of blocks of another size")
        if grep { !$_->has_usual_blocks($device) } @chain;
    my ($damaged) = grep { $_->is_known_damaged($device) } @chain;
    fail('archive ' . $damaged->name . ' is damaged, according to its last verification')
        if $damaged;
    return $chain[0];
}

# Versions 0.1.x keep bitmaps.json here. It is removed, so that they too begin with a full backup.
sub publish ($self, $archive, $notes = undef) {
    remove_tree("$self->{dir}/bitmaps.json");
    return $self->SUPER::publish($archive, $notes);
}

# ---- removal ----

sub is_built_on ($self, $name) { return $self->_children($name)->%* ? 1 : 0 }

# Dies if the function finds a reason why the archive must not be merged into one that builds on it.
sub _check_children ($self, $name, $children, $find) {
    for my $device (sort keys $children->%*) {
        my $child = $children->{$device}->name;
        my $problem;
        my $error = attempt { $problem = $find->($children->{$device}, $device) };
        $problem = reason($error) if $error;
        next if !defined($problem);
        my $advice = $error && !is_damage($error) ? '' : " - remove $child first";
        $Error->throw(
            'ArchiveError',
            "archive $name cannot be merged into $child, which builds on it - $problem$advice",
            device => $device
        );
    }
    return;
}

# Removes an archive. Data that other archives need is merged into them. Needs the locks for a
# change and a removal.
sub remove ($self, $name) {
    $self->check_unprotected($name);
    my $children = $self->_children($name);
    $self->_check_children($name, $children,
        sub ($child, $device) { $self->_child_problem($child, $device) });
    return $self->discard($name) if !$children->%*;
    $self->_check_space($name, $children);

    # The last, because it reads the data. If that is damaged, this archive may be the last intact one, and which others are
    # to go has to be decided anew.
    my $archive = $self->archive($name);
    fail("archive $name is not removed, since damage was found before that - $self->{damage}")
        if defined($self->{damage});
    $self->_check_children($name, $children,
        sub ($child, $device) { $self->{damage} = merge_damage($child, $device, $archive) });

    # Marked before the first merge, which changes the archive's images: after a crash, clean completes the removal of
    # marked archives.
    $archive->mark_removed;
    my $error = attempt { $self->_finish_removal($name, $children) };
    $Error->throw($error->class,
              "the removal of archive $name could not be completed - "
            . reason($error)
            . ' - what builds on it can still be restored, and the next backup, prune or removal of this guest completes it'
    ) if $error;
    return;
}

# Why the archive that a child builds on cannot be merged into it, or undef.
sub _child_problem ($self, $child, $device) {
    my @chain = $self->chain($child->name, $device, $child->own($device));
    my $problem = $self->chain_problem($device, @chain)
        // $chain[0]->merge_problem($device, $chain[1]);
    return $problem // $chain[0]->unproven_problem($device) // $chain[1]->unproven_problem($device);
}

# A removal does not start if it may run out of space: a half-finished merge blocks everything else until it is completed.
sub _check_space ($self, $name, $children) {
    my $archive = $self->archive($name);
    my $needed = sum0(map { $children->{$_}->merge_space($_, $archive) } keys $children->%*);
    my $free = PVE::BackupAccess::_free_bytes($self->{dir});
    fail(     "archive $name cannot be merged into the next one - this may need "
            . bytes($needed)
            . ", but only "
            . bytes($free)
            . " are free in $self->{dir} - make room there, and try again")
        if defined($free) && $free < $needed;
    return;
}

# { device => the archive that builds on this archive's device, and answers to that name }. Archives with a damaged
# manifest are left out: they cannot be restored anyway. Dies if a manifest cannot be read for another reason, and if a
# half-removed archive builds on this one: what builds on that one still needs the images of both.
sub _children ($self, $name) {
    my %children;
    my %is_half_removed = map { $_ => 1 } $self->_half_removed;
    my @names = grep { $_ ne $name } $self->names, keys %is_half_removed;
    my @others = $self->readable_of(\my @unread, @names);
    $Error->throw('SystemError',
        "archive $name cannot be removed, since another one may build on it - $unread[0]")
        if @unread;
    for my $other (@others) {
        for my $own ($other->devices) {
            my ($parent, $device) = $other->merges($own);
            next if ($parent // '') ne $name;
            my $problem
                = $is_half_removed{ $other->name }
                ? 'the removal of archive '
                . $other->name
                . ', which builds on it, has to be completed first: the next backup, prune or removal tries again'
                : $children{$device} ? 'more than one archive builds on it'
                : undef;
            $Error->throw(
                'ArchiveError',
                "archive $name cannot be removed - $problem",
                device => $device
            ) if defined($problem);
            $other->answer_to($device, $own);
            $children{$device} = $other;
        }
    }
    return \%children;
}

sub _finish_removal ($self, $name, $children = $self->_children($name)) {
    my $archive = $self->archive($name);
    for my $device (sort keys $children->%*) {
        my $child = $children->{$device};
        my $is_merged = !file_exists($archive->image($device));
        my @chain = $is_merged ? () : $self->chain($child->name, $device, $child->own($device));
        my $problem = @chain ? $self->headers_problem($device, @chain) : undef;
        fail($problem, device => $device) if defined($problem);
        $child->absorb($device, $archive);
    }

    # Only after all of its images have moved to the archives that build on them.
    $self->discard($name);
    return;
}

1;
