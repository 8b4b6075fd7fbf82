# Faults of copies: at the source, at the target, and in between. Each copy must die soon with an error that
# names the offset, and leave an object that can be freed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Errno qw(EIO EINVAL);
use File::Temp ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::QemuNbd;
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

my $NBDServer = 'PBA::Test::NBDServer';
my $QemuNbd = 'PBA::Test::QemuNbd';
my $Volume = 'PVE::BackupAccess::Volume';

# Runs in a mount namespace of its own, so that nothing stays mounted however the test ends.
if (!$ENV{PBA_UNSHARED} && system('unshare --mount true 2>/dev/null') == 0) {
    $ENV{PBA_UNSHARED} = 1;
    exec(qw(unshare --mount), $^X, (map { "-I$_" } @INC), $0) or die "unshare: $!\n";
}

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $size = 8 * $MiB;
my $seed = 20261122;
my $dir = File::Temp->newdir('pba-copy-faults-XXXXXXXX', TMPDIR => 1);

my @servers;

sub start (%options) {
    push @servers,
        $NBDServer->start(
        size => $size,
        export => 'disk',
        dirty => [[0, $size]],
        dirty_only => 1,
        %options,
        );
    shift(@servers) if @servers > 4;
    return $servers[-1];
}

sub descriptors () {
    opendir(my $handle, '/proc/self/fd') or die "/proc/self/fd: $!\n";
    return scalar(grep { !m/\A\./ } readdir($handle));
}

# The threads of a copy have ended when it is over, but may still exist for a moment.
sub threads_but_ours () {
    for (1 .. 50) {
        my @tasks = glob('/proc/self/task/*');
        return 0 if @tasks == 1;
        sleep(0.1);
    }
    return 1;
}

# The copy must die with such an error, and nothing of it may be left when the volume has been freed.
sub copy_dies ($server, $pattern, $name, @options) {
    my $before = descriptors();
    my $volume = open_volume($server);
    my $done = eval { $volume->copy(to => '/dev/null', 'without-base' => 1, @options); 1 };
    my $error = $@;
    ok(!$done, "$name: dies");
    like($error, qr/\Adevice disk: .*$pattern.*\n\z/, "$name: message");
    my $is_ours = ref($error) && $error->isa('PVE::BackupAccess::Error');
    ok($is_ours && $error->device eq 'disk', "$name: an error of ours");
    undef $volume;
    is(threads_but_ours(), 0, "$name: no thread is left");
    is(descriptors(), $before, "$name: no descriptor is left");
    return;
}

my $read = qr/reading \d+ bytes at offset \d+ failed - /;
my $map = qr/dirty bitmap cannot be read from offset \d+ on - /;
my $lost = qr/(?:reading|discarding) \d+ bytes at offset \d+ failed - /;
my %source_faults = (
    'an error' => [{ read_error => EIO }, qr/${read}Input\/output error/],
    'a broken snapshot' => [{ read_error => EINVAL }, qr/${read}Invalid .* fleecing image full/],
    'short data' => [{ short_read => 1 }, $read],
    'half the data' => [{ short_read => 64 * $KiB }, $read],
    'no data' => [{ missing_data => 1 }, $read],
    'half a reply' => [{ disconnect_in => 'read' }, $lost],
    'a refused discard' =>
        [{ trim_error => EIO }, qr/discarding \d+ bytes at offset \d+ failed - Input/],
    'half a map' => [{ disconnect_in => 'block-status' }, $map],
    'an empty answer' => [{ no_extents => 1 }, $map],
    'extents of no length' => [{ only_zero_extents => 1 }, $map],
    'a wrong context' => [{ wrong_context_id => 1 }, $map],
    'a refused map' => [{ block_status_error => EIO }, $map],
);

for my $fault (sort keys %source_faults) {
    my ($options, $pattern) = $source_faults{$fault}->@*;
    subtest "source: $fault" => sub {

        # The map may have a single answer, and the discards as few.
        for my $good ($pattern eq $read
            || $pattern eq $lost
            || $options->{read_error} ? (0, 1, 7) : 0)
        {
            for my $connections (1, 4) {
                copy_dies(
                    start(%$options, good_first => $good), $pattern,
                    "after $good good ones, $connections connections",
                    connections => $connections,
                    'request-size' => 128 * $KiB,
                );
            }
        }
    };
}

subtest 'a map that ends early' => sub {
    my $dirty = [map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 63];
    for my $answers (1, 2, 5, 15) {
        my %options = (dirty => $dirty, max_extents => 4, disconnect_after => $answers);
        copy_dies(start(%options), qr/offset \d+/, "after $answers answers");
        copy_dies(start(%options), $map, "after $answers answers, counted",
            progress => sub (@) { });
    }
};

