package PVE::BackupAccess::Provider::Qcow2Chain::Restore;

# A device of an archive while it is restored: what it builds on is locked against removal, and a server shows it.

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Qcow2Chain::RawFile;
use PVE::BackupAccess::Provider::Qcow2Chain::Server;

my $RawFile = 'PVE::BackupAccess::Provider::Qcow2Chain::RawFile';
my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

# Of the guest's archive of that name. volname: how it is called in an error; socket: where the server listens;
# is-file: a raw file is needed as well.
sub start ($class, $guest, $name, $device, %options) {

    # Before the chain is read: while this lock is held, no prune and no removal merges a part of it.
    my $self = bless({ reading => $guest->read_lock }, $class);
    my @chain = $guest->chain($name, $device);
    my $problem = $guest->headers_problem($device, @chain);
    PVE::BackupAccess::Error->throw(
        'ArchiveError',
        "device $device: cannot be restored from $options{volname} - $problem",
        device => $device
    ) if defined($problem);
    $self->{server} = $Server->start($chain[0]->image($device), %options{'socket'});
    $self->{file} = $RawFile->start($self->{server}, $chain[0]->device($device)->{size})
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
