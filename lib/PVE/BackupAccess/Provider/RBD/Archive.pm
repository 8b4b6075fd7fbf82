package PVE::BackupAccess::Provider::RBD::Archive;

# One archive: for each device a snapshot of an image, with the archive's name, and the digests as objects; and a manifest
# as a value of the guest's object. Without a manifest it is not an archive.

use v5.36;

use Digest::SHA qw(sha256_hex);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(sha256 write_file);
use PVE::BackupAccess::Program qw(new_pipe);
use PVE::BackupAccess::Provider::RBD::Parts qw(get_parts part_names put_parts);
use PVE::BackupAccess::Provider::RBD::Server;
use PVE::BackupAccess::Provider::Store::Content qw(is_damage);
use PVE::BackupAccess::Provider::Store::Digests qw(digests_size merge_digests);
use PVE::BackupAccess::Provider::Store::Filter;
use PVE::BackupAccess::Provider::Store::Manifest
    qw(decode_manifest device_fault encode_manifest has_its_digest is_hash is_text manifest_fault new_id refuse_newer);
use PVE::BackupAccess::Provider::Store::Tar qw(stream_problem);
use PVE::BackupAccess::Try qw(attempt reason rethrow);

use parent qw(PVE::BackupAccess::Provider::Store::Archive);

my $Filter = 'PVE::BackupAccess::Provider::Store::Filter';
my $Server = 'PVE::BackupAccess::Provider::RBD::Server';

my $format = 1;
my $digest_block = 65536;

my sub fail ($message, %context) {
    PVE::BackupAccess::Error->throw('ArchiveError', $message, %context);
}

# ---- a new archive ----

sub begin ($class, $guest, $name, %about) {
    my $manifest = { format => $format, id => new_id(), %about, devices => {}, files => {} };
    return bless({ guest => $guest, name => $name, manifest => $manifest, is_new => 1 }, $class);
}

sub add_file ($self, $name, $content) {
    utf8::encode($content) if utf8::is_utf8($content);
    $self->{manifest}{files}{$name} = { content => $content };
    return;
}

# Stores the device in the image of the parent, which must answer to the device's name, or without a parent in a new
# image.
sub add_device ($self, $device, $about, $parent = undef) {
    my $entry = $self->{manifest}{devices}{$device} = { $about->%* };
    $entry->{image}
        = $parent
        ? $parent->device($device)->{image}
        : $self->{guest}->image_for($device, $self->{name});
    $entry->{parent} = $parent->name if $parent;
    $self->{parents}{$device} = $parent;
    return;
}

# First undoes what a killed backup has written to the image.
sub open_to_write ($self, $device) {
    my ($ceph, $entry) = ($self->{guest}->ceph, $self->device($device));
    my $parent = $self->{parents}{$device};
    $self->{guest}->check_lock;
    if ($parent) {
        $ceph->fence($entry->{image});
        $ceph->roll_back($entry->{image}, $parent->name)
            if $ceph->differs($entry->{image}, $parent->name);
    }
    else {
        $ceph->create($entry->{image}, $entry->{size});
    }
    my $start = sub { $Server->start({ ceph => $ceph, image => $entry->{image} }, writable => 1) };
    my $server = $start->();
    return $server if !$parent;
    if ($server->size != $entry->{size}) {    # a new size alone is no difference
        $server->kill;
        $ceph->roll_back($entry->{image}, $parent->name);
        $server = $start->();
    }

    # The other process' fence does not stop a server that had not yet the image's lock. So the order is: lock, then look.
    $server->lock_image($entry->{size});
    $self->{guest}->check_lock;
    return $server;
}

sub cluster_size ($self) { return $digest_block }

