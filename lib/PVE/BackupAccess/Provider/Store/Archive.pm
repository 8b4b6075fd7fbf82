package PVE::BackupAccess::Provider::Store::Archive;

# An archive as its manifest describes it, wherever it is stored. Unless a subclass overrides this, it has all data of its
# devices, so that it depends on no other archive, and the manifest contains its small files. A subclass implements:
#
#   serve($device, %options) starts a Store::Server of the device's content
#   digests($device)         a file with the digests of the device: in a new archive, of what this backup has read; else of
#                            all data. Dies if it is damaged
#   is_known_damaged($device), note_damage($device, $is_damaged)    the result of the last verification
#   keep_log($text)          stores the log, which the manifest does not list
#
# for a new archive, see also Devices.pm:
#
#   open_to_write($device)   a Store::Server of the image to write to, which has the parent's data, if there is a parent
#   keep_digests($device, $file)    stores the digests of all data of the device
#   seal                     stores the manifest, if publish does not; all data is durable after that
#
# and, for containers:
#
#   add_container($fill)     fill->($name, $handle) writes the tree to the handle; the name is for its messages
#   container_source         where it is read from, see Tar.pm
#   container_path           a file with it, whose name ends in .tar.zst
#   container_place          where it is, for messages
#   tree_problem             why it cannot be read, undef if it can; does not read it

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(sha256);
use PVE::BackupAccess::Provider::Store::Content qw(problem_of);
use PVE::BackupAccess::Provider::Store::Digests qw(merge_digests);
use PVE::BackupAccess::Provider::Store::Manifest
    qw(decode_manifest device_fault encode_manifest has_its_digest is_hash is_text manifest_fault new_id refuse_newer);
use PVE::BackupAccess::Provider::Store::Tar qw(stream_problem);

my $digest_block = 65536;

sub manifest_format ($class) { return 1 }

# ---- a new archive ----

sub begin ($class, $guest, $name, %about) {
    my %manifest
        = (format => $class->manifest_format, id => new_id(), %about, devices => {}, files => {});
    return bless({ guest => $guest, name => $name, manifest => \%manifest, is_new => 1 }, $class);
}

sub add_file ($self, $name, $content) {
    utf8::encode($content) if utf8::is_utf8($content);
    $self->{manifest}{files}{$name} = { content => $content };
    return;
}

# With a parent, which must answer to the device's name, the device starts with the parent's data.
sub add_device ($self, $device, $about, $parent = undef) {
    my $entry = $self->{manifest}{devices}{$device} = { $about->%* };
    $entry->{parent} = $parent->name if $parent;
    $self->{parents}{$device} = $parent;
    return;
}

sub cluster_size ($self) { return $digest_block }

# Called before workers are forked, and when the data of all devices is stored.
sub prepare ($self) { return }
sub freeze ($self) { return }

# Stores the digests of the whole device, and returns their entry for the manifest.
sub put_digests ($self, $device) {
    my ($parent, $file) = ($self->{parents}{$device}, $self->digests($device));
    if ($parent) {
        merge_digests($file, $parent->digests($device), "$file.all");
        $file = "$file.all";
    }
    my $entry = { sha256 => sha256($file), algorithm => 'SHA-256', block => $digest_block };
    $self->keep_digests($device, $file);
    return $entry;
}

# bytes: how many were written for the device.
sub note_device ($self, $device, $digests, $bytes) {
    $self->device($device)->@{qw(digests stored)} = ($digests, $bytes);
    return;
}

sub seal ($self) { return }
sub text ($self) { return encode_manifest($self->{manifest}) }

# Notes, for a caller that does not know IDs, that the bitmaps are relative to this archive.
sub note_in ($self, $notes) {
    my $devices = $self->{manifest}{devices};
    my $find = sub ($device) { $devices->{$device}{'bitmap-mode'} ne 'none' };
    $notes->note({ map { $_ => $find->($_) ? { id => $self->id } : undef } keys $devices->%* });
    return;
}

# ---- an existing archive ----

