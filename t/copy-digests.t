# Digests of the data that a copy reads: passed to a code ref, stored in a file, and compared with those in
# files.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Digest::SHA qw(sha256);
use Errno qw(EIO);
use File::Temp ();
use List::Util qw(min sum0);
use POSIX ();
use Test::More;
use Time::HiRes ();

use PBA::Test::CopySource qw($image $odd_size %maps start write_file read_file same);
use PBA::Test::Handle;
use PBA::Test::NBDServer qw(open_volume pattern);
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $header = 4096;
my $dir = File::Temp->newdir('pba-digests-XXXXXXXX', TMPDIR => 1);

# { number of a block => its digest } of the blocks in the map.
sub digests_of ($data, $map, $block = 64 * $KiB) {
    my %digests;
    for my $region ($map->@*) {
        my ($offset, $length) = $region->@*;
        for (my $at = $offset; $at < $offset + $length; $at += $block) {
            $digests{ $at / $block } = sha256(substr($data, $at, $block));
        }
    }
    return \%digests;
}

sub slots ($digests) { return unpack('(a32)*', $digests) }

# The same for a file; blocks of zeroes have no digest in it.
sub slots_of ($file) {
    my @slots = slots(substr(read_file($file), $header));
    return { map { $slots[$_] =~ m/[^\0]/ ? ($_ => $slots[$_]) : () } 0 .. $#slots };
}

# The digests in a complete file, which has none of zeroes.
sub without_zeroes ($digests, $data, $block = 64 * $KiB) {
    return {
        map { substr($data, $_ * $block, $block) =~ m/[^\0]/ ? ($_ => $digests->{$_}) : () }
            keys $digests->%*
    };
}

# A code ref that collects the digests and checks that it gets each block only once.
sub collector ($found, $block = 64 * $KiB) {
    return sub ($offset, $digests) {
        my $first = $offset / $block;
        for my $digest (slots($digests)) {
            die "block $first was told twice\n" if exists($found->{$first});
            $found->{ $first++ } = $digest;
        }
    };
}

# The maps that consist of whole blocks.
my %whole = map { $_ => $maps{$_} } 'one region', 'all', 'nothing', 'every other cluster',
    'the odd end', 'long and short';

subtest 'a code ref, for targets of all kinds' => sub {
    my %targets = (
        'a file' => sub ($name) { write_file("$dir/target", "\xee" x $odd_size) },
        'a code ref' => sub ($name) {
            sub ($offset, $data) { }
        },
        'NBD' => sub ($name) {
            state $server = PBA::Test::NBDServer->start(size => $odd_size);
            $server->uri;
        },
    );
    for my $map (sort keys %whole) {
        for my $target (sort keys %targets) {
            my %found;
            my $volume = open_volume(start(dirty => $whole{$map}));
            my $statistics = $volume->copy(
                to => $targets{$target}->($map),
                digests => collector(\%found)
            );
            is_deeply(\%found, digests_of($image, $whole{$map}), "$map, $target");
            is($statistics->{'bytes-read'}, sum0(map { $_->[1] } $whole{$map}->@*), 'bytes');
        }
    }
};

subtest 'other sizes of blocks, requests and connections' => sub {
    for my $block (4 * $KiB, 128 * $KiB, 8 * $MiB) {
        for my $request (4 * $KiB, 192 * $KiB) {
            my %found;
            open_volume(start(dirty => $maps{all}))->copy(
                to => '/dev/null',
                digests => collector(\%found, $block),
                'digest-block' => $block,
                'request-size' => $request,
                connections => 2,
            );
            is_deeply(\%found, digests_of($image, $maps{all}, $block), "$block, $request");
        }
    }
    my %found;
    open_volume(start(dirty => $maps{all}))->copy(
        to => '/dev/null',
        digests => collector(\%found, $MiB),
        'digest-block' => $MiB,
        'bandwidth-limit' => 8 * $MiB,
    );
    is_deeply(\%found, digests_of($image, $maps{all}, $MiB), 'a bandwidth limit');
};

subtest 'holes' => sub {
    my $size = 40 * $MiB + 512;
    my $hole = [3 * $MiB + 512, $size - 4 * $MiB];
    my $data = pattern(0, $size);
    substr($data, $hole->[0], $hole->[1]) = "\0" x $hole->[1];
    my $server = start(
        size => $size,
        dirty => [[0, $size]],
        dirty_only => 0,
        holes => [$hole],
        data => sub ($offset, $length) { substr($data, $offset, $length) },
    );
    for my $block (64 * $KiB, 4 * $MiB) {
        my %found;
        open_volume($server)->copy(
            to => "$dir/holes",
            'without-base' => 1,
            digests => collector(\%found, $block),
            'digest-block' => $block,
        );
        is_deeply(\%found, digests_of($data, [[0, $size]], $block), "blocks of $block");
    }
    same(read_file("$dir/holes"), $data, 'the data');
    my $read = sum0(map { $_->{length} } $server->requests('read'));
    cmp_ok($read, '<', 20 * $MiB, 'holes are not read');
};

subtest 'a code ref as the target gets data after its digests' => sub {
    my (@events, %found);
    my $take = collector(\%found);
    open_volume(start(dirty => $maps{all}, delay => 0.001))->copy(
        to => sub ($offset, $data) { push(@events, [data => $offset, length($data)]) },
        digests => sub ($offset, $digests) {
            push(@events, [digests => $offset, slots($digests)]);
            $take->($offset, $digests);
        },
    );
    my $wrong = grep {
        my ($digests, $data) = @events[$_ * 2, $_ * 2 + 1];
        $digests->[0] ne 'digests' || $data->[0] ne 'data' || $digests->[1] != $data->[1]
    } 0 .. $#events / 2;
    is($wrong, 0, 'digests and data alternate');
};

subtest 'a file' => sub {
    my $file = "$dir/full";
    open_volume(start(dirty_only => 0), 'bitmap-mode' => 'none', 'bitmap-name' => undef)
        ->copy(to => '/dev/null', digests => $file);
    my $all = digests_of($image, $maps{all});
    is_deeply(slots_of($file), without_zeroes($all, $image), 'a whole volume: without zeroes');
    is(substr(read_file($file), 0, 12), "PBA-DIGESTS\n", 'has a header');
    is((stat($file))[2] & 0777, 0600, 'is its owner\'s alone');
    for my $map (sort keys %whole) {
        unlink("$dir/increment");
        my $volume = open_volume(start(dirty => $whole{$map}));
        $volume->copy(to => '/dev/null', digests => "$dir/increment");
        is_deeply(
            slots_of("$dir/increment"),
            digests_of($image, $whole{$map}),
            "of an increment: $map"
        );
    }
    my $new = pattern($odd_size, $odd_size);
    my $server = start(
        dirty => [[128 * $KiB, 64 * $KiB], [6 * $MiB, 4608]],
        data => sub ($offset, $length) { substr($new, $offset, $length) }
    );
    open_volume($server)->copy(to => '/dev/null', digests => $file);
    my $merged = $image;
    substr($merged, $_->[0], $_->[1]) = substr($new, $_->[0], $_->[1])
        for [128 * $KiB, 64 * $KiB], [6 * $MiB, 4608];
    is_deeply(
        slots_of($file),
        without_zeroes(digests_of($merged, $maps{all}), $merged),
        'an increment is written to the existing file'
    );
};

# Calls copy or check, and returns the damaged ranges in order.
sub damage_of ($server, $expected, %options) {
    my @damage;
    my $volume = open_volume(
        $server,
        'bitmap-mode' => 'none',
        'bitmap-name' => undef
    );
    my $method = exists($options{to}) ? 'copy' : 'check';
    my $statistics = $volume->$method(
        expected => $expected,
        damaged => sub ($offset, $length) { push(@damage, [$offset, $length]) },
        %options,
    );
    return ($statistics, sort { $a->[0] <=> $b->[0] } @damage);
}

my $flipped = $image;
substr($flipped, $_, 1) ^.= "\x10" for 64 * $KiB + 5, 128 * $KiB - 1, 3 * $MiB, 6 * $MiB + 4607;
my @flips = ([64 * $KiB, 64 * $KiB], [3 * $MiB, 64 * $KiB], [6 * $MiB, 4608]);
my @damaged_data = (data => sub ($offset, $length) { substr($flipped, $offset, $length) });

subtest 'expected digests' => sub {
    my $file = "$dir/expected";
    open_volume(start(dirty_only => 0), 'bitmap-mode' => 'none', 'bitmap-name' => undef)
        ->copy(to => '/dev/null', digests => $file);
    my ($statistics, @damage) = damage_of(start(dirty_only => 0), [$file]);
    is_deeply(\@damage, [], 'equal data: no damage');
    is($statistics->{'bytes-read'}, $odd_size, 'equal data: everything was read');
    is($statistics->{'bytes-unknown'}, 0, 'equal data: every digest was known');
    ($statistics, @damage) = damage_of(start(dirty_only => 0, @damaged_data), [$file]);
    is_deeply(\@damage, \@flips, 'damaged data and zeroes are reported');
    is($statistics->{'bytes-damaged'}, 128 * $KiB + 4608, 'are counted');
    ($statistics, @damage)
        = damage_of(start(dirty_only => 0, @damaged_data), [$file], to => "$dir/restored");
    is_deeply(\@damage, \@flips, 'a copy reports the same damage');
    same(read_file("$dir/restored"), $flipped, 'the copy contains everything that was read');
    my $volume = open_volume(
        start(dirty_only => 0, @damaged_data),
        'bitmap-mode' => 'none',
        'bitmap-name' => undef
    );
    eval { $volume->check(expected => [$file], connections => 1) };
    like($@, qr/65536 bytes at offset 65536 do not match their digests/,
        'without a code ref: dies');
    is(ref($@) && $@->class, 'ContentError', 'the error has a class of its own');
};

subtest 'several files' => sub {
    my ($old, $new) = ("$dir/expected", "$dir/newer");
    open_volume(start(dirty => [@flips], @damaged_data))->copy(to => '/dev/null', digests => $new);
    my $server = start(dirty_only => 0, @damaged_data);
    my ($statistics, @damage) = damage_of($server, [$new, $old]);
    is_deeply(\@damage, [], 'the newest is right');
    ($statistics, @damage) = damage_of($server, [$old, $new]);
    is_deeply(\@damage, \@flips, 'the digests of the first file take precedence');
    ($statistics, @damage) = damage_of($server, [$new]);
    is_deeply(\@damage, [], 'blocks without a digest are not damaged');
    is($statistics->{'bytes-unknown'}, $odd_size - 128 * $KiB - 4608, 'they are counted');
    ($statistics, @damage) = damage_of(start(dirty_only => 0), [$new, $old], 'only-known' => 1);
    is_deeply(\@damage, \@flips, 'only the blocks of the first file are checked');
    is($statistics->{'bytes-read'}, 128 * $KiB + 4608, 'is read');
    my @progress;
    damage_of($server, [$new], 'only-known' => 1, progress => sub (@told) { @progress = @told });
    is_deeply(\@progress, [(128 * $KiB + 4608) x 2], 'progress counts this data');
};

# The blocks of 64 KiB that differ, as a map with one region for each.
sub differing ($one, $other) {
    return map { [$_, min(64 * $KiB, $odd_size - $_)] }
        grep { substr($one, $_, 64 * $KiB) ne substr($other, $_, 64 * $KiB) }
        map { $_ * 64 * $KiB } 0 .. ($odd_size - 1) / (64 * $KiB);
}

# Data over zeroes and zeroes over data, beside unchanged blocks, in the middle and at the end.
sub changed_image () {
    my $data = $image;
    substr($data, 256 * $KiB, 64 * $KiB) = "\0" x (64 * $KiB);
    substr($data, 320 * $KiB, 1) = 'x';
    substr($data, $_ * 192 * $KiB + 77, 3) = 'new' for 4 .. 20;
    substr($data, 2 * $MiB, 256 * $KiB) = "\0" x (256 * $KiB);
    substr($data, -1) = 'z';
    return $data;
}

# A volume with all of this data.
sub whole ($data) {
    my $server
        = start(dirty_only => 0, data => sub ($at, $length) { substr($data, $at, $length) });
    return open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
}

# Copies to a code ref, and returns the blocks with which it was called.
sub blocks_written ($data, %options) {
    my %blocks;
    whole($data)->copy(
        to => sub ($offset, $part) {
            die "other data at $offset\n" if substr($data, $offset, length($part)) ne $part;
            my @offsets = map { $offset + 4 * $KiB * $_ } 0 .. (length($part) - 1) / (4 * $KiB);
            $blocks{ int($_ / (64 * $KiB)) * 64 * $KiB } = 1 for @offsets;
        },
        %options,
    );
    return sort { $a <=> $b } keys %blocks;
}

subtest 'unchanged blocks are not written' => sub {
    my ($old, $new) = ($image, changed_image());
    substr($old, 320 * $KiB, 64 * $KiB) = "\0" x (64 * $KiB);
    my ($base, $part) = ("$dir/base-digests", "$dir/part-digests");
    whole($old)->copy(to => '/dev/null', digests => $base);
    my @differ = differing($old, $new);
    my $bytes = sum0(map { $_->[1] } @differ);
    for my $request (4 * $KiB, 256 * $KiB, $MiB) {
        unlink($part);
        my %options = (unchanged => [$base], connections => 4, 'request-size' => $request);
        write_file("$dir/over", $old);
        my $statistics = whole($new)->copy(to => "$dir/over", digests => $part, %options);
        same(read_file("$dir/over"), $new, "$request: a file");
        is_deeply(
            [$statistics->@{qw(bytes-read bytes-unchanged)}],
            [$odd_size, $odd_size - $bytes],
            "$request: everything is read"
        );
        is($statistics->{'bytes-written'} + $statistics->{'bytes-zero'}, $bytes, 'sums');
        is_deeply(slots_of($part), digests_of($new, \@differ), "$request: digests");
        my @offsets = map { $_->[0] } @differ;
        is_deeply([blocks_written($new, %options)], \@offsets, "$request: a code ref");
        my $target = PBA::Test::NBDServer->start(size => $odd_size, keep => 1);
        whole($new)->copy(to => $target->uri, %options);
        my $expected = "\xee" x $odd_size;
        substr($expected, $_->[0], $_->[1]) = substr($new, $_->[0], $_->[1]) for @differ;
        same($target->content, $expected, "$request: NBD");
    }
};

subtest 'unreadable blocks are damaged' => sub {
    my $server = start(dirty => [[0, 3 * $MiB], [3 * $MiB + 256 * $KiB, 2 * $MiB]]);
    my ($statistics, @damage) = damage_of(
        $server, ["$dir/expected"],
        to => "$dir/restored",
        connections => 1,
        'request-size' => 256 * $KiB,
    );
    my $lost = sum0(map { $_->[1] } @damage);
    is($lost, $odd_size - 5 * $MiB, 'ranges');
    my $data = $image;
    substr($data, $_->[0], $_->[1]) = "\0" x $_->[1] for @damage;
    same(read_file("$dir/restored"), $data, 'the rest was restored');
    eval {
        damage_of(start(dirty_only => 0, disconnect_at => 4 * $MiB),
            ["$dir/expected"], connections => 1);
    };
    like($@, qr/\S/, 'a lost connection is an error, not damage');
};

sub dies_like ($code, $pattern, $name) {
    my $done = eval { $code->(); 1 };
    return ok(!$done, $name) && like($@, $pattern, $name);
}

sub copy_to_null ($map, %options) {
    return open_volume(start(dirty => $maps{$map}))->copy(to => '/dev/null', %options);
}

subtest 'errors' => sub {
    dies_like(
        sub {
            copy_to_null('small blocks', digests => sub (@) { });
        },
        qr/region of 4096 bytes at offset 0 does not consist of whole blocks of 65536.*digest-block/,
        'regions of parts of blocks'
    );
    copy_to_null('small blocks', digests => sub (@) { }, 'digest-block' => 4 * $KiB);
    pass('smaller blocks help');
    dies_like(
        sub {
            copy_to_null('all', digests => sub (@) { die "enough\n" });
        },
        qr/\Aenough\n\z/,
        'the code ref dies'
    );
    dies_like(
        sub {
            damage_of(start(dirty_only => 0, @damaged_data),
                ["$dir/expected"], damaged => sub (@) { die "too much\n" });
        },
        qr/\Atoo much\n\z/,
        'the code ref for damage dies, too'
    );
    dies_like(
        sub { copy_to_null('all', digests => "$dir/none/such") },
        qr/cannot open .* No such file/,
        'the directory does not exist'
    );
    dies_like(sub { copy_to_null('all', digests => '/dev/full') }, qr{/dev/full}, 'not a file');
    dies_like(
        sub { copy_to_null('all', expected => ["$dir/restored"]) },
        qr/is not a file of digests/,
        'the file has no digests'
    );
};

subtest 'a pipe for a file of digests' => sub {
    POSIX::mkfifo("$dir/pipe", 0600) or die "$dir/pipe: $!\n";
    for my $option ([digests => "$dir/pipe"], [expected => ["$dir/pipe"]]) {
        local $SIG{ALRM} = sub { die "it hangs\n" };
        alarm(60);
        dies_like(sub { copy_to_null('all', @$option) }, qr!/pipe!, "$option->[0]: a pipe");
        alarm(0);
    }
};

subtest 'invalid files of digests' => sub {
    my $content = read_file("$dir/expected");
    my %bad = (
        'not a file of digests' => "\0$content",
        'later version' => $content =~ s/\n1/\n2/r,
        'is of a volume' => substr($content, 0, 32) . pack('Q>', 5) . substr($content, 40),
        'length' => substr($content, 0, -1),
    );
    for my $what (sort keys %bad) {
        my $file = write_file("$dir/bad", $bad{$what});
        dies_like(sub { copy_to_null('all', expected => [$file]) }, qr/$what/, "a file: $what");
    }
    dies_like(
        sub {
            copy_to_null(
                'all',
                expected => ["$dir/expected"],
                digests => sub (@) { },
                'digest-block' => 4096
            );
        },
        qr/in blocks of 65536, not/,
        'blocks of two sizes'
    );
};

subtest 'a copy that fails leaves no digests' => sub {
    unlink("$dir/half");
    my $server = start(dirty => $maps{all}, read_error => EIO, good_first => 2);
    eval { open_volume($server)->copy(to => '/dev/null', digests => "$dir/half", connections => 1) };
    like($@, qr/failed/, 'a copy that fails');
    dies_like(
        sub { copy_to_null('all', expected => ["$dir/half"]) },
        qr/is not a file of digests/,
        'leaves no file of digests'
    );
};

subtest 'errors of the option unchanged' => sub {
    my @unchanged = (unchanged => ["$dir/expected"]);
    dies_like(
        sub { copy_to_null('all', @unchanged, expected => ["$dir/expected"]) },
        qr/unchanged and expected exclude/,
        'options that exclude each other'
    );
    dies_like(
        sub { whole($image)->copy(to => "$dir/not-there", @unchanged) },
        qr/there is no .*not-there/,
        'a target that has no base'
    );
};

subtest 'a signal' => sub {
    unlink("$dir/half");
    for my $target ('/dev/null', sub (@) { }) {
        my $volume = open_volume(start(dirty => $maps{all}, delay => 0.02));
        local $SIG{ALRM} = sub { die "alarm\n" };
        Time::HiRes::ualarm(100_000);
        eval {
            $volume->copy(
                to => $target,
                digests => "$dir/half",
                'request-size' => 64 * $KiB,
                'bandwidth-limit' => $MiB
            );
        };
        is($@, "alarm\n", 'a signal ends the copy');
    }
};

subtest 'a file handle' => sub {
    my $file = write_file("$dir/disk", $image);
    my @left = $whole{'long and short'}->@*;
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    my $volume = PVE::BackupAccess::Volume->open(
        'disk',
        {
            size => $odd_size,
            'bitmap-mode' => 'new',
            'file-handle' => $fh,
            'next-dirty-region' => sub { @left ? shift(@left)->@* : () },
        },
    );
    my %found;
    $volume->copy(to => '/dev/null', digests => collector(\%found), discard => 0);
    is_deeply(\%found, digests_of($image, $whole{'long and short'}), 'digests');
};

done_testing();
