# Copies of volumes to every kind of target, byte by byte. t/copy-calls.t tests what the caller is told
# meanwhile, and what it may do.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(O_WRONLY);
use File::Temp ();
use List::Util qw(max sum0);
use POSIX ();
use Test::More;

use PBA::Test::CopySource qw($image $odd_size %maps start write_file read_file same);
use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::QemuNbd qw(img);
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $O_DIRECT = eval { Fcntl::O_DIRECT() } // die "no O_DIRECT\n";
my $dir = File::Temp->newdir('pba-copy-XXXXXXXX', TMPDIR => 1);

# The initial content of the target: neither data nor zeroes of the source.
my $unseen = "\xee";

# For NBD targets, only whole clusters count.
sub zero_bytes ($block) {
    return sum0(map { length } grep { !m/[^\0]/ } unpack("(a$block)*", $image));
}

# The expected content of the target: the image in dirty parts, the initial content elsewhere.
sub expected ($before, $map) {
    my $data = $before;
    substr($data, $_->[0], $_->[1]) = substr($image, $_->[0], $_->[1]) for @$map;
    return $data;
}

sub check_statistics ($statistics, $map, $name) {
    my $bytes = sum0(map { $_->[1] } @$map);
    is($statistics->{'bytes-read'}, $bytes, "$name: bytes read");
    is($statistics->{'bytes-written'} + $statistics->{'bytes-zero'}, $bytes, "$name: all written");
    is($statistics->{regions}, scalar(@$map), "$name: regions");
    cmp_ok($statistics->{seconds}, '>', 0, "$name: seconds");
}

# name => code that copies, and returns the statistics and the content of the target
my %sinks = (
    'a file' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        return ($volume->copy(to => $file), read_file($file));
    },
    'a descriptor' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        my $statistics = $volume->copy(to => $fh);
        is(tell($fh), 0, 'the position is left alone');
        return ($statistics, read_file($file));
    },

    # Threads write what cannot be written at once.
    'a direct descriptor' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        sysopen(my $fh, $file, O_WRONLY | $O_DIRECT) or die "$file: $!\n";
        return ($volume->copy(to => $fh), read_file($file));
    },
    'the number of a descriptor' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        return ($volume->copy(to => fileno($fh)), read_file($file));
    },
    'the path of a descriptor' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        return ($volume->copy(to => '/dev/fd/' . fileno($fh)), read_file($file));
    },
    'raw over NBD' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        my $server = PBA::Test::QemuNbd->start(file => $file);
        my $statistics = $volume->copy(to => $server->uri);
        $server->stop;
        return ($statistics, read_file($file));
    },
    'qcow2 over NBD' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        img('convert', '-f', 'raw', '-O', 'qcow2', $file, "$file.qcow2");
        my $server = PBA::Test::QemuNbd->start(file => "$file.qcow2", format => 'qcow2');
        my $statistics = $volume->copy(to => $server->uri, connections => 3);
        $server->stop;
        img('convert', '-f', 'qcow2', '-O', 'raw', "$file.qcow2", $file);
        return ($statistics, read_file($file));
    },
    'a function' => sub ($volume, $before) {
        my ($data, $end) = ($before, 0);
        my $write = sub ($offset, $bytes) {
            cmp_ok($offset, '>=', $end, 'offsets ascend') if $offset < $end;
            $end = $offset + length($bytes);
            substr($data, $offset, length($bytes)) = $bytes;
        };
        return ($volume->copy(to => $write), $data);
    },
);

for my $sink (sort keys %sinks) {
    subtest "to $sink" => sub {
        for my $map_name (sort keys %maps) {
            my $map = $maps{$map_name};
            my $volume = open_volume(start(dirty => $map));
            my $before = $unseen x $odd_size;
            my ($statistics, $got) = $sinks{$sink}->($volume, $before);
            same($got, expected($before, $map), "$map_name: data");
            check_statistics($statistics, $map, $map_name);
            if ($sink eq 'a function') {
                is($statistics->{'bytes-zero'}, 0, "$map_name: zeroes are handed out, too");
            }
            elsif ($map_name eq 'all') {
                my $block = $sink =~ m/NBD/ ? 64 * $KiB : 4 * $KiB;
                is($statistics->{'bytes-zero'},
                    zero_bytes($block), "$map_name: all zero blocks were seen");
            }
        }
    };
}

