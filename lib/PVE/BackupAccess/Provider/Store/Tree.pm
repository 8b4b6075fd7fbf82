package PVE::BackupAccess::Provider::Store::Tree;

# A container's tree from an archive in a form that Proxmox VE's pct accepts: the tar itself, or a directory that is removed
# with the object.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(make_directory);
use PVE::BackupAccess::Provider::Store::PrivateDir;
use PVE::BackupAccess::Provider::Store::Tar qw(extract is_for_pct);

our @EXPORT_OK = qw(mechanism_of);

sub mechanism_of ($archive) {
    return is_for_pct($archive->container_source) ? 'tar' : 'directory';
}

sub new ($class, $archive) {
    my $problem = $archive->container_problem;
    PVE::BackupAccess::Error->throw('ArchiveError', $problem) if defined($problem);
    my $path = $archive->container_path;
    my $self = bless({ mechanism => mechanism_of($archive), path => $path }, $class);
    $self->{archive} = $archive;    # its file may be a copy, which it removes
    return $self if $self->{mechanism} eq 'tar';

    # Not in /tmp: the tree may be large, and /tmp may be in memory.
    $self->{private}
        = PVE::BackupAccess::Provider::Store::PrivateDir->new($ENV{TMPDIR} ? () : '/var/tmp');
    $self->{path} = $self->{private}->path . '/tree';
    make_directory($self->{path});
    extract($path, $self->{path});
    delete($self->{archive});
    return $self;
}

sub mechanism ($self) { return $self->{mechanism} }
sub path ($self) { return $self->{path} }

1;
