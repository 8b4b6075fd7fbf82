# Sizes that NBD servers report: of blocks and of the export, on each connection. Whatever they are, no byte is
# written outside of a buffer. Sizes that conform to the NBD protocol are respected, and others are ignored or
# refused. The sanitizers' part of ./run test includes this file.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::CopySource qw(write_file read_file same);
use PBA::Test::NBDServer qw(open_volume pattern);
use PBA::Test::VFile;
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $size = 192 * $KiB;
my $dir = File::Temp->newdir('pba-block-sizes-XXXXXXXX', TMPDIR => 1);

# Below this limit, requests are reduced to 4 KiB (src/copy/limit.c).
my $low_limit = 79 * $KiB;
my @dirty = ([0, 64 * $KiB], [128 * $KiB, 64 * $KiB]);

sub source (%options) {
    return PBA::Test::NBDServer->start(
        size => $size,
        export => 'disk',
        dirty => \@dirty,
        dirty_only => 1,
        %options
    );
}

sub target (%options) {
    return PBA::Test::NBDServer->start(
        size => $size,
        export => 'target',
        keep => 1,
        offer_bitmap => 0,
        %options
    );
}

sub expected (@ranges) {
    my $data = "\xee" x $size;
    substr($data, $_->[0], $_->[1]) = pattern(@$_) for @ranges;
    return $data;
}

# libnbd's rule: other sizes are treated like none.
sub is_legal ($min = 0, $preferred = 0, $max = 0) {
    my $is_power = sub ($n) { $n > 0 && ($n & ($n - 1)) == 0 };
    return
           $is_power->($min)
        && $min <= 64 * $KiB
        && $is_power->($preferred)
        && $preferred >= 512
        && $min <= $preferred
        && $preferred <= $max
        && ($max == 0xffffffff || $max % $min == 0);
}

my @values = (0, 1, 512, 513, 4095, 4096, 12345, 64 * $KiB, 1 << 31, 0xffffffff);
my @block_sizes = (
    (map { [$_, $_ == 64 * $KiB ? $_ : 4096, 32 * $MiB] } @values),
    (map { [1, $_, 32 * $MiB] } @values),
    (map { [1, 512, $_] } @values),
    [512, 512, 512],
    [4096, 4096, 4096],
    [512, 512, 1536],
    [64 * $KiB, 64 * $KiB, 64 * $KiB],
    [],
);

# One row for each connection.
sub by_row (@rows) {
    return (
        block_sizes => sub ($connection) { $rows[$connection - 1] },
        strict_blocks => sub ($connection) { is_legal($rows[$connection - 1]->@*) },
    );
}

# One of the servers has these sizes, or both.
sub copies ($source, $target, $ranges, $rows, @options) {
    for my $sizes (@$rows) {
        write_file($target->dir . '/content', "\xee" x $size);
        my $volume = open_volume($source);
        my $done = eval { $volume->copy(to => $target->uri, connections => 1, @options); 1 };
        ok($done, "(@$sizes)") or diag($@);
        same($target->content, expected(@$ranges), "(@$sizes): data");
    }
}

subtest 'sizes of a source' => sub {
    copies(source(by_row(@block_sizes)), target(), \@dirty, \@block_sizes);
};

subtest 'sizes of a target' => sub {
    copies(source(), target(by_row(@block_sizes)), \@dirty, \@block_sizes);
};

