# Provider::RBD as a user of the Ceph cluster that may do only what doc/operating.md says: in a namespace, and in a
# pool of its own.
#
# One QEMU is enough: no guest is needed, and qemu-nbd's rbd driver is the machine's.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use PBA::Test::Strike;    # before the modules whose calls it intercepts

use Test::More;

use File::Temp ();

use PBA::Test::Ceph;
use PBA::Test::Command qw(run_command);
use PBA::Test::RBDLife;
use PVE::BackupAccess::Provider::RBD;

plan(skip_all => 'needs Ceph') if !PBA::Test::Ceph->is_installed;

my $ceph = PBA::Test::Ceph->start;
my $dir = File::Temp->newdir('pba-rbd-XXXXXXXX', TMPDIR => 1);
my $scsi = 'drive-scsi0';
my @devices = ($scsi, 'drive-efidisk0');
srand($ENV{PBA_SEED} // 20261201);

sub run_as ($user, @command) {
    return run_command(@command, '--ceph-conf', $ceph->conf, '--ceph-user', $user);
}

# All that changes or reads a store.
sub live ($life) {
    my $user = $life->{user};
    $life->guest->write_random(8);
    my $first = eval { $life->backup } // return fail("a backup: $@");
    for my $point ([2, 'progress'], [1, 'set_value']) {
        $life->guest->write_random(3);
        my $where = $life->killed_backup($point->@*) // 'not at all';
        $life->guest->lose_bitmap($scsi);
        $life->guest->write_random(1);
        ok(eval { $life->backup }, "a backup after one that was killed: $where") or diag($@);
    }
    is($life->problem, undef, 'all archives are intact');
    my $provider = $life->provider;
    is($life->_difference($provider, $first), undef, 'restored');
    is_deeply($provider->verify($first), [], 'verified');
    my $uri = $provider->rbd_uri($first, $scsi);
    $ceph->run(qw(qemu-img convert -f raw -O raw), $uri, "$dir/restored.raw");
    open(my $fh, '<:raw', "$dir/restored.raw") or die "restored.raw: $!\n";
    read($fh, my $content, -s $fh);
    ok($content eq $life->{expected}{$first}{$scsi}, 'restored by its URI');
    my $removed = eval { $provider->prune(100, 1) } // diag($@);
    is(scalar(($removed // [])->@*), 2, 'pruned');
    $life->forget(($removed // [])->@*);

    for my $name ($life->names) {
        ok(eval { $provider->remove($name); 1 }, 'removed') or diag($@);
        $life->forget($name);
    }
    is_deeply([$life->images], [], 'nothing is left');
    return;
}

subtest 'a user of a namespace' => sub {
    my $namespace = $ceph->new_namespace;
    my $user = $ceph->new_user(
        mon => 'profile rbd',
        osd => "profile rbd pool=backup namespace=$namespace"
    );
    my $life = PBA::Test::RBDLife->new(
        ceph => $ceph,
        dir => "$dir",
        namespace => $namespace,
        user => $user,
        devices => \@devices
    );
    live($life);

    SKIP: {
        skip('needs zstd', 2) if system('zstd --version >/dev/null 2>&1') != 0;
        my $container = $ceph->new_container($namespace, 'ceph-user' => $user)->fill;
        my $name = $container->backup // diag($container->error);
        is_deeply($container->provider->verify($name), [], 'a container');
        my $restored = $container->tmp . '/restored';
        mkdir($restored);
        chown($container->{first_id}, $container->{first_id}, $restored) if !$>;
        is($container->restore($name, $restored), 'tar', 'restored');
    }

    my $list = run_as($user, 'list', "rbd:backup/$namespace");
    is($list->{status}, 0, 'list') or diag($list->{err});
    for my $other ('rbd:backup', 'rbd:backup/' . $ceph->new_namespace) {
        my $run = run_as($user, 'list', $other);
        is($run->{status}, 1, "$other is refused") or diag($run->{out});
        like($run->{err}, qr/refuses the user client[.]$user /, 'and the error says why');
    }
};

subtest 'a user of a pool' => sub {
    $ceph->run(qw(ceph osd pool create), "own-$$", 8);
    $ceph->run(qw(rbd pool init), "own-$$");
    my $user = $ceph->new_user(mon => 'profile rbd', osd => "profile rbd pool=own-$$");
    my $image = "$dir/disk0.qcow2";
    $ceph->run(qw(qemu-img create -q -f qcow2), $image, '8M');
    $ceph->run(qw(qemu-io -f qcow2 -c), 'write -q -P 7 1M 300k', $image);
    my @guest = ('--image', $image, '--vmid', 100, '--fleecing-dir', "$dir");
    my $store = "rbd:own-$$";

    for my $command (
        ['backup', $store, @guest],
        ['backup', $store, @guest],
        ['list', $store],
        ['verify', $store],
        ['restore', "$store/vm/100", "$dir/disk0.raw"],
        ['prune', $store, '--keep-last', 1],
        )
    {
        my $run = run_as($user, $command->@*);
        is($run->{status}, 0, $command->[0]) or diag($run->{err});
    }
    is(system(qw(qemu-img compare -q), $image, "$dir/disk0.raw"), 0, 'restored as it was');
};

done_testing;