sub load ($class, $guest, $name, $text) {
    my $manifest = decode_manifest($text);
    refuse_newer("archive $name", $manifest, $class->manifest_format);
    my $problem
        = has_its_digest($text)
        ? manifest_fault($manifest, $class->manifest_format)
        : 'its SHA-256 differs';
    $problem //= $class->_devices_fault($manifest) // $class->_container_fault($manifest);
    PVE::BackupAccess::Error->throw('ArchiveError',
        "the manifest of archive $name is damaged - $problem")
        if defined($problem);
    return bless({ guest => $guest, name => $name, manifest => $manifest }, $class);
}

# What a subclass has added to the entry of a device or of the container: whether it is valid.
sub is_valid_entry ($class, $entry) { return 1 }

sub _devices_fault ($class, $manifest) {
    for my $device (sort keys $manifest->{devices}->%*) {
        my $entry = $manifest->{devices}{$device};
        my $fault = device_fault($device, $entry);
        return $fault if defined($fault);
        return "the place of device $device is not valid" if !$class->is_valid_entry($entry);
        my $digests = $entry->{digests};
        return "device $device has no valid digests"
            if !is_hash($digests) || ($digests->{sha256} // '') !~ m/\A[0-9a-f]{64}\z/;
    }
    my ($odd) = grep { !is_hash($_) || !is_text($_->{content}) } values $manifest->{files}->%*;
    return $odd ? 'the content of one of its files is not a text' : undef;
}

sub _container_fault ($class, $manifest) {
    my $container = $manifest->{container} // return undef;
    my $is_valid
        = is_hash($container)
        && $class->is_valid_entry($container)
        && !grep { ($container->{$_} // '') !~ m/\A[0-9]{1,19}\z/ } qw(size bytes);
    return 'its container is not valid'
        if !$is_valid || ($container->{sha256} // '') !~ m/\A[0-9a-f]{64}\z/;
    return undef;
}

sub name ($self) { return $self->{name} }
sub id ($self) { return $self->{manifest}{id} }

# The UUID of the guest, undef if it is unknown.
sub guest ($self) { return $self->{manifest}{guest} }
sub devices ($self) { return sort keys $self->{manifest}{devices}->%* }

# A disk may have had another name in older archives of a chain. After this call, the archive finds the disk that it
# calls $own under the name $device.
sub answer_to ($self, $device, $own) {
    $self->{own}{$device} = $own;
    return;
}

sub own ($self, $device) { return ($self->{own} // {})->{$device} // $device }

# The device's entry in the manifest: { size, bitmap-mode, identity, node, parent, parent-id, ... }, or undef.
sub device ($self, $device) { return $self->{manifest}{devices}{ $self->own($device) } }

# (name of the archive that this one depends on, the device's name there), or nothing.
sub parent_of ($self, $own) { return }

# Why the manifest differs from what was written; undef if it does not.
sub manifest_problem ($self) { return undef }

# Why the file of digests cannot be read; undef if it can.
sub digests_problem ($self, $device) {
    return problem_of(sub () { $self->digests($device); return undef });
}

# Whether the storage returns all of the device's image, whatever that contains.
sub is_readable ($self, $device) { return 0 }

# The bytes that the backup has written, for the archive or for a device.
sub file_size ($self, $device = undef) {
    my $devices = $self->{manifest}{devices};
    my $size = 0;
    $size += $_->{stored} // 0 for defined($device) ? $self->device($device) : values $devices->%*;
    return $size + (defined($device) || !$self->container ? 0 : $self->container_bytes);
}

# undef if it has no such file.
sub content ($self, $name) {
    my $file = $self->{manifest}{files}{$name} // return undef;
    utf8::downgrade(my $content = $file->{content});
    return $content;
}

# ---- a container ----

# { size, sha256 } of the tree before compression, undef for a virtual machine.
sub container ($self) { return $self->{manifest}{container} }

# The bytes that the compressed tree occupies.
sub container_bytes ($self) { return $self->container->{bytes} }

# Why it is damaged, undef if it is not; without reading it, and by reading it.
sub container_problem ($self) {
    return $self->tree_problem // (
        $self->is_known_damaged('container')
        ? 'damage was found in ' . $self->container_place
        : undef
    );
}

sub container_damage ($self) {
    return $self->tree_problem // stream_problem($self->container_source, $self->container);
}

1;
