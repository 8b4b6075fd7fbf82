# Copies of volumes to every kind of target, byte by byte. The source is an NBD server that answers
# reads outside of dirty regions, or after a discard, with an error, as a snapshot does.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(O_WRONLY);
use File::Temp ();
use List::Util qw(max min sum0);
use POSIX ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::Handle;
use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::QemuNbd;
use PBA::Test::VFile;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $O_DIRECT = eval { Fcntl::O_DIRECT() } // die "no O_DIRECT\n";
my $odd_size = 6 * $MiB + 4608;
my $dir = File::Temp->newdir('pba-copy-XXXXXXXX', TMPDIR => 1);

# What the target is full of before: neither data nor zeroes of the source.
my $unseen = "\xee";

# Data with zeroes in pieces of every size from 4 KiB on.
sub make_image ($size) {
    my $image = PBA::Test::NBDServer::pattern(0, $size);
    for (my ($at, $i) = (8 * $KiB, 1); $at < $size; $at += $i++ * 28 * $KiB) {
        my $length = min($i * 4 * $KiB, $size - $at);
        substr($image, $at, $length) = "\0" x $length;
    }
    return $image;
}

my $image = make_image($odd_size);
my $zero_bytes = sum0(map { length } grep { !m/[^\0]/ } unpack('(a4096)*', $image));

my %maps = (
    'one region' => [[64 * $KiB, 64 * $KiB]],
    'all' => [[0, $odd_size]],
    'nothing' => [],
    'every other cluster' => [map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 47],
    'the odd end' => [[0, 192 * $KiB], [6 * $MiB, 4608]],
    'long and short' =>
        [[$MiB, 3 * $MiB - 64 * $KiB], [4 * $MiB, 64 * $KiB], [5 * $MiB, 512 * $KiB]],
    'small blocks' => [map { [$_ * 12 * $KiB, 4 * $KiB] } 0 .. 300],
    'sectors' => [map { [$_ * 2560, 512] } 7 .. 400],
);

# A server lives as long as its object; these outlive the volume a test makes of them.
my @servers;

sub start (%options) {
    push @servers,
        PBA::Test::NBDServer->start(
        size => $odd_size,
        export => 'disk',
        dirty_only => 1,
        data => sub ($offset, $length) { substr($image, $offset, $length) },
        %options,
        );
    shift(@servers) if @servers > 4;
    return $servers[-1];
}

sub write_file ($file, $data) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print {$fh} $data;
    close($fh) or die "$file: $!\n";
    return $file;
}

sub read_file ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# The target after the copy: the image where it was dirty, elsewhere what was there before.
sub expected ($before, $map) {
    my $data = $before;
    substr($data, $_->[0], $_->[1]) = substr($image, $_->[0], $_->[1]) for @$map;
    return $data;
}

# is() would print megabytes.
sub same ($got, $expected, $name) {
    return pass($name) if $got eq $expected;
    my $difference = $got ^. $expected;
    $difference =~ m/[^\0]/;
    return fail(
        "$name: differs from byte $-[0] on, lengths " . length($got) . ' and ' . length($expected));
}

sub check_statistics ($statistics, $map, $name) {
    my $bytes = sum0(map { $_->[1] } @$map);
    is($statistics->{'bytes-read'}, $bytes, "$name: bytes read");
    is($statistics->{'bytes-written'} + $statistics->{'bytes-zero'}, $bytes, "$name: all written");
    is($statistics->{regions}, scalar(@$map), "$name: regions");
    cmp_ok($statistics->{seconds}, '>', 0, "$name: seconds");
}

# name => code that copies and returns the statistics and what the target holds then
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

    # What cannot be taken at once is written by threads.
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
    'raw over NBD' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        my $server = PBA::Test::QemuNbd->start(file => $file);
        my $statistics = $volume->copy(to => $server->uri);
        $server->stop;
        return ($statistics, read_file($file));
    },
    'qcow2 over NBD' => sub ($volume, $before) {
        my $file = write_file("$dir/target", $before);
        PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'qcow2', $file, "$file.qcow2");
        my $server = PBA::Test::QemuNbd->start(file => "$file.qcow2", format => 'qcow2');
        my $statistics = $volume->copy(to => $server->uri, connections => 3);
        $server->stop;
        PBA::Test::QemuNbd::img('convert', '-f', 'qcow2', '-O', 'raw', "$file.qcow2", $file);
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
                is($statistics->{'bytes-zero'}, $zero_bytes,
                    "$map_name: all zero blocks were seen");
            }
        }
    };
}

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
    like($why, qr/too few for the volume's/, 'and the error says why');
};