# The rows that a plain run includes for both servers: each row has also been used for the source alone and for
# the target alone.
sub part (@rows) {
    state $calls = 0;
    return @rows if $ENV{PBA_FULL};
    my $first = $calls++ % 2;
    return @rows[grep { $_ % 2 == $first } 0 .. $#rows];
}

subtest 'sizes of both, with a request size' => sub {
    my @rows = part(@block_sizes);
    my @servers = (source(by_row(@rows)), target(by_row(@rows)));
    copies(@servers, \@dirty, \@rows, 'request-size' => 4096);
};

# With a limit, only little is read, because more would take long.
my @little = ([0, 8 * $KiB]);
my @small = grep { ($_->[0] // 0) != 64 * $KiB } @block_sizes;
for my $request ([], ['request-size' => 16 * $KiB]) {
    my @rows = part(@small);
    subtest "sizes of both, with a limit@{[$request->@* && ' and a request size']}" => sub {
        my @servers = (source(by_row(@rows), dirty => \@little), target(by_row(@rows)));
        copies(@servers, \@little, \@rows, 'bandwidth-limit' => $low_limit, $request->@*);
    };
}

# ---- other sizes that are respected ----

subtest 'reads of a volume' => sub {
    for my $sizes ([4096, 4096, 4096], [512, 4096, 12 * $KiB], [1, 512, 513]) {
        my $server = source(dirty => [[0, $size]], block_sizes => $sizes, strict_blocks => 1);
        my $volume = open_volume($server);
        for my $range ([0, $size], [1, 1], [4095, 2], [513, 70_000], [$size - 1, 1]) {
            my $data = eval { $volume->pread(@$range) } // $@;
            ok($data eq pattern(@$range), "(@$sizes): range @$range");
        }
        is(length($volume->pread(4096, 4096)), 4096, "(@$sizes): a whole block");
        ok(!eval { $volume->pread($size, 1); 1 }, "(@$sizes): nothing behind the end");
    }
};

subtest 'an end that no request can reach' => sub {
    my $no_end = qr/\Adevice disk: .*has 5120 bytes.*minimum block of 4096 bytes.*\n\z/;
    my @odd = (size => 5120, dirty => [[0, 5120]], block_sizes => [4096, 4096, 8192]);
    my $server = source(@odd);
    ok(!eval { open_volume($server); 1 }, 'of the source: refused');
    like($@, $no_end, 'of the source: error');
    is($@->class, 'NbdError', 'of the source: class');

    my $volume = open_volume(my $good = source(size => 5120, dirty => [[0, 5120]]));
    my $target = target(@odd);
    ok(!eval { $volume->copy(to => $target->uri); 1 }, 'of the target: refused');
    like($@, qr/has 5120 bytes.*at the target/, 'of the target: error');

    my $larger = target(size => 8192, block_sizes => [4096, 4096, 4096], strict_blocks => 1);
    ok(eval { $volume->copy(to => $larger->uri, connections => 1); 1 }, 'a larger target')
        or diag($@);
    my $kept = $larger->content;
    same($kept, pattern(0, 5120) . "\0" x 3072, 'the last block is filled up');
};

subtest 'regions of partial blocks' => sub {
    my $volume = open_volume(my $server = source(dirty => [[512, 4096]]));
    my $target = target(block_sizes => [4096, 4096, 32 * $MiB]);
    ok(!eval { $volume->copy(to => $target->uri); 1 }, 'of the target: refused');
    like($@, qr/only whole blocks of 4096 bytes, and cannot take \d+ bytes at offset 512/, 'error');
    is($@->class, 'UnsupportedError', 'class');
    is(scalar($target->requests('write')), 0, 'nothing was written');

    $volume
        = open_volume($server = source(dirty => [[512, 4096]], block_sizes => [4096, 4096, 8192]));
    ok(!eval { $volume->copy(to => '/dev/null'); 1 }, 'of the source: refused');
    like($@, qr/bytes at offset \d+ failed - .*unaligned|dirty bitmap/, 'error');
};

subtest 'connections that differ' => sub {
    my @several = (
        [[1, 4096, 32 * $MiB], [4096, 4096, 4096], [64 * $KiB, 64 * $KiB, 64 * $KiB], []],
        [[512, 512, 512], [64 * $KiB, 64 * $KiB, 32 * $MiB]],
    );
    for my $sizes (@several) {
        my $of = sub ($connection) { $sizes->[($connection - 1) % @$sizes] };
        my $strict = sub ($connection) { is_legal($of->($connection)->@*) };
        my @options = (block_sizes => $of, strict_blocks => $strict);
        my $volume = open_volume(my $server = source(@options));
        my $file = write_file("$dir/copy", "\xee" x $size);
        my @copy = (connections => 4, 'request-size' => 4096);
        ok(eval { $volume->copy(to => $file, @copy); 1 }, 'of the source') or diag($@);
        same(read_file($file), expected(@dirty), 'of the source: data');
        $volume = open_volume($server = source());
        my $target = target(@options);
        ok(eval { $volume->copy(to => $target->uri, @copy); 1 }, 'of the target') or diag($@);
        same($target->content, expected(@dirty), 'of the target: data');
    }
    my @grows = (advertised_size => sub ($connection) { $size * ($connection > 1 ? 2 : 1) });
    my @shrinks = (advertised_size => sub ($connection) { $size / $connection });
    for my $changes (\@grows, \@shrinks) {
        my $volume = open_volume(my $server = source(@$changes));
        ok(!eval { $volume->copy(to => '/dev/null'); 1 }, "the source's size: refused");
        like($@, qr/\d+ bytes instead of $size/, 'error');
        $volume = open_volume($server = source());
        my $target = target(@$changes);
        ok(!eval { $volume->copy(to => $target->uri); 1 }, "the target's size: refused");
        like($@, qr/\d+ bytes instead of $size.*at the target/, 'error');
    }
};

# The exports describe the size of the fleecing image's clusters, which others might change.
subtest 'clusters of a discard' => sub {
    my $is = 'pba: discard by clusters of ';
    my %cluster = (
        '' => 64 * $KiB,
        "${is}2097152" => 2 * $MiB,
        "${is}65536" => 64 * $KiB,
        (map { $is . $_ => 64 * $KiB } qw(1 4096 0 -1 3145728 18446744073709551616 x), ''),
        (map { $is . $_ => 64 * $KiB } '2097152 ', '02097152', ' 2097152'),
        "${is}9223372036854775808" => 1 << 30,
    );
    my $long = 5 * $MiB + 4608;
    for my $description (sort keys %cluster) {
        my $cluster = $cluster{$description};
        my $server = source(size => $long, dirty => [[0, $long]], description => $description);
        my $statistics = open_volume($server)->copy(to => '/dev/null', connections => 1);
        my $whole = int($long / $cluster) * $cluster;
        is($statistics->{'bytes-discarded'},
            $whole, "'$description': the number of discarded bytes");
        my @parts = grep { $_->{offset} % $cluster } $server->requests('trim');
        is(scalar(@parts), 0, "'$description': no part of a cluster is discarded");
    }
};

subtest 'a file over them' => sub {
    plan(skip_all => 'no /dev/fuse') if !-e '/dev/fuse' || $> != 0;
    for my $sizes ([1, 512, 512], [512, 512, 1536], [4096, 4096, 4096]) {
        my $server = source(block_sizes => $sizes, strict_blocks => 1);
        my $file = PBA::Test::VFile->start(
            socket => $server->socket_path,
            device => 'disk',
            size => $size,
            bitmap => 'bitmap0',
        );
        my $handle = $file->handle;
        for my $range ([0, 64 * $KiB], [128 * $KiB, 4096], [188 * $KiB, 4096]) {
            my $data = '';
            sysseek($handle, $range->[0], 0);
            is(sysread($handle, $data, $range->[1]), $range->[1], "(@$sizes): @$range");
            same($data, pattern(@$range), "(@$sizes): @$range: data");
        }
    }
};

done_testing();
