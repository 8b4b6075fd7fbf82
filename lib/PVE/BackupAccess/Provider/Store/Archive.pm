package PVE::BackupAccess::Provider::Store::Archive;

# An archive as its manifest describes it, wherever it is stored. A subclass implements:
#
#   parent_of($own)          (name of the archive that this one builds on, the device's name there), or nothing
#   digests($device)         a file with the digests of the data that this archive itself has of the device
#   digests_problem($device) why that file cannot be read, undef if it can
#   serve($device, %options) starts a Store::Server of the device's content
#   is_known_damaged($device), note_damage($device, $is_damaged)    the result of the last verification
#   content($name)           the content of a file of the archive, undef if there is no such file
#   keep_log($text)          stores the log, which the manifest does not list
#   add_file($name, $content), seal    for a new archive; its data is durable after seal
#   file_size([$device])     the bytes that the archive, or one device, occupies
#
# and, for containers:
#
#   add_container($fill)     fill->($name, $handle) writes the tree to the handle; the name is for its messages
#   container                { size, sha256 } of the tree before compression, undef for a virtual machine
#   container_bytes          the bytes that the compressed tree occupies
#   container_source         where it is read from, see Tar.pm
#   container_path           a file with it, whose name ends in .tar.zst
#   container_place          where it is, for messages
#   container_problem        why it is damaged, undef if it is not; need not read it

use v5.36;

sub name ($self) { return $self->{name} }
sub id ($self) { return $self->{manifest}{id} }

# The UUID of the guest, undef if it is unknown.
sub guest ($self) { return $self->{manifest}{guest} }
sub devices ($self) { return sort keys $self->{manifest}{devices}->%* }
sub container ($self) { return undef }

# Whether the storage returns all of the device's image, whatever that contains.
sub is_readable ($self, $device) { return 0 }

# A disk may have had another name in older archives of a chain. After this call, the archive finds the disk that it
# calls $own under the name $device.
sub answer_to ($self, $device, $own) {
    $self->{own}{$device} = $own;
    return;
}

sub own ($self, $device) { return ($self->{own} // {})->{$device} // $device }

# The device's entry in the manifest: { size, bitmap-mode, identity, node, parent, parent-id, ... }, or undef.
sub device ($self, $device) { return $self->{manifest}{devices}{ $self->own($device) } }

1;
