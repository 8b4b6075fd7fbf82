# Backups in a Ceph cluster by Provider::RBD: the content of each archive, whatever happens during it.
#
# One QEMU is enough: no guest is needed, and qemu-nbd's rbd driver is the machine's.
#
# A plain run has two disks and kills backups at some points, which PBA_SEED chooses, and a short random life at the
# end (PBA_STEPS). PBA_FULL=1 includes all.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use PBA::Test::Strike;    # before the modules whose calls it intercepts

use Test::More;

use File::Temp ();
use POSIX ();

use PBA::Test::Ceph;
use PBA::Test::Command qw(run_command);
use PBA::Test::Container qw(describe);
use PBA::Test::RBDLife;
use PVE::BackupAccess::Provider::RBD;

plan(skip_all => 'needs Ceph') if !PBA::Test::Ceph->is_installed;

my $ceph = PBA::Test::Ceph->start;
my $dir = File::Temp->newdir('pba-rbd-XXXXXXXX', TMPDIR => 1);
my $scsi = 'drive-scsi0';
my $steps = $ENV{PBA_STEPS} // ($ENV{PBA_FULL} ? 40 : 2);
my $seed = $ENV{PBA_SEED} // time;
srand($seed);
diag("PBA_SEED=$seed");

# One of them, and with PBA_FULL all.
sub some_of (@all) { return $ENV{PBA_FULL} ? @all : $all[rand(@all)] }

sub new_life () {
    my @devices = ($scsi, some_of('drive-efidisk0', 'drive-tpmstate0'));
    return PBA::Test::RBDLife->new(ceph => $ceph, dir => "$dir", devices => \@devices);
}

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

my $life;

# At each step in which the store and the guest get their objects.
subtest 'killed first backups' => sub {
    for my $point (some_of(map { ([$_, 'make_object'], [$_, 'set_value']) } 1 .. 3)) {
        $life = new_life();
        $life->guest->write_random(8);
        my $where = $life->killed_backup($point->@*) // 'not at all';
        my $name = $life->backup;
        is($life->statuses->{$scsi}, 'new', "killed: $where $point->[0]: the next one is full");
        is($life->problem, undef, 'it is listed and intact');
    }
};

subtest 'an increment' => sub {
    my ($first) = $life->names;
    $life->guest->write_random(2);
    my $second = $life->backup;
    is($life->statuses->{$scsi}, 'reuse', 'the second one is an increment');
    is($life->problem, undef, 'both archives are intact');
    is(
        scalar($life->images),
        scalar(keys $life->guest->{disks}->%*),
        'there is one image for each device'
    );
    is($life->_difference($life->provider, $first, $scsi), undef, 'it is restored by path');
    my $uri = $life->provider->rbd_uri($first, $scsi);
    $ceph->run('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', $uri, "$dir/restored.raw");
    ok(content("$dir/restored.raw") eq $life->{expected}{$first}{$scsi}, 'and by its URI');
    my ($entry) = grep { $_->{volname} eq $second } $life->provider->list(100)->@*;
    is($entry->{devices}{$scsi}{parent}, $first =~ s{.*/}{}r, 'the list tells what it builds on');
    is_deeply($life->provider->verify($second), [], 'verify finds nothing wrong');

    for my $image ($life->images) {
        unlike($ceph->run('rbd', 'status', $life->place . "/$image"),
            qr/watcher=/, 'no reader or writer is left in the cluster');
    }
};

subtest 'a lost bitmap costs reading' => sub {
    $life->guest->lose_bitmap($scsi);
    $life->guest->write_random(1);
    $life->log;
    $life->backup;
    is($life->statuses->{$scsi}, 'new', 'everything is read');
    like(
        $life->log,
        qr/$scsi: read in full, stored .* that differ from /,
        'only the difference is stored'
    );
    is(
        scalar($life->images),
        scalar(keys $life->guest->{disks}->%*),
        'it is stored in the same image'
    );
    is($life->problem, undef, 'all archives are intact');
};

