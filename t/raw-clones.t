# Example::RawClones, a provider of a hundred lines on the classes of Provider::Store: it has all that Qcow2Chain and RBD
# have, whatever happens to its store.
#
# One QEMU is enough: qemu-nbd serves raw images, and the machine of try-provider has disks that the guest does not use.
# PBA_SEED is the seed of the first life, PBA_STEPS is the number of steps in all.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../examples/lib";

use PBA::Test::Strike;    # before the modules whose calls it intercepts

use Test::More;

use File::Temp ();

use PBA::Test::Command qw(run_command);
use PBA::Test::Container qw(describe);
use PBA::Test::Orphans qw(adopt_orphans);
use PBA::Test::StoreLife::Clones;
use PBA::Test::StoreLife::Lives qw(run_lives);
use PVE::BackupAccess::Task;
use Example::RawClones;

my $steps = $ENV{PBA_STEPS} // ($ENV{PBA_FULL} ? 2000 : 60);
my $seed = $ENV{PBA_SEED} // 20261201;

adopt_orphans();    # so that leftovers of a killed process can be waited for

my $tmp = File::Temp->newdir('pba-clones-XXXXXXXX', TMPDIR => 1);
mkdir("$tmp/$_") or die "mkdir: $!\n" for qw(disk scratch tmp empty);

# The whole API, with a real QEMU, and with -T.
{
    my $run = run_command(
        'try-provider', '-I',
        "$FindBin::Bin/../examples/lib", '--scfg',
        "state-dir=$tmp/empty", 'Example::RawClones'
    );
    is($run->{status}, 0, 'try-provider') or diag($run->{out}, $run->{err});
}

subtest 'a container' => sub {
    plan(skip_all => 'needs zstd') if system('zstd --version >/dev/null 2>&1') != 0;
    my $container = PBA::Test::Container->new(
        first_id => $> ? 0 : 100_000,
        new_provider =>
            sub ($log) { Example::RawClones->new(undef, { path => "$tmp/disk" }, 'test', $log) },
    )->fill;
    my $name = $container->backup // return fail($container->error);
    my $provider = $container->provider;
    is_deeply($provider->verify($name), [], 'verify finds no damage');
    my $restored = $container->tmp . '/restored';
    mkdir($restored);
    chown($container->{first_id}, $container->{first_id}, $restored) if !$>;
    is($container->restore($name, $restored), 'tar', 'restored by tar');
    utime(1, 1, $restored, $container->root);
    ok(describe($restored, './dev/*') eq describe($container->root, './dev/*'), 'all is as it was');
    my $tree = "$tmp/disk/$name/root.tar.zst";
    open(my $fh, '+<:raw', $tree) or die "$tree: $!\n";
    seek($fh, 600, 0);
    print {$fh} 'x' x 8;
    close($fh);
    like("@{$provider->verify($name)}", qr/root\.tar\.zst is damaged/, 'damage is found');
    is_deeply($provider->list->[0]{damaged}, ['container: damage was found in it'], 'listed');
    is_deeply([map { $_->{mark} } $provider->retention(101, 1)->@*], ['broken'], 'and noted');
    $provider->remove($name);
    is_deeply($provider->list, [], 'removed');
};

$ENV{TMPDIR} = "$tmp/tmp";
my $is_mounted = system("mount -t tmpfs -o size=200m tmpfs $tmp/disk 2>/dev/null") == 0;
note('needs root for a disk of its own: none is full, none is read-only') if !$is_mounted;

run_lives(
    'PBA::Test::StoreLife::Clones', $steps,
    seed => $seed,
    dir => "$tmp/disk",
    scratch => "$tmp/scratch",
    is_mounted => $is_mounted,
);
system('umount', "$tmp/disk") if $is_mounted;

done_testing;
