# Qcow2Chain and containers: the calls of pve-container, as root and in a container's user namespace, together
# with archives of virtual machines in one store, and all kinds of faults.
#
# One QEMU is enough: containers have none.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use POSIX ();
use Time::HiRes qw(sleep time);

use PBA::Test::Chain;
use PBA::Test::Container qw(describe in_own_mounts run_command run_in_namespace write_file);
use PVE::BackupAccess::Provider::Qcow2Chain;

my $class = 'PVE::BackupAccess::Provider::Qcow2Chain';
my $Container = 'PBA::Test::Container';
my @first_ids = $> ? 0 : (0, 100_000);

for my $program (qw(tar zstd)) {
    plan(skip_all => "needs $program") if system("$program --version >/dev/null 2>&1") != 0;
}
my $has_own_mounts = in_own_mounts();

sub fails ($code, $error, $text) {
    my $done = eval { $code->(); 1 };
    ok(!$done, $text);
    like($@, $error, "$text: the error");
}

sub new_container (%options) { return $Container->new(%options)->fill }

# pct creates the root directory, so its time is not that of the archive.
sub is_same ($one, $other, $text, @exclude) {
    utime(1, 1, $one, $other);
    ok(describe($one, @exclude) eq describe($other, @exclude), $text);
}

sub new_directory ($container, $name) {
    my $path = $container->tmp . "/$name";
    mkdir($path) or die "$path: $!\n";
    chown($container->{first_id}, $container->{first_id}, $path) if !$>;
    return $path;
}

sub tree_of ($container, $name) { return $container->store . "/$name/root.tar.zst" }

sub members ($container, $name) {
    my $path = tree_of($container, $name);
    chomp(my @members = qx(tar --list --zstd --file=$path));
    return { map { $_ => 1 } @members };
}

# No other archives exist, nothing is left behind, and the guest is free for the next backup.
sub is_clean ($container, $names, $text) {
    my @there = map { $_->{volname} } $container->provider->list->@*;
    is_deeply(\@there, $names, "$text: no other archives");
    opendir(my $dh, $container->guest_dir) or die $container->guest_dir . ": $!\n";
    is(join(' ', grep { m/\A\.(?:tmp|del)-/ } readdir($dh)), '', "$text: nothing is left");
    my $next = $container->backup;
    ok(defined($next), "$text: the next backup") or diag($container->error);
    $container->provider->remove($next) if defined($next);
}

for my $first_id (@first_ids) {
    subtest "a container whose root is $first_id" => sub {
        my $container = new_container(first_id => $first_id);
        my $name = $container->backup // return fail($container->error);
        like($name, qr!\Act/101/[0-9]{8}T[0-9]{6}Z\z!, "the archive's name");
        like($container->log, qr/container: stored .* as .*\n.*container: checked/, 'the log')
            if !$first_id;
        my $provider = $container->provider;
        is_deeply($provider->verify($name), [], 'verify finds no damage');
        is_deeply($provider->unproven($name), [], 'the content is proven');
        is($provider->archive_get_guest_config($name, 'test'), "hostname: $name\n",
            'configuration');
        is($provider->archive_get_firewall_config("backup/$name"), "[OPTIONS]\n", 'firewall');
        my ($listed) = $provider->list(101)->@*;
        is($listed->{type}, 'lxc', 'list: the type');
        is($listed->{size}, $container->result->{stats}{'archive-size'}, 'the size of the archive');
        is($listed->{devices}{container}{size} % 512, 0, 'list: the size of what was read');
        ok(members($container, $name)->{'./dev/null'}, 'the device is in it')
            if $container->{device};
        is((stat(tree_of($container, $name)))[2] & 077, 0, 'other users cannot read the archive');

        my $restored = new_directory($container, 'restored');
        is($container->restore($name, $restored), 'tar', 'restored by tar');
        is_same($container->root, $restored, 'all is as it was', './dev/*');
        cmp_ok((stat("$restored/var/sparse"))[12] * 512, '<', 1 << 19, 'holes are holes');
        is((stat("$restored/bin/again"))[1], (stat("$restored/bin/passwd"))[1], 'hard links, too');
    };
}