# Adds a container's tree: fill writes it to a handle, and returns { size, sha256 } of the stream before compression. The
# program is not killed if fill dies: the cluster would not let the image be removed for half a minute.
sub add_container ($self, $fill) {
    my ($guest, $name) = $self->@{qw(guest name)};
    my ($ceph, $image) = ($guest->ceph, $guest->image_for('container', $name));
    $guest->check_lock;
    my ($from, $to) = new_pipe();
    my $import = $Filter->start({ in => $from }, $ceph->import_command($image));
    close($from);
    my $stream;
    my $error = attempt { $stream = $fill->("image $image", $to) };
    close($to);
    my $problem = $import->problem;
    PVE::BackupAccess::Error->throw('SystemError', "cannot write image $image - $problem")
        if defined($problem);
    rethrow($error) if $error;
    $guest->check_lock;
    $ceph->snap($image, $name);
    $self->{manifest}{container}
        = { image => $image, bytes => $ceph->size_of($image), $stream->%* };
    return;
}

# To be called when all devices are stored and flushed.
sub freeze ($self) {
    $self->{guest}->check_lock;
    for my $device ($self->devices) {
        $self->{guest}->ceph->snap($self->device($device)->{image}, $self->{name});
    }
    return;
}

# Stores the digests as objects, and returns their entry for the manifest. The archive gets the digests of the whole
# device, so that it does not depend on another one.
sub put_digests ($self, $device) {
    my ($parent, $file) = ($self->{parents}{$device}, $self->digests($device));
    if ($parent) {
        merge_digests($file, $parent->digests($device), "$file.all");
        $file = "$file.all";
    }
    my $place = _digests_of($self->device($device)->{image}, $self->{name});
    put_parts($self->{guest}->ceph, $place, $file);
    return { sha256 => sha256($file), algorithm => 'SHA-256', block => $digest_block };
}

# bytes: how many were written for the device.
sub note_device ($self, $device, $digests, $bytes) {
    $self->device($device)->@{qw(digests stored)} = ($digests, $bytes);
    return;
}

# Nothing remains to be done: all data is in the cluster. publish writes the manifest, and with it the archive exists.
sub seal ($self) { return }
sub text ($self) { return encode_manifest($self->{manifest}) }

# ---- an existing archive ----

sub load ($class, $guest, $name, $text) {
    my $manifest = decode_manifest($text);
    refuse_newer("archive $name", $manifest, $format);
    my $problem = has_its_digest($text) ? manifest_fault($manifest, qr/1/) : 'its SHA-256 differs';
    $problem //= _devices_fault($manifest) // _container_fault($manifest);
    fail("the manifest of archive $name is damaged - $problem") if defined($problem);
    return bless({ guest => $guest, name => $name, manifest => $manifest }, $class);
}

