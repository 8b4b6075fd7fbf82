# Maps of NBD servers that behave correctly, unusually and maliciously. A map that ends early must never look
# like a complete one.

use v5.36;

use lib 't/lib';

use Errno qw(EIO);
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::HostileNBD;
use PBA::Test::Watchdog;

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
        is_deeply([$volume->next_dirty_region], [], "$name: the map stays at its end");
        is_deeply([$volume->dirty_regions(3)], [], "$name: a batch at the end is empty");
        my $asked = 0;
        my @asked = map { [@$_{qw(offset length)}] } $server->requests('block-status');
        $asked += $_->[1] for @asked;
        cmp_ok($asked, '>=', $size, "$name: the whole disk was queried");
        ok(!(grep { $_->[1] >= 4 * $GiB } @asked), "$name: each request has less than 4 GiB");
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
        is_deeply(\@regions, [map { @$_ } @dirty], "batches of at most $max");
    }
    my $volume = open_volume(start(dirty => \@dirty));
    is_deeply([$volume->next_dirty_region], $dirty[0], 'one region');
    is_deeply([$volume->dirty_regions(2)], [map { @$_ } @dirty[1, 2]], 'then a batch');
    is_deeply([$volume->next_dirty_region], $dirty[3], 'then one region again');
};

subtest 'unusual but correct answers' => sub {
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

        # Extents beyond the end of the disk are cut off; libnbd 1.22 does not pass them on.
        for my $bytes (1, $MiB) {
            my $server = start(dirty => \@dirty, beyond_end => $bytes);
            my $got = eval { map_of(open_volume($server)) };
            $got
                ? is_deeply($got, expected_map(8 * $MiB, @dirty), "$name: beyond_end $bytes")
                : like($@, qr/cannot be read on .* Protocol error$/, "$name: beyond_end $bytes");
        }
    }
};

subtest 'runs over several answers' => sub {

    # Extents of one byte that split regions, also across answers.
    my $bytes = sub ($offset) { return (1, $offset >= 100 && $offset < 1000 ? 1 : 0) };
    my $server = start(size => 2000, dirty => $bytes, max_extents => 3);
    is_deeply(map_of(open_volume($server)), [[100, 900]], 'neighbours joined across answers');

    # A run that spans many requests.
    $server = start(size => 64 * $GiB, dirty => [[$MiB, 63 * $GiB]], max_extents => 1);
    is_deeply(map_of(open_volume($server)), [[$MiB, 63 * $GiB]], 'a run is joined across requests');
};

subtest 'no bitmap' => sub {
    for my $size (1, 4608, 8 * $MiB, 5 * $GiB) {
        my $server = start(size => $size, offer_bitmap => 0);
        my $volume = open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        is_deeply(map_of($volume), [[0, $size]], "$size bytes: one region");
        is_deeply([$volume->next_dirty_region], [], 'there is no other region');
        is_deeply([$server->requests('block-status')], [], 'the server was not asked');
    }
    my $server = start(dirty => [[0, 1]]);
    my $volume = open_volume($server, 'bitmap-mode' => 'none');
    is_deeply(
        map_of($volume),
        [[0, 8 * $MiB]],
        'mode none with a name: the whole disk is one region'
    );
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
        'a bad URI' =>
            [{ 'nbd-path' => 'gopher://x' }, qr/ArgumentError/, qr/device disk: .*'gopher:'/],
    );
    for my $name (sort keys %refused) {
        my ($more, $class, $pattern) = $refused{$name}->@*;
        ok(!eval { open_volume($server, %$more); 1 }, "$name: dies");
        like(error_class($@), $class, "$name: class");
        like("$@", $pattern, "$name: message");
        like(
            "$@",
            qr/\Adevice disk: [^\n]*\n\z/,
            "$name: the error is one line that names the device"
        );
    }
    my $without = start(offer_bitmap => 0);
    ok(!eval { open_volume($without); 1 }, 'no context: dies');
    is(error_class($@), 'IncompleteError', 'no context: class');
    my $grown = start(advertised_size => 9 * $MiB);
    ok(!eval { open_volume($grown); 1 }, 'another size than told: dies');
    like("$@", qr/9437184.*8388608/, 'the error names both sizes');

    my $last = open_volume($server);
    is_deeply(map_of($last), [[0, 1]], 'the server itself is fine');
};

# The error is detected by libnbd, or by our code.
my $broken = qr/\A(?:Nbd|Incomplete)Error\z/;

subtest 'truncated maps' => sub {
    for my $after (0 .. 8, 31, 63) {
        my $server = start(dirty => \@blocks, max_extents => 2, disconnect_after => $after);
        my @map = map_dies($server, $broken, "after $after answers", qr/bitmap/);
        is_deeply(
            \@map,
            [@blocks[0 .. $#map]],
            "after $after answers: the regions returned are right"
        );
        cmp_ok(scalar(@map), '<=', $after, "after $after answers: no more regions are returned");
    }
    for my $at (0, 1, 64 * $KiB, 4 * $MiB, 8 * $MiB - 1) {
        my $server = start(dirty => \@blocks, max_extents => 2, disconnect_at => $at);
        my @map = map_dies($server, $broken, "at offset $at");
        is_deeply(\@map, [@blocks[0 .. $#map]], "at offset $at: the regions returned are right");
    }
};

# The fault comes after many requests, because an answer that is still correct is complete.
subtest 'maps with a fault in them' => sub {
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
            is_deeply(
                \@map,
                [@sparse[0 .. $#map]],
                "$name after $good: the regions returned are right"
            );
        }
    }
};

subtest 'maps that end before a region or in a batch' => sub {

    # All clean except for the end, or all dirty: no region was returned before the map ends.
    map_dies(start(dirty => [[8 * $MiB - 1, 1]], size => 8 * $MiB, disconnect_after => 0),
        $broken, 'the map ends before its first region');
    my @map = map_dies(start(size => 64 * $GiB, dirty => [[0, 64 * $GiB]], disconnect_after => 3),
        $broken, 'in the middle of a run');
    is_deeply(\@map, [], 'a run that has no end is no region');
    my $volume = open_volume(start(dirty => \@blocks, max_extents => 2, disconnect_after => 10));
    my @batch = eval { $volume->dirty_regions(1000) };
    ok($@ && !@batch, 'a batch that breaks off dies');
    @batch = eval { $volume->dirty_regions(1000) };
    ok($@ && !@batch, 'the next batch dies, too');
};

subtest 'requests in flight' => sub {
    my $server = start(size => 64 * $GiB, dirty => [[0, $GiB]], delay => 0.1);
    my $started = time;
    is_deeply(map_of(open_volume($server)), [[0, $GiB]], 'map');
    my $count = () = $server->requests('block-status');
    cmp_ok($server->max_in_flight, '>', 1, 'several requests are in flight');
    cmp_ok($server->max_in_flight, '<=', 64, 'the number is limited');
    cmp_ok(time - $started, '<', 0.1 * $count, "the requests overlap ($count requests)");
    my @flags = map { $_->{flags} } $server->requests('block-status');
    is(scalar(grep { $_ } @flags), 0, 'no request asks for a single extent');
};

done_testing();
