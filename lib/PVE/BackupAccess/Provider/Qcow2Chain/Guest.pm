package PVE::BackupAccess::Provider::Qcow2Chain::Guest;

# All archives of one guest: a directory.

use v5.36;

use List::Util qw(sum0);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain::Archive;
use PVE::BackupAccess::Provider::Store::Content qw(content_problem);
use PVE::BackupAccess::File qw(entries make_directory move remove_tree);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(image_chain);
use PVE::BackupAccess::Provider::Qcow2Chain::Lock qw(drop_lock take_lock try_lock);
use PVE::BackupAccess::Try qw(attempt reason);

use parent qw(PVE::BackupAccess::Provider::Store::Guest);

my $Archive = 'PVE::BackupAccess::Provider::Qcow2Chain::Archive';
my $Error = 'PVE::BackupAccess::Error';

my sub fail ($message, %context) {
    $Error->throw('ArchiveError', $message, %context);
}

# wait: so many seconds for other processes that have what is to be locked.
sub new ($class, $dir, $wait = 0) {
    return bless({ dir => $dir, wait => $wait }, $class);
}

sub dir ($self) { return $self->{dir} }
sub is_there ($self) { return -d $self->{dir} }

sub make_place ($self) {
    make_directory($self->{dir});
    return;
}

# Locks: see Lock.pm.
sub try_change_lock ($self) { return try_lock($self->{dir}, 'change') }
sub change_lock ($self) { return take_lock($self->{dir}, 'change', $self->{wait}) }

sub drop ($self, $lock) {
    drop_lock($lock);
    return;
}

sub removal_lock ($self) { return take_lock($self->{dir}, 'removal', $self->{wait}) }

sub read_lock ($self) {
    return -d $self->{dir} ? take_lock($self->{dir}, 'read', $self->{wait}) : undef;
}

# The archives, the oldest first.
sub names ($self) {
    my $pattern = $Archive->name_pattern;
    return grep { $Archive->exists($self->{dir}, $_) }
        map { m/\A$pattern\z/ ? $1 : () } entries($self->{dir});
}

sub has ($self, $name) { return $Archive->exists($self->{dir}, $name) }
sub archive ($self, $name) { return $Archive->load($self->{dir}, $name) }

