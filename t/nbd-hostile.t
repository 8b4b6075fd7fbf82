# Volumes against an NBD server that behaves well, oddly, and badly. The one thing that may never
# happen is that a map which stops early looks like a whole one.

use v5.36;

use lib 't/lib';

use Errno qw(EIO EINVAL);
use IO::Socket::UNIX ();
use POSIX ();
use Test::More;
use Time::HiRes qw(alarm sleep time);

use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $GiB = 1 << 30;

# A server lives as long as its object; these outlive the volume a test makes of them.
my @servers;

sub start (%options) {
    push @servers, PBA::Test::NBDServer->start(size => 8 * $MiB, export => 'disk', %options);
    shift(@servers) if @servers > 4;
    return $servers[-1];
}

sub map_of ($volume) {
    my @map;
    while (my ($offset, $length) = $volume->next_dirty_region) {
        push @map, [$offset, $length];
        die "the map does not end\n" if @map > 1_000_000;
    }
    return \@map;
}

# The map from any way to say it: neighbours joined, cut off at the size.
sub expected_map ($size, @ranges) {
    my @map;
    for my $range (@ranges) {
        my ($offset, $length) = @$range;
        $length = $size - $offset if $offset + $length > $size;
        if (@map && $map[-1][0] + $map[-1][1] == $offset) {
            $map[-1][1] += $length;
        }
        else {
            push @map, [$offset, $length];
        }
    }
    return \@map;
}

sub error_class ($error) {
    return ref($error)
        && $error->isa('PVE::BackupAccess::Error') ? $error->class : "no object: $error";
}

# Dies, and goes on dying: nothing that comes after the error may look like an end.
sub map_dies ($server, $class, $name, $pattern = qr/./) {
    my $volume = open_volume($server);
    my @map;
    my $done = eval {
        while (my ($offset, $length) = $volume->next_dirty_region) {
            push @map, [$offset, $length];
            die "the map does not end\n" if @map > 1_000_000;
        }
        1;
    };
    my $error = $@;
    ok(!$done, "$name: dies");
    like(error_class($error), $class, "$name: class") or diag($error);
    like("$error", qr/\Adevice disk: .*$pattern.*\n\z/, "$name: message");
    for my $method (qw(next_dirty_region dirty_regions)) {
        my @regions = eval { $volume->$method($method eq 'dirty_regions' ? 10 : ()) };
        my $again = $@;
        ok($again && !@regions, "$name: $method dies again");
        like(error_class($again), qr/Error\z/, "$name: with an error of ours") or diag($again);
    }
    ok(eval { $volume->close; 1 }, "$name: closing");
    return @map;
}

subtest 'maps' => sub {
    my $odd = 8 * $MiB + 4608;
    my @maps = (
        ['empty', 8 * $MiB],
        ['all dirty', 8 * $MiB, [0, 8 * $MiB]],
        ['the first byte', 8 * $MiB, [0, 1]],
        ['the last byte', 8 * $MiB, [8 * $MiB - 1, 1]],
        ['one byte amidst', 8 * $MiB, [12345, 1]],
        ['a disk of one byte', 1, [0, 1]],
        ['a clean disk of one byte', 1],
        ['an EFI disk', 528 * $KiB, [0, 64 * $KiB], [512 * $KiB, 16 * $KiB]],
        ['a TPM disk', 4608, [0, 4608]],
        ['an odd tail', $odd, [0, 64 * $KiB], [8 * $MiB, 4608]],
        ['alternate blocks', 8 * $MiB, map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 63],
        ['the other blocks', 8 * $MiB, map { [$_ * 128 * $KiB + 64 * $KiB, 64 * $KiB] } 0 .. 63],
        ['neighbours', 8 * $MiB, map { [$_ * 64 * $KiB, 64 * $KiB] } 3 .. 90],
        ['every other sector', $MiB, map { [$_ * $KiB, 512] } 0 .. 1023],
        ['over 4 GiB', 9 * $GiB, [4 * $GiB - 64 * $KiB, 128 * $KiB], [9 * $GiB - 1, 1]],
        ['over 4 GiB at once', 20 * $GiB, [$GiB, 17 * $GiB]],
        ['all of 16 TiB', 16384 * $GiB, [0, 16384 * $GiB]],
        ['an empty disk', 0],
    );
    for my $map (@maps) {
        my ($name, $size, @dirty) = @$map;
        my $server = start(size => $size, dirty => \@dirty);
        my $volume = open_volume($server);
        is($volume->size, $size, "$name: size");
        is_deeply(map_of($volume), expected_map($size, @dirty), "$name: map");
        is_deeply([$volume->next_dirty_region], [], "$name: still at its end");
        is_deeply([$volume->dirty_regions(3)], [], "$name: in batches, too");
        my $asked = 0;
        my @asked = map { [@$_{qw(offset length)}] } $server->requests('block-status');
        $asked += $_->[1] for @asked;
        cmp_ok($asked, '>=', $size, "$name: all was asked for");
        ok(!(grep { $_->[1] >= 4 * $GiB } @asked), "$name: in requests of less than 4 GiB");
    }
};