subtest 'unusual but correct answers' => sub {
    my %oddities = (
        'unknown flags' => { unknown_flags => 0xfff0 },
        'more than asked' => { answer_more => 1 },
        'one by one' => { max_extents => 1 },
    );
    my $dirty = [[0, 64 * $KiB], [$MiB, 3 * $MiB], [7 * $MiB, $MiB]];
    for my $name (sort keys %oddities) {
        my $volume = open_volume(start(dirty => $dirty, $oddities{$name}->%*));
        my %got;
        my $statistics = $volume->copy(to => sub ($offset, $data) { $got{$offset} = $data });
        is($statistics->{'bytes-read'}, 4 * $MiB + 64 * $KiB, "$name: bytes");
        is($statistics->{regions}, 3, "$name: regions");
        my @wrong
            = grep { $got{$_} ne PBA::Test::NBDServer::pattern($_, length($got{$_})) } keys %got;
        is_deeply(\@wrong, [], "$name: data");
    }
};

subtest 'source lost at any offset' => sub {
    srand($seed);
    for my $round (1 .. 12) {

        # The map is answered correctly, and so is the first read of each connection.
        my $at = $MiB + int(rand($size - $MiB));
        copy_dies(
            start(disconnect_at => $at, good_first => 1), $lost, "round $round, at $at",
            to => "$dir/target",
            connections => 1 + $round % 4,
            'request-size' => 64 * $KiB,
        );
    }
};

# Copies slowly, and ends a server during the copy.
sub copy_while_ending ($victim, $volume, @options) {
    my $calls = 0;
    my $end = sub (@) { $victim->stop('KILL') if ++$calls == 2 };
    my $done = eval { $volume->copy(@options, 'bandwidth-limit' => 4 * $MiB, progress => $end); 1 };
    return ($done, $@);
}

sub filled_file ($file) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print {$fh} PBA::Test::NBDServer::pattern(0, $size);
    close($fh) or die "$file: $!\n";
    return $file;
}

subtest 'servers that are killed' => sub {
    my $source = $QemuNbd->start(file => filled_file("$dir/source"), readonly => 1);
    my $volume = $Volume->open('disk', { 'nbd-path' => $source->uri });
    my ($done, $error) = copy_while_ending($source, $volume, to => "$dir/target");
    ok(!$done, 'the source');
    like($error, qr/\Adevice disk: $lost/, 'the source: error');
    ok(!eval { $volume->pread(0, 512); 1 }, 'the source: reads fail, too');

    my $target = $QemuNbd->start(file => filled_file("$dir/target"));
    $volume = open_volume(start());
    ($done, $error) = copy_while_ending($target, $volume, to => $target->uri);
    ok(!$done, 'the target');
    like($error, qr/\Adevice disk: writing \d+ bytes at offset \d+ to nbd/, 'the target: error');
    ok(eval { $volume->pread($size - 512, 512) }, 'the target: the volume can be read');
};

# The source disconnects between the only read and the discard of that data, so only the discard can fail.
subtest 'a source that disconnects before a discard' => sub {
    for my $connections (1, 4) {
        my $source = $QemuNbd->start(file => filled_file("$dir/source"));
        my $volume = $Volume->open('disk', { 'nbd-path' => $source->uri });
        my @options = (discard => 1, connections => $connections, 'request-size' => $size);
        my $end = sub (@) { $source->stop('KILL') };
        ok(!eval { $volume->copy(to => $end, @options); 1 }, "$connections connections: dies");
        like(
            $@,
            qr/\Adevice disk: discarding $size bytes at offset 0 failed - .+\n\z/,
            "$connections connections: names what was lost"
        );
    }
};

# Calls the code with a sparse file for which its file system has no space.
sub with_small_fs ($code) {
    my $mount = "$dir/small";
    mkdir($mount);
    system("mount -t tmpfs -o size=1m none $mount 2>/dev/null") == 0
        or skip('needs to mount', 1);
    open(my $fh, '>', "$mount/disk") or die "$mount/disk: $!\n";
    truncate($fh, $size) or die "$mount/disk: $!\n";
    close($fh);
    $code->("$mount/disk");
    system('umount', $mount) == 0 or die "umount failed\n";
}

subtest 'targets that are full' => sub {
    my $full = qr/failed - No space left on device/;
    copy_dies(start(), qr/writing \d+ bytes at offset \d+ to \/dev\/full $full/,
        'a device', to => '/dev/full',);

    SKIP: {
        skip('needs root', 1) if $> != 0;
        with_small_fs(
            sub ($file) {
                copy_dies(
                    start(),
                    qr/writing \d+ bytes at offset \d+ to \Q$file\E $full/,
                    'a file system',
                    to => $file
                );
            }
        );
    }

    my $offset = 5 * $MiB;
    my %node = (
        driver => 'blkdebug',
        'image.driver' => 'file',
        'image.filename' => filled_file("$dir/target"),
        'inject-error.0.event' => 'none',
        'inject-error.0.iotype' => 'write',
        'inject-error.0.errno' => 28,
        'inject-error.0.sector' => $offset / 512,
    );
    my $target = $QemuNbd->start(image_opts => join(',', map { "$_=$node{$_}" } sort keys %node));
    copy_dies(
        start(), qr/writing \d+ bytes at offset $offset to nbd.* $full/, 'a server',
        to => $target->uri,
        'request-size' => 64 * $KiB,
    );
};

