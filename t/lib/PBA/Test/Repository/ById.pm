package PBA::Test::Repository::ById;

# A repository that keeps the image of every backup under the backup's ID, as soon as all of its data is stored,
# and continues from the backup to which the device's bitmap claims to be relative. So it trusts whatever ID
# QEMU reports. Mode audit is mode use with an audit of the bitmap.

use v5.36;

use parent 'PBA::Test::Repository';

sub _image_of ($self, $id, $backup) { return "$self->{dir}/$id.of-$backup" }

sub image ($self, $id) {
    return $self->{base}{$id} // "$self->{dir}/$id.none";
}

# The IDs are queried in the same way in which the backup is made.
sub requests ($self, $access, $modes, @ids) {
    my $backend = $self->{backend};
    my %device = map { $_ => $backend->device($_) } @ids;
    my $bases = $access->bases(values %device);
    my @requests;
    for my $id (@ids) {
        my $backup = $bases->{ $device{$id} };
        my $image = $self->_image_of($id, $backup // '');
        $backup = undef if $modes->{$id} eq 'new' || !-e $image;
        $self->{base}{$id} = defined($backup) ? $image : undef;
        push(
            @requests,
            {
                device => $device{$id},
                'bitmap-mode' => $modes->{$id} =~ s/audit/use/r,
                base => $backup,
                audit => $modes->{$id} eq 'audit',
            }
        );
    }
    return @requests;
}

# What the task does for a provider that does not know IDs: after a failure, the bitmaps get the backup's ID. They fit the last
# image as well.
sub _fail ($self, $access, $backup, @ids) {
    for my $id (grep { -e $self->image($_) } @ids) {
        link($self->image($id), $self->_image_of($id, $backup)) or die "link: $!\n";
    }
    return $access->_end(0, $backup);
}

# The image is stored before QEMU is told about the success.
sub finish ($self, $access, $success, @ids) {
    my $backup = PVE::BackupAccess->new_id;
    return $self->_fail($access, $backup, @ids) if !$success;
    rename($self->candidate($_), $self->_image_of($_, $backup)) or die "rename: $!\n" for @ids;
    $access->teardown(1, $backup);
    for my $id (@ids) {
        $self->{base}{$id} = $self->_image_of($id, $backup);
        unlink(grep { $_ ne $self->{base}{$id} } glob("$self->{dir}/$id.of-*"));
    }
    return;
}

# Does nothing, because each image has its own ID.
sub take_good ($self, @ids) { return }

1;