subtest 'files: size and holes' => sub {
    my $map = [[0, $odd_size]];
    for my $case (['new', undef], ['short', $MiB], ['long', 9 * $MiB], ['empty', 0]) {
        my ($name, $size) = @$case;
        my $file = "$dir/sparse";
        unlink($file);
        write_file($file, $unseen x $size) if defined($size);
        my $statistics = open_volume(start(dirty => $map))->copy(to => $file);
        same(read_file($file), $image, "$name file");
        my $allocated = (stat($file))[12] * 512;
        cmp_ok(
            $allocated, '<=',
            $statistics->{'bytes-written'} + 64 * $KiB,
            "$name file: zeroes are holes"
        );
    }

    # As secret as the disk.
    my $umask = umask(0);
    unlink("$dir/sparse");
    open_volume(start(dirty => $map))->copy(to => "$dir/sparse");
    umask($umask);
    is((stat("$dir/sparse"))[2] & 07777, 0600, 'a new file is for its owner only');
    chmod(0640, "$dir/sparse");
    open_volume(start(dirty => $map))->copy(to => "$dir/sparse");
    is((stat("$dir/sparse"))[2] & 07777, 0640, 'one that was there keeps its mode');

    my $file = "$dir/whole";
    my $volume
        = open_volume(start(dirty_only => 0), 'bitmap-mode' => 'none', 'bitmap-name' => undef);
    $volume->copy(to => $file, 'bandwidth-limit' => undef);
    same(read_file($file), $image, 'without a bitmap everything is copied');
    unlink($file);
    $volume->copy(to => $file, 'bandwidth-limit' => 0);
    same(read_file($file), $image, 'no limit is none');
};

subtest 'what is asked of the source' => sub {
    for my $request_size (64 * $KiB, 256 * $KiB, 8 * $MiB) {
        for my $map_name (sort keys %maps) {
            my $map = $maps{$map_name};
            my $name = "$map_name by $request_size";
            my $server = start(dirty => $map);
            my $volume = open_volume($server);
            my $statistics = $volume->copy(to => '/dev/null', 'request-size' => $request_size);
            my @reads = sort { $a->[0] <=> $b->[0] }
                map { [@$_{qw(offset length)}] } $server->requests('read');
            is(
                sum0(map { $_->[1] } @reads),
                $statistics->{'bytes-read'},
                "$name: nothing is read twice"
            );
            cmp_ok(max(0, map { $_->[1] } @reads), '<=', $request_size, "$name: no longer reads");
            my $fewest = sum0(map { POSIX::ceil($_->[1] / $request_size) } @$map);
            cmp_ok(scalar(@reads), '<=', $fewest + @$map, "$name: and no more of them");
            check_discards($server, $map, $statistics, $name);
        }
    }
    my $server = start(dirty => $maps{all}, delay => 0.05);
    open_volume($server)->copy(to => '/dev/null', 'request-size' => 64 * $KiB);
    cmp_ok($server->max_in_flight, '>=', 8, 'many reads are in flight');
    cmp_ok($server->connections, '>', 1, 'over several connections');
    $server = start(dirty => $maps{all});
    open_volume($server)->copy(to => '/dev/null', connections => 1);
    is($server->connections, 1, 'or just one');
};

