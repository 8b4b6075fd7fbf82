# What is noted of backups may be damaged: by the disk, a crash, or what a caller keeps it in. A note that
# tells no backup costs a full one, and the next note is good again. So does what a provider takes for an
# id, and what is none.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PVE::BackupAccess::File qw(read_file write_file);

use PBA::Test::Backend;
use PBA::Test::Provider;

# One QEMU is enough: it is about files.
my $backend = PBA::Test::Backend->start(
    name => (PBA::Test::Backend->names)[0],
    guest => 0,
    paused => 1,
    memory => 32,
    disks => [{ id => 'disk0', size => 1 << 20, format => 'qcow2', bus => 'scsi' }],
);
my $device = $backend->device('disk0');
my $provider = PBA::Test::Provider->new;

sub mode_of_next (%options) {
    my $result = eval { $backend->task($provider, %options)->run };
    return $result ? $result->{devices}{$device}{'bitmap-mode'} : "none: $@";
}

# What becomes of a note that is good.
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
    is(mode_of_next(), 'reuse', 'the next one is incremental');
    return;
}

sub check_unreadable () {
    my ($file) = glob($backend->work_dir('state') . '/*');
    unlink($file);
    symlink($file, $file) or die "symlink: $!\n";
    is(mode_of_next(), 'new', 'a note that cannot be read: a full backup');
    is(mode_of_next(), 'reuse', 'the next one is incremental');
    return;
}

# The caller's own.
sub check_code_refs () {
    for my $text (@odd[0, 2, -1]) {
        my $note = $text;
        my %code
            = ('load-note' => sub (@) { $note }, 'store-note' => sub ($key, $new) { $note = $new });
        is(mode_of_next(%code), 'new', 'one that the caller keeps: full');
        is(mode_of_next(%code), 'reuse', 'then incremental');
    }
    return;
}

sub check_answer ($base) {
    local $provider->{on}{backup_vm_query_incremental} = sub ($self, $vmid, $volumes) {
        return { map { $_ => { 'bitmap-mode' => 'use', base => $base } } keys $volumes->%* };
    };
    is(mode_of_next(), 'new', "a provider's base '$base' is none: a full backup");
    is($backend->logged(qr/\Awarn: .*\Q$device\E.* is not the id of a backup\z/s),
        1, 'and a warning');
    return;
}

is(mode_of_next(), 'new', 'the first one');
is(mode_of_next(), 'reuse', 'a note that is good');
check_file($_) for @odd;
check_unreadable();
check_code_refs();
check_answer($_) for 'x', 'A' x 32, 'a' x 33, 'a' x 32 . "\n", '', "a\0b", 12;

done_testing;