sub _devices_fault ($manifest) {
    for my $device (sort keys $manifest->{devices}->%*) {
        my $entry = $manifest->{devices}{$device};
        my $fault = device_fault($device, $entry);
        return $fault if defined($fault);
        _has_image($entry) or return "device $device has no valid name of an image";
        my $digests = $entry->{digests};
        return "device $device has no valid digests"
            if !is_hash($digests) || ($digests->{sha256} // '') !~ m/\A[0-9a-f]{64}\z/;
    }
    my ($odd) = grep { !is_hash($_) || !is_text($_->{content}) } values $manifest->{files}->%*;
    return $odd ? 'the content of one of its files is not a text' : undef;
}

# Removes the taint from the image's name.
sub _has_image ($entry) {
    ($entry->{image}) = ($entry->{image} // '') =~ m/\A(pba-[A-Za-z0-9%._-]+)\z/;
    return defined($entry->{image});
}

sub _container_fault ($manifest) {
    my $container = $manifest->{container} // return undef;
    my $is_valid
        = is_hash($container)
        && _has_image($container)
        && !grep { ($container->{$_} // '') !~ m/\A[0-9]{1,19}\z/ } qw(size bytes);
    return 'its container is not valid'
        if !$is_valid || ($container->{sha256} // '') !~ m/\A[0-9a-f]{64}\z/;
    return undef;
}

# A snapshot does not depend on another archive.
sub parent_of ($self, $own) { return }
sub manifest_problem ($self) { return undef }

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

sub keep_log ($self, $text) {
    my $file = $self->{guest}->directory . '/log';
    write_file($file, $text);
    $self->{guest}->ceph->put($self->{guest}->log_of($self->{name}), $file);
    return;
}

# To be called before workers are forked, so that all of them use the same directory.
sub prepare ($self) {
    $self->{guest}->directory;
    return;
}

# The names of the objects with the digests of a device of that size, in a snapshot of an image.
sub digest_objects ($class, $image, $snapshot, $size) {
    return part_names(_digests_of($image, $snapshot), digests_size($size, $digest_block));
}

sub _digests_of ($image, $snapshot) { return "$image\@$snapshot.digests" }

# The file of digests: in a new archive of what this backup has read, in an existing one of the whole device. It is fetched
# once for all objects of the archive.
sub digests ($self, $device) {
    utf8::encode(my $bytes = "$self->{name} " . $self->own($device));
    my $file = $self->{guest}->directory . '/' . sha256_hex($bytes);
    return $file if $self->{is_new} || $self->{guest}{fetched}{$file};
    my $entry = $self->device($device);
    my $place = _digests_of($entry->{image}, $self->{name});
    get_parts($self->{guest}->ceph, $place, digests_size($entry->{size}, $digest_block), $file);
    fail("the digests of archive $self->{name} are damaged - their SHA-256 differs",
        device => $device)
        if sha256($file) ne $entry->{digests}{sha256};
    $self->{guest}{fetched}{$file} = 1;
    return $file;
}

sub digests_problem ($self, $device) {
    my $error = attempt { $self->digests($device) };
    rethrow($error) if $error && !is_damage($error);
    return $error ? reason($error) : undef;
}

# Serves the snapshot. options: those of the server.
sub serve ($self, $device, %options) {
    my $image = { ceph => $self->{guest}->ceph, image => $self->device($device)->{image} };
    return $Server->start({ $image->%*, snapshot => $self->{name} }, %options);
}

sub uri ($self, $device) {
    return $self->{guest}->ceph->uri($self->device($device)->{image}, $self->{name});
}

# ---- a container ----

sub container ($self) { return $self->{manifest}{container} }
sub container_bytes ($self) { return $self->container->{bytes} }

sub container_place ($self) {
    return
          'rbd:'
        . $self->{guest}->ceph->place
        . "/$self->{manifest}{container}{image}\@$self->{name}";
}

sub container_source ($self) {
    my ($ceph, $image) = ($self->{guest}->ceph, $self->container->{image});
    my ($from, $to) = new_pipe();
    my $program = $Filter->start({ out => $to }, $ceph->export_command($image, $self->{name}));
    return { name => $self->container_place, handle => $from, program => $program };
}

# Without reading it.
sub container_problem ($self) {
    my $problem
        = $self->{guest}->snapshot_problem($self->{name}, $self->container->@{qw(image bytes)});
    return $problem // ($self->is_known_damaged('container') ? 'damage was found in it' : undef);
}

# The same, but reads it.
sub container_damage ($self) {
    return $self->{guest}->snapshot_problem($self->{name}, $self->container->@{qw(image bytes)})
        // stream_problem($self->container_source, $self->container);
}

# A copy that is removed with the guest's object.
sub container_path ($self) {
    my ($ceph, $image) = ($self->{guest}->ceph, $self->container->{image});
    my $path = $self->{guest}->directory . '/root.tar.zst';
    return $path if -e $path;
    $ceph->rbd('export', '--no-progress', "$image\@$self->{name}", $path);
    my $problem = stream_problem($path, $self->container);
    fail($problem =~ s/\Q$path\E/$self->container_place/er) if defined($problem);
    return $path;
}

sub is_known_damaged ($self, $device) {
    return $self->{guest}->is_known_damaged($self->{name}, $self->own($device));
}

sub note_damage ($self, $device, $is_damaged) {
    return $self->{guest}->note_damage($self->{name}, $self->own($device), $is_damaged);
}

1;
