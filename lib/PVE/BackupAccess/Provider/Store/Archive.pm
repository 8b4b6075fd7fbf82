package PVE::BackupAccess::Provider::Store::Archive;

# One archive by its manifest, wherever it is stored. A subclass has it in its guest's store, and has these methods:
#
#   parent_of($own)          (name of the archive that it builds on, what that calls the device), or nothing
#   digests($device)         a file with the digests of what the archive itself has of the device
#   digests_problem($device) why that file cannot be read, undef if it can
#   serve($device, %options) a Store::Server of what the device holds
#   is_known_damaged($device), note_damage($device, $is_damaged)    what a verification found
#   content($name)           of a file of it, undef if it has none such
#   keep_log($text)          beside what has to be there
#   add_file($name, $content), seal    while it is being made; what it has is durable after seal
#   file_size([$device])     bytes that it takes
#   container, container_path, container_problem    see Qcow2Chain/Archive.pm; of virtual machines alone: undef

use v5.36;

sub name ($self) { return $self->{name} }
sub id ($self) { return $self->{manifest}{id} }

# The UUID of the guest, undef if it was not told.
sub guest ($self) { return $self->{manifest}{guest} }
sub devices ($self) { return sort keys $self->{manifest}{devices}->%* }
sub container ($self) { return undef }

# A disk may have had other names in the archives of a chain: there each answers to the name by which it is asked
# for. What it calls that itself:
sub answer_to ($self, $device, $own) {
    $self->{own}{$device} = $own;
    return;
}

sub own ($self, $device) { return ($self->{own} // {})->{$device} // $device }

# { size, bitmap-mode, identity, node, parent, parent-id, ... }, undef if the archive has no such device.
sub device ($self, $device) { return $self->{manifest}{devices}{ $self->own($device) } }

1;
