package PVE::BackupAccess::Provider::Qcow2Chain::Merge;

# The methods of an archive by which the archive that it builds on is merged into it.

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(file_exists move sync write_file);
use PVE::BackupAccess::Provider::Qcow2Chain::Content qw(merge_image);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(bytes_to_separate separate);
use PVE::BackupAccess::Provider::Store::Digests qw(bytes_to_add merge_digests);

my $spare = 1 << 20;

# The most bytes that a merge of the parent takes, including metadata.
sub merge_space ($self, $device, $parent) {
    my $digests = $self->digests($device);
    return -s $self->image($device) if !defined($digests);

    my $is_compressed = $parent->device($device)->{compressed};
    return $spare + (-s $digests) + bytes_to_separate($parent->image($device))
        + bytes_to_add($digests, $parent->digests($device), $is_compressed);
}

# The number of the file system that has the file.
sub _file_system ($file) { return (stat($file))[0] // 0 }

# Why the parent must not be merged into this archive, or undef: if a manifest or a file of digests is damaged, a merge
# would compute a new hash of the damaged file and so hide the damage. At the end, the parent's image is renamed.
sub merge_problem ($self, $device, $parent) {
    my @images = map { $_->image($device) } $self, $parent;
    return "$images[1] is on another file system than $images[0]"
        if _file_system($images[0]) != _file_system($images[1]);
    my ($problem) = map {
        $_->manifest_problem // ($_->digests($device) ? $_->digests_problem($device) : undef) // ()
    } $self, $parent;
    return $problem;
}

# Why the image of an archive of version 0.1 is not what was written, or undef: after a merge its SHA-256 is computed anew.
sub unproven_problem ($self, $device) {
    return undef if defined($self->digests($device));
    my ($image) = $self->names_of($self->own($device));
    return $self->file_problem($image, 1);
}

# Whether this object has found its own data of the device intact. With a value, notes it.
sub is_intact ($self, $device, @value) {
    my $known = $self->{intact} //= {};
    $known->{ $self->own($device) } = $value[0] if @value;
    return $known->{ $self->own($device) };
}

# Merges this archive's image into the parent's, which then becomes this archive's. The content that this archive shows
# stays the same all the time, so after a crash this is simply done again.
#
# The digests and the manifest of the result are written under other names before the image moves, and get their own names
# after that. So at each moment one of the manifests matches the image, and a reader knows which one: the new one, once the
# parent has no image any more. A store that cannot be written to is read so, too.
sub absorb ($self, $device, $parent) {
    my ($mine, $theirs) = ($self->image($device), $parent->image($device));
    my @merged = sort keys(($self->{merged} // {})->%*);
    $self->_complete_merge($_) for @merged;
    return if grep { $_ eq $self->own($device) } @merged;

    $self->note_damage($device, 1) if $parent->is_known_damaged($device);
    my $is_there = file_exists($theirs);    # not if an earlier version was killed after the move
    if ($is_there) {
        my $problem = $self->merge_problem($device, $parent);
        PVE::BackupAccess::Error->throw('ArchiveError', $problem, device => $device)
            if defined($problem);
        separate($theirs);
        merge_image($self, $device, $theirs);
        sync($theirs);
    }
    $self->_prepare_merge($device, $parent, $is_there ? $theirs : $mine);
    move($theirs, $mine) if $is_there;
    $self->_complete_merge($self->own($device));
    return;
}

# Writes the digests and the manifest of a merge whose image is complete. Digests are joined, not computed, so damaged data
# still does not match them.
sub _prepare_merge ($self, $device, $parent, $image) {
    my ($own, $mine) = ($self->own($device), $self->digests($device));
    my ($image_name, $digests_name) = $self->names_of($own);
    my $files = { $image_name => $image };
    if (defined($mine)) {
        my $joined = $self->_joined_digests($own);
        merge_digests($mine, $parent->digests($device), $joined);
        sync($joined);
        $files->{$digests_name} = $joined;
    }
    my $entry = $self->device($device);
    delete($entry->@{qw(parent parent-id parent-device)});
    if (my ($name, $there) = $parent->parent_of($parent->own($device))) {
        $entry->@{qw(parent parent-id)} = ($name, $parent->device($device)->{'parent-id'});
        $entry->{'parent-device'} = $there if $there ne $own;
    }

    # The image has the parent's compressed data.
    $entry->{compressed} = 1 if $parent->device($device)->{compressed};
    $self->_note_file($_, path => $files->{$_}) for sort keys $files->%*;
    my $merged = $self->_merged_manifest($own);
    unlink($merged);    # a copy of the store by hard links keeps its own
    write_file($merged, $self->_manifest_text);
    sync($_) for $merged, $self->{dir};
    return;
}

sub _complete_merge ($self, $own) {
    my ($joined, $dir) = ($self->_joined_digests($own), $self->dir);
    my (undef, $digests) = $self->names_of($own);
    move($joined, "$dir/$digests") if file_exists($joined);
    move($self->_merged_manifest($own), "$dir/manifest.json");
    delete(($self->{merged} // {})->{$own});
    return;
}

1;