subtest 'batches' => sub {
    my @dirty = map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 63;
    for my $max (1, 2, 3, 63, 64, 65, 1000, 1_000_000) {
        my $volume = open_volume(start(dirty => \@dirty));
        my @regions;
        while (my @batch = $volume->dirty_regions($max)) {
            die "odd batch\n" if @batch % 2 || @batch > 2 * $max;
            push @regions, @batch;
        }
        is_deeply(\@regions, [map { @$_ } @dirty], "at most $max");
    }
    my $volume = open_volume(start(dirty => \@dirty));
    is_deeply([$volume->next_dirty_region], $dirty[0], 'one by itself');
    is_deeply([$volume->dirty_regions(2)], [map { @$_ } @dirty[1, 2]], 'then a batch');
    is_deeply([$volume->next_dirty_region], $dirty[3], 'and one again');
};

subtest 'odd answers that are no lies' => sub {
    my $step = 64 * $KiB;
    my @maps = (
        [alternate => map { [$_ * 2 * $step, $step] } 0 .. 63],
        [neighbours => map { [$_ * $step, $step] } 3 .. 90],
        [clean => ()],
        [dirty => [0, 8 * $MiB]],
    );
    my @options = (
        [max_extents => 1],
        [max_extents => 2],
        [max_extents => 7],
        [answer_more => 1],
        [answer_more => 1, max_extents => 1],
        [unknown_flags => 0x40],
        [unknown_flags => 0xfffffffe],
        [delay => 0.02],
    );
    for my $map (@maps) {
        my ($name, @dirty) = @$map;
        for my $options (@options) {
            my $server = start(dirty => \@dirty, @$options);
            my $got = eval { map_of(open_volume($server)) };
            is_deeply($got, expected_map(8 * $MiB, @dirty), "$name: @$options") or diag($@);
        }

        # What ends beyond the disk is cut off, but libnbd 1.22 does not let it through.
        for my $bytes (1, $MiB) {
            my $server = start(dirty => \@dirty, beyond_end => $bytes);
            my $got = eval { map_of(open_volume($server)) };
            $got
                ? is_deeply($got, expected_map(8 * $MiB, @dirty), "$name: beyond_end $bytes")
                : like($@, qr/cannot be read on .* Protocol error$/, "$name: beyond_end $bytes");
        }
    }

    # Extents of one byte that split what belongs together, also across answers.
    my $bytes = sub ($offset) { return (1, $offset >= 100 && $offset < 1000 ? 1 : 0) };
    my $server = start(size => 2000, dirty => $bytes, max_extents => 3);
    is_deeply(map_of(open_volume($server)), [[100, 900]], 'neighbours joined across answers');

    # A run that goes over many requests.
    $server = start(size => 64 * $GiB, dirty => [[$MiB, 63 * $GiB]], max_extents => 1);
    is_deeply(map_of(open_volume($server)), [[$MiB, 63 * $GiB]], 'and across requests');
};