# Data that the target has refused, or not acknowledged yet, can still be read from the source.
subtest 'discards wait for the target' => sub {
    for my $good (0, 1, 5, 20) {
        my $target = $NBDServer->start(
            size => $size,
            write_error => EIO,
            good_first => $good,
            delay => 0.2,
        );
        my $source = start();
        my @options = (connections => 1, 'request-size' => 64 * $KiB);
        copy_dies(
            $source, qr/writing \d+ bytes at offset \d+ to nbd.* failed - Input/,
            "after $good good ones",
            to => $target->uri,
            @options
        );
        my %written
            = map { $_->{offset} => 1 } ($target->requests('write'))[0 .. $good - 1];
        my @early;
        for my $trim ($source->requests('trim')) {
            for (my $at = 0; $at < $trim->{length}; $at += 64 * $KiB) {
                push(@early, $trim->{offset} + $at) if !$written{ $trim->{offset} + $at };
            }
        }
        is_deeply(\@early, [], "after $good good writes: nothing else was discarded");
    }
};

# libnbd does not report whether a dead connection supports flushes. Before the two connections that write, there is one for
# base:allocation, which this server does not have.
subtest 'a target whose first connection dies once it is idle' => sub {
    my $delay = sub ($connection) { $connection == 2 ? 0.3 : 1 };
    my $target = $NBDServer->start(size => $size, delay => $delay, garbage_on => 2);
    my $copied = eval {
        open_volume(start())->copy(to => $target->uri, 'request-size' => $size / 2);
        1;
    };
    ok(!$copied, 'the copy dies: written data may not be flushed');
    is(ref($@) && $@->class, 'NbdError', 'class') or diag($@);
    is(scalar(() = $target->requests('write')), 2, 'all data was written before the flush failed');
};

subtest 'a target that cannot flush' => sub {
    my $target = $NBDServer->start(size => $size, no_flush => 1);
    my $statistics = open_volume(start())->copy(to => $target->uri);
    is($statistics->{'bytes-written'}, $size, 'the target receives all data');
    is_deeply([$target->requests('flush')], [], 'no flush is requested');
    my $other = $NBDServer->start(size => $size);
    open_volume(start())->copy(to => $other->uri);
    cmp_ok(scalar(() = $other->requests('flush')), '>', 0, 'a target that can flush gets a flush');
};

# Accepted data need not be stored data; only the flush shows it.
subtest 'targets that lose accepted data' => sub {
    my %node = (
        driver => 'blkdebug',
        'image.driver' => 'file',
        'image.filename' => filled_file("$dir/target"),
        'inject-error.0.event' => 'none',
        'inject-error.0.iotype' => 'flush',
    );
    my $target = $QemuNbd->start(image_opts => join(',', map { "$_=$node{$_}" } sort keys %node));
    copy_dies(start(), qr/flushing nbd.* failed - Input/, 'a server', to => $target->uri);

    SKIP: {
        skip('needs root and loop devices', 1) if $> != 0 || !-e '/dev/loop-control';
        with_small_fs(
            sub ($file) {
                chomp(my $device = `losetup --find --show $file`);
                die "losetup failed\n" if $?;
                copy_dies(start(), qr/flushing $device failed - Input/, 'a device', to => $device);
                system('losetup', '--detach', $device) == 0 or die "losetup failed\n";
            }
        );
    }
};

# A separate program, because the limit cannot be removed. It returns 0 if the copy dies as expected.
my $limited_copy = <<'EOF';
use PVE::BackupAccess::Volume;
my ($path, $bitmap, $target) = @ARGV;
open(my $fh, '+<', $target) or die;
my $volume = PVE::BackupAccess::Volume->open('disk',
    { 'nbd-path' => $path, 'bitmap-mode' => 'reuse', 'bitmap-name' => $bitmap });
eval { $volume->copy(to => $fh); 1 } and exit(1);
exit($@ =~ m/at offset \d+ to .* failed - File too large/ ? 0 : 2);
EOF

subtest 'a file beyond the size limit' => sub {
    my $server = start();
    my $file = filled_file("$dir/target");
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        my @perl = ($^X, (map { "-I$_" } @INC), '-e', $limited_copy);
        exec('/bin/sh', '-c', 'ulimit -f 4096; exec "$@"',
            'sh', @perl, $server->socket_path, $server->{bitmap}, $file)
            or POSIX::_exit(127);
    }
    waitpid($pid, 0);
    is($?, 0, 'the copy dies with the right error, and no signal ends it');
};

done_testing;
