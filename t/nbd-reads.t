# Reads and discards over NBD, with servers that behave correctly, unusually and maliciously: the data is right,
# or there is an error.

use v5.36;

use lib 't/lib';

use Errno qw(EIO EINVAL);
use Test::More;

use PBA::Test::HostileNBD;
use PBA::Test::Watchdog;

subtest 'reading' => sub {

    # Created at once, because single pieces would be slow under the sanitizers.
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
    is_deeply(\@requests, \@ranges, 'one request for each read');
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
    ok($volume->pread(128 * $KiB, 512) eq pattern(128 * $KiB, 512),
        'a refused read does not affect the next one');
    $volume->discard(0, 64 * $KiB);
    ok(!eval { $volume->pread(0, 1); 1 }, 'discarded: dies');
    is_deeply(map_of($volume), \@blocks, 'the map is still whole');

    for my $errno (EIO, EINVAL) {
        my $broken = open_volume(start(dirty => \@blocks, read_error => $errno));
        ok(!eval { $broken->pread(0, 512); 1 }, "error $errno: dies");
        is(error_class($@), 'NbdError', 'class');
        is_deeply(map_of($broken), \@blocks, 'the map can still be read');
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
    ok(!eval { $volume->pread(0, 512); 1 }, 'a read after the connection was lost dies');
    like("$@", qr/earlier error/, 'the error says why');
    my @regions = eval { $volume->next_dirty_region };
    ok($@ && !@regions, 'the map, too');
    ok(!eval { $volume->discard(0, 64 * $KiB); 1 }, 'discards die, too');
};

subtest 'discarding' => sub {
    my $odd = 8 * $MiB + 4608;
    my @cases = (

        # offset, length, the requests
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
        is_deeply(\@trims, \@sent, 'only whole clusters and the tail are sent');
    }
};

subtest 'long, short and failing discards' => sub {
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
    is($next, 10 * $GiB, 'the pieces end at the end of the range');

    my $volume = open_volume(start(dirty => \@blocks, trim_error => EIO));
    ok(!eval { $volume->discard(0, 64 * $KiB); 1 }, 'an error of the server: dies');
    is(error_class($@), 'NbdError', 'class');
    ok(eval { $volume->discard(0, 512); 1 }, 'parts of a cluster: nothing is sent');
    is_deeply(map_of($volume), \@blocks, 'the map can still be read');
};

done_testing();
