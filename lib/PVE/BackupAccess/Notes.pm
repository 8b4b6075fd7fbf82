package PVE::BackupAccess::Notes;

# For providers that do not know IDs: a note of the backup that the provider's newest data of each
# device comes from. The note is a text for each target and number of a guest, stored by the caller or
# in a file of this host.

use v5.36;

use Digest::SHA ();
use JSON::PP ();

use PVE::BackupAccess::Argument qw(bad_argument is_backup_id);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(make_directory read_if_there replace_file sync);
use PVE::BackupAccess::Try qw(attempt_any);

my $system_dir = '/var/lib/pve-backup-access';
my $json = JSON::PP->new->utf8->canonical;

my sub default_dir () {
    return $system_dir if $> == 0;
    my ($home) = ((getpwuid($>))[7] // '') =~ m!\A(/.*)\z!s
        or bad_argument('this user has no home directory - give state-dir');
    return "$home/.local/state/pve-backup-access";
}

# Options: load, store => code refs; dir => the directory of the files that are used otherwise.
sub new ($class, $target_id, $vmid, %options) {
    utf8::encode(my $target = $target_id);
    my $key = Digest::SHA::sha256_hex("$target\0$vmid");
    return bless({ %options, key => $key }, $class);
}

sub _file ($self) {
    my $dir = $self->{dir} // default_dir();
    return "$dir/$self->{key}.json";
}

sub _text ($self) {
    return $self->{load}->($self->{key}) if $self->{load};
    return read_if_there($self->_file);
}

# An empty note removes the file. This needs no space, so a full file system does not prevent a
# backup.
sub _store ($self, $ids) {
    return $self->{store}->($self->{key}, $json->encode($ids)) if $self->{store};
    my $file = $self->_file;
    my $dir = $file =~ s{/[^/]+\z}{}r;
    make_directory($dir);
    if ($ids->%*) {
        replace_file($file, $json->encode($ids));
    }
    elsif (!unlink($file) && !$!{ENOENT}) {
        PVE::BackupAccess::Error->throw('SystemError', "cannot remove $file - $!");
    }
    else {
        sync($dir);
    }
    return;
}

# Earlier versions stored an ID without the identity of its disk.
my sub read_note ($note) {
    my ($id, $identity) = ref($note) eq 'HASH' ? $note->@{qw(id identity)} : $note;
    return if !is_backup_id($id) || ref($identity);
    return { id => $id, identity => $identity };
}

# Returns undef if the note cannot be read.
sub _read ($self) {
    my $ids;
    attempt_any { $ids = $json->decode($self->_text // '{}') };
    return undef if ref($ids) ne 'HASH';
    return { map { my $note = read_note($ids->{$_}); $note ? ($_ => $note) : () } keys $ids->%* };
}

# { device => { id, identity } }: the identity of the disk that had the name then, undef if it is
# not known. An unreadable note counts as an empty one.
sub ids ($self) { return $self->_read // {} }

# Dies if one of these devices has another note than in the earlier result of ids.
sub check_same ($self, $before, @devices) {
    my $now = $self->ids;
    for my $device (sort @devices) {
        my ($old, $new) = map { ($_->{$device} // {})->{id} // '' } $before, $now;
        PVE::BackupAccess::Error->throw(
            'StateError',
            "device $device: the note of its last backup has changed while this one began - try again",
            device => $device
        ) if $old ne $new;
    }
    return;
}

# Replaces the notes of these devices; undef: not known. An unreadable note is replaced completely,
# because it might become readable later.
sub note ($self, $new) {
    my $old = $self->_read;
    my %ids = (($old // {})->%*, $new->%*);
    delete($ids{$_}) for grep { !defined($ids{$_}) } keys %ids;
    $self->_store(\%ids) if !$old || $json->encode(\%ids) ne $json->encode($old);
    return;
}

1;
