# A random life of a store: whatever happens to it, each listed archive is restored to exactly its instant, or
# verify and restore report it as damaged; and an intact archive is never reported as damaged.
#
# PBA_SEED is the seed of the first life, and each later life has the next number. PBA_STEPS is the number of
# steps in all.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use PBA::Test::Strike;    # before the modules whose calls it intercepts

use Test::More;

use File::Temp ();
use PBA::Test::Orphans qw(adopt_orphans);
use PBA::Test::StoreLife;
use PBA::Test::StoreLife::Known qw(remember_intact);
use PBA::Test::StoreLife::Lives qw(run_lives);

my $steps = $ENV{PBA_STEPS} // ($ENV{PBA_FULL} ? 5000 : 1000);
my $seed = $ENV{PBA_SEED} // 20261129;

adopt_orphans();    # so that leftovers of a killed process can be waited for

my $tmp = File::Temp->newdir('pba-store-XXXXXXXX', TMPDIR => 1);
mkdir("$tmp/$_") or die "mkdir: $!\n" for qw(disk fast);
my $is_mounted = system("mount -t tmpfs -o size=48m tmpfs $tmp/disk 2>/dev/null") == 0;
my $is_fast = $is_mounted && system("mount -t tmpfs tmpfs $tmp/fast 2>/dev/null") == 0;
mkdir("$tmp/fast/$_") or die "mkdir: $!\n" for qw(scratch tmp);
$ENV{TMPDIR} = "$tmp/fast/tmp";
remember_intact();
note('needs root for a disk of its own: none is full, none is read-only') if !$is_mounted;

run_lives(
    'PBA::Test::StoreLife', $steps,
    seed => $seed,
    dir => "$tmp/disk",
    scratch => "$tmp/fast/scratch",
    is_mounted => $is_mounted,
);
system('umount', "$tmp/disk") if $is_mounted;
system('umount', "$tmp/fast") if $is_fast;

done_testing;