subtest 'no bitmap' => sub {
    for my $size (1, 4608, 8 * $MiB, 5 * $GiB) {
        my $server = start(size => $size, offer_bitmap => 0);
        my $volume = open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        is_deeply(map_of($volume), [[0, $size]], "$size bytes: one region");
        is_deeply([$volume->next_dirty_region], [], 'and no more');
        is_deeply([$server->requests('block-status')], [], 'the server was not asked');
    }
    my $server = start(dirty => [[0, 1]]);
    my $volume = open_volume($server, 'bitmap-mode' => 'none');
    is_deeply(map_of($volume), [[0, 8 * $MiB]], 'mode none with a name: still the whole');
    $volume = open_volume($server, 'bitmap-mode' => undef, 'bitmap-name' => undef, size => undef);
    is($volume->size, 8 * $MiB, "no size given: the server's");
    $volume = open_volume($server, 'bitmap-mode' => undef);
    is_deeply(map_of($volume), [[0, 1]], 'a name without a mode counts');
    $volume = open_volume($server, 'nbd-path' => $server->uri);
    is_deeply(map_of($volume), [[0, 1]], 'over a URI');
};

subtest 'open' => sub {
    my $server = start(dirty => [[0, 1]]);
    my %refused = (
        'size too big' => [{ size => 9 * $MiB }, qr/NbdError/, qr/8388608.*9437184/],
        'size too small' => [{ size => 8 * $MiB - 1 }, qr/NbdError/, qr/8388608.*8388607/],
        'size 0' => [{ size => 0 }, qr/NbdError/, qr/8388608/],
        'another bitmap' => [{ 'bitmap-name' => 'bitmap1' }, qr/IncompleteError/, qr/bitmap1/],
        'half a bitmap name' => [{ 'bitmap-name' => 'bitmap' }, qr/IncompleteError/, qr/bitmap/],
        'another export' =>
            [{ 'nbd-path' => $server->uri('other') }, qr/NbdError/, qr/device disk: /],
        'no such socket' => [
            { 'nbd-path' => '/nonexistent/socket' }, qr/(?:Nbd|Connection)Error/, qr/No such file/
        ],
        'a bad URI' => [{ 'nbd-path' => 'gopher://x' }, qr/NbdError/, qr/device disk: /],
    );
    for my $name (sort keys %refused) {
        my ($more, $class, $pattern) = $refused{$name}->@*;
        ok(!eval { open_volume($server, %$more); 1 }, "$name: dies");
        like(error_class($@), $class, "$name: class");
        like("$@", $pattern, "$name: message");
        like("$@", qr/\Adevice disk: [^\n]*\n\z/, "$name: one line that names the device");
    }
    my $without = start(offer_bitmap => 0);
    ok(!eval { open_volume($without); 1 }, 'no context: dies');
    is(error_class($@), 'IncompleteError', 'no context: class');
    my $grown = start(advertised_size => 9 * $MiB);
    ok(!eval { open_volume($grown); 1 }, 'another size than told: dies');
    like("$@", qr/9437184.*8388608/, 'both sizes told');

    my $last = open_volume($server);
    is_deeply(map_of($last), [[0, 1]], 'the server itself is fine');
};

my @blocks = map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 63;

# Found by libnbd, or by us.
my $broken = qr/\A(?:Nbd|Incomplete)Error\z/;

