# Written data is read back during the copy, and compared with the digests of what was read.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Errno qw(EIO);
use File::Temp ();
use List::Util qw(sum0);
use POSIX ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::CopySource qw($image $odd_size %maps start write_file read_file same);
use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::QemuNbd qw(img);
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $device = 'disk';
my $dir = File::Temp->newdir('pba-check-XXXXXXXX', TMPDIR => 1);

# The maps that consist of whole blocks.
my @whole
    = ('one region', 'all', 'nothing', 'every other cluster', 'the odd end', 'long and short');

sub bytes_of ($map) {
    return sum0(map { $_->[1] } $map->@*);
}

sub target (%options) {
    return PBA::Test::NBDServer->start(
        size => $odd_size,
        export => 'disk',
        keep => 1,
        reads_back => 1,
        %options
    );
}

sub copy ($map, $to, %options) {
    return open_volume(start(dirty => $map))->copy(
        to => $to->uri,
        digests => sub (@) { },
        check => 1,
        %options,
    );
}

# The target's content of a map.
sub holds ($target, $map) {
    my $content = $target->content;
    return !grep { substr($content, $_->[0], $_->[1]) ne substr($image, $_->[0], $_->[1]) }
        $map->@*;
}

subtest 'all written data is read back' => sub {
    for my $name (@whole) {
        for my $no_multi (0, 1) {
            my $target = target(no_multi => $no_multi);
            my $found = copy($maps{$name}, $target);
            my $about = $name . ($no_multi ? ', a single connection' : '');
            is($found->{'bytes-checked'}, bytes_of($maps{$name}), $about);
            ok(holds($target, $maps{$name}), 'the target has the data');
            my %reads = map { $_->{connection} => 1 } $target->requests('read');
            my %writes = map { $_->{connection} => 1 } $target->requests('write');
            ok(
                $no_multi || !grep({ $writes{$_} } keys %reads),
                'the data is read back over a separate connection'
            );
            is(
                scalar(keys %reads),
                $name eq 'nothing' ? 0 : 1,
                'the data is read back over one connection'
            );
        }
    }
};

subtest 'no check without the option' => sub {
    my $target = target();
    my $found = copy($maps{all}, $target, check => 0);
    is($found->{'bytes-checked'}, 0, 'nothing');
    is(scalar($target->requests('read')), 0, 'nothing is read back');
    is($target->connections, 4, 'there is no connection for it');
};

subtest 'requests, blocks, connections, limits' => sub {
    my %cases = (
        'small requests' => { 'request-size' => 4 * $KiB },
        'small digests' => { 'digest-block' => 4 * $KiB },
        'large digests' => { 'digest-block' => 8 * $MiB },
        'large clusters' => { 'cluster-size' => 2 * $MiB },
        'one connection' => { connections => 1 },
        'many' => { connections => 16 },
        'a limit' => { 'bandwidth-limit' => 8 * $MiB },
        'progress' => { progress => sub (@) { } },
    );
    for my $name (sort keys %cases) {
        my $target = target();
        my $found = copy($maps{all}, $target, $cases{$name}->%*);
        is($found->{'bytes-checked'}, $odd_size, $name);
        ok(holds($target, $maps{all}), 'the target has the data');
    }
    my $start = time;
    copy([[0, 4 * $MiB]], target(), 'bandwidth-limit' => 4 * $MiB);
    cmp_ok(time - $start, '>', 0.5, 'a limit holds');
    for my $sizes ([512, 4096, 64 * $KiB], [4608, 4608, 46080]) {
        my $target = target(
            size => 8 * $MiB - 8 * $MiB % $sizes->[0],
            block_sizes => $sizes,
            strict_blocks => 1
        );
        my $found = eval { copy($maps{all}, $target) };
        is($found ? $found->{'bytes-checked'} : $@, $odd_size, "blocks of $sizes->[0]")
            if $sizes->[0] == 512;
    }
};

subtest 'a block beyond the end of the volume' => sub {
    my $target = target(
        size => $odd_size + 4096 - $odd_size % 4096,
        block_sizes => [4096, 4096, $MiB],
        strict_blocks => 1
    );
    is(copy($maps{all}, $target)->{'bytes-checked'}, $odd_size, 'is read back in whole ones');
};

