# The mechanism file-handle: providers can use the handle as usual, it ends with the access even if other
# processes still have it, and nothing of it is left behind.
#
# One QEMU is enough: the server of the file reads NBD; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Fcntl qw(F_GETFD F_GETFL FD_CLOEXEC O_ACCMODE O_DIRECT O_RDWR);
use POSIX qw(EIO WNOHANG);
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::Backend;
use PBA::Test::Handle;
use PBA::Test::Model;
use PBA::Test::Repository;

my $Handle = 'PBA::Test::Handle';

my $missing = $Handle->missing;
plan(skip_all => $missing) if defined($missing);

my $mib = 1024 * 1024;
my $size = 64 * $mib;
my $odd_size = 32 * $mib + 512;
my $seed = 20261123;
my $blocks = 2048;
my $limit = 10;

my %disks = (
    upstream => [
        { id => 'disk0', format => 'qcow2', size => $size },
        { id => 'disk1', format => 'raw', size => $odd_size, bus => 'scsi', shape => 'drive' },
    ],
    pve => [
        { id => 'disk0', format => 'raw', size => $size },
        { id => 'disk1', format => 'qcow2', size => $odd_size, bus => 'scsi', shape => 'drive' },
    ],
);

sub check_nothing_left ($context, $name) {
    my $backend = $context->{backend};
    is_deeply($backend->outside, $context->{outside}, "$name: graph, exports and files as before");
    check_no_process($context, $name);
}

sub check_no_process ($context, $name) {
    my $dir = $context->{backend}->work_dir('run');
    is_deeply([$Handle->mounts($dir)], [], "$name: no mount");
    is_deeply([$Handle->servers($dir)], [], "$name: no process");
}

sub wait_until ($code) {
    my $deadline = time() + $limit;
    while (time() < $deadline) {
        return 1 if $code->();
        sleep(0.02);
    }
    return 0;
}

# Waits for a child of ours; its status as in $?, undef if it does not end.
sub ended ($pid) {
    my $ended = wait_until(sub { waitpid($pid, WNOHANG) == $pid });
    my $status = $?;
    return $status if $ended;
    kill('KILL', $pid);
    return undef;
}

sub set_up ($backend, $mode) {
    my $access = $backend->access;
    $access->setup($backend->devices($mode));
    return ($access, $access->volumes('file-handle'));
}

# ---- backups ----

# With sysread in pieces of one size, and with this project's own reader.
sub check_backups ($context) {
    my $backend = $context->{backend};
    my $model = $context->{model};
    my $repository = PBA::Test::Repository->new($backend);
    my $last = 0;
    my @steps = ([new => 4096], [use => 65536], [use => undef], [use => $mib], [none => 4 * $mib]);

    for my $step (@steps) {
        my ($mode, $piece) = $step->@*;
        my $name = "mode $mode, " . ($piece ? "pieces of $piece" : 'Volume->open');
        my $open = sub ($device, $volume) { $Handle->new($volume, $piece) };
        $backend->guest->wait_more_churn(20);
        my $result = $repository->backup(
            mode => $mode,
            success => 1,
            mechanism => 'file-handle',
            during => sub ($id) { $backend->guest->wait_more_churn(20) },
            $piece ? (open => $open) : (),
        );
        my %images = map { $_ => $repository->image($_) } qw(disk0 disk1);
        my ($write, $problem) = $model->check_images(\%images);
        is($problem, undef, "$name: the images are the disks after write $write");
        cmp_ok($write, '>', $last, "$name: a later instant than the last one");
        $last = $write;
        my $all = $mode ne 'use';
        is(($result->{disk0}{bytes} == $size) + 0, $all + 0, "$name: " . ($all ? 'all' : 'a part'));
        check_nothing_left($context, $name);
    }
}

# ---- the handle ----

