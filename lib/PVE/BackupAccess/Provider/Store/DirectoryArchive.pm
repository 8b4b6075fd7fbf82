package PVE::BackupAccess::Provider::Store::DirectoryArchive;

# An archive in a directory of its own. A directory without a manifest is not an archive.

use v5.36;

use Exporter qw(import);
use Fcntl qw(O_CREAT O_EXCL O_WRONLY);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File
    qw(file_exists fingerprint make_directory move remove_tree replace_file sync write_file);
use PVE::BackupAccess::Provider::Store::Manifest qw(safe_name);
use PVE::BackupAccess::Try qw(attempt_any);

use parent qw(PVE::BackupAccess::Provider::Store::Archive);

our @EXPORT_OK = qw($manifest_name $tree);

our $manifest_name = 'manifest.json';
our $tree = 'root.tar.zst';    # of a container

# guest: the guest's directory. A killed backup may have left the archive's, and digests of an increment would be added to those
# that are there.
sub begin ($class, $guest, $name, %about) {
    my $self = $class->SUPER::begin($guest, $name, %about);
    $self->{dir} = "$guest/.tmp-$name";
    remove_tree($self->{dir});
    make_directory($self->{dir});
    return $self;
}

sub publish ($self) {
    my $dir = "$self->{guest}/$self->{name}";
    move($self->{dir}, $dir);
    $self->{dir} = $dir;
    return;
}

sub dir ($self) { return $self->{dir} }

# The current name of the archive's directory.
sub entry ($self) { return $self->{dir} =~ s{.*/}{}sr }

# The path of a device's file.
sub path_of ($self, $device, $suffix) {
    return "$self->{dir}/" . safe_name($self->own($device)) . ".$suffix";
}

# Notes whether a verification found damage in the archive's own data of the device. No archive builds on a damaged one.
# On a read-only store nothing is noted, and there are no backups either.
sub note_damage ($self, $device, $is_damaged) {
    my $file = $self->path_of($device, 'damaged');
    attempt_any { write_file($file, ''); sync($file) }
    if $is_damaged && !-e $file;
    unlink($file) if !$is_damaged;
    return;
}

sub is_known_damaged ($self, $device) { return file_exists($self->path_of($device, 'damaged')) }

# The manifest does not list the log.
sub keep_log ($self, $text) {
    replace_file("$self->{dir}/backup.log", $text);
    return;
}

# ---- a container ----

sub add_container ($self, $fill) {
    my $path = $self->container_path;
    sysopen(my $file, $path, O_WRONLY | O_CREAT | O_EXCL, 0600)
        or PVE::BackupAccess::Error->throw('SystemError', "cannot write $path - $!");
    my $stream = $fill->($path, $file);
    $self->{manifest}{container} = { file => $tree, bytes => -s $path, $stream->%* };
    return;
}

sub container_path ($self) { return "$self->{dir}/$tree" }
sub container_place ($self) { return $self->container_path }
sub container_source ($self) { return $self->container_path }
sub container_bytes ($self) { return -s $self->container_path }

sub tree_problem ($self) {
    return $self->size_problem($self->container_path, $self->container->{bytes});
}

# Why a file does not have the size that it should have, undef if it has.
sub size_problem ($self, $path, $size) {
    my $found = fingerprint($path) // return "$path is missing";
    return undef if $found->{size} == $size;
    return "$path is damaged - it has $found->{size} bytes, not $size";
}

1;