subtest 'zeroes' => sub {
    my $size = 96 * $MiB;
    my $hole = [0, $size - $MiB];
    my $data = ("\0" x $hole->[1]) . PBA::Test::NBDServer::pattern($hole->[1], $MiB);
    my %source = (
        size => $size,
        dirty => [[0, $size]],
        dirty_only => 0,
        holes => [$hole],
        data => sub ($offset, $length) { substr($data, $offset, $length) },
    );
    my $try = sub (%options) {
        my $target = target(size => $size, %options);
        my $found = eval {
            open_volume(start(%source))
                ->copy(to => $target->uri, digests => sub (@) { }, check => 1);
        };
        my $error = $@;
        my $read = sum0(map { $_->{length} } $target->requests('read'));
        return ($found ? $found->{'bytes-checked'} : $error, $read);
    };
    is_deeply([$try->()], [$size, $size], 'are read');
    is_deeply([$try->(no_multi => 1)], [$size, $size], 'over the only connection');
    is_deeply([$try->(holes => [$hole])], [$size, $MiB], 'reported zeroes are not read');
    is_deeply([$try->(no_multi => 1, holes => [$hole])], [$size, $MiB], 'nor with one connection');
    my ($checked, $read) = $try->(holes => [[32 * $MiB, 16 * $MiB], [50 * $MiB + 512, 10 * $MiB]]);
    is($checked, $size, 'some zeroes reported: all are checked');
    cmp_ok($read, '<=', $size - 16 * $MiB, 'some zeroes reported: the rest is read');
    my ($error) = $try->(loses => [[70 * $MiB, 4096]]);
    like($error, qr/ 65536 bytes .*: 65536 at offset 73400320$/m, 'lost zeroes: an error');
    ($error) = $try->(holes => [[32 * $MiB, 32 * $MiB]], returns_wrong => [[65 * $MiB, 1]]);
    like($error, qr/ 65536 bytes .*: 65536 at offset 68157440$/m, 'wrong zeroes: an error');
    ($error) = $try->(allocation_error => EIO);
    is($error, $size, 'no allocation reported: all is read');
};

# { name => [options of the target, the error] } of targets that lose what was written.
my %lossy = (
    'a write is lost' => [{ loses => [[3 * $MiB, 64 * $KiB]] }, '65536 at offset 3145728'],
    'a sector is lost' => [{ loses => [[3 * $MiB + 512, 512]] }, '65536 at offset 3145728'],
    'another byte' => [{ returns_wrong => [[3 * $MiB + 70_000, 1]] }, '65536 at offset 3211264'],
    'two ranges' => [
        { returns_wrong => [[4 * $MiB, 1], [4 * $MiB + 128 * $KiB, 64 * $KiB + 1]] },
        '65536 at offset 4194304, 131072 at offset 4325376'
    ],
    'the last bytes' => [{ loses => [[$odd_size - 1, 1]] }, '4608 at offset 6291456'],
    'the first byte' => [{ returns_wrong => [[0, 1]] }, '65536 at offset 0'],
);

subtest 'a target with other data' => sub {
    for my $name (sort keys %lossy) {
        for my $no_multi (0, 1) {
            my ($options, $said) = $lossy{$name}->@*;
            my $target = target(no_multi => $no_multi, $options->%*);
            ok(!eval { copy($maps{all}, $target); 1 }, $name);
            like(
                $@,
                qr/\Adevice disk: the target lacks what was written to it - \d+ bytes .*: \Q$said\E$/,
                'is told'
            );
            is($@->class, 'ContentError', 'the error has a class');
            ok(!$target->requests('flush'), 'no flush was sent before the error');
        }
    }
};

subtest 'after a failed check, the file of digests is not valid' => sub {
    my $target = target(loses => [[0, 1]]);
    ok(!eval { copy($maps{all}, $target, digests => "$dir/bad"); 1 }, 'the copy fails');
    ok(!eval { open_volume(start(dirty => []))->check(expected => ["$dir/bad"]); 1 },
        'the file has no valid digests');
};

subtest 'failures while data is read back' => sub {
    my %fails = (
        'an error' => [
            { read_error => EIO },
            qr/reading back \d+ bytes at offset \d+ from nbd.* failed - Input/
        ],
        'an end' => [{ disconnect_at => 2 * $MiB }, qr/(?:reading|writing).* failed - /],
        'half a reply' => [{ disconnect_in => 'read' }, qr/(?:reading|writing).* failed - /],
        'a short answer' => [{ short_read => 512 }, qr/reading back .* failed - /],
        'no data' => [{ missing_data => 1 }, qr/reading back .* failed - /],
    );
    for my $name (sort keys %fails) {
        for my $no_multi (0, 1) {
            my ($options, $said) = $fails{$name}->@*;
            my $target = target(no_multi => $no_multi, $options->%*);
            ok(!eval { copy($maps{all}, $target); 1 }, $name);
            like($@, $said, 'is told');
            is($@->class, 'NbdError', 'the error has a class');
        }
    }
};