# What the server says is zero is not read, however it is written.
subtest 'holes' => sub {
    my $size = 20 * $MiB + 512;
    my @holes = (
        [0, 2 * $MiB],
        [3 * $MiB, 64 * $KiB],
        [7 * $MiB + 4096, 9 * $MiB],
        [19 * $MiB, $MiB + 512]
    );
    my $thin = 'thin' x ($size / 4);
    substr($thin, $_->[0], $_->[1]) = "\0" x $_->[1] for @holes;
    my %servers = (
        'no bitmap' => [[[0, $size]], 'bitmap-mode' => 'none'],
        'a large region' => [[[$MiB, 17 * $MiB]]],
    );
    for my $case (sort keys %servers) {
        my ($map, %volume) = ($servers{$case}[0], $servers{$case}->@[1 .. $servers{$case}->$#*]);
        my @options = (
            size => $size,
            dirty => $map,
            dirty_only => !%volume,
            holes => \@holes,
            data => sub ($offset, $length) { substr($thin, $offset, $length) },
        );
        my $expected = $unseen x $size;
        substr($expected, $_->[0], $_->[1]) = substr($thin, $_->[0], $_->[1]) for @$map;
        for my $sink ('a file', 'raw over NBD', 'a function') {
            my $server = start(@options);
            my $before = $unseen x $size;
            my ($statistics, $got) = $sinks{$sink}->(open_volume($server, %volume), $before);
            same($got, $expected, "$case to $sink: data");
            check_statistics($statistics, $map, "$case to $sink");
            my $inside = reads_inside($server, grep { $_->[1] >= 256 * $KiB } @holes);
            $sink eq 'a function'
                ? cmp_ok($inside, '>', 0, "$case to $sink: all is read")
                : is($inside, 0, "$case to $sink: no hole is read");
        }
        my $server = start(@options);
        my $target = PBA::Test::NBDServer->start(size => $size);
        my $statistics = open_volume($server, %volume)->copy(to => $target->uri);
        is($statistics->{'bytes-zero'}, 0, "$case: a target that cannot write zeroes gets data");
        is(
            sum0(map { $_->{length} } $target->requests('write')),
            $statistics->{'bytes-read'},
            "$case: all of it"
        );
        $statistics = open_volume(start(@options), %volume)->copy(to => '/dev/null');
        is($statistics->{'bytes-zero'}, 0, "$case: so does a device that has no holes");
        my $silent = open_volume(start(@options, allocation_error => 22), %volume);
        my ($again, $got) = $sinks{'a file'}->($silent, $unseen x $size);
        same($got, $expected, "$case: where the server cannot tell, all is read");
    }
};

# As QEMU before 10.0 needs it: a longer read of a snapshot returns wrong data, and two questions for
# holes at a time make it abort.
subtest 'a server to be read by clusters' => sub {
    my $size = 20 * $MiB + 512;
    my @options = (
        size => $size,
        holes => [[0, 17 * $MiB]],
        data => sub ($offset, $length) { "\0" x $length },
    );
    for my $description (undef, 'pba: read by clusters of 65536 bytes') {
        my $server = start(@options, description => $description, dirty_only => 0);
        my $volume = open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        $volume->copy(to => '/dev/null');
        my $crossing = 0;
        for my $read ($server->requests('read')) {
            my ($first, $end) = ($read->{offset}, $read->{offset} + $read->{length});
            $crossing++ if int($first / 65536) != int(($end - 1) / 65536);
        }
        my $questions = () = $server->requests('block-status');
        if (!defined($description)) {
            cmp_ok($crossing, '>', 0, 'any other one: reads across clusters');
            cmp_ok($questions, '>', 0, 'any other one: is asked for holes');
            next;
        }
        is($crossing, 0, 'no read crosses the edge of a cluster');
        is($questions, 0, 'it is not asked for holes');
        my $whole = grep { $_->{flags} & 4 } $server->requests('read');
        is($whole, scalar(() = $server->requests('read')), 'nor does it look for them in a read');
    }
};

sub reads_inside ($server, @ranges) {
    return scalar(
        grep {
            my ($begin, $end) = ($_->{offset}, $_->{offset} + $_->{length});
            grep { $_->[0] < $end && $begin < $_->[0] + $_->[1] } @ranges
        } $server->requests('read')
    );
}

# Whole clusters of what was dirty, each once.
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
    is($bytes, $whole, "$name: all of them");
    is($statistics->{'bytes-discarded'}, $whole, "$name: and they are counted");
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

    # What the target has not got is still there.
    my $server = start(dirty => $maps{all});
    my $volume = open_volume($server);
    my $seen = 0;
    my $write = sub ($offset, $data) {
        die "enough\n" if $offset >= 3 * $MiB;
        $seen = $offset + length($data);
    };
    ok(!eval { $volume->copy(to => $write); 1 }, 'a copy that ends early');
    is($@, "enough\n", 'by what the function died of');
    is(scalar(grep { $_->{offset} + $_->{length} > $seen } $server->requests('trim')),
        0, 'nothing is discarded that was not handed out');
};

subtest 'the volume is as before' => sub {
    my $map = $maps{'every other cluster'};
    my $volume = open_volume(start(dirty => $map));
    is_deeply([$volume->dirty_regions(3)], [map { @$_ } @$map[0 .. 2]], 'three regions');
    my $file = write_file("$dir/target", $unseen x $odd_size);
    for my $round (1, 2) {
        $volume->copy(to => $file, discard => 0);
        same(read_file($file), expected($unseen x $odd_size, $map), "copy $round has all of them");
    }
    is_deeply([$volume->next_dirty_region], $map->[3], 'and the fourth comes after the third');
    is_deeply([$volume->dirty_regions(1000)], [map { @$_ } @$map[4 .. $#$map]], 'then the others');
};

subtest 'data that the function keeps' => sub {
    my @kept;
    my $volume = open_volume(start(dirty => $maps{all}));
    $volume->copy(to => sub { push(@kept, \$_[1], $_[1]) }, 'request-size' => 64 * $KiB);
    same(join('', map { ${ $kept[2 * $_] } } 0 .. $#kept / 2), $image, 'references');
    same(join('', map { $kept[2 * $_ + 1] } 0 .. $#kept / 2), $image, 'copies');
};

# A plain file is such a handle, too; what is discarded there becomes zero.
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

# The handle's file after all whole clusters of the map were discarded.
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
        is($@, "no more\n", 'which comes through');
        $volume = open_handle([[0, 65536], [32768, 65536]]);
        ok(!eval { $volume->copy(to => '/dev/null', @progress); 1 }, 'regions that overlap');
        like($@, qr/offset 32768/, 'are an error');
        ok(!eval { $volume->next_dirty_region; 1 }, 'and never the end');
    }
    my $volume = open_handle([[0, $odd_size]]);
    truncate("$dir/handle", 5 * $MiB + 512) or die "truncate: $!\n";
    ok(!eval { $volume->copy(to => '/dev/null'); 1 }, 'a file that ends early');
    my $end = 5 * $MiB + 512;
    like($@, qr/reading \d+ bytes at offset $end failed/, 'names the offset');
};

subtest 'progress' => sub {
    for my $map_name (sort keys %maps) {
        my $total = sum0(map { $_->[1] } $maps{$map_name}->@*);
        my @calls;
        my $volume = open_volume(start(dirty => $maps{$map_name}, delay => 0.02));
        $volume->copy(
            to => '/dev/null',
            connections => 1,
            'request-size' => 4 * $KiB,
            progress => sub ($done, $all) { push(@calls, [$done, $all]) },
        );
        is_deeply($calls[-1], [$total, $total], "$map_name: ends at the total");
        is(scalar(grep { $_->[1] != $total } @calls), 0, "$map_name: knows it from the start");
        is(scalar(grep { $calls[$_][0] < $calls[$_ - 1][0] } 1 .. $#calls),
            0, "$map_name: never falls");
    }
};

subtest 'bandwidth limit' => sub {
    my $limit = 400 * $KiB;
    my $volume = open_volume(start(size => 4 * $MiB, dirty => [[0, 4 * $MiB]]));
    my $statistics = $volume->copy(to => '/dev/null', 'bandwidth-limit' => $limit);
    my $expected = 4 * $MiB / $limit;
    cmp_ok($statistics->{seconds}, '>', $expected * 0.95, 'not faster than the limit');
    cmp_ok($statistics->{seconds}, '<', $expected * 1.05, 'nor much slower');
    is($statistics->{'bytes-discarded'}, 4 * $MiB, 'short reads are discarded by whole clusters');
};

sub hanging_target () {
    state $server = PBA::Test::NBDServer->start(size => $odd_size, hang_write_at => 3 * $MiB);
    return $server;
}

# The server of the file waits for an answer that does not come. It is ended before the interpreter.
my $hanging_file;
END { undef $hanging_file }

sub open_hanging_handle () {
    state $server = PBA::Test::NBDServer->start(size => $odd_size, hang_at => 5 * $MiB);
    $hanging_file = PBA::Test::VFile->start(
        socket => $server->socket_path,
        device => $server->{export},
        size => $odd_size,
    );
    my @left = ([0, $odd_size]);
    return PVE::BackupAccess::Volume->open(
        'disk',
        {
            size => $odd_size,
            'bitmap-mode' => 'new',
            'file-handle' => $hanging_file->handle,
            'next-dirty-region' => sub { @left ? shift(@left)->@* : () },
        },
    );
}

# How much slower than it should be a machine is that has too much to do.
sub slowness () {
    open(my $fh, '<', '/proc/loadavg') or return 1;
    my ($load) = split(' ', <$fh>);
    return max(1, $load);
}

subtest 'exceptions and signals' => sub {
    my $object = bless({ reason => 'mine' }, 'My::Exception');
    for my $case (['to', sub { die $object }], ['progress', sub { die $object }]) {
        my ($option, $code) = @$case;
        my $volume = open_volume(start(dirty => $maps{all}));
        ok(!eval { $volume->copy(to => '/dev/null', $option => $code); 1 }, "$option dies");
        is($@, $object, "$option: its own exception comes through");
        same($volume->pread(4096, 4096), substr($image, 4096, 4096),
            "$option: the volume works on");
    }

    my @hangs = (
        [
            'source', sub { open_volume(start(dirty => $maps{all}, hang_at => 5 * $MiB)) },
            "$dir/target"
        ],
        ['target', sub { open_volume(start(dirty => $maps{all})) }, hanging_target()->uri],
        PBA::Test::Handle->missing ? () : ['file handle', \&open_hanging_handle, "$dir/target"],
    );
    for my $case (@hangs) {
        my ($name, $open, $target) = @$case;
        my $volume = $open->();
        my $start = time;
        my $done = eval {
            local $SIG{ALRM} = sub { die "alarm\n" };
            Time::HiRes::alarm(0.5);
            $volume->copy(to => $target);
            1;
        };
        ok(!$done, "a $name that hangs: a handler ends the copy");
        is($@, "alarm\n", "a $name that hangs: with what it died of");
        cmp_ok(time - $start, '<', 1.5 * slowness(), "a $name that hangs: within a second");
    }

    # They would leave the copy behind, half done and without an error.
    for my $option (qw(to progress)) {
        no warnings 'exiting';    ## no critic (ProhibitNoWarnings)
        my @ways = ([last => sub { last }], [next => sub { next }]);
        for my $way (@ways) {
            my ($word, $code) = $way->@*;
            my @seen;
            for my $time (1, 2) {
                my $volume = open_volume(start(dirty => $maps{all}));
                push(@seen, eval { $volume->copy(to => '/dev/null', $option => $code) } // $@);
            }
            is(scalar(@seen), 2, "$word in $option: leaves no loop of the caller's");
            is(scalar(grep { m/\ACan't "$word" outside a loop block/ } @seen), 2, 'but dies');
        }
    }

    my $inside;
    my $volume = open_volume(start(dirty => $maps{all}));
    $volume->copy(
        to => sub {
            $inside //= eval { $volume->size; 1 } ? 'usable' : $@;
        }
    );
    like($inside, qr/in use by a call that is under way/,
        'the volume is not for use in a callback');
};

subtest 'forks' => sub {
    my $map = $maps{all};
    for my $how (qw(exits dies returns)) {
        my $volume = open_volume(start(dirty => $map));
        my $file = write_file("$dir/target", $unseen x $odd_size);
        my ($test, @children) = ($$);
        my $fork = sub (@) {
            return if @children;
            my $pid = fork() // die "cannot fork: $!\n";
            if (!$pid) {
                POSIX::_exit(0) if $how eq 'exits';
                die "child\n" if $how eq 'dies';
                return;
            }
            push(@children, $pid);
        };
        my $statistics = eval { $volume->copy(to => $file, progress => $fork) };
        if ($$ != $test) {
            my $expected = $how eq 'dies' ? qr/\Achild\n\z/ : qr/belongs to another process/;
            undef $volume;
            POSIX::_exit($@ =~ $expected ? 0 : 1);
        }
        is($@, '', "a child that $how: the copy goes on");
        waitpid($_, 0) for @children;
        is($?, 0, "a child that $how: as it should");
        same(read_file($file), $image, "a child that $how: data");
    }
};

subtest 'bounded memory' => sub {
    my $server = start(size => 1 << 30, dirty => [[0, 1 << 30]], data => sub ($, $n) { 'x' x $n });
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        my $volume = open_volume($server);
        my $before = peak_kib();
        $volume->copy(to => '/dev/null', 'request-size' => 8 * $MiB);
        my $grown = peak_kib() - $before;
        POSIX::_exit($grown <= 64 * 1024 ? 0 : 1);
    }
    waitpid($pid, 0);
    is($?, 0, 'at most 64 MiB for the longest requests');
};

sub peak_kib () {
    my ($kib) = map { m/^VmHWM:\s+(\d+)/ } split(/^/, read_file('/proc/self/status'));
    return $kib;
}

subtest 'a million regions' => sub {
    my $size = 1 << 30;
    my $file = "$dir/map.qcow2";
    PBA::Test::QemuNbd::write_map(
        file => $file,
        size => $size,
        granularity => 512,
        bitmap => 'bitmap0',
        pattern => 'alternate',
    );
    my $server = PBA::Test::QemuNbd->start(
        file => $file,
        format => 'qcow2',
        bitmap => 'bitmap0',
        readonly => 1,
    );
    my $volume
        = PVE::BackupAccess::Volume->open('disk',
        { 'nbd-path' => $server->uri, 'bitmap-name' => 'bitmap0' },
        );
    my ($total, $calls) = (0, 0);
    my $statistics = $volume->copy(
        to => "$dir/target",
        progress => sub ($done, $all) { $total = $all; $calls++ },
    );
    is($statistics->{regions}, 1 << 20, 'regions');
    is($statistics->{'bytes-read'}, $size / 2, 'bytes');
    is($total, $size / 2, 'progress');
    cmp_ok($calls, '<=', $statistics->{seconds} * 5 + 2, 'is told a few times a second');
};

subtest 'arguments' => sub {
    my $volume = open_volume(start(dirty => $maps{all}));
    open(my $reader, '<', '/dev/null') or die;
    open(my $appender, '>>', "$dir/appended") or die;
    open(my $closed, '<', '/dev/null') or die;
    close($closed);
    my @cases = (
        [qr/copy needs the option 'to'/],
        [qr/copy needs the option 'to'/, to => undef],
        [qr/to must not be empty/, to => ''],
        [qr/must be open for writing, not for reading/, to => $reader],
        [qr/must be open for writing, not for appending/, to => $appender],
        [qr/must be an open file/, to => $closed],
        [qr/must be an open file/, to => {}],
        [qr/cannot write to the file descriptor 987 - Bad file/, to => 987],
        [qr/cannot write to .*Is a directory/, to => "$dir"],
        [qr/cannot write to .*No such file/, to => "$dir/none/target"],
        [qr/connecting failed.*nothing-here/, to => "nbd+unix:///x?socket=$dir/nothing-here"],
        [qr/unknown option 'speed'/, to => '/dev/null', speed => 1],
        [qr/bandwidth-limit must be/, to => '/dev/null', 'bandwidth-limit' => -1],
        [qr/bandwidth-limit must be/, to => '/dev/null', 'bandwidth-limit' => '1M'],
        [qr/connections must be/, to => '/dev/null', connections => 17],
        [qr/request-size must be/, to => '/dev/null', 'request-size' => 16 * $MiB],
        [qr/request-size must be a multiple of 4096/, to => '/dev/null', 'request-size' => 5000],
        [qr/progress must be a code ref/, to => '/dev/null', progress => 1],
        [qr/discard must be 0 or 1/, to => '/dev/null', discard => 'no'],
    );
    for my $case (@cases) {
        my ($pattern, @options) = @$case;
        ok(!eval { $volume->copy(@options); 1 }, "refused: $pattern");
        like($@, qr/$pattern.*\n\z/, 'with this error');
    }
    is_deeply([$volume->next_dirty_region], [0, $odd_size], 'the volume was not touched');
};

done_testing;