subtest 'maps cut off' => sub {
    for my $after (0 .. 8, 31, 63) {
        my $server = start(dirty => \@blocks, max_extents => 2, disconnect_after => $after);
        my @map = map_dies($server, $broken, "after $after answers", qr/bitmap/);
        is_deeply(\@map, [@blocks[0 .. $#map]], "after $after answers: what came was right");
        cmp_ok(scalar(@map), '<=', $after, "after $after answers: and no more of it");
    }
    for my $at (0, 1, 64 * $KiB, 4 * $MiB, 8 * $MiB - 1) {
        my $server = start(dirty => \@blocks, max_extents => 2, disconnect_at => $at);
        my @map = map_dies($server, $broken, "at offset $at");
        is_deeply(\@map, [@blocks[0 .. $#map]], "at offset $at: what came was right");
    }

    # Over many requests, since an answer that is still good is a whole one.
    my @sparse = map { [$_ * $GiB, 64 * $KiB] } 0 .. 63;
    my %faults = (
        'in the middle of an answer' => [disconnect_in => 'block-status'],
        'an error' => [block_status_error => EIO],
        'an empty answer' => [no_extents => 1],
        'an extent of no length' => [zero_extent => 1],
        'nothing but that' => [only_zero_extents => 1],
        "another context's answer" => [wrong_context_id => 1],
    );
    for my $name (sort keys %faults) {
        for my $good (0, 1, 5, 20) {
            my $server = start(
                size => 64 * $GiB,
                dirty => \@sparse,
                good_first => $good,
                $faults{$name}->@*
            );
            my @map = map_dies($server, $broken, "$name after $good good ones");
            is_deeply(\@map, [@sparse[0 .. $#map]], "$name after $good: what came was right");
        }
    }

    # All clean but for the end, or all dirty: no region was seen when it breaks off.
    map_dies(start(dirty => [[8 * $MiB - 1, 1]], size => 8 * $MiB, disconnect_after => 0),
        $broken, 'nothing seen yet');
    my @map = map_dies(start(size => 64 * $GiB, dirty => [[0, 64 * $GiB]], disconnect_after => 3),
        $broken, 'in the middle of a run');
    is_deeply(\@map, [], 'a run that has no end is no region');
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 2, disconnect_after => 10));
    my @batch = eval { $volume->dirty_regions(1000) };
    ok($@ && !@batch, 'a batch that breaks off dies');
    @batch = eval { $volume->dirty_regions(1000) };
    ok($@ && !@batch, 'and the next one');
};

subtest 'requests in flight' => sub {
    my $server = start(size => 64 * $GiB, dirty => [[0, $GiB]], delay => 0.1);
    my $started = time;
    is_deeply(map_of(open_volume($server)), [[0, $GiB]], 'map');
    my $count = () = $server->requests('block-status');
    cmp_ok($server->max_in_flight, '>', 1, 'more than one');
    cmp_ok($server->max_in_flight, '<=', 64, 'but not without bound');
    cmp_ok(time - $started, '<', 0.1 * $count, "they overlap ($count requests)");
    my @flags = map { $_->{flags} } $server->requests('block-status');
    is(scalar(grep { $_ } @flags), 0, 'none asks for a single extent');
};

sub pattern ($offset, $length) { return PBA::Test::NBDServer::pattern($offset, $length) }

subtest 'reading' => sub {

    # Made at once: a piece at a time would be slow under the sanitizers.
    my $disk = join('', map { pattern($_ * 64 * $KiB, 64 * $KiB) } 0 .. 640);
    my $size = 40 * $MiB + 512;
    my $read = sub ($offset, $length) { return substr($disk, $offset, $length) };
    my $server = start(size => $size, dirty => \@blocks, data => $read);
    my $volume = open_volume($server);
    my @ranges = (
        [0, 1], [0, 512], [1, 1],
        [13, 4711],
        [65535, 2],
        [$size - 1, 1],
        [$size - 513, 513],
        [0, 32 * $MiB],
        [$size - 32 * $MiB, 32 * $MiB],
    );
    for my $range (@ranges) {
        my $data = $volume->pread(@$range);
        ok($data eq $read->(@$range), "range @$range") or diag('length ' . length($data));
        ok(!utf8::is_utf8($data), 'bytes');
    }
    my @requests = map { [@$_{qw(offset length)}] } $server->requests('read');
    is_deeply(\@requests, \@ranges, 'one request each');
    is_deeply(map_of($volume), \@blocks, 'the map is not disturbed');
    is_deeply([$server->requests('trim')], [], 'nothing is discarded unasked');
};

subtest 'reading while the map is read' => sub {
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 3));
    my $count = 0;
    while (my ($offset, $length) = $volume->next_dirty_region) {
        $count++ if $volume->pread($offset, $length) eq pattern($offset, $length);
        $volume->discard($offset, $length);
    }
    is($count, 64, 'every region is right');
};

subtest 'reads refused' => sub {
    my $server = start(dirty => \@blocks, dirty_only => 1);
    my $volume = open_volume($server);
    is(length($volume->pread(0, 64 * $KiB)), 64 * $KiB, 'a dirty range');
    for my $range ([64 * $KiB, 1], [0, 64 * $KiB + 1], [8 * $MiB - 1, 1]) {
        ok(!eval { $volume->pread(@$range); 1 }, "clean range @$range: dies");
        is(error_class($@), 'NbdError', 'class');
        like("$@",
            qr/\Adevice disk: .*\b$range->[1] bytes at offset $range->[0]\b.*Invalid argument/,
            'message');
    }
    ok($volume->pread(128 * $KiB, 512) eq pattern(128 * $KiB, 512), 'a refused read ends nothing');
    $volume->discard(0, 64 * $KiB);
    ok(!eval { $volume->pread(0, 1); 1 }, 'discarded: dies');
    is_deeply(map_of($volume), \@blocks, 'the map is still whole');

    for my $errno (EIO, EINVAL) {
        my $broken = open_volume(start(dirty => \@blocks, read_error => $errno));
        ok(!eval { $broken->pread(0, 512); 1 }, "error $errno: dies");
        is(error_class($@), 'NbdError', 'class');
        is_deeply(map_of($broken), \@blocks, 'the map can be read all the same');
    }
};

subtest 'reads cut short' => sub {
    my %faults = (
        'short data' => [short_read => 1],
        'half the data' => [short_read => 256],
        'no data' => [missing_data => 1],
        'cut off in the data' => [disconnect_in => 'read'],
        'connection lost' => [disconnect_at => 100],
    );
    for my $name (sort keys %faults) {
        my $volume = open_volume(start(dirty => \@blocks, $faults{$name}->@*));
        my $data = eval { $volume->pread(0, 512) };
        ok(!defined($data), "$name: dies") or diag('length ' . length($data));
        like(error_class($@), qr/\A(?:Nbd|Incomplete|Connection)Error\z/, "$name: class");
        like("$@", qr/\Adevice disk: [^\n]*512[^\n]*\n\z/, "$name: message");
    }
    my $volume = open_volume(start(dirty => \@blocks, disconnect_at => 7 * $MiB, max_extents => 2));
    ok($volume->pread(0, 512) eq pattern(0, 512), 'before the connection is lost');
    ok(!eval { $volume->pread(7 * $MiB, 512); 1 }, 'lost: dies');
    ok(!eval { $volume->pread(0, 512); 1 }, 'after it: dies');
    like("$@", qr/earlier error/, 'and says why');
    my @regions = eval { $volume->next_dirty_region };
    ok($@ && !@regions, 'the map, too');
    ok(!eval { $volume->discard(0, 64 * $KiB); 1 }, 'and discarding');
};

subtest 'discarding' => sub {
    my $odd = 8 * $MiB + 4608;
    my @cases = (

        # offset, length, what is sent
        [0, 64 * $KiB, [0, 64 * $KiB]],
        [0, 64 * $KiB - 1],
        [1, 64 * $KiB],
        [1, 128 * $KiB - 1, [64 * $KiB, 64 * $KiB]],
        [64 * $KiB, 1],
        [64 * $KiB - 1, 2],
        [100, 1000],
        [4096, $MiB, [64 * $KiB, $MiB - 64 * $KiB]],
        [0, $odd, [0, $odd]],
        [8 * $MiB, 4608, [8 * $MiB, 4608]],
        [8 * $MiB, 512],
        [8 * $MiB + 512, 4096],
        [8 * $MiB - 1, 4609, [8 * $MiB, 4608]],
        [8 * $MiB - 64 * $KiB, 64 * $KiB + 4608, [8 * $MiB - 64 * $KiB, 64 * $KiB + 4608]],
        [$odd - 1, 1],
    );
    for my $case (@cases) {
        my ($offset, $length, @sent) = @$case;
        my $server = start(size => $odd, dirty => [[0, $odd]]);
        my $volume = open_volume($server);
        ok(eval { $volume->discard($offset, $length); 1 }, "$offset, $length") or diag($@);
        my @trims = map { [@$_{qw(offset length)}] } $server->requests('trim');
        is_deeply(\@trims, \@sent, 'only whole clusters, and the tail');
    }
    my $server = start(size => 4608, dirty => [[0, 4608]]);
    open_volume($server)->discard(0, 4608);
    is(scalar(() = $server->requests('trim')), 1, 'a disk smaller than a cluster');

    $server = start(size => 10 * $GiB, dirty => [[0, $GiB]]);
    open_volume($server)->discard($KiB, 10 * $GiB - $KiB);
    my ($next, $bad) = (64 * $KiB, 0);
    for my $trim ($server->requests('trim')) {
        $bad++ if $trim->{offset} != $next || $trim->{length} > 4 * $GiB - 64 * $KiB;
        $next += $trim->{length};
    }
    is($bad, 0, 'a long range in pieces a server takes');
    is($next, 10 * $GiB, 'to its end');

    my $volume = open_volume(start(dirty => \@blocks, trim_error => EIO));
    ok(!eval { $volume->discard(0, 64 * $KiB); 1 }, 'an error of the server: dies');
    is(error_class($@), 'NbdError', 'class');
    ok(eval { $volume->discard(0, 512); 1 }, 'parts of a cluster: nothing is sent');
    is_deeply(map_of($volume), \@blocks, 'the map can be read all the same');
};

# ---- signals ----

sub in_child ($code) {
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>', '/dev/null') or POSIX::_exit(126);
        my $status = eval { $code->() ? 0 : 1 } // 2;

        # Global destruction is part of what is tested.
        Test::More->builder->no_ending(1);
        exit($status);
    }
    return status_of($pid);
}

# The child's exit status; one that hangs is ended.
sub status_of ($pid, $seconds = 20) {
    my $deadline = time + $seconds;
    while (waitpid($pid, POSIX::WNOHANG()) == 0) {
        kill('KILL', $pid) if time > $deadline;
        sleep(0.01);
    }
    return $?;
}

sub dies_by_alarm ($code, $name) {
    local $SIG{ALRM} = sub { die { from => 'handler' } };
    my $started = time;
    alarm(0.3);
    my $done = eval { $code->(); 1 };
    my $error = $@;
    alarm(0);
    ok(!$done, "$name: dies");
    is_deeply($error, { from => 'handler' }, "$name: with what the handler died with");
    cmp_ok(time - $started, '<', 1.3, "$name: within a second");
    return;
}

subtest 'a handler that dies' => sub {
    my @few = @blocks[0 .. 7];
    my $volume = open_volume(start(dirty => \@few, max_extents => 2, delay => 0.5));
    my @map;
    dies_by_alarm(sub { push @map, [$volume->next_dirty_region] }, 'the first region');
    push @map, map { [$volume->next_dirty_region] } 1 .. 2;
    dies_by_alarm(sub { push @map, [$volume->next_dirty_region] for 1 .. 8 }, 'some way on');
    my $rest = map_of($volume);
    is_deeply([@map, @$rest], \@few, 'carried on: nothing is lost, nothing comes twice');
    is_deeply([$volume->next_dirty_region], [], 'to the end');
};

subtest 'a handler that dies, everywhere' => sub {
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 5, delay => 0.03));
    my ($deaths, @map) = (0);
    local $SIG{ALRM} = sub { die "alarm\n" };
    while ($deaths < 2000) {
        my @region;
        Time::HiRes::ualarm(10_000 + 4_000 * ($deaths % 17));
        my $done = eval { @region = $volume->next_dirty_region; 1 };
        my $error = $@;
        Time::HiRes::ualarm(0);
        die $error if !$done && $error ne "alarm\n";

        # The handler may also come when the call is over, but the statement is not.
        push @map, \@region if @region;
        last if $done && !@region;
        $deaths++ if !$done;
    }
    cmp_ok($deaths, '>', 0, "interrupted often ($deaths times)");
    is_deeply(\@map, \@blocks, 'and the map is the same');
};

subtest 'a handler that dies while reading' => sub {
    my $server = start(dirty => \@blocks, max_extents => 2, delay => 0.8);
    my $volume = open_volume($server);
    dies_by_alarm(sub { $volume->pread(0, 4 * $MiB) }, 'reading');
    ok($volume->pread(512, 4096) eq pattern(512, 4096), 'another read is right');
    is_deeply([$volume->next_dirty_region], $blocks[0], 'the map, too');
    dies_by_alarm(sub { $volume->pread($MiB, 512) }, 'in the middle of the map');
    dies_by_alarm(sub { $volume->discard(0, 64 * $KiB) }, 'discarding');
    is_deeply([map { [$volume->next_dirty_region] } 1 .. 3], [@blocks[1 .. 3]], 'the map goes on');

    my $hangs = open_volume(start(dirty => \@blocks, max_extents => 2, hang_at => 300 * $KiB));
    dies_by_alarm(sub { map_of($hangs) }, 'a server that hangs');
    dies_by_alarm(sub { map_of($hangs) }, 'and again');
};

subtest 'a handler that does not die' => sub {
    my $handled = 0;
    local $SIG{ALRM} = sub { $handled++; Time::HiRes::ualarm(5_000) };
    local $SIG{USR1} = sub {
        eval { die "inner\n" };
        $handled++;
    };
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 3, delay => 0.03));
    Time::HiRes::ualarm(5_000);
    my $map = eval { map_of($volume) };
    my $data = eval { local $@ = 'kept'; $volume->pread(0, 4096) };
    Time::HiRes::ualarm(0);
    is_deeply($map, \@blocks, 'map') or diag($@);
    ok($data eq pattern(0, 4096), 'data');
    cmp_ok($handled, '>', 3, "it ran often ($handled times)");
};

