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
use PVE::BackupAccess::Provider::Store::Digests qw(digests_size);
use PVE::BackupAccess::Provider::Store::Filter;
use PVE::BackupAccess::Provider::Store::Tar qw(stream_problem);
use PVE::BackupAccess::Try qw(attempt rethrow);

use parent qw(PVE::BackupAccess::Provider::Store::Archive);

my $Filter = 'PVE::BackupAccess::Provider::Store::Filter';
my $Server = 'PVE::BackupAccess::Provider::RBD::Server';

my sub fail ($message, %context) {
    PVE::BackupAccess::Error->throw('ArchiveError', $message, %context);
}

# ---- a new archive ----

# The device is stored in the image of the parent, or without a parent in a new image.
sub add_device ($self, $device, $about, $parent = undef) {
    my $image
        = $parent
        ? $parent->device($device)->{image}
        : $self->{guest}->image_for($device, $self->{name});
    return $self->SUPER::add_device($device, { $about->%*, image => $image }, $parent);
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

# The check reads the snapshots. So it detects what another program wrote to an image before, and what a program writes later is
# not in the backup.
sub freeze ($self) {
    $self->{guest}->check_lock;
    for my $device ($self->devices) {
        $self->{guest}->ceph->snap($self->device($device)->{image}, $self->{name});
    }
    return;
}

sub keep_digests ($self, $device, $file) {
    put_parts($self->{guest}->ceph,
        _digests_of($self->device($device)->{image}, $self->{name}), $file);
    return;
}

# ---- an existing archive ----

# Removes the taint from the image's name.
sub is_valid_entry ($class, $entry) {
    ($entry->{image}) = ($entry->{image} // '') =~ m/\A(pba-[A-Za-z0-9%._-]+)\z/;
    return defined($entry->{image});
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
    return part_names(_digests_of($image, $snapshot), digests_size($size, $class->cluster_size));
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
    get_parts($self->{guest}->ceph,
        $place, digests_size($entry->{size}, $self->cluster_size), $file);
    fail("the digests of archive $self->{name} are damaged - their SHA-256 differs",
        device => $device)
        if sha256($file) ne $entry->{digests}{sha256};
    $self->{guest}{fetched}{$file} = 1;
    return $file;
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

sub tree_problem ($self) {
    return $self->{guest}->snapshot_problem($self->{name}, $self->container->@{qw(image bytes)});
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