subtest 'a container without sbin' => sub {
    my $container = new_container(first_id => $first_ids[-1]);
    unlink($container->root . '/sbin') or die "sbin: $!\n";
    my $name = $container->backup // return fail($container->error);
    local $ENV{TMPDIR} = new_directory($container, 'private');
    my $restored = new_directory($container, 'restored');
    is($container->restore($name, $restored), 'directory', 'restored from a directory');
    is_same($container->root, $restored, 'everything is restored', './dev/*');
    cmp_ok((stat("$restored/var/sparse"))[12] * 512, '<', 1 << 19, 'holes are holes');
    is(join(' ', glob("$ENV{TMPDIR}/*")), '', 'the temporary directory is empty');
};

subtest 'excluded files' => sub {
    my $container = new_container();
    my $root = $container->root;
    write_file("$root/$_") for qw(a/x/y.log a/y.log b/cache/z cachefile c/k/l c/l lost+found/q);
    mkdir("$root/mnt");
    mkdir("$root/mnt/data");
    my $is_mounted = $has_own_mounts
        && system(qw(mount -t tmpfs tmpfs), "$root/mnt/data") == 0;
    write_file("$root/mnt/data/file");
    my $members = sub (%options) {
        my $name = $container->backup(%options) // die $container->error;
        return members($container, $name);
    };
    my $all = $members->();
    ok($all->{"./$_"}, "$_ is in it") for qw(tmp/left tmp/sub/left a/x/y.log lost+found/q);
    is($all->{'./mnt/data/file'} // 0, $is_mounted ? 0 : 1, 'mounted file systems are left out');
    my @exclude = ('/tmp/?*', '/a/**/y.log', 'cache/', '/l', 'shadow');
    my $some = $members->(exclude => \@exclude, sources => ['./', './mnt/data']);
    ok(!$some->{"./$_"}, "$_ is not")
        for qw(tmp/left tmp/sub/left tmp/sub/ a/x/y.log a/y.log b/cache/z etc/shadow);
    ok($some->{"./$_"}, "$_ is") for qw(tmp/ cachefile c/l c/k/l mnt/data/file b/cache/);
    $container->{first_id} = $first_ids[-1] or return;
    $container->_own;
    ok(!$members->()->{'./lost+found/q'},
        'nor is what is the file system\'s, where it cannot be read');
    run_command('umount', "$root/mnt/data") if $is_mounted;
};

subtest 'arguments' => sub {
    my $container = new_container();
    my $provider = $container->provider;
    fails(
        sub () { $provider->backup_init(101, 'jail', 1) },
        qr/'jail' are not supp/,
        'another type'
    );
    is($provider->backup_get_mechanism(101, 'jail'), undef, 'the type has no mechanism');
    $provider->backup_init(101, 'lxc', 1);
    fails(
        sub () { $provider->backup_container(101, '', [], {}) },
        qr/prepare must be called/,
        'backup_container without backup_container_prepare'
    );
    $provider->backup_cleanup(101, 'lxc', 0, {});
    for my $source ('/etc', '../etc', './a/../..', 'etc', '--option') {
        is($container->backup(sources => [$source]), undef, "source $source");
        like($container->error, qr/a source must be in the container/, 'the error says why');
    }
    is($container->backup(info => { directory => $container->root . '/none' }),
        undef, 'the directory does not exist');
    like($container->error, qr/tar ended with status 2 - .*Cannot open/, 'says tar');
    fails(sub () { $provider->restore_container_init('vm/100/20000101T000000Z', 'x', {}) },
        qr/no archive/, 'the archive does not exist');
    is_clean($container, [], 'afterwards');
};

subtest 'a limit' => sub {
    my $container = new_container();
    write_file($container->root . '/data', 'x' x (1 << 20));
    my $began = time;
    ok($container->backup(info => { 'bandwidth-limit' => 2 << 20 }), 'a backup');
    cmp_ok(time - $began, '>', 0.4, 'the bandwidth is limited');
};

subtest 'one at a time' => sub {
    my $container = new_container();
    my $other = $class->new(undef, { path => $container->store }, 'test');
    $container->backup(
        during => sub ($backup_container) {
            fails(sub () { $other->backup_init(101, 'lxc', 1) }, qr/is in use by/, 'a backup');
            fails(sub () { $other->prune(101, 1) }, qr/is in use by/, 'a prune');
            $backup_container->();
            is(scalar($other->list->@*), 1, 'the archive is listed when backup_container returns');
            is_deeply($other->prune(101, 1), [], 'Proxmox VE can prune before the cleanup');
        }
    ) or fail($container->error);
};

# ---- guests of both kinds ----

subtest 'a store with both kinds of guests' => sub {
    my $chain = PBA::Test::Chain->new;
    my $container
        = $Container->new(store => $chain->store, first_id => $first_ids[-1], vmid => 100)->fill;
    my (@vms, @containers);
    for my $number (1 .. 3) {
        $chain->write_random;
        push(@vms, $chain->backup // die($chain->error));
        write_file($container->root . '/etc/number', $number);
        push(@containers, $container->backup // die($container->error));
    }

    my $provider = $container->provider;
    is_deeply([map { $_->{type} } $provider->list->@*], [('qemu') x 3, ('lxc') x 3], 'list');
    is(scalar($provider->list(100)->@*), 6, 'both guests have this number');
    $chain->check('beside containers');
    is_deeply($provider->verify($_), [], "$_ is in order") for @containers;
    fails(sub () { $provider->restore_vm_init($containers[0]) }, qr/is of a container/, 'not a VM');
    fails(sub () { $provider->restore_container_init($vms[0]) }, qr/is of a virtual/, 'a VM');
    is_deeply([$provider->restore_get_mechanism($vms[0])],
        [qw(qemu-img qemu)], 'how a VM is restored');

    write_file($container->store . "/$containers[0]/protected");
    fails(sub () { $provider->remove($containers[0]) }, qr/is protected/, 'a protected one');
    my %marks = map { $_->{volname} => $_->{mark} } $provider->retention(100, 1)->@*;
    is_deeply([@marks{@vms}], [qw(remove remove keep)], 'the marks of the virtual machine');
    is_deeply([@marks{@containers}], [qw(protected remove keep)], 'the marks of the container');
    is_deeply($provider->prune(100, 2), [$vms[0]], 'prune: the virtual machine');
    is_deeply($provider->prune(100, 1), [$vms[1], $containers[1]], 'prune: both guests');
    $chain->forget(@vms[0, 1]);
    $chain->check('after a prune');
    my $restored = new_directory($container, 'restored');
    $container->restore($containers[0], $restored);
    is(-s "$restored/etc/number", 1, 'the content of the container is restored');
    $provider->remove($containers[2]);
    is(scalar($provider->list(100)->@*), 2, 'removed');
};

# ---- damage ----

sub flip ($path, $at) {
    open(my $fh, '+<:raw', $path) or die "$path: $!\n";
    seek($fh, $at, 0);
    read($fh, my $byte, 1);
    seek($fh, $at, 0);
    print {$fh} $byte ^. "\xff";
    close($fh);
}

subtest 'damage' => sub {
    my $container = new_container();
    my @names = map { $container->backup // die($container->error) } 1 .. 3;
    my $provider = $container->provider;
    flip(tree_of($container, $names[0]), 600);
    truncate(tree_of($container, $names[1]), 700);
    like($provider->verify($names[0])->[0], qr/root.tar.zst is damaged - zstd/, 'a byte');
    like($provider->verify($names[1])->[0], qr/has 700 bytes, not/, 'the end');
    fails(sub () { $provider->restore_container_init($_, 'test', {}) },
        qr/root\.tar\.zst/, 'restore')
        for @names[0, 1];

    # Another tree's archive, which is intact, with the size that this one should have.
    write_file($container->root . '/etc/empty', '');
    my $other = tree_of($container, $names[2]);
    my $size = -s $other;
    system("printf other | zstd --quiet --stdout > $other");
    open(my $fh, '>>', $other) or die "$other: $!\n";
    print {$fh} pack('V V a*', 0x184d2a50, $size - 8 - -s $other, "\0" x ($size - 8 - -s $other));
    close($fh);
    is(-s $other, $size, 'another stream');
    like($provider->verify($names[2])->[0], qr/differs from what was read/,
        'another stream: found');

    my %marks = map { $_->{volname} => $_->{mark} } $provider->retention(101, 1)->@*;
    is_deeply([@marks{@names}], [('broken') x 3], 'no damaged archive is counted');
    my $good = $container->backup;
    is_deeply($provider->prune(101, 1),
        \@names, 'damaged archives are removed when an intact one exists');
    is_deeply([map { $_->{volname} } $provider->list->@*], [$good], 'the intact archive stays');
};

# The time of a file does not change then.
subtest 'a disk rots' => sub {
    my $container = new_container();
    my @names = map { $container->backup // die($container->error) } 1, 2;
    my ($provider, $tree) = ($container->provider, tree_of($container, $names[1]));
    my @times = (Time::HiRes::stat($tree))[8, 9];
    flip($tree, 600);
    Time::HiRes::utime($times[0], $times[1], $tree);
    like($provider->verify($names[1])->[0], qr/root.tar.zst is damaged - zstd/, 'found');
    is_deeply($provider->list(101)->[1]{damaged}, ['container: damage was found in it'], 'listed');
    is_deeply($provider->prune(101, 1), [], 'it does not count');
    flip($tree, 600);
    Time::HiRes::utime($times[0], $times[1], $tree);
    is_deeply($provider->verify($names[1]), [], 'intact again');
    is_deeply($provider->prune(101, 1), [$names[0]], 'it counts again');
};

# ---- faults ----

sub children_of ($pid) {
    open(my $fh, '<', "/proc/$pid/task/$pid/children") or return ();
    return map { ($_, children_of($_)) } split(' ', <$fh> // '');
}

sub is_called ($pid, $name) {
    open(my $fh, '<', "/proc/$pid/comm") or return 0;
    return (<$fh> // '') eq "$name\n";
}

# The processes of a slow backup, by name.
my %processes = (
    tar => sub (@pids) {
        grep { is_called($_, 'tar') } @pids;
    },
    zstd => sub (@pids) {
        grep { is_called($_, 'zstd') } @pids;
    },
    keeper => sub (@pids) {
        grep {
            my $pid = $_;
            grep { is_called($_, 'zstd') } children_of($pid)
        } @pids;
    },
    caller => sub (@pids) {
        grep {
            my $pid = $_;
            grep { is_called($_, 'tar') } children_of($pid)
        } @pids;
    },
);

# On a loaded machine, a program may start later than its output file is created.
sub wait_for_processes ($process, $parent) {
    for (1 .. 3000) {
        my @pids = $processes{$process}->(children_of($parent));
        return @pids if @pids;
        sleep(0.01);
    }
    return;
}

# Makes a backup during which something is done as soon as data is stored.
sub interrupted ($container, $do) {
    my $parent = $$;
    my $helper = fork() // die "fork: $!\n";
    if (!$helper) {
        my $tries = 3000;
        while ($tries--) {
            sleep(0.01);
            next if !grep { -e } glob($container->guest_dir . '/.tmp-*/root.tar.zst');
            sleep(0.2);
            $do->($parent);
            last;
        }
        POSIX::_exit(0);
    }
    my $name = eval { $container->backup(info => { 'bandwidth-limit' => 1 << 18 }) };
    $container->{error} = $@ if $@;
    waitpid($helper, 0);
    return $name;
}

sub new_large (%options) {
    my $container = new_container(%options);
    write_file($container->root . '/data', join('', map { chr(rand(256)) } 1 .. 1 << 20));
    $container->_own;
    return $container;
}

# The other container would do the same.
my @interrupted = $ENV{PBA_FULL} ? @first_ids : $first_ids[-1];

for my $first_id (@interrupted) {
    my $container = new_large(first_id => $first_id);
    my $last = $container->backup // die $container->error;
    for my $process (grep { $first_id || $_ ne 'caller' } sort keys %processes) {
        subtest "root $first_id: $process is killed" => sub {
            my $name = interrupted($container,
                sub ($parent) { kill('KILL', wait_for_processes($process, $parent)) });
            is($name, undef, 'the backup fails');
            note($container->error);
            is_clean($container, [$last], 'afterwards');
            is_deeply([grep { is_called($_, 'tar') } children_of($$)], [],
                'no tar process is left');
        };
    }
    subtest "root $first_id: a signal" => sub {
        local $SIG{ALRM} = sub { die "enough\n" };
        is(interrupted($container, sub ($parent) { kill('ALRM', $parent) }),
            undef, 'the backup ends');
        is($container->error, "enough\n", "the exception is the handler's");
        is_clean($container, [$last], 'afterwards');
    };
    subtest "root $first_id: the backup's process is killed" => sub {
        my $pid = fork() // die "fork: $!\n";
        if (!$pid) {
            $container->provider;
            interrupted($container, sub ($parent) { kill('KILL', $parent) });
            POSIX::_exit(0);
        }
        waitpid($pid, 0);
        is($?, 9, 'killed');
        my $deadline = time + 30;
        sleep(0.05)
            while !$container->provider->_guest('ct/101')->try_change_lock && time < $deadline;
        my @there = map { $_->{volname} } $container->provider->list->@*;
        is_deeply(\@there, [$last], 'no other archives are listed');
        $container->provider->remove($container->backup);
        is_clean($container, [$last], 'after the next backup');
    };
}

subtest 'a file that cannot be read' => sub {
    plan(skip_all => 'needs root') if $>;
    my $container = new_container(first_id => 100_000);
    chown(0, 0, $container->root . '/etc/shadow');
    is($container->backup, undef, 'the backup fails');
    like($container->error, qr/tar ended with status 2 - .*shadow: Cannot open/, 'why');
    chown(100_000, 100_000, $container->root . '/etc/shadow');
    is_clean($container, [], 'afterwards');
};

subtest 'a full disk' => sub {
    plan(skip_all => 'needs mounts of its own') if !$has_own_mounts;
    my $container = new_large(first_id => 100_000);
    run_command(qw(mount -t tmpfs -o), 'size=512k,mode=700', 'tmpfs', $container->store);
    is($container->backup, undef, 'the backup fails');
    like($container->error, qr/root\.tar\.zst - zstd ended .*No space left/, 'the error says why');
    unlink($container->root . '/data');
    is_clean($container, [], 'afterwards');
    run_command('umount', $container->store);
};

subtest 'missing programs' => sub {
    my $container = new_container();
    for my $program (qw(tar zstd)) {
        no strict 'refs';
        local ${"PVE::BackupAccess::Provider::Store::Tar::$program"} = 'no-such-program';
        is($container->backup, undef, "$program cannot be run");
        like($container->error, qr/cannot run no-such-program - No such file/,
            'the error says why');
    }
    is_clean($container, [], 'afterwards');
};

# This says nothing about the archive.
subtest 'a zstd that cannot check' => sub {
    my $container = new_container();
    my $provider = $container->provider;
    my ($first, $second) = map { $container->backup // die($container->error) } 1, 2;
    my $killed = $container->store . '/killed';
    write_file($killed, "#!/bin/sh\nkill -9 \$\$\n");
    chmod(0755, $killed) or die "chmod: $!\n";
    my $path = tree_of($container, $second);
    utime(1, 1, $path) or die "utime: $!\n";    # so that prune reads it
    no strict 'refs';

    for my $program ('no-such-program', $killed) {
        local ${"PVE::BackupAccess::Provider::Store::Tar::zstd"} = $program;
        fails(
            sub () { $provider->verify($second) },
            qr/cannot check \Q$path\E - /,
            "$program: verify"
        );
        my ($mark) = map { $_->{unsure} } reverse($provider->retention(101, 1)->@*);
        is($mark, 1, "$program: prune does not know whether it is damaged");
        is_deeply($provider->prune(101, 1), [], "$program: so nothing is removed");
    }
    is_deeply($provider->prune(101, 1), [$first], 'then it counts again');
};

# ---- taint mode ----

subtest 'taint mode' => sub {
    my $container = new_container();
    my @command
        = ($^X, '-T', '-Iblib/lib', '-Iblib/arch', "$FindBin::Bin/taint/qcow2-chain-container.pl");
    is(system(@command, $container->store, $container->root, './', '/tmp/?*'),
        0, 'a backup and its restore');
    is(scalar($container->provider->list->@*), 1, 'the archive is listed');
};

done_testing;