subtest 'a handler that uses the volume' => sub {
    my %use = (
        close => sub ($volume) { $volume->close },
        pread => sub ($volume) { $volume->pread(0, 512) },
        next_dirty_region => sub ($volume) { $volume->next_dirty_region },
    );
    for my $name (sort keys %use) {
        my $server = start(dirty => \@blocks, max_extents => 8, delay => 0.1);
        my $code = sub {
            my $volume = open_volume($server);
            local $SIG{ALRM} = sub {
                eval { $use{$name}->($volume) }
            };
            alarm(0.25);
            my $map = eval { map_of($volume) };
            alarm(0);

            # What it does is open, as long as no map is taken for a whole one that is not.
            !$map || @$map == 64;
        };
        is(in_child($code), 0, "$name within a call does no harm");
    }
};

subtest 'connecting is interrupted' => sub {
    my $listener = IO::Socket::UNIX->new(Local => my $path = "/tmp/pba-nbd-hostile-$$", Listen => 1)
        or die "cannot listen: $!\n";
    my $volume = { 'nbd-path' => $path, size => 512, 'bitmap-mode' => 'none' };
    dies_by_alarm(sub { PVE::BackupAccess::Volume->open('disk', $volume) },
        'a server that is mute');
    unlink($path);
};

# ---- processes and ends ----