# The writing process has other descriptors than the caller, and must not mistake its own for the caller's.
subtest 'links to descriptors' => sub {
    write_file("$dir/target", '');
    open(my $fh, '+<:raw', "$dir/target") or die "$dir/target: $!\n";
    for my $number (0 .. 5) {
        symlink("/proc/self/fd/$number", "$dir/link") or die "symlink: $!\n";
        my $volume = open_volume(start());
        ok(!eval { $volume->copy(to => "$dir/link", 'without-base' => 1); 1 }, "$number: refused")
            or is(-s "$dir/target", $odd_size, "$number: or the copy succeeds");
        like("$@", qr/cannot write to \Q$dir\E\/link - /, "$number: the error says why");
        unlink("$dir/link");
    }
};

subtest 'to a block device' => sub {
    plan(skip_all => 'needs root and loop devices') if $> != 0 || !-e '/dev/loop-control';
    my $file = write_file("$dir/backing", $unseen x (7 * $MiB));
    chomp(my $device = `losetup --find --show $file`);
    die "losetup failed\n" if $?;
    my $map = $maps{'long and short'};
    my $done = eval { open_volume(start(dirty => $map))->copy(to => $device) };
    my $error = $@;
    my $refused = eval { open_volume(start(size => 8 * $MiB))->copy(to => $device); 1 };
    my $why = $@;
    system('losetup', '--detach', $device) == 0 or die "losetup failed\n";
    is($error, '', 'copied');
    same(read_file($file), expected($unseen x (7 * $MiB), $map), 'data');
    check_statistics($done, $map, 'loop device');
    ok(!$refused, 'a device that is too small is refused');
    like($why, qr/too few for the volume's/, 'the error says why');
};

subtest 'files: size and holes' => sub {
    my $map = [[0, $odd_size]];
    for my $case (['new', undef], ['short', $MiB], ['long', 9 * $MiB], ['empty', 0]) {
        my ($name, $size) = @$case;
        my $file = "$dir/sparse";
        unlink($file);
        write_file($file, $unseen x $size) if defined($size);
        my $statistics
            = open_volume(start(dirty => $map), 'bitmap-mode' => 'new')->copy(to => $file);
        same(read_file($file), $image, "$name file");
        my $allocated = (stat($file))[12] * 512;
        cmp_ok(
            $allocated, '<=',
            $statistics->{'bytes-written'} + 64 * $KiB,
            "$name file: zeroes are holes"
        );
    }

    # The copy is as confidential as the disk.
    my $umask = umask(0);
    unlink("$dir/sparse");
    open_volume(start(dirty => $map), 'bitmap-mode' => 'new')->copy(to => "$dir/sparse");
    umask($umask);
    is((stat("$dir/sparse"))[2] & 07777, 0600, 'a new file is for its owner only');
    chmod(0640, "$dir/sparse");
    open_volume(start(dirty => $map), 'bitmap-mode' => 'new')->copy(to => "$dir/sparse");
    is((stat("$dir/sparse"))[2] & 07777, 0640, 'an existing file keeps its mode');

    my $file = "$dir/whole";
    my $volume
        = open_volume(start(dirty_only => 0), 'bitmap-mode' => 'none', 'bitmap-name' => undef);
    $volume->copy(to => $file, 'bandwidth-limit' => undef);
    same(read_file($file), $image, 'without a bitmap everything is copied');
    unlink($file);
    $volume->copy(to => $file, 'bandwidth-limit' => 0);
    same(read_file($file), $image, 'a limit of 0 is no limit');
};

# Without the byte that is read after a second connection is made, to see whether the server answers.
sub data_reads ($server) {
    return grep { $_->{length} > 1 } $server->requests('read');
}

subtest 'requests to the source' => sub {
    for my $request_size (64 * $KiB, 256 * $KiB, 8 * $MiB) {
        for my $map_name (sort keys %maps) {
            my $map = $maps{$map_name};
            my $name = "$map_name by $request_size";
            my $server = start(dirty => $map);
            my $volume = open_volume($server);
            my $statistics = $volume->copy(to => '/dev/null', 'request-size' => $request_size);
            my @reads = sort { $a->[0] <=> $b->[0] }
                map { [@$_{qw(offset length)}] } data_reads($server);
            is(
                sum0(map { $_->[1] } @reads),
                $statistics->{'bytes-read'},
                "$name: nothing is read twice"
            );
            cmp_ok(max(0, map { $_->[1] } @reads), '<=', $request_size, "$name: no read is longer");
            my $fewest = sum0(map { POSIX::ceil($_->[1] / $request_size) } @$map);
            cmp_ok(scalar(@reads), '<=', $fewest + @$map, "$name: the fewest reads");
            check_discards($server, $map, $statistics, $name);
        }
    }
    my $server = start(dirty => $maps{all}, delay => 0.05);
    open_volume($server)->copy(to => '/dev/null', 'request-size' => 64 * $KiB);
    cmp_ok($server->max_in_flight, '>=', 8, 'many reads are in flight');
    cmp_ok($server->connections, '>', 1, 'over several connections');
    $server = start(dirty => $maps{all});
    open_volume($server)->copy(to => '/dev/null', connections => 1);
    is($server->connections, 1, 'one connection, if requested');
};

my $thin_size = 20 * $MiB + 512;
my @thin_holes
    = ([0, 2 * $MiB], [3 * $MiB, 64 * $KiB], [7 * $MiB + 4096, 9 * $MiB], [19 * $MiB, $MiB + 512]);

sub thin_image () {
    my $thin = 'thin' x ($thin_size / 4);
    substr($thin, $_->[0], $_->[1]) = "\0" x $_->[1] for @thin_holes;
    return $thin;
}

sub start_thin ($thin, $map, $mode, %more) {
    return start(
        size => $thin_size,
        dirty => $map,
        dirty_only => $mode ne 'none',
        holes => \@thin_holes,
        data => sub ($offset, $length) { substr($thin, $offset, $length) },
        %more
    );
}

# [name, map, bitmap mode]
my @thin_cases
    = (['a large region', [[$MiB, 17 * $MiB]], 'new'], ['no bitmap', [[0, $thin_size]], 'none'],);

# What the server reports as zero is not read, whatever the target is.
subtest 'holes' => sub {
    my $thin = thin_image();
    for my $case (@thin_cases) {
        my ($name, $map, $mode) = $case->@*;
        my $expected = $unseen x $thin_size;
        substr($expected, $_->[0], $_->[1]) = substr($thin, $_->[0], $_->[1]) for @$map;
        for my $sink ('a file', 'raw over NBD', 'a function') {
            my $server = start_thin($thin, $map, $mode);
            my $volume = open_volume($server, 'bitmap-mode' => $mode);
            my ($statistics, $got) = $sinks{$sink}->($volume, $unseen x $thin_size);
            same($got, $expected, "$name to $sink: data");
            check_statistics($statistics, $map, "$name to $sink");
            my $inside = reads_inside($server, grep { $_->[1] >= 256 * $KiB } @thin_holes);
            $sink eq 'a function'
                ? cmp_ok($inside, '>', 0, "$name to $sink: everything is read")
                : is($inside, 0, "$name to $sink: no hole is read");
        }
        my $silent = open_volume(start_thin($thin, $map, $mode, allocation_error => 22),
            'bitmap-mode' => $mode);
        my ($again, $got) = $sinks{'a file'}->($silent, $unseen x $thin_size);
        same($got, $expected, "$name: where the server cannot tell, all is read");
    }
};

subtest 'holes, to targets without holes' => sub {
    my $thin = thin_image();
    for my $case (@thin_cases) {
        my ($name, $map, $mode) = $case->@*;
        my $volume = open_volume(start_thin($thin, $map, $mode), 'bitmap-mode' => $mode);
        my $target = PBA::Test::NBDServer->start(size => $thin_size);
        my $statistics = $volume->copy(to => $target->uri);
        is($statistics->{'bytes-zero'}, 0, "$name: a target that cannot write zeroes gets data");
        is(
            sum0(map { $_->{length} } $target->requests('write')),
            $statistics->{'bytes-read'},
            "$name: all data is written"
        );
        $volume = open_volume(start_thin($thin, $map, $mode), 'bitmap-mode' => $mode);
        $statistics = $volume->copy(to => '/dev/null');
        is($statistics->{'bytes-zero'}, 0, "$name: a device without holes gets data");
    }
};

sub reads_inside ($server, @ranges) {
    return scalar(
        grep {
            my ($begin, $end) = ($_->{offset}, $_->{offset} + $_->{length});
            grep { $_->[0] < $end && $begin < $_->[0] + $_->[1] } @ranges
        } data_reads($server)
    );
}

# Whole clusters of the dirty parts, each once.
sub check_discards ($server, $map, $statistics, $name) {
    my $cluster = 64 * $KiB;
    my $dirty = '';
    for my $range (@$map) {
        vec($dirty, int($_ / 512), 1) = 1
            for map { $range->[0] + $_ * 512 } 0 .. $range->[1] / 512 - 1;
    }
    my $discarded = '';
    my ($bytes, $twice, $clean, $part) = (0, 0, 0, 0);
    for my $request ($server->requests('trim')) {
        my ($offset, $length) = @$request{qw(offset length)};
        $bytes += $length;
        $part++ if $offset % $cluster || ($length % $cluster && $offset + $length != $odd_size);
        for my $sector ($offset / 512 .. ($offset + $length) / 512 - 1) {
            $twice++ if vec($discarded, $sector, 1);
            $clean++ if !vec($dirty, $sector, 1);
            vec($discarded, $sector, 1) = 1;
        }
    }
    is($twice + $clean + $part, 0, "$name: discards are whole dirty clusters, each once");
    my $whole = sum0(
        map {
            my $end = $_->[0] + $_->[1];
            $end -= $end % $cluster if $end != $odd_size;
            max(0, $end - POSIX::ceil($_->[0] / $cluster) * $cluster);
        } @$map
    );
    is($bytes, $whole, "$name: all whole clusters are discarded");
    is(
        $statistics->{'bytes-discarded'},
        $whole - $whole % $cluster,
        "$name: the statistics count them, without the part at the end"
    );
}

subtest 'discarding' => sub {
    my $map = $maps{'long and short'};
    my @cases = (
        ['by default', 1, {}, []],
        ['told not to', 0, {}, [discard => 0]],
        ['a bare URI', 0, { 'bitmap-mode' => undef }, []],
        ['a bare URI, told to', 1, { 'bitmap-mode' => undef }, [discard => 1]],
    );
    for my $case (@cases) {
        my ($name, $discards, $keys, $options) = @$case;
        my $server = start(dirty => $map);
        my $statistics = open_volume($server, %$keys)->copy(to => '/dev/null', @$options);
        is(scalar(() = $server->requests('trim')) > 0, $discards == 1, $name);
        is($statistics->{'bytes-discarded'} > 0, $discards == 1, "$name: statistics");
    }

    # Data that the target has not got is still at the source.
    my $server = start(dirty => $maps{all});
    my $volume = open_volume($server);
    my $seen = 0;
    my $write = sub ($offset, $data) {
        die "enough\n" if $offset >= 3 * $MiB;
        $seen = $offset + length($data);
    };
    ok(!eval { $volume->copy(to => $write); 1 }, 'a copy that ends early');
    is($@, "enough\n", 'the exception is that of the function');
    is(scalar(grep { $_->{offset} + $_->{length} > $seen } $server->requests('trim')),
        0, 'nothing is discarded that was not handed out');
};

subtest 'the volume can be used again' => sub {
    my $map = $maps{'every other cluster'};
    my $volume = open_volume(start(dirty => $map));
    is_deeply([$volume->dirty_regions(3)], [map { @$_ } @$map[0 .. 2]], 'three regions');
    my $file = write_file("$dir/target", $unseen x $odd_size);
    for my $round (1, 2) {
        $volume->copy(to => $file, discard => 0);
        same(read_file($file), expected($unseen x $odd_size, $map), "copy $round has all regions");
    }
    is_deeply([$volume->next_dirty_region], $map->[3], 'the fourth region follows the third');
    is_deeply([$volume->dirty_regions(1000)], [map { @$_ } @$map[4 .. $#$map]], 'then the rest');
};

subtest 'data that the function keeps' => sub {
    my @kept;
    my $volume = open_volume(start(dirty => $maps{all}));
    my @options = ('request-size' => 64 * $KiB, discard => 0);
    $volume->copy(to => sub { push(@kept, \$_[1], $_[1]) }, @options);
    same(join('', map { ${ $kept[2 * $_] } } 0 .. $#kept / 2), $image, 'references');
    same(join('', map { $kept[2 * $_ + 1] } 0 .. $#kept / 2), $image, 'copies');

    @kept = ();
    $volume->copy(to => sub { utf8::upgrade($_[1]); push(@kept, \$_[1]) }, discard => 0);
    same(join('', map { $$_ } @kept), $image, 'references to what is made wide');
};

# A plain file can be such a handle, too; discarded parts become zero.
sub open_handle ($map, %more) {
    my $file = write_file("$dir/handle", $image);
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    my @left = map { [@$_] } @$map;
    my $volume = {
        size => $odd_size,
        'bitmap-mode' => 'reuse',
        'file-handle' => $fh,
        'next-dirty-region' => sub { @left ? shift(@left)->@* : () },
        %more,
    };
    return PVE::BackupAccess::Volume->open('disk', $volume);
}

# The handle's file after a discard of all whole clusters in the map.
sub punched ($map) {
    my $data = $image;
    my $cluster = 64 * $KiB;
    for my $range (@$map) {
        my $end = $range->[0] + $range->[1];
        $end -= $end % $cluster if $end != $odd_size;
        my $begin = POSIX::ceil($range->[0] / $cluster) * $cluster;
        substr($data, $begin, $end - $begin) = "\0" x ($end - $begin) if $end > $begin;
    }
    return $data;
}

subtest 'from a file handle' => sub {
    for my $map_name (sort keys %maps) {
        my $map = $maps{$map_name};
        my $total = sum0(map { $_->[1] } @$map);
        for my $with_progress (0, 1) {
            my $name = "$map_name, progress $with_progress";
            my $volume = open_handle($map);
            my $target = write_file("$dir/target", $unseen x $odd_size);
            my @last;
            my @progress = $with_progress ? (progress => sub (@now) { @last = @now }) : ();
            my $statistics = $volume->copy(to => $target, @progress);
            same(read_file($target), expected($unseen x $odd_size, $map), "$name: data");
            same(read_file("$dir/handle"), punched($map), "$name: discarded");
            check_statistics($statistics, $map, $name);
            is_deeply(\@last, [$total, $total], "$name: total") if $with_progress;
        }
    }
};

subtest 'faulty regions of a file handle' => sub {
    for my $with_progress (0, 1) {
        my @progress = $with_progress ? (progress => sub (@) { }) : ();
        my $calls = 0;
        my $volume = open_handle(
            [],
            'next-dirty-region' => sub {
                die "no more\n" if $calls++ == 3;
                return ($calls * $MiB, 65536);
            },
        );
        ok(!eval { $volume->copy(to => '/dev/null', @progress); 1 },
            'regions that end in an exception');
        is($@, "no more\n", 'the exception arrives unchanged');
        $volume = open_handle([[0, 65536], [32768, 65536]]);
        ok(!eval { $volume->copy(to => '/dev/null', @progress); 1 }, 'regions that overlap');
        like($@, qr/offset 32768/, 'are an error');
        ok(!eval { $volume->next_dirty_region; 1 }, 'the error does not look like the end');
    }
    my $volume = open_handle([[0, $odd_size]]);
    truncate("$dir/handle", 5 * $MiB + 512) or die "truncate: $!\n";
    ok(!eval { $volume->copy(to => '/dev/null'); 1 }, 'a file that ends early');
    my $end = 5 * $MiB + 512;
    like($@, qr/reading \d+ bytes at offset $end failed/, 'names the offset');
};

done_testing;