sub check_handle ($backend, $volume) {
    my $handle = $volume->{'file-handle'};
    is_deeply(
        [sort keys $volume->%*],
        ['bitmap-mode', 'file-handle', 'next-dirty-region', 'size'],
        'the keys of the provider API'
    );
    my $flags = fcntl($handle, F_GETFL, 0);
    is($flags & O_ACCMODE, O_RDWR, 'open for reading and writing');
    ok($flags & O_DIRECT, 'the file is opened with O_DIRECT');
    ok(fcntl($handle, F_GETFD, 0) & FD_CLOEXEC, 'closed on exec');
    is(-s $handle, $volume->{size}, 'the size of the file');
    my $path = readlink("/proc/$$/fd/" . fileno($handle));
    my $run_dir = $backend->work_dir('run');
    like($path, qr{\A\Q$run_dir\E/[^/]+/vfile-\d+\z}, 'the path is in the run directory');
    is((stat($path =~ s{/[^/]+\z}{}r))[2] & 07777, 0700, 'which is private');
    my ($mount) = grep { m{ \Q$path\E } } do {
        open(my $fh, '<', '/proc/self/mounts') or die "mounts: $!\n";
        <$fh>;
    };
    like($mount, qr/ fuse .*\buser_id=$>,/, 'the file is mounted for this user');
    unlike($mount, qr/allow_other/, 'other users have no access');

    is(syswrite($handle, "\0" x 4096), undef, 'the file cannot be written to');
    ok(!PBA::Test::Handle::fallocate($handle, 0, 0, 65536), 'space cannot be allocated');
    ok(!truncate($handle, 0), 'the file cannot be truncated');
    is(sysseek($handle, $volume->{size}, 0), $volume->{size}, 'the end can be sought');
    is(sysread($handle, my $data, 65536), 0, 'the end of the volume is the end of the file');
}