# Of whatever is there when they are called: a test lets go of it.
sub uses_of ($volume) {
    return (
        next_dirty_region => sub { $volume->$*->next_dirty_region },
        dirty_regions => sub { $volume->$*->dirty_regions(3) },
        pread => sub { $volume->$*->pread(0, 512) },
        discard => sub { $volume->$*->discard(0, 64 * $KiB) },
        size => sub { $volume->$*->size },
    );
}

sub dies_as_foreign ($code) {
    return !eval { $code->(); 1 } && error_class($@) eq 'StateError';
}

subtest 'a forked child' => sub {
    my $server = start(dirty => \@blocks, max_extents => 2);
    my $volume = open_volume($server);
    is_deeply([$volume->next_dirty_region], $blocks[0], 'the first region');
    is(in_child(sub { 1 }), 0, 'a child that just ends');
    is_deeply([$volume->next_dirty_region], $blocks[1], 'the parent goes on');
    my %use = uses_of(\$volume);
    for my $name (sort keys %use) {
        is(in_child(sub { dies_as_foreign($use{$name}) }), 0, "$name in a child dies");
    }
    is(in_child(sub { $volume->close; 1 }), 0, 'a child that closes it');
    is(in_child(sub { undef $volume; 1 }), 0, 'a child that lets it go');
    my $grandchild = sub {
        in_child(sub { dies_as_foreign($use{pread}) }) == 0;
    };
    is(in_child($grandchild), 0, 'a grandchild');
    is_deeply([map { [$volume->next_dirty_region] } 2 .. 63], [@blocks[2 .. 63]], 'the whole map');
    ok($volume->pread(4096, 512) eq pattern(4096, 512), 'data');
    is($server->connections, 1, 'over the one connection');
    is_deeply([$server->requests('trim')], [], 'no child sent anything');
};