subtest 'killed backups' => sub {
    my $differs = 0;
    my @points = ([3, 'progress'], [2, 'snap'], [1, 'set_value'], [24], [1, 'put'], [60]);
    for my $point (some_of(@points)) {
        $life->guest->write_random(3);
        my $where = $life->killed_backup($point->@*) // 'not at all';
        my ($last) = reverse($life->names);
        is($life->problem($last), undef, "killed: $where: the last good one is restored");
        $differs += $life->different;
        $life->guest->lose_bitmap($scsi) if $where =~ m/progress/;
        $life->guest->write_random(1);
        my $name = $life->backup;
        is($life->problem($name), undef, 'the next archive is intact');
    }
    cmp_ok($differs, '>', 0, 'some interrupted backups had changed the images') if $ENV{PBA_FULL};
    is($life->problem, undef, 'all archives are intact');
};

subtest 'prune and remove' => sub {
    my @names = $life->names;
    my $removed = $life->provider->prune(100, 2);
    is_deeply($removed, [@names[0 .. $#names - 2]], 'prune removes what is not kept');
    $life->forget($removed->@*);
    is($life->problem, undef, 'the other archives are intact');
    my ($first, $second) = $life->names;
    $life->provider->remove($second);
    $life->forget($second);
    is($life->problem, undef, 'the newest one was removed');
    $life->guest->write_random(1);
    $life->backup;
    is($life->problem, undef, 'the next one is right');
    $life->provider->remove($_) for $life->names;
    $life->forget($life->names);
    is_deeply([$life->images], [], 'without archives there are no images');
    is_deeply([grep { m/digests|[.]log/ } $life->objects], [], 'no digests are left');
};

# Damages the object with the first bytes of a device's image.
sub damage ($life, $device) {
    my ($image) = grep { m/\Q$device\E/ } $life->images;
    my ($prefix)
        = $ceph->run('rbd', 'info', $life->place . "/$image") =~ m/block_name_prefix: (\S+)/;
    my ($object) = grep { m/\A\Q$prefix\E/ } $life->objects;
    my @rados = ('rados', '-p', 'backup', '-N', $life->{namespace});
    $ceph->run(@rados, 'get', $object, "$dir/object");
    my $data = content("$dir/object");
    substr($data, 4096, 1) = chr(ord(substr($data, 4096, 1)) ^ 1);
    open(my $fh, '>:raw', "$dir/object") or die "open: $!\n";
    print {$fh} $data;
    close($fh) or die "close: $!\n";
    $ceph->run(@rados, 'put', $object, "$dir/object");
    return;
}

subtest 'damage is found' => sub {

    # The number of writes is random too, and an image of zeroes has no object.
    do { $life->guest->write_random(20) } until $life->guest->content($scsi) =~ m/[^\0]/;
    my $name = $life->backup;
    damage($life, $scsi);
    my $problems = $life->provider->verify($name);
    like(
        "@{$problems}",
        qr/\A$scsi: 65536 bytes differ from what was read .* offset 0/,
        'verify reports the damage'
    );
    $life->log;
    my $next = $life->backup;
    like($life->log, qr/$scsi: full backup - archive \S+ is damaged/, 'nothing is built on it');
    is($life->problem($next), undef, 'the next one is right');
    my ($entry) = grep { $_->{volname} eq $name } $life->provider->list(100)->@*;
    like("@{$entry->{damaged}}", qr/$scsi: damage was found/, 'list shows the damage');
    $life->provider->remove($name);
    $life->forget($name);
};

subtest 'one at a time' => sub {
    my $guest = $life->provider->_guest('vm/100');
    my $lock = $guest->change_lock;
    local $life->{wait} = 0;
    is(eval { $life->backup }, undef, 'a second backup is refused while the guest is locked');
    my $error = $@;
    is(eval { $error->class }, 'StateError', 'it is refused') or diag($error);
    is($life->problem, undef, 'restores are possible');
    $guest->drop($lock);
    my $reading = $guest->read_lock;
    my ($name) = $life->names;
    is(eval { $life->provider->remove($name); 1 },
        undef, 'an archive that is being read cannot be removed');
    $guest->drop($reading);
};

subtest 'the command' => sub {
    my $store = 'rbd:backup/' . $ceph->new_namespace;
    my $run = sub ($command, @arguments) {
        my $done = run_command($command, @arguments, '--ceph-conf', $ceph->conf);
        is($done->{status}, 0, "$command: exit status") or diag($done->{err});
        return $done->{out};
    };
    my $image = "$dir/disk0.qcow2";
    $ceph->run('qemu-img', 'create', '-q', '-f', 'qcow2', $image, '8M');
    $ceph->run('qemu-io', '-f', 'qcow2', '-c', 'write -q -P 7 1M 300k', $image);
    my @guest = ('--image', $image, '--vmid', 100, '--fleecing-dir', "$dir");
    my $first = $run->('backup', $store, @guest);
    like($first, qr!\A\Q$store\E/vm/100/[0-9TZ]+\n\z!, 'backup prints what it made');
    $ceph->run('qemu-io', '-f', 'qcow2', '-c', 'write -q -P 8 2M 64k', $image);
    chomp(my $second = $run->('backup', $store, @guest));
    my $list = $run->('list', $store);
    like($list, qr/disk0 +full .*disk0 +incremental /s,
        'list shows a full backup and an increment');
    $run->('verify', $store);
    $run->('restore', "$store/vm/100", "$dir/disk0.raw");
    is(system('qemu-img', 'compare', '-q', $image, "$dir/disk0.raw"), 0, 'restored as it was');
    $run->('prune', $store, '--keep-last', 1);
    $run->('remove', $second);
    is($ceph->run('rbd', 'ls', $store =~ s/\Arbd://r), '', 'nothing is left');
};

# ---- a container ----

sub restored_container ($container, $name) {
    my $path = $container->tmp . "/restored$name" =~ tr!/!-!r;
    mkdir($path) or die "$path: $!\n";
    chown($container->{first_id}, $container->{first_id}, $path) if !$>;
    my $mechanism = $container->restore($name, $path);
    utime(1, 1, $path);
    return ($mechanism, describe($path));
}

subtest 'a container' => sub {
    plan(skip_all => 'needs zstd') if system('zstd --version >/dev/null 2>&1') != 0;
    my $namespace = $ceph->new_namespace;
    my $container = $ceph->new_container($namespace)->fill;
    utime(1, 1, $container->root);
    my $tree = describe($container->root, './dev/*');
    my $name = $container->backup // return fail($container->error);
    like($name, qr!\Act/101/!, "the archive's name");
    my ($mechanism, $restored) = restored_container($container, $name);
    is($mechanism, 'tar', 'restored by tar');
    ok($restored eq $tree, 'all is as it was');
    my $provider = $container->provider;
    is_deeply($provider->verify($name), [], 'verify finds no damage');
    is($provider->archive_get_guest_config($name, 'test'), "hostname: $name\n", 'configuration');

    my $killed = fork() // die "fork: $!\n";
    if (!$killed) {
        $container->backup(then => sub { }, during => sub { kill(KILL => $$) });
        POSIX::_exit(0);
    }
    waitpid($killed, 0);
    $provider->wait_for_others(30);
    my $next = $container->backup // return fail($container->error);
    is_deeply([map { $_->{volname} } $provider->list->@*], [$name, $next], 'both are listed');
    my @images = split(' ', $ceph->run('rbd', 'ls', "backup/$namespace"));
    is(scalar(@images), 2, 'nothing of a killed one is left');
    is_deeply($provider->prune(101, 1), [$name], 'prune');
    $provider->remove($next);
    is($ceph->run('rbd', 'ls', "backup/$namespace"), '', 'nothing is left');
};

# ---- a random life ----

sub one_step ($life) {
    my $what = rand();
    if ($what < 0.4) {
        $life->guest->write_random(3);
        $life->backup;
    }
    elsif ($what < 0.7) {
        $life->guest->write_random(3);
        $life->killed_backup(1 + int(rand(80)));
    }
    elsif ($what < 0.8) { $life->guest->lose_bitmap($scsi) }
    elsif ($what < 0.85) { $life->guest->resize($scsi) }
    elsif (my @names = $life->names) {
        my $name = $names[rand(@names)];
        $what < 0.95 ? $life->provider->remove($name) : $life->provider->prune(100, 2);
        $life->forget($what < 0.95 ? $name : @names[0 .. $#names - 2]);
    }
    return $life->problem;
}

$life = new_life();
for my $step (1 .. $steps) {
    srand($seed * 1009 + $step);
    my $problem = eval { one_step($life) } // ($@ || undef);
    is($problem, undef, "step $step of seed $seed") or diag($life->log) or last;
}

done_testing;
