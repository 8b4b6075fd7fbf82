# Notes about backups may be damaged, by the disk, by a crash, or by the caller's storage. A note that names no
# backup causes a full backup, and the next note is valid again. The same applies to a provider's invalid ID.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PVE::BackupAccess::File qw(read_file write_file);

use PBA::Test::Backend;
use PBA::Test::Provider;

# One QEMU is enough: it is about files.
my $backend = PBA::Test::Backend->start_paused(
    name => (PBA::Test::Backend->names)[0],
    disks => [{ id => 'disk0', size => 1 << 20, format => 'qcow2', bus => 'scsi' }],
);
my $device = $backend->device('disk0');
my $provider = PBA::Test::Provider->new;

sub mode_of_next (%options) {
    my $result = eval { $backend->task($provider, %options)->run };
    return $result ? $result->{devices}{$device}{'bitmap-mode'} : "none: $@";
}

# Damaged forms of a valid note.
my @odd = ('', ' ', '{', 'null', '[]', '"x"', "{\"$device\":null}", "\xff\xfe", "\0" x 512);
push(@odd,
    map { "{\"$device\":$_}" } qw(1 1.5 true {} []),
    map { "\"$_\"" } qw(x 0x12),
    '', 'G' x 32, 'A' x 32, 'a' x 31, 'a' x 33,
    'a' x 32 . '\n',
    "\xc3\xa4" x 32, '\ud800');

sub check_file ($text) {
    my ($file) = glob($backend->work_dir('state') . '/*');
    write_file($file, $text);
    my $shown = substr($text, 0, 60) =~ s/([^ -~])/sprintf('\\x%02x', ord($1))/ger;
    is(mode_of_next(), 'new', "a note of $shown: a full backup");
    is(mode_of_next(), 'reuse', 'the next backup is incremental');
    return;
}

sub check_unreadable () {
    my ($file) = glob($backend->work_dir('state') . '/*');
    unlink($file);
    symlink($file, $file) or die "symlink: $!\n";
    my $is_left;
    {
        local $provider->{on}{backup_vm}
            = sub ($self, @) { $is_left = -l $file ? 1 : 0; die "killed\n" };
        eval { $backend->task($provider)->run };
    }
    unlink($file);
    ok(defined($is_left) && !$is_left,
        'where it cannot be read, it is none when there may be new data');
    symlink($file, $file) or die "symlink: $!\n";
    is(mode_of_next(), 'new', 'a note that cannot be read: a full backup');
    is(mode_of_next(), 'reuse', 'the next backup is incremental');
    return;
}

# Notes that the caller stores itself.
sub check_code_refs () {
    for my $text (@odd[0, 2, -1]) {
        my $note = $text;
        my %code
            = ('load-note' => sub (@) { $note }, 'store-note' => sub ($key, $new) { $note = $new });
        is(mode_of_next(%code), 'new', 'a bad note from a code ref: a full backup');
        is(mode_of_next(%code), 'reuse', 'the next backup is incremental');
    }
    return;
}

# The old note must be gone before the provider has new data, even if it could not be read: the backup may then
# be killed and the guest rolled back.
sub check_load_dies () {
    my ($note, $is_down, $old, $seen);
    my %code = (
        'load-note' => sub (@) { $is_down ? die "the cluster is away\n" : $note },
        'store-note' => sub ($key, $new) { $note = $new },
    );
    is(mode_of_next(%code), 'new', 'without a note from the code ref: a full backup');
    is(mode_of_next(%code), 'reuse', 'is good');
    ($is_down, $old) = (1, $note);
    my %on = (backup_vm => sub ($self, @) { $seen = $note; die "killed\n" });
    local $provider->{on} = \%on;
    eval { $backend->task($provider, %code)->run };
    my ($id) = $old =~ m/([0-9a-f]{32})/;
    unlike($seen, qr/$id/, 'where it cannot be read, it is gone when there may be new data');
    $is_down = 0;
    delete($on{backup_vm});
    is(mode_of_next(%code), 'reuse', 'the failed backup made a new bitmap, which is used');
    is_deeply($provider->{regions}{$device}, [0, 1 << 20], 'everything in it is dirty');
    return;
}

# If the note cannot be stored, but the old one can be removed, the next backup is a full one. If not even that is possible,
# or a signal arrives, the backup fails before the provider has data of it.
sub check_store_dies () {
    my ($note, $strike);
    my $store = sub ($key, $new) { $new eq '{}' || $strike->(); $note = $new };
    my %code = ('load-note' => sub (@) { $note }, 'store-note' => $store);
    $strike = sub () { die "the cluster is away\n" };
    is(mode_of_next(%code), 'new', 'a note that cannot be stored: the backup is good');
    is($backend->logged(qr/\Awarn: .*cannot note the ID.*the cluster is away/s),
        1, 'the log has a warning');
    $strike = sub () { };
    is(mode_of_next(%code), 'new', 'the next backup is full');

    is(mode_of_next(%code), 'reuse', 'the one after that is incremental');

    $provider->{calls} = [];
    $strike = sub () { kill(USR1 => $$) };
    local $SIG{USR1} = sub { die "stop\n" };
    is(mode_of_next(%code), "none: stop\n", 'a signal in store-note ends the backup');
    $code{'store-note'} = sub (@) { die "the cluster is away\n" };
    is(mode_of_next(%code), "none: the cluster is away\n",
        'an old note that stays ends the backup');
    is_deeply([grep { $_->[0] eq 'backup_vm' } $provider->{calls}->@*],
        [], 'the provider is not called');
    $code{'store-note'} = $store;
    $strike = sub () { };
    is(mode_of_next(%code), 'reuse', 'the next backup is incremental');
    return;
}

