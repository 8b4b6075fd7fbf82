package PVE::BackupAccess::Provider::Store::Restore;

# A device of an archive while it is restored: what it needs is locked against removal, and a server shows it.

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::RawFile;

my $RawFile = 'PVE::BackupAccess::Provider::Store::RawFile';

# Of the guest's archive of that name. volname: how it is called in an error; socket: where the server listens;
# is-file: a raw file is needed as well.
sub start ($class, $guest, $name, $device, %options) {

    # Before the archive is read: while this lock is held, no prune and no removal takes a part of it away.
    my $self = bless({ reading => $guest->read_lock }, $class);
    my ($archive, $problem) = $guest->restorable($name, $device);
    PVE::BackupAccess::Error->throw(
        'ArchiveError',
        "device $device: cannot be restored from $options{volname} - $problem",
        device => $device
    ) if defined($problem);
    $self->{server} = $archive->serve($device, %options{'socket'});
    $self->{file} = $RawFile->start($self->{server}, $archive->device($device)->{size})
        if $options{'is-file'};
    return $self;
}

sub server ($self) { return $self->{server} }

# Of the raw file, or the server's URI.
sub path ($self) { return $self->{file} ? $self->{file}->path : $self->{server}->uri }

# The file first, which the server's data goes through.
sub stop ($self) {
    $self->{file}->stop if $self->{file};
    $self->{server}->kill;
    return;
}

1;