subtest 'a signal ends a hang' => sub {
    for my $no_multi (0, 1) {
        my $target = target(no_multi => $no_multi, hang_at => 2 * $MiB);
        my $volume = open_volume(start(dirty => $maps{all}));
        my $start = time;
        local $SIG{ALRM} = sub { die "interrupted\n" };
        POSIX::alarm(1);
        ok(
            !eval {
                $volume->copy(to => $target->uri, digests => sub (@) { }, check => 1);
                1;
            },
            'the copy ends'
        );
        is($@, "interrupted\n", "the handler's own exception");
        cmp_ok(time - $start, '<', 20, 'soon');
        $volume = open_volume(start(dirty => $maps{all}));
        ok($volume->copy(to => target()->uri, digests => sub (@) { }, check => 1), 'another copy');
    }
};

subtest 'unchanged blocks are neither written nor read back' => sub {
    my $target = target();
    copy($maps{all}, $target, digests => "$dir/all");
    my $changed = $image;
    for my $at (64 * $KiB, 192 * $KiB, 2 * $MiB) {
        substr($changed, $at, 5) = 'other';
    }
    my $before = scalar($target->requests('read'));
    my $found = open_volume(
        start(
            dirty => $maps{all},
            data => sub ($offset, $length) { substr($changed, $offset, $length) }
        )
    )->copy(
        to => $target->uri,
        digests => "$dir/new",
        unchanged => ["$dir/all"],
        check => 1
    );
    is($found->{'bytes-checked'}, 3 * 64 * $KiB, 'changed blocks are read back');
    my @reads = $target->requests('read');
    is_deeply(
        [sort { $a <=> $b } map { $_->{offset} } @reads[$before .. $#reads]],
        [64 * $KiB, 192 * $KiB, 2 * $MiB],
        'nothing else is read back'
    );
    same($target->content, $changed, 'the target has the data');
    ok(
        !eval {
            copy($maps{all}, $target, digests => "$dir/none", unchanged => ["$dir/new"]);
            copy(
                [[64 * $KiB, 192 * $KiB]], target(loses => [[192 * $KiB, 1]]),
                digests => "$dir/none",
                unchanged => ["$dir/new"]
            );
        },
        'a lost changed block'
    );
    like($@, qr/65536 at offset 196608$/m, 'is told');
};

subtest 'an increment' => sub {
    my $target = target();
    copy($maps{all}, $target, digests => "$dir/chain");
    my $found = copy($maps{'every other cluster'}, $target, digests => "$dir/chain");
    is($found->{'bytes-checked'}, bytes_of($maps{'every other cluster'}), 'is read back');
};

subtest 'a target that advertises zeroing but cannot zero' => sub {
    my $target = target(zero_error => POSIX::EINVAL());
    is(copy($maps{all}, $target)->{'bytes-checked'}, $odd_size, 'has the data read back');
    ok(holds($target, $maps{all}), 'the target has the data');
};

subtest 'damage that cannot be read' => sub {
    my $server = start(dirty => $maps{all}, read_error => EIO, good_first => 3);
    my $target = target();
    copy($maps{all}, target(), digests => "$dir/known");
    my $damaged = 0;
    my $found = open_volume($server)->copy(
        to => $target->uri,
        digests => sub (@) { },
        expected => ["$dir/known"],
        damaged => sub ($offset, $length) { $damaged += $length },
        check => 1
    );
    is($found->{'bytes-checked'}, $odd_size - $damaged, 'has no digest');
};

subtest 'a real server' => sub {
    my $file = "$dir/real.qcow2";
    img(qw(create -q -f qcow2), $file, $odd_size);
    my $server = PBA::Test::QemuNbd->start(file => $file, format => 'qcow2');
    for my $name (@whole) {
        my $found = copy($maps{$name}, $server, 'cluster-size' => 64 * $KiB);
        is($found->{'bytes-checked'}, bytes_of($maps{$name}), $name);
    }
    my $size = 64 * $MiB;
    img(qw(create -q -f qcow2), "$dir/thin.qcow2", $size);
    my $thin = PBA::Test::QemuNbd->start(file => "$dir/thin.qcow2", format => 'qcow2');
    my $source = start(
        size => $size,
        dirty => [[0, $size]],
        dirty_only => 0,
        holes => [[0, $size]],
        data => sub ($offset, $length) { "\0" x $length },
    );
    my $found
        = open_volume($source)->copy(to => $thin->uri, digests => sub (@) { }, check => 1);
    is($found->{'bytes-checked'}, $size, 'zeroes');
};

subtest 'wrong options' => sub {
    my $volume = open_volume(start(dirty => $maps{all}));
    my %wrong = (
        "check needs an NBD URI as the target 'to'" =>
            { to => "$dir/file", digests => "$dir/x", check => 1, 'without-base' => 1 },
        'check needs digests' => { to => target()->uri, check => 1 },
    );
    for my $said (sort keys %wrong) {
        ok(!eval { $volume->copy($wrong{$said}->%*); 1 }, $said);
        like($@, qr/\Q$said\E/, 'is said');
    }
};

done_testing;