# A note is stored while the backup has the guest's access, and before the provider may have data of it. So it never replaces
# that of another process' backup.
sub check_order () {
    my $note;
    my %code = (
        'load-note' => sub (@) { $note },
        'store-note' => sub ($key, $new) { $provider->note('store-note'); $note = $new },
    );
    for my $fails (0, 1) {
        $provider->{calls} = [];
        local $provider->{on}{backup_vm} = sub (@) { die "no space\n" if $fails };
        mode_of_next(%code);
        my @calls = grep { m/\A(?:backup_vm|store-note)\z/ } map { $_->[0] } $provider->{calls}->@*;
        is("@calls", 'store-note backup_vm', 'the note is stored once, before backup_vm');
    }

    # While the provider is asked, another process' backup begins, and has removed the old note.
    my $other = $backend->access(log => sub { });
    my $begin = sub ($self, $vmid, $volumes) {
        $other->setup($backend->devices('use', 'disk0'));
        $note = '{}';
        return { map { $_ => 'use' } keys $volumes->%* };
    };
    local $provider->{on}{backup_vm_query_incremental} = $begin;
    like(mode_of_next(%code), qr/\Anone: .*already/s, 'another backup has begun');
    is($note, '{}', 'its note stays');
    $other->teardown(0);
    return;
}

# While the provider is asked, another backup is made, and the guest is rolled back: the bitmap fits the note that the task
# has seen, but not the provider's newest data.
sub check_other_backup () {
    my $note;
    my %code
        = ('load-note' => sub (@) { $note }, 'store-note' => sub ($key, $new) { $note = $new });
    mode_of_next(%code);
    is(mode_of_next(%code), 'reuse', 'the bitmap fits the note');
    my $other = $note =~ s/[0-9a-f]{32}/PVE::BackupAccess->new_id/er;
    $provider->{calls} = [];
    {
        local $provider->{on}{backup_vm_query_incremental} = sub ($self, $vmid, $volumes) {
            $note = $other;
            return { map { $_ => 'use' } keys $volumes->%* };
        };
        like(mode_of_next(%code), qr/\Anone: .*note .* has changed/, 'another backup was made');
    }
    is($note, $other, 'its note stays');
    is_deeply([grep { $_->[0] eq 'backup_vm' } $provider->{calls}->@*],
        [], 'the provider is not called');
    is(mode_of_next(%code), 'new', 'the next backup is full');
    return;
}

# A signal while the caller's code runs ends the backup.
sub check_load_signal () {
    my %code = ('load-note' => sub (@) { kill(USR1 => $$); undef }, 'store-note' => sub (@) { });
    local $SIG{USR1} = sub { die "stop\n" };
    my $done = eval { $backend->task($provider, %code)->run; 1 };
    is($done ? 'it did not die' : $@, "stop\n", 'a signal in load-note ends the backup');
    return;
}

sub check_answer ($base) {
    local $provider->{on}{backup_vm_query_incremental} = sub ($self, $vmid, $volumes) {
        return { map { $_ => { 'bitmap-mode' => 'use', base => $base } } keys $volumes->%* };
    };
    is(mode_of_next(), 'new', "a provider's base '$base' is none: a full backup");
    is($backend->logged(qr/\Awarn: .*\Q$device\E.* is not the ID of a backup\z/s),
        1, 'the log has a warning');
    return;
}

# The provider's newest archive may be of a program that does not know IDs, of which the note does not know.
sub check_answer_without_base () {
    local $provider->{on}{backup_vm_query_incremental} = sub ($self, $vmid, $volumes) {
        return { map { $_ => { 'bitmap-mode' => 'use' } } keys $volumes->%* };
    };
    is(mode_of_next(), 'new', 'a provider knows IDs, but has none for its archive: a full backup');
    return;
}

is(mode_of_next(), 'new', 'the first backup is full');
is(mode_of_next(), 'reuse', 'with a good note, the backup is incremental');
check_file($_) for @odd;
check_unreadable();
check_code_refs();
check_load_dies();
check_store_dies();
check_order();
check_other_backup();
check_load_signal();
mode_of_next();
check_answer_without_base();
check_answer($_) for 'x', 'A' x 32, 'a' x 33, 'a' x 32 . "\n", '', "a\0b", 12;

done_testing;
