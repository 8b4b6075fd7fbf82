# Lists what the next backup of a disk would read. The access ends as after a failed backup, so the bitmap keeps all of
# its bits. If the target has no bitmap yet, it gets one in which everything is dirty.
#
#     perl examples/dirty-regions.pl QMP-SOCKET TARGET-ID DEVICE FLEECING-DIRECTORY

use v5.36;

use PVE::BackupAccess;

my ($qmp, $target_id, $device, $fleecing_dir) = @ARGV;
die "usage: $0 QMP-SOCKET TARGET-ID DEVICE FLEECING-DIRECTORY\n" if @ARGV != 4;

my $access = PVE::BackupAccess->new(
    qmp => $qmp,
    'target-id' => $target_id,
    'fleecing-dir' => $fleecing_dir,
);
$access->setup([{ device => $device, 'bitmap-mode' => 'use' }]);
my $volume = $access->volume($device);
while (my ($offset, $length) = $volume->next_dirty_region) {
    say "$offset $length";
}
$volume->close;
$access->teardown(0);
