package PVE::BackupAccess::Provider::Store::Restore;

# A device of an archive during its restore: its data is locked against removal, and a server exports it.

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::RawFile;
use PVE::BackupAccess::Try qw(attempt);

my $RawFile = 'PVE::BackupAccess::Provider::Store::RawFile';

# volname: the archive's name for errors; socket: where the server listens; is-file: a raw file is needed too.
sub start ($class, $guest, $name, $device, %options) {

    # Taken before the archive is read: while this lock is held, no prune and no removal changes the archive.
    my $self = bless({ guest => $guest, name => $name, device => $device, %options }, $class);
    $self->{reading} = $guest->read_lock;
    my ($archive, $problem) = $guest->restorable($name, $device);
    PVE::BackupAccess::Error->throw(
        'ArchiveError',
        "device $device: cannot be restored from $options{volname} - $problem",
        device => $device
    ) if defined($problem);
    $self->{server} = $archive->serve($device, $self->%{qw(reading socket)});
    $self->{file} = $RawFile->start($self->{server}, $archive->device($device)->{size})
        if $options{'is-file'};
    return $self;
}

sub server ($self) { return $self->{server} }

# The path of the raw file, or the server's URI.
sub path ($self) { return $self->{file} ? $self->{file}->path : $self->{server}->uri }

# The raw file first: it reads from the server.
sub stop ($self) {
    $self->{file}->stop if $self->{file};
    $self->{server}->kill;
    return;
}

# Notes that these ranges do not match the digests, so that no backup builds on them.
sub note_damage ($self, $ranges) {
    return if !($ranges // [])->@*;
    attempt { $self->{guest}->note_damage_in($self->@{qw(name device)}, $ranges) };
    return;
}

# Dies if what was read may be wrong.
sub check ($self) {
    my ($name, $device) = $self->@{qw(name device)};
    my $problem = $self->{guest}->reading_problem($name, $device) // return;
    PVE::BackupAccess::Error->throw(
        'ArchiveError',
        "device $device: what was read from $self->{volname} may be wrong - $problem",
        device => $device
    );
}

1;