# The archive that has the device's data, then those it builds on, down to a full one: each answers to the
# device's name, whatever it calls that itself. Dies if one is not there.
sub chain ($self, $name, $device, $own = $device) {
    my (@chain, %seen, $id);
    while (defined($name)) {
        my $archive = $self->archive($name);
        $archive->answer_to($device, $own);
        my $entry = $archive->device($device);
        my $problem
            = $seen{$name}++ ? 'its chain is a loop'
            : !$entry ? "it has no device $own"
            : defined($id) && $id ne $archive->id ? 'it is not the archive that it was'
            : @chain && $entry->{size} != $chain[0]->device($device)->{size} ? 'its size differs'
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

# Why the images of such a chain do not match the manifests, or undef. Only headers are read, and
# the content of files that were touched since the backup.
sub chain_problem ($self, $device, @chain) {
    for my $archive (@chain) {
        my $problem = $archive->device_problem($device);
        return $problem if defined($problem);
    }
    my $problem = $self->headers_problem($device, @chain);
    for my $archive (grep { $_->is_touched($device) } @chain) {
        $problem //= content_problem($archive, $device);
    }
    return $problem;
}

# The reason why the archive's device cannot be restored, undef if it can. Of images only the headers are
# read, and all of those that were touched since the backup.
sub device_problem ($self, $name, $device) {
    my $problem;
    my $error
        = attempt { $problem = $self->chain_problem($device, $self->chain($name, $device)) };
    return $error ? reason($error) : $problem;
}

# (archive, why the device cannot be read from it, or undef). Its data is not looked at.
sub restorable ($self, $name, $device) {
    my @chain = $self->chain($name, $device);
    return ($chain[0], $self->headers_problem($device, @chain));
}

sub headers_problem ($self, $device, @chain) {
    my $image = $chain[0]->image($device);
    my @headers;
    my $error = attempt { @headers = image_chain($image) };
    return $error =~ s/\n\z//r if $error;
    for my $archive (@chain) {
        my $problem = $archive->header_problem($device, shift(@headers) // { size => 0 });
        return $problem if defined($problem);
    }
    return undef;
}

# ---- after a crash ----

# Takes away what a killed process left, and ends what it began. Needs the lock. Returns what could
# not be ended now, as texts: the next call tries again, as it does where others read now.
sub clean ($self) {
    my $pattern = $Archive->name_pattern;
    my $alone = try_lock($self->{dir}, 'removal');
    my @problems;
    for my $entry ($alone ? entries($self->{dir}) : ()) {
        if ($entry =~ m/\A(\.(?:tmp|del)-$pattern)\z/) {
            remove_tree("$self->{dir}/$1");
        }
        elsif ($entry =~ m/\A$pattern\z/ && $Archive->is_half_removed($self->{dir}, $1)) {
            my $name = $1;
            my $error = attempt { $self->_finish_removal($name) };
            push(@problems,
                "archive $name could not be merged into the next - $error" =~ s/\n.*//sr)
                if $error;
        }
    }
    return @problems;
}

# ---- what a backup builds on ----

# Each takes descriptors and time to open: 100 images take 0.1 s, 500 take 1.2 s and half of the 1024
# descriptors that a process usually may have.
our $longest_chain = 100;

# Of the archive of that name, which calls the device so: it, if the device can be stored on top of it. Else it dies.
sub checked_base ($self, $name, $device, $own, $size) {
    my @chain = $self->chain($name, $device, $own);
    fail("its chain has $longest_chain archives, which is the limit") if @chain >= $longest_chain;
    my $old_size = $chain[0]->device($device)->{size};
    fail("its size changed from $old_size to $size") if $old_size != $size;
    my $problem = $self->chain_problem($device, @chain);
    fail($problem) if defined($problem);
    fail("archive $name is of version 0.1: it has no digests of what was read")
        if !defined($chain[0]->digests($device));
    my ($damaged) = grep { $_->is_known_damaged($device) } @chain;
    fail('archive ' . $damaged->name . ' is damaged, as its last verification found') if $damaged;
    return $chain[0];
}

# Gives the archive its name. Before that it is noted, for a caller that knows of no ids: a crash in
# between makes the next backup a full one. Versions 0.1.x have a note of theirs here: without it they
# begin with a full one as well.
sub publish ($self, $archive, $notes = undef) {
    my %modes = map { $_ => $archive->device($_)->{'bitmap-mode'} } $archive->devices;
    my %ids = map { $_ => $modes{$_} ne 'none' ? { id => $archive->id } : undef } keys %modes;
    $notes->note(\%ids) if $notes;
    remove_tree("$self->{dir}/bitmaps.json");
    $archive->publish;
    return;
}

# ---- removal ----

# Proxmox VE's storage plugin keeps that attribute of a backup in this file.
sub is_protected ($self, $name) { return -e "$self->{dir}/$name/protected" ? 1 : 0 }

sub is_built_on ($self, $name) { return $self->_children($name)->%* ? 1 : 0 }

# Removes an archive. Data that other archives need is merged into them. Needs the locks for a
# change and a removal.
sub remove ($self, $name) {
    fail("archive $name is protected - remove the file 'protected' in it first")
        if $self->is_protected($name);
    my $children = $self->_children($name);
    for my $device (sort keys $children->%*) {
        my $child = $children->{$device}->name;
        my @chain = $self->chain($child, $device, $children->{$device}->own($device));
        my $problem = $self->chain_problem($device, @chain)
            // $chain[0]->merge_problem($device, $chain[1]) // next;
        $Error->throw(
            'ArchiveError',
            "archive $name cannot be merged into $child - $problem",
            device => $device
        );
    }
    if ($children->%*) {
        $self->_check_space($name, $children);

        # Before the first merge, which changes its images: after a crash clean goes on with what has this mark.
        $self->archive($name)->mark_removed;
        $self->_finish_removal($name);
    }
    else {
        $self->discard($name);
    }
    return;
}

# A merge that stopped for want of space would have to be ended before anything else can be done.
sub _check_space ($self, $name, $children) {
    my $archive = $self->archive($name);
    my $needed = sum0(map { $children->{$_}->merge_space($_, $archive) } keys $children->%*);
    my $free = PVE::BackupAccess::_free_bytes($self->{dir});
    fail(     "archive $name cannot be merged into the next - that may take "
            . bytes($needed)
            . ', and there are '
            . bytes($free) . ' left')
        if defined($free) && $free < $needed;
    return;
}

# { device => the archive that builds on this one's, and answers to that name }. What has no manifest that can be read cannot be
# restored, whatever it builds on.
sub _children ($self, $name) {
    my %children;
    for my $other (grep { $_->name ne $name } $self->readable) {
        for my $own ($other->devices) {
            my ($parent, $device) = $other->parent_of($own);
            next if ($parent // '') ne $name;
            $Error->throw(
                'ArchiveError',
                "archive $name cannot be removed - more than one archive builds on it",
                device => $device
            ) if $children{$device};
            $other->answer_to($device, $own);
            $children{$device} = $other;
        }
    }
    return \%children;
}

sub _finish_removal ($self, $name) {
    my $archive = $self->archive($name);
    my $children = $self->_children($name);
    $children->{$_}->absorb($_, $archive) for sort keys $children->%*;

    # Only when all of its images have gone to those that were built on them.
    $self->discard($name);
    return;
}

# Takes away what there is of a new one.
sub give_up ($self, $archive) { return $self->discard($archive->entry) }

# Removes a directory that nothing builds on; other processes see all of it or none.
sub discard ($self, $entry) {
    my $gone = "$self->{dir}/.del-" . $entry =~ s/\A\.tmp-//r;
    remove_tree($gone) if -e $gone;
    move("$self->{dir}/$entry", $gone);
    remove_tree($gone);
    return;
}

1;
