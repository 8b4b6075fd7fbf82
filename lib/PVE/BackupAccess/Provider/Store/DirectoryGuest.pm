package PVE::BackupAccess::Provider::Store::DirectoryGuest;

# All archives of one guest in a directory, with a directory for each archive. A new archive is written under another name,
# and renamed when it is complete; to remove an archive, it is renamed first. A subclass implements what Store/Guest.pm requires,
# except for the methods here.

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File
    qw(directory_exists entries file_exists make_directory move remove_tree remove_unused);
use PVE::BackupAccess::Provider::Store::DirectoryArchive qw($manifest_name);
use PVE::BackupAccess::Provider::Store::DirectoryLock qw(drop_lock make_locks take_lock try_lock);
use PVE::BackupAccess::Provider::Store::Manifest qw($name_pattern);
use PVE::BackupAccess::Try qw(attempt reason);

use parent qw(PVE::BackupAccess::Provider::Store::Guest);

# wait: how many seconds to wait for a lock that another process holds.
sub new ($class, $dir, $wait = 0) {
    return bless({ dir => $dir, wait => $wait }, $class);
}

sub dir ($self) { return $self->{dir} }
sub is_there ($self) { return directory_exists($self->{dir}) }

sub make_place ($self) {
    make_directory($self->{dir});
    make_locks($self->{dir});
    return;
}

# Locks: see DirectoryLock.pm.
sub try_change_lock ($self) { return try_lock($self->{dir}, 'change') }
sub change_lock ($self) { return take_lock($self->{dir}, 'change', $self->{wait}) }

sub drop ($self, $lock) {
    drop_lock($lock);
    return;
}

sub removal_lock ($self) { return take_lock($self->{dir}, 'removal', $self->{wait}) }

sub read_lock ($self) {
    return $self->is_there ? take_lock($self->{dir}, 'read', $self->{wait}) : undef;
}

# The directories that have the name of an archive, the oldest first.
sub archive_directories ($self) {
    return map { m/\A$name_pattern\z/ ? $1 : () } entries($self->{dir});
}

sub names ($self) {
    return grep { $self->has($_) } $self->archive_directories;
}

sub has ($self, $name) { return file_exists("$self->{dir}/$name/$manifest_name") }

# The directories of incomplete and of removed archives.
sub leftovers ($self) {
    return map { m/\A(\.(?:tmp|del)-$name_pattern)\z/ ? $1 : () } entries($self->{dir});
}

sub is_clean ($self) { return !$self->leftovers }

# Removes what a killed process left. Needs the change lock. Returns what could not be completed, as texts. The next call tries
# again, also if this one did nothing because other processes read archives. If there is nothing to do, these are not locked out.
sub clean ($self) {
    return if $self->is_clean;
    my $alone = try_lock($self->{dir}, 'removal') // return;
    return (
        $self->tried(
            sub ($name) { 'cannot remove what a killed process left' },
            sub ($name) { remove_unused("$self->{dir}/$name") },
            $self->leftovers
        ),
        $self->complete_removals,
    );
}

# Completes removals that a killed process has begun, if they have more than one step.
sub complete_removals ($self) { return }

# Calls the code for each name, and returns what failed, as texts.
sub tried ($self, $what, $code, @names) {
    return map {
        my $name = $_;
        my $error = attempt { $code->($name) };
        $error ? $what->($name) . ' - ' . reason($error) : ();
    } @names;
}

# For a caller that does not know IDs, the archive is noted first: after a crash in between, the next backup is a full one.
sub publish ($self, $archive, $notes = undef) {
    $archive->note_in($notes) if $notes;
    $archive->publish;
    return;
}

# Proxmox VE's storage plugin creates this file to protect a backup.
sub is_protected ($self, $name) { return file_exists("$self->{dir}/$name/protected") }

sub check_unprotected ($self, $name) {
    PVE::BackupAccess::Error->throw('ArchiveError',
        "archive $name is protected - remove the file 'protected' in it first")
        if $self->is_protected($name);
    return;
}

# Removes an incomplete new archive, unless the process that stored it has done so.
sub give_up ($self, $archive) {
    my $entry = $archive->entry;
    $self->discard($entry) if file_exists("$self->{dir}/$entry");
    return;
}

sub remove ($self, $name) { return $self->discard($name) }

# Removes an archive that nothing builds on. Other processes see either all of it or nothing.
sub discard ($self, $entry) {
    $self->check_unprotected($entry) if $self->has($entry);    # it may be since prune looked
    my $gone = "$self->{dir}/.del-" . $entry =~ s/\A\.tmp-//r;
    remove_tree($gone) if file_exists($gone);
    move("$self->{dir}/$entry", $gone);
    remove_unused($gone);
    return;
}

1;
