package Example::RawClones;

# A backup provider on the classes in PVE::BackupAccess::Provider::Store. An archive is a directory with a raw image of each
# device. An incremental backup clones the images of the archive that it builds on, and writes what has changed. On a
# file system with reflinks, such as XFS or Btrfs, a clone takes neither time nor space.

use v5.36;

use List::Util qw(uniq);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(directory_exists entries);

use parent qw(PVE::BackupAccess::Provider::Store::WithContainers);

my %directories = (qemu => 'vm', lxc => 'ct');

sub new ($class, $storage_plugin, $scfg, $storeid, $log = undef) {
    my %settings = $class->_settings($storage_plugin, $scfg, $storeid, $log);
    my $path = $class->can('_checked_path')->('path', $scfg->{path});
    return bless({ %settings, path => $path }, $class);
}

sub provider_name ($self) { return 'raw clones' }

sub job_init ($self, $start_time) {
    PVE::BackupAccess::Error->throw('StateError', "$self->{path} does not exist")
        if !directory_exists($self->{path});
    return;
}

sub _guest ($self, $place) {
    return Example::RawClones::Guest->new("$self->{path}/$place", $self->{wait});
}

sub _vmids ($self) {
    my @entries = map { entries("$self->{path}/$_") } values %directories;
    return sort { $a <=> $b } uniq(map { m/\A([1-9][0-9]{0,8})\z/ ? $1 : () } @entries);
}

sub _begin ($self, $task, %about) {
    return Example::RawClones::Archive->begin($task->{guest}->dir, $task->{name}, %about);
}

sub _places_of_type ($self) { return \%directories }
sub _where ($self) { return $self->{path} }
sub _notes_name ($self) { return 'raw-clones' }

## no critic (ProhibitMultiplePackages): the classes of one provider
package Example::RawClones::Guest;

use parent qw(PVE::BackupAccess::Provider::Store::DirectoryGuest);

sub archive ($self, $name) { return Example::RawClones::Archive->load($self->{dir}, $name) }

sub image_problem ($self, $archive, $device) {
    return $archive->size_problem($archive->image($device), $archive->device($device)->{size});
}

package Example::RawClones::Archive;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(file_exists move read_if_there replace_file sha256 sync);
use PVE::BackupAccess::Program qw(run_program);
use PVE::BackupAccess::Provider::Store::DirectoryArchive qw($manifest_name);

use parent -norequire, 'PVE::BackupAccess::Provider::Store::DirectoryArchive';

my $Error = 'PVE::BackupAccess::Error';
my $Server = 'Example::RawClones::Server';

sub load ($class, $guest, $name) {
    my $dir = "$guest/$name";
    my $text = read_if_there("$dir/$manifest_name")
        // $Error->throw('ArchiveError', "there is no archive $dir");
    my $self = $class->SUPER::load($guest, $name, $text);
    $self->{dir} = $dir;
    return $self;
}

sub image ($self, $device) { return $self->path_of($device, 'raw') }

sub open_to_write ($self, $device) {
    my ($image, $parent) = ($self->image($device), $self->{parents}{$device});
    my @make
        = $parent
        ? ('cp', '--reflink=auto', '--sparse=always', '--', $parent->image($device), $image)
        : ('truncate', '--size', $self->device($device)->{size}, '--', $image);
    my ($status, undef, $message) = run_program(@make);
    $Error->throw('SystemError', "cannot make $image - " . $message =~ s/\n.*//sr) if $status != 0;
    return $Server->start($image, writable => 1);
}

sub serve ($self, $device, %options) { return $Server->start($self->image($device), %options) }

# In a new archive, the digests of what this backup has read.
sub digests ($self, $device) {
    return $self->path_of($device, 'read') if $self->{is_new};
    my $file = $self->path_of($device, 'digests');
    my $is_good = file_exists($file) && sha256($file) eq $self->device($device)->{digests}{sha256};
    $Error->throw('ArchiveError', "$file is missing or damaged", device => $device) if !$is_good;
    return $file;
}

sub keep_digests ($self, $device, $file) {
    move($file, $self->path_of($device, 'digests'));
    unlink($self->digests($device));
    return;
}

sub seal ($self) {
    my @files = map { ($self->image($_), $self->path_of($_, 'digests')) } $self->devices;
    sync($_) for @files, $self->container ? $self->container_path : ();
    replace_file("$self->{dir}/$manifest_name", $self->text);
    return;
}

package Example::RawClones::Server;

use parent qw(PVE::BackupAccess::Provider::Store::Server);

sub _image_arguments ($class, $file, %options) { return ('--format=raw', $file) }

1;
