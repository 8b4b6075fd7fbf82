# What an administrator, another host or the cluster can do to backups by Provider::RBD: each archive stays
# intact or is reported as damaged, and the next backup is right.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use File::Temp ();

use PBA::Test::Ceph;
use PBA::Test::Command qw(run_command start_command);
use PBA::Test::Container qw(write_file);
use PBA::Test::RBDLife;
use PVE::BackupAccess::Provider::RBD;
use PVE::BackupAccess::Provider::RBD::Archive;
use PVE::BackupAccess::Provider::RBD::Ceph;

plan(skip_all => 'needs Ceph and PBA_FULL')
    if !$ENV{PBA_FULL} || !PBA::Test::Ceph->is_installed;

my $ceph = PBA::Test::Ceph->start;
my $dir = File::Temp->newdir('pba-rbd-XXXXXXXX', TMPDIR => 1);
my $scsi = 'drive-scsi0';
srand($ENV{PBA_SEED} // 20261130);

sub new_life () { return PBA::Test::RBDLife->new(ceph => $ceph, dir => "$dir") }

sub image_of_scsi ($life) {
    my ($image) = grep { m/scsi0/ } $life->images;
    return $life->place . "/$image";
}

sub two_backups ($life) {
    for (1, 2) {
        $life->guest->write_random(8);
        $life->backup;
    }
    return $life->names;
}

sub remove_all ($life, @others) {
    for my $name ($life->names) {
        is(eval { $life->provider->remove($name); 1 }, 1, 'removed') or diag($@);
        $life->forget($name);
    }
    is_deeply([$life->images], \@others,
        'without archives there are no images, except for those of others');
    is_deeply([grep { m/digests|[.]log/ } $life->objects], [], 'no digests are left');
    return;
}

# ---- by hand ----

my %by_hand = (
    'the image was written to' => sub ($image, @) {
        $ceph->run(
            'qemu-io', '-f', 'raw', '-c',
            'write -q -P 99 0 200k',
            "rbd:$image:conf=" . $ceph->conf
        );
    },
    'the image grew' =>
        sub ($image, @) { $ceph->run(qw(rbd resize --no-progress --size 8M), $image) },
    'the image shrank' => sub ($image, @) {
        $ceph->run(qw(rbd resize --no-progress --allow-shrink --size 64K), $image);
    },
    'the first snapshot was removed' => sub ($image, $first, $second) {
        $ceph->run(qw(rbd snap rm --no-progress), "$image\@$first");
    },
    'the second snapshot was removed' => sub ($image, $first, $second) {
        $ceph->run(qw(rbd snap rm --no-progress), "$image\@$second");
    },
    'the image was renamed' => sub ($image, @) { $ceph->run(qw(rbd mv), $image, "$image-old") },
    'the image was removed' => sub ($image, @) {
        $ceph->run(qw(rbd snap purge --no-progress), $image);
        $ceph->run(qw(rbd rm --no-progress), $image);
    },
);

for my $what (sort keys %by_hand) {
    subtest $what => sub {
        my $life = new_life();
        my @names = map { s{.*/}{}r } two_backups($life);
        $by_hand{$what}->(image_of_scsi($life), @names);
        is($life->unnamed, '', 'each archive is intact or reported as damaged');
        $life->guest->write_random(3);
        my $next = $life->backup;
        is($life->problem($next), undef, 'the next archive is right');
        is($life->unnamed, '', 'the other archives are as before');
        remove_all($life, grep { m/-old\z/ } $life->images);
    };
}

# ---- other hosts ----

# A host that did not respond for half a minute has lost its lock, and continues.
for my $point (['progress', 1], ['snap', 1], ['snap', 3], ['set_value', 1]) {
    my ($method, $number) = $point->@*;
    subtest "overtaken before $method, call $number" => sub {
        my $life = new_life();
        two_backups($life);
        $life->guest->write_random(3);
        my $undo = $life->before($method, $number, sub () { $life->overtake });
        is(eval { $life->backup }, undef, 'the backup fails after another backup overtook it');
        like($@, qr/was lost|rbd|qemu-nbd|NBD/, 'it says why') or diag($@);
        $undo->();
        is($life->problem, undef, 'all archives are intact');
        $life->guest->write_random(3);
        $life->backup;
        is($life->problem, undef, 'the next archive is intact, too');
        remove_all($life);
    };
}

# An increment of the disk, as far as its image is open for writing.
sub begun_backup ($life, $name) {
    my $guest = $life->provider->_guest('vm/100');
    my $lock = $guest->change_lock;
    my ($last) = reverse($guest->names);
    my $archive = PVE::BackupAccess::Provider::RBD::Archive->begin($guest, $name);
    my $size = length($life->guest->content($scsi));
    $archive->add_device($scsi, { size => $size }, $guest->archive($last));
    return { archive => $archive, lock => $lock, server => $archive->open_to_write($scsi) };
}

sub write_block ($backup, $number) {
    my @write = ('-c', 'write -q -P 77 ' . ($number * 65536) . ' 64k');
    return eval { $ceph->run('qemu-io', '-f', 'raw', @write, $backup->{server}->uri); 1 };
}

# What it would write, the other backup would not find: it reads back only what it has written itself.
subtest 'overtaken before its first write' => sub {
    my $life = new_life();
    two_backups($life);
    my $late = begun_backup($life, '20270101T000000Z');
    $late->{lock}->drop;
    my $other = begun_backup($life, '20270102T000000Z');
    is(write_block($other, 0), 1, 'the other backup writes');
    is(write_block($late, 1), undef, 'the late one cannot write any more');
    is(write_block($other, 2), 1, 'the other one goes on');
    $_->{server}->kill for $late, $other;
    $other->{lock}->drop;
    $life->backup;
    is($life->problem, undef, 'all archives are intact');
};

subtest 'an archive is removed during its restore' => sub {
    my $life = new_life();
    my ($name) = two_backups($life);
    my $provider = $life->provider;
    $provider->restore_vm_init($name);
    my $uri = $provider->restore_vm_volume_init($name, $scsi, {})->{'qemu-img-path'};
    $ceph->run(qw(rbd snap rm --no-progress), image_of_scsi($life) . '@' . $name =~ s{.*/}{}r);
    system("qemu-img convert -f raw -O raw '$uri' $dir/late.raw >/dev/null 2>&1");
    note('it returns data') if !$?;
    is(eval { $provider->restore_vm_volume_cleanup($name, $scsi, {}); 1 }, undef, 'an error');
    like($@, qr/what was read from $name may be wrong - the snapshot .* is missing/, 'it says why');
    $provider->restore_vm_cleanup($name);
};

# ---- the cluster ----

subtest 'the OSD ends in the middle of a backup, and comes back' => sub {
    my $life = new_life();
    two_backups($life);
    for my $point (['progress', 1], ['snap', 2], ['set_value', 1]) {
        $life->guest->write_random(3);
        my $undo = $life->before($point->@*, sub () { $ceph->restart_osd(3) });
        my $name = eval { $life->backup } // diag($@);
        $undo->();
        is($life->problem, undef, "before $point->[0]: all archives are intact");
    }
};

subtest 'a lock ends although the cluster does not answer' => sub {
    my $life = new_life();
    my $name = $life->backup;
    my $guest = $life->provider->_guest('vm/100');
    my $lock = $guest->change_lock;
    $ceph->stop_osd;
    local $SIG{ALRM} = sub { die "it waits\n" };
    alarm(60);
    is(eval { $guest->drop($lock); 1 }, 1, 'it is dropped') or diag($@);
    alarm(0);
    $ceph->start_osd;
    my $next = $life->provider->_guest('vm/100');
    $next->{wait} = 60;
    is(eval { $next->drop($next->change_lock); 1 }, 1, 'and the next one is had') or diag($@);
};

subtest 'places that do not exist' => sub {
    my %places = (
        'rbd:none' => qr/rbd:none failed - there is no such pool/,
        'rbd:backup/none' => qr/there is no namespace none in pool backup/,
    );
    for my $place (sort keys %places) {
        for my $command (
            ['list', $place],
            ['verify', $place],
            ['prune', $place, '--keep-last', 1],
            ['list', $place, '--vmid', 100],
            ['remove', "$place/vm/100/20261122T064953Z"]
            )
        {
            my $run = run_command($command->@*, '--ceph-conf', $ceph->conf);
            is($run->{status}, 1, "@$command: exit status") or diag($run->{out});
            like($run->{err}, $places{$place}, 'the error says why');
        }
    }
};

# The configuration with a changed line, and the expected reason.
my %unreachable = (
    'no monitor answers' =>
        ['mon host = v2:127.0.0.1:1', qr/no monitor .* answered for 2 seconds .*other[.]conf/],
    'the monitors accept no other authentication' =>
        ['auth client required = none', qr/refuses the user client[.]admin .*other[.]conf/],
    'there is no keyring' => ['keyring = /none', qr/refuses the user client[.]admin/],
);

# If the cluster cannot be reached, nothing is reported as missing.
for my $what (sort keys %unreachable) {
    subtest $what => sub {
        my ($line, $pattern) = $unreachable{$what}->@*;
        my $conf = $ceph->run('cat', $ceph->conf);
        for my $one (split(m/\n/, $line)) {
            my ($key) = $one =~ m/\A(.*) =/;
            $conf =~ s/^\Q$key\E = .*$/$one/m;
        }
        open(my $fh, '>', "$dir/other.conf") or die "open: $!\n";
        print {$fh} $conf;
        close($fh) or die "close: $!\n";
        local $PVE::BackupAccess::Provider::RBD::Ceph::connect_limit = 2;
        my $provider = PVE::BackupAccess::Provider::RBD->new(undef,
            { pool => 'backup', 'ceph-conf' => "$dir/other.conf" }, 'test');
        my %calls = (
            list => sub () { $provider->list },
            'list of a guest' => sub () { $provider->list(100) },
            prune => sub () { $provider->prune(100, 1) },
            has => sub () { $provider->has('vm/100/20261122T064953Z') },
        );
        for my $call (sort keys %calls) {
            is(eval { $calls{$call}->(); 1 }, undef, "$call fails");
            like($@, $pattern, 'the error says why');
        }
    };
}

# A clone of an archive, by a cluster that needs no protection of its snapshot.
subtest 'an archive that was cloned' => sub {
    my $life = new_life();
    my ($first, $second) = two_backups($life);
    my $snapshot = image_of_scsi($life) . '@' . $first =~ s{.*/}{}r;
    $ceph->run(qw(rbd clone --rbd-default-clone-format 2), $snapshot, $life->place . '/clone');
    my $expected = $life->{expected}{$first}{$scsi};
    is(eval { $life->provider->remove($first); 1 }, 1, 'it is removed') or diag($@);
    $life->forget($first);
    $life->guest->write_random(3);
    $life->backup;
    is($life->problem, undef, 'the other archives are intact');
    ok($ceph->run(qw(rbd export --no-progress), $life->place . '/clone', '-') eq $expected,
        'the clone has its content');
    my @errors = grep { $_ } map {
        eval { $life->provider->remove($_); 1 }
            ? ''
            : $@
    } $life->names;
    like("@errors", qr/is removed, but .* rbd rm .* linked clones/, 'its image stays');
    is_deeply([$life->provider->list->@*], [], 'all archives are removed');
    $life->forget($life->names);
    $ceph->run(qw(rbd flatten --no-progress), $life->place . '/clone');
    $life->backup;
    is($life->problem, undef, 'the next archive is intact');
    remove_all($life, 'clone');
};

# ---- containers ----

sub new_container ($namespace) {
    my $container = $ceph->new_container($namespace)->fill;
    write_file($container->root . '/data', join('', map { chr(rand(256)) } 1 .. 6 << 20));
    $container->_own;
    return $container;
}

# Changes a byte in the first object of the image, in all of its snapshots.
sub damage_image ($namespace, $image) {
    my ($prefix)
        = $ceph->run('rbd', 'info', "backup/$namespace/$image") =~ m/block_name_prefix: (\S+)/;
    my @rados = ('rados', '-p', 'backup', '-N', $namespace);
    my ($object) = sort grep { m/\A\Q$prefix\E/ } split(' ', $ceph->run(@rados, 'ls'));
    $ceph->run(@rados, 'get', $object, "$dir/object");
    open(my $fh, '+<:raw', "$dir/object") or die "object: $!\n";
    seek($fh, 1000, 0);
    read($fh, my $bytes, 100);
    seek($fh, 1000, 0);
    print {$fh} $bytes ^. ("\xff" x 100);
    close($fh) or die "object: $!\n";
    $ceph->run(@rados, 'put', $object, "$dir/object");
    return;
}

sub images_in ($namespace) {
    my @images = split(' ', $ceph->run('rbd', 'ls', "backup/$namespace"));
    return @images;
}

subtest 'containers' => sub {
    my $namespace = $ceph->new_namespace;
    my $container = new_container($namespace);
    my $provider = $container->provider;
    my $first = $container->backup // return fail($container->error);
    my ($image) = images_in($namespace);
    unlike($ceph->run('rbd', 'status', "backup/$namespace/$image"),
        qr/watcher=/, 'no watcher is left');

    # Proxmox VE prunes before the cleanup.
    my $second = $container->backup(
        during => sub ($backup_container) {
            $backup_container->();
            is_deeply($provider->prune(101, 1), [$first], 'prune before the cleanup');
        }
    ) // return fail($container->error);

    ($image) = images_in($namespace);
    damage_image($namespace, $image);
    like($provider->verify($second)->[0], qr/\Q$image\E.* is damaged - /, 'damage is found');
    is(eval { $provider->restore_container_init($second, 'test', {}); 1 }, undef, 'not restored');
    is($provider->retention(101, 1)->[0]{mark}, 'broken', 'it does not count');

    my $next = $container->backup // return fail($container->error);
    is_deeply($provider->verify($next), [], 'the next one is right');
    is_deeply($provider->prune(101, 1), [$second], 'prune removes the damaged one');
    $provider->remove($next);
    is_deeply([images_in($namespace)], [], 'nothing is left');
};

# ---- serve and mount ----

sub places_of ($command) {
    $command->wait_for('out', qr/scsi0 .*\n/);
    my ($place) = $command->text('out') =~ m/scsi0 (.*)\n/;
    return $place;
}

for my $way ('serve', -e '/dev/fuse' ? 'mount' : ()) {
    subtest $way => sub {
        my $life = new_life();
        two_backups($life);
        my ($first) = $life->names;
        my $expected = "$dir/expected.raw";
        open(my $fh, '>:raw', $expected) or die "open: $!\n";
        print {$fh} $life->{expected}{$first}{$scsi};
        close($fh) or die "close: $!\n";
        mkdir("$dir/$way");
        my $path = 'rbd:' . $life->place . "/$first";
        my @how = $way eq 'serve' ? ($path, '--socket-dir', "$dir/$way") : ($path, "$dir/$way");
        my $command = start_command($way, @how, '--ceph-conf', $ceph->conf);
        my $place = places_of($command);
        is(system(qw(qemu-img compare -q -f raw -F raw), $expected, $place),
            0, 'the content is that of the archive');
        is(eval { $life->provider->remove($first); 1 }, undef, 'the archive cannot be removed');
        $command->kill('TERM');
        is($command->finish->{status}, 0, 'the command ends');
        is_deeply([glob("$dir/$way/*")], [], 'nothing is left');
        remove_all($life);
    };
}

# The processes of a command with that name.
sub programs_of ($command, $name) {
    my $pid = $command->pid;
    open(my $fh, '<', "/proc/$pid/task/$pid/children") or die "children: $!\n";
    return grep { ($ceph->run('cat', "/proc/$_/comm")) eq "$name\n" } split(' ', <$fh> // '');
}

subtest 'a serve whose host does not respond, and the archive is removed' => sub {
    my $life = new_life();
    my ($name) = two_backups($life);
    my $path = 'rbd:' . $life->place . "/$name";
    mkdir("$dir/late");
    my $command
        = start_command('serve', $path, '--socket-dir', "$dir/late", '--ceph-conf', $ceph->conf);
    places_of($command);
    my @watches = programs_of($command, 'rados');
    cmp_ok(scalar(@watches), '>', 0, 'it has locks');
    kill(STOP => @watches);
    my $provider = $life->provider;
    $provider->wait_for_others(60);
    is(eval { $provider->remove($name); 1 }, 1, 'the archive can be removed then') or diag($@);
    kill(CONT => @watches);
    my $run = $command->finish;
    is($run->{status}, 1, 'the command ends');
    like($run->{err}, qr/the lock \S+ .* was lost, .* may have removed the archive/,
        'and says why');
    is_deeply([glob("$dir/late/*")], [], 'nothing is left');
};

done_testing;