# Other programs open the file again by the number of the descriptor.
sub check_reopen ($volume, $expected) {
    my $path = "/proc/$$/fd/" . fileno($volume->{'file-handle'});
    my $blocks_of_mib = length($expected) / $mib;
    my $content = qx{dd if=$path bs=1M count=$blocks_of_mib iflag=fullblock 2>/dev/null};
    ok($content eq $expected, 'another program opens it by /proc/PID/fd/N and reads the same');

    my $device = qx{losetup --find --show --read-only $path 2>&1};
    SKIP: {
        skip('no /dev/loop: ' . ($device =~ s/\n.*//sr), 2) if $device !~ m{\A/dev/loop\d+\n\z};
        chomp($device);
        is(0 + qx{blockdev --getsize64 $device},
            $volume->{size}, 'a read-only loop device on it has its size');
        $content = qx{dd if=$device bs=1M count=$blocks_of_mib 2>/dev/null};
        ok($content eq $expected, 'the loop device has the content');
        system('losetup', '--detach', $device);
    }
}

sub fleecing_bytes ($backend) {
    my $vm = $backend->vm;
    my @open = grep { (readlink($_) // '') =~ m{/fleecing/pba-fleece-} }
        glob('/proc/' . $vm->pid . '/fd/*');
    @open = map { $vm->fleecing_file("disk$_-fleecing") // () } 0, 1 if !@open;
    my $bytes = 0;
    $bytes += (stat($_))[12] * 512 for @open;
    return $bytes;
}

sub check_regions ($context) {
    my $backend = $context->{backend};
    my $guest = $backend->guest;
    my ($access, $volumes) = set_up($backend, 'new');
    $access->teardown(1);
    $guest->write('disk0', 8 * $mib, 2 * $mib, 0x41);
    $guest->write('disk0', 40 * $mib, 65536, 0x42);

    ($access, $volumes) = set_up($backend, 'use');
    my $volume = $volumes->{ $backend->device('disk0') };
    my $reader = $Handle->new($volume, $mib);
    is($volume->{'bitmap-mode'}, 'reuse', 'the bitmap is used');
    my @regions;
    while (my @region = $volume->{'next-dirty-region'}->()) {
        push(@regions, @region);
    }
    is(scalar(@regions), 4, 'two dirty regions');
    is_deeply([$volume->{'next-dirty-region'}->()], [], 'the end stays the end');

    $guest->write('disk0', 8 * $mib, 2 * $mib, 0x43);
    my $kept = fleecing_bytes($backend);
    cmp_ok($kept, '>=', 2 * $mib, 'a write to a dirty part takes fleecing space');
    ok($reader->pread(8 * $mib, 2 * $mib) eq 'A' x (2 * $mib), 'the data of the instant');
    $reader->discard(8 * $mib, 2 * $mib);
    ok(wait_until(sub { fleecing_bytes($backend) <= $kept - 2 * $mib }),
        'punching a hole frees it');
    ok($reader->pread(40 * $mib, 65536) eq 'B' x 65536, 'the rest is still there');

    for my $case (['discarded', 8 * $mib], ['discarded', 9 * $mib], ['clean', 16 * $mib]) {
        my ($what, $offset) = $case->@*;
        my $done = eval { $reader->pread($offset, 65536); 1 };
        ok(!$done, "$what, at $offset: unreadable");
        is($! + 0, EIO, "$what, at $offset: an I/O error");
    }
    check_own_volume($backend, $volume);
    $access->teardown(1);
    check_nothing_left($context, 'regions');
}

# The module's own class with a handle of the module.
sub check_own_volume ($backend, $volume) {
    my $own = PVE::BackupAccess::Volume->open($backend->device('disk0'), $volume);
    is($own->size, $size, 'Volume->open: size');
    ok($own->pread(40 * $mib, 512) eq 'B' x 512, 'Volume->open: reads');
    ok(!eval { $own->pread(16 * $mib, 512); 1 }, 'Volume->open: no clean part');
    like(
        "$@",
        qr/reading \d+ bytes at offset 16777216 failed - Input\/output error/,
        'the error says why'
    );
    $own->discard(40 * $mib, 4096);
    ok($own->pread(40 * $mib, 512) eq 'B' x 512, 'Volume->open: parts of a cluster stay');
    $own->discard(40 * $mib, 65536);
    ok(!eval { $own->pread(40 * $mib, 512); 1 }, 'Volume->open: a whole cluster is discarded');
    my @rest = $own->dirty_regions(10);
    is_deeply(\@rest, [], 'Volume->open: regions come from the code ref');
}

# An incomplete map is an error, also in later calls.
sub check_lost_map ($context) {
    my $backend = $context->{backend};
    my ($access, $volumes) = set_up($backend, 'use');
    my $volume = $volumes->{ $backend->device('disk0') };
    $backend->vm->end_exports;
    for my $time ('once', 'again') {
        my @region = eval { $volume->{'next-dirty-region'}->() };
        is(ref($@), 'PVE::BackupAccess::Error', "a map that is lost: dies $time");
        is(scalar(@region), 0, "a map that is lost: no region, $time");
    }
    $access->teardown(0);
    check_nothing_left($context, 'lost map');
}

sub check_uses ($context) {
    my $backend = $context->{backend};
    $backend->guest->write('disk0', 0, 4 * $mib, 0x44);
    my ($access, $volumes) = set_up($backend, 'none');
    my $volume = $volumes->{ $backend->device('disk0') };
    check_handle($backend, $volume);
    is_deeply(
        [$volume->{'next-dirty-region'}->()],
        [0, $size],
        'without a bitmap, the whole disk is dirty'
    );
    is_deeply([$volume->{'next-dirty-region'}->()], [], 'the region is returned once');
    check_reopen($volume, 'D' x (4 * $mib));
    my $again = $access->volumes('file-handle');
    my $other = $Handle->new($again->{ $backend->device('disk0') }, 65536);
    ok($other->pread(65536, 4096) eq 'D' x 4096, 'asked for again: another handle');
    is(sysseek($volume->{'file-handle'}, 0, 1), $size, 'the other handle has its own position');
    is(length($access->volume($backend->device('disk0'))->pread(0, 512)),
        512, 'NBD works at the same time');
    $access->teardown(0);
    is(fileno($volume->{'file-handle'}), undef, 'teardown closes the handles');
    check_nothing_left($context, 'uses');
}

# ---- ends ----

# Child processes still have the handle open: one reads in a loop, the other does nothing.
sub check_busy_teardown ($context) {
    my $backend = $context->{backend};
    my ($access, $volumes) = set_up($backend, 'none');
    my $volume = $volumes->{ $backend->device('disk0') };
    my $idle = fork() // die "fork: $!\n";
    if (!$idle) {
        sleep(1000);
        POSIX::_exit(1);
    }
    my $busy = fork() // die "fork: $!\n";
    if (!$busy) {
        my $reader = $Handle->new($volume, 65536);
        while (eval { $reader->pread(0, 8 * $mib); 1 }) {
        }
        POSIX::_exit($@ =~ m/\Asysread: / ? 7 : 1);
    }
    sleep(0.3);
    my $begin = time();
    $access->teardown(0);
    cmp_ok(time() - $begin, '<', $limit, 'teardown while others read');
    is(ended($busy), 7 << 8, 'the reader gets an error');
    check_nothing_left($context, 'readers');
    kill('KILL', $idle);
    ended($idle);
}

sub check_forked_child ($context) {
    my $backend = $context->{backend};
    my ($access, $volumes) = set_up($backend, 'none');
    my $device = $backend->device('disk1');
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        Test::More->builder->no_ending(1);
        undef $volumes;
        undef $access;
        exit(5);
    }
    is(ended($pid), 5 << 8, 'a child drops its copies');
    my $reader = $Handle->new($volumes->{$device}, $mib);
    is(length($reader->pread(0, $odd_size)), $odd_size, 'the parent reads on, to an odd end');
    $access->teardown(0);
    check_nothing_left($context, 'fork');
}

# The server is started after another program has removed the export.
sub check_server_fails ($context) {
    my $backend = $context->{backend};
    my $access = $backend->access;
    $access->setup($backend->devices('none'));
    $access->volumes('nbd');
    $backend->vm->end_exports;
    ok(!eval { $access->volumes('file-handle'); 1 }, 'no export: there is no file');
    my $device = $backend->device('disk0');
    like(
        "$@",
        qr/\Adevice \Q$device\E: connecting failed .* no export/,
        "no export: the error is the server's"
    );
    $access->teardown(0);
    check_nothing_left($context, 'no export');
}

sub check_server_killed ($context) {
    my $backend = $context->{backend};
    my ($access, $volumes) = set_up($backend, 'none');
    my @servers = $Handle->servers($backend->work_dir('run'));
    is(scalar(@servers), 2, 'a server for each disk');
    kill('KILL', @servers);
    for my $id (qw(disk0 disk1)) {
        my $reader = $Handle->new($volumes->{ $backend->device($id) }, 65536);
        ok(!eval { $reader->pread(0, $mib) for 1 .. 1000; 1 }, "$id: the server has ended");
        like("$@", qr/\Asysread: /, "$id: an error");
    }
    my @warnings;
    local $SIG{__WARN__} = sub ($text) { push(@warnings, $text) };
    $access->teardown(0);
    is(scalar(grep { m/virtual file died of signal Killed/ } @warnings),
        2, 'teardown warns of the killed servers');
    check_nothing_left($context, 'server killed');
}

# A program is killed during a read, while its child process lives on: everything local is removed.
sub check_parent_killed ($context) {
    my $backend = $context->{backend};
    my $dir = $backend->work_dir('run');
    pipe(my $reader, my $writer) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($reader);
        my ($access, $volumes) = set_up($backend, 'none');
        my $child = fork() // die "fork: $!\n";
        if (!$child) {
            sleep(1000);
            POSIX::_exit(1);
        }
        syswrite($writer, "$child\n");
        my $handle = $Handle->new($volumes->{ $backend->device('disk0') }, 65536);
        while (1) { $handle->pread(0, 8 * $mib) }
    }
    close($writer);
    my $child = <$reader>;
    chomp($child);
    is(scalar($Handle->servers($dir)), 2, 'a program reads');
    sleep(0.2);
    kill('KILL', $pid);
    waitpid($pid, 0);
    ok(wait_until(sub { !$Handle->servers($dir) }), 'killed: its servers end');
    check_no_process($context, 'killed');
    is_deeply([glob("$dir/*/vfile-*")], [], 'killed: no file is left');
    kill('KILL', $child);
}

# A mount namespace hides the device file.
sub check_no_fuse ($context) {
    my $backend = $context->{backend};
    SKIP: {
        my $hide = 'mount --bind /dev/null /dev/fuse';
        skip('no /dev/fuse to be hidden: needs root', 3)
            if $> != 0 || system("unshare --mount sh -c '$hide' 2>/dev/null") != 0;
        my $program
            = 'use PVE::BackupAccess; my %o = splice(@ARGV, 1); my $d = $ARGV[0]; '
            . 'my $a = PVE::BackupAccess->new(%o); $a->setup([{ device => $d }]); '
            . 'print eval { $a->volumes("file-handle"); 1 } ? "served\n" : ref($@) . " " . $@->class . " $@"; '
            . 'print length($a->volume($d)->pread(0, 65536)), "\n"; $a->teardown(1)';
        my @command = ($^X, (map { "-I$_" } @INC), '-e', $program);
        my @arguments = ($backend->device('disk0'), $backend->options);
        open(my $pipe, '-|', 'unshare', '--mount', 'sh', '-c', "$hide && exec \"\$@\"",
            'sh', @command, @arguments)
            or die "cannot run unshare: $!\n";
        my @said = <$pipe>;
        close($pipe);
        like(
            $said[0],
            qr{^PVE::BackupAccess::Error UnsupportedError .*/dev/fuse.*'nbd'},
            'no FUSE: the error names the device file and what works'
        );
        is($said[1], "65536\n", 'no FUSE: mechanism nbd works');
        check_nothing_left($context, 'no FUSE');
    }
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(name => $name, disks => $disks{$name});
    my @disks = map { { id => $_, size => $backend->vm->disk($_)->{size} } } qw(disk0 disk1);
    my $context = {
        backend => $backend,
        model => PBA::Test::Model->new(seed => $seed, disks => \@disks, blocks => $blocks),
        outside => $backend->outside,
    };
    $backend->guest->start_churn(seed => $seed, disks => [qw(disk0 disk1)], blocks => $blocks);
    check_backups($context);
    $backend->guest->stop_churn;
    check_regions($context);
    check_lost_map($context);
    check_uses($context);
    check_busy_teardown($context);
    check_forked_child($context);
    check_server_fails($context);
    check_server_killed($context);
    check_no_fuse($context);
    $backend->check_manners;
    check_parent_killed($context);
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
