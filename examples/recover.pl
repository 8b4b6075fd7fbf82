# Undoes what a killed backup program left behind in a guest, and prints what it did. If there is nothing to
# undo, it prints nothing, so it can be run at any time.
#
#     perl examples/recover.pl QMP-SOCKET TARGET-ID FLEECING-DIRECTORY

use v5.36;

use PVE::BackupAccess;

my ($qmp, $target_id, $fleecing_dir) = @ARGV;
die "usage: $0 QMP-SOCKET TARGET-ID FLEECING-DIRECTORY\n" if @ARGV != 3;

my $lines = PVE::BackupAccess->recover(
    qmp => $qmp,
    'target-id' => $target_id,
    'fleecing-dir' => $fleecing_dir,
);
say for $lines->@*;