subtest 'a child of its own volume' => sub {
    my $server = start(dirty => \@blocks);
    my $code = sub {
        my $volume = open_volume($server);
        @{ map_of($volume) } == 64;
    };
    is(in_child($code), 0, 'works in the child');
    is_deeply(map_of(open_volume($server)), \@blocks, 'and in the parent');
};

subtest 'the end' => sub {
    my $server = start(dirty => \@blocks);
    my $volume = open_volume($server);
    ok(eval { $volume->close; 1 }, 'close');
    $server->wait_for_record('closed');
    ok(eval { $volume->close; 1 }, 'close again');
    my %use = uses_of(\$volume);
    for my $name (sort keys %use) {
        ok(!eval { $use{$name}->(); 1 }, "$name after close dies");
        is(error_class($@), 'StateError', 'class');
    }
    undef $volume;

    $volume = open_volume($server);
    undef $volume;
    $server->wait_for_record('closed', 2);
    pass('letting it go closes the connection');

    my $twice = sub {
        my $object = open_volume($server);
        my $destroy = $object->can('DESTROY') // sub ($object) { };
        $destroy->($object);
        eval { $object->size };
        eval { $object->close };
        eval { $destroy->($object) };
        undef $object;
        1;
    };
    is(in_child($twice), 0, 'DESTROY by hand and again');
    my $in_flight = sub {
        my $object = open_volume(start(dirty => \@blocks, delay => 0.5));
        local $SIG{ALRM} = sub { die "alarm\n" };
        alarm(0.1);
        eval { $object->next_dirty_region };
        alarm(0);
        undef $object;
        1;
    };
    is(in_child($in_flight), 0, 'let go with requests in flight');
};

subtest 'descriptors' => sub {
    my $count = sub { my @fds = glob('/proc/self/fd/*'); return scalar(@fds) };
    my $server = start(dirty => \@blocks);
    open_volume($server)->close;
    my $before = $count->();
    for (1 .. 20) {
        my $volume = open_volume($server);
        $volume->next_dirty_region;
        eval { open_volume($server, size => 1) };
        eval { open_volume($server, 'bitmap-name' => 'x') };
        eval { $volume->pread(0, 1 << 40) };
    }
    is($count->(), $before, 'none is left open');
};

done_testing();
