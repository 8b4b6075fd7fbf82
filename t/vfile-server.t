# The server of virtual files with an NBD server that records its requests, and misbehaves.

use v5.36;
use utf8;

use Fcntl qw(O_RDONLY);
use FindBin;
use lib "$FindBin::Bin/lib";
use List::Util ();
use POSIX qw(EINTR EIO);
use Test::More;
use Time::HiRes qw(alarm sleep time);

use PVE::BackupAccess::Volume;

use PBA::Test::Handle qw(fallocate);
use PBA::Test::NBDServer qw(pattern);
use PBA::Test::VFile;

my $missing = PBA::Test::Handle->missing;
plan(skip_all => $missing) if defined($missing);

my $kib = 1024;
my $mib = 1024 * $kib;
my $size = 64 * $mib;
my $odd_size = $size + 512;
my $max_memory_kib = 64 * $kib;

sub serve (%opt) {
    my $server = PBA::Test::NBDServer->start(size => $size, %opt);
    my $file = PBA::Test::VFile->start(
        socket => $server->socket_path,
        device => $server->{export},
        size => $opt{vfile_size} // $server->{size},
        bitmap => $opt{dirty} ? $server->{bitmap} : undef,
        kind => $opt{kind},
    );
    return ($server, $file);
}

sub reader ($handle, $piece) {
    return PBA::Test::Handle->new({ 'file-handle' => $handle }, $piece);
}

sub is_pattern ($reader, $offset, $length, $name) {
    my $data = eval { $reader->pread($offset, $length) } // '';
    ok($data eq pattern($offset, $length), $name) or diag($@);
}

# The error of a read that must fail soon.
sub error_of ($reader, $offset, $length) {
    my $begin = time();
    my $done = eval { $reader->pread($offset, $length); 1 };
    my $error = $! + 0;
    cmp_ok(time() - $begin, '<', 5, "at $offset: the answer does not take long");
    return $done ? undef : $error;
}

sub wait_until ($code) {
    for (1 .. 500) {
        return 1 if $code->();
        sleep(0.01);
    }
    return 0;
}

sub reads ($server) {
    return map { [$_->{offset}, $_->{offset} + $_->{length}] } $server->requests('read');
}

# ---- content ----

sub check_content () {
    my $name = "disk, 'o=1' \"%s\" \\ ü";
    utf8::encode(my $bytes = $name);
    my ($server, $file) = serve(size => $odd_size, export => $bytes);
    my $handle = $file->handle;
    is(-s $handle, $odd_size, 'an odd name, an odd size');
    for my $piece (512, 1000, 64 * $kib, $mib, 4 * $mib) {
        is_pattern(reader($handle, $piece), 0, 2 * $mib, "from the start in pieces of $piece");
    }
    my $reader = reader($handle, 8 * $mib);
    is_pattern($reader, $size - $mib, $mib + 512, 'a read at the odd end');
    is_pattern($reader, 12345, 1, 'a read of one byte');
    is_pattern($reader, 12345, 3 * $mib + 1, 'a read with both ends unaligned');
    srand(5);
    for (1 .. 50) {
        my $offset = int(rand($size));
        my $length = 1 + int(rand(3 * $mib));
        $length = $odd_size - $offset if $length > $odd_size - $offset;
        is_pattern($reader, $offset, $length, "$length at $offset");
    }
    cmp_ok($server->max_in_flight, '>', 1, 'several requests in flight');
    undef $handle;
    undef $reader;
    is($file->end, 0, 'the server ends normally');
    ok(!-e $file->path, 'the file is removed');
}

# As QEMU before 8.0 requires, which returns wrong data for longer reads of a snapshot.
sub check_by_clusters () {
    my ($server, $file) = serve(description => 'pba: read by clusters of 65536 bytes');
    my $reader = reader($file->handle, $mib);
    is_pattern($reader, 4096, 4 * $mib, 'by clusters: the data is right');
    my @crossing = grep { int($_->[0] / 65536) != int(($_->[1] - 1) / 65536) } reads($server);
    is_deeply(\@crossing, [], 'by clusters: no read crosses the edge of a cluster');
    my @requests = $server->requests('read');    # at once, because reading ahead goes on
    my $whole = grep { $_->{flags} & 4 } @requests;
    is($whole, scalar(@requests), 'by clusters: all reads have the flag DF');
}

# Reads in a separate process, and returns when the server has got the request.
sub start_reading ($server, $file, $offset, $length) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        eval { reader($file->handle, $length)->pread($offset, $length) };
        POSIX::_exit(0);
    }
    wait_until(
        sub {
            grep { $_->[0] == $offset } reads($server);
        }
    );
    return $pid;
}

# QEMU before 9.2 aborts if it gets a query for a part that it is still reading.
sub check_no_overlap () {
    my @by_cluster = (description => 'pba: read by clusters of 65536 bytes');
    my $piece = 64 * $kib;
    my ($server, $file) = serve(@by_cluster, delay => 0.5);
    my $handle = $file->handle;
    my $pid = start_reading($server, $file, 0, $mib);
    fallocate($handle, 3, 0, $piece) or die "fallocate: $!\n";
    is_pattern(reader($handle, $piece), $piece, $piece, 'beside a discard of what is being read');
    waitpid($pid, 0);
    is_deeply([$server->overlapping_reads], [], 'nothing is asked for twice at a time');

    ($server, $file) = serve(@by_cluster, hang_at => 2 * $piece);
    $handle = $file->handle;
    $pid = start_reading($server, $file, 2 * $piece, $piece);
    is_pattern(reader($handle, $piece),
        0, 2 * $piece, 'a sequential read up to the range of another read');
    is_pattern(reader($handle, $piece), 32 * $mib, $piece, 'a read elsewhere');
    kill('KILL', $pid);
    waitpid($pid, 0);
    is_deeply([$server->overlapping_reads], [], 'nothing is asked for twice at a time');
}

# ---- reading ahead ----

# Whether there is read-ahead at all: requests are larger than the reads.
sub ahead_of ($server, $piece) {
    return scalar(grep { $_->[1] - $_->[0] > $piece } reads($server));
}

sub check_read_ahead () {
    my ($server, $file) = serve();
    my $handle = $file->handle;
    my $piece = 16 * $kib;
    my $reader = reader($handle, $piece);
    is_pattern($reader, 0, 8 * $mib, 'a sequential reader');
    my $before = ahead_of($server, $piece);
    cmp_ok($before, '>', 6, 'is read ahead');
    cmp_ok(scalar(() = reads($server)), '<', 32, 'there are few requests');
    is_pattern($reader, 0, 8 * $mib, 'a sequential reader that starts again');
    cmp_ok(ahead_of($server, $piece), '>', $before + 6, 'is read ahead again');
    is_pattern($reader, 40 * $mib, 8 * $mib, 'a sequential reader at another position');
    cmp_ok(ahead_of($server, $piece), '>', $before + 12, 'the other position is read ahead, too');
    my $count = () = reads($server);

    for my $offset (map { ($_ * 37 % 61) * $mib } 1 .. 60) {
        $reader->pread($offset, $piece);
    }
    cmp_ok(
        (() = reads($server)) - $count,
        '<=',
        60 + 32 + 16,
        'random reads are not read ahead after a while'
    );
}

# Data that was read ahead is used even if the reader discards what it has read.
sub check_discarding_reader () {
    my ($server, $file) = serve();
    my $handle = $file->handle;
    my $piece = 64 * $kib;
    my $reader = reader($handle, $piece);
    for my $offset (map { $_ * $piece } 0 .. 127) {
        is_pattern($reader, $offset, $piece, "at $offset") if $offset % $mib == 0;
        $reader->pread($offset, $piece);
        next if $offset % (2 * $piece) == 0;    # in pairs, the second one first
        for my $at ($offset, $offset - $piece) {
            fallocate($handle, 3, $at, $piece) or die "fallocate: $!\n";
        }
    }
    my @reads = reads($server);
    cmp_ok(scalar(@reads), '<', 48, 'read and discarded in turn: few requests');
    my $sum = 0;
    $sum += $_->[1] - $_->[0] for @reads;
    cmp_ok($sum, '<=', 8 * $mib + 6 * $mib, 'hardly anything is read twice');
}

# Regions of odd lengths, some of them discarded before they are read: no request may touch clean or discarded
# parts, or cross an edge. The server also answers such requests with an error.
sub check_edges () {
    my @dirty = map { [$_ * $mib, 64 * $kib * (1 + $_ % 7)] } 0 .. 63;
    push(@dirty, [40 * $mib + 8 * 64 * $kib, 4 * 64 * $kib]);
    @dirty = sort { $a->[0] <=> $b->[0] } @dirty;
    for my $piece (64 * $kib, $mib) {
        my ($server, $file) = serve(dirty => \@dirty, dirty_only => 1);
        my $reader = reader($file->handle, $piece);
        my %gone = map { $dirty[$_][0] => 1 } grep { $_ % 10 == 5 } 0 .. $#dirty;
        my $good = 0;
        for my $i (0 .. $#dirty) {
            my ($offset, $length) = $dirty[$i]->@*;

            # The discarded range is a little ahead of the reader, where data may have been read ahead.
            my $ahead = $dirty[$i + 3];
            $reader->discard($ahead->@*) if $ahead && $gone{ $ahead->[0] };
            next if $gone{$offset};
            my $data = eval { $reader->pread($offset, $length) } // '';
            $good++ if $data eq pattern($offset, $length);
            $reader->discard($offset, $length) if $i % 2;
        }
        is($good, @dirty - keys %gone, "pieces of $piece: all regions have their data");
        my (@trimmed, $bad);
        for my $request ($server->requests) {
            my ($begin, $end) = ($request->{offset}, $request->{offset} + $request->{length});
            push(@trimmed, [$begin, $end]) if $request->{command} eq 'trim';
            next if $request->{command} ne 'read';
            my $inside = grep { $_->[0] <= $begin && $end <= $_->[0] + $_->[1] } @dirty;
            $bad //= "$begin to $end"
                if !$inside || grep { $_->[0] < $end && $begin < $_->[1] } @trimmed;
        }
        is($bad, undef, "pieces of $piece: no request leaves a region or reads discarded data");
        cmp_ok($server->max_in_flight, '>', 1, "pieces of $piece: several are in flight");
        is(error_of($reader, $dirty[1][0], 512), EIO, 'discarded: an I/O error');
        is(error_of($reader, 900 * $kib, 512), EIO, 'clean: an I/O error');
        is_pattern($reader, $dirty[0][0], 512, 'the rest can be read');
    }
}

sub check_discard () {
    my ($server, $file) = serve(size => $odd_size);
    my $handle = $file->handle;
    my $keep = 3;
    my $at = 64 * $kib;
    ok(fallocate($handle, $keep, $at + 1, 3 * $at), 'an unaligned discard');
    ok(fallocate($handle, $keep, $at + 1, $at), 'less than a cluster');
    ok(fallocate($handle, $keep, $odd_size - 512, 512), 'the odd end');
    ok(fallocate($handle, $keep, $odd_size - 512, 1 << 40), 'a discard beyond the odd end');
    wait_until(sub { (() = $server->requests('trim')) >= 3 });
    my @trims = map { [$_->{offset}, $_->{length}] } $server->requests('trim');
    is_deeply(
        \@trims,
        [[2 * $at, 2 * $at], [$odd_size - 512, 512], [$odd_size - 512, 512]],
        'whole clusters only'
    );
    ok(!fallocate($handle, $_, 0, $at), "mode $_ is refused") for 0, 1, 2, 16;
}

# QEMU before 9.2 must not get queries for what it is reading. The server of an image gets one, so that it keeps the
# memory of requests, which must be smaller than the answer.
sub check_status () {
    my ($server, $file) = serve(holes => []);
    is_pattern(reader($file->handle, $mib), 0, $mib, 'data');
    is_deeply([$server->requests('block-status')], [], 'is read without any block status');

    ($server, $file) = serve(holes => [], no_trim => 1, kind => 'image');
    is_pattern(reader($file->handle(O_RDONLY), 4 * $mib), 0, 8 * $mib, 'an image');
    is(scalar(() = $server->requests('block-status')), 1, 'is read after one block status');
    my $longest = List::Util::max(map { $_->{length} } $server->requests('read'));
    is($longest, 512 * $kib, 'and by less than 1 MiB');
}

# A discard is answered before it is done.
sub check_early_discard () {
    my ($server, $file) = serve(hang_trim_at => 8 * $mib);
    my $reader = reader($file->handle, 64 * $kib);
    ok(
        eval { $reader->discard(8 * $mib, 64 * $kib); 1 },
        'a discard that hangs does not block its caller'
    );
    is(error_of($reader, 8 * $mib + 512, 512), EIO, 'the discarded range is unreadable at once');
    is_pattern($reader, 9 * $mib, 64 * $kib, 'the rest can be read');

    ($server, $file) = serve(trim_error => EIO);
    $reader = reader($file->handle, 64 * $kib);
    ok(eval { $reader->discard(0, 64 * $kib); 1 }, 'a discard that will fail');
    ok(
        wait_until(
            sub {
                !eval { $reader->discard($mib, 64 * $kib); 1 }
            }
        ),
        'the next discard reports the failure'
    );
    is($! + 0, EIO, 'the error is an I/O error');
    is_pattern($reader, 0, $mib, 'data that could not be discarded can be read');
}

# ---- errors ----

sub check_errors () {
    my ($server, $file) = serve(read_error => EIO, good_first => 40);
    my $reader = reader($file->handle, 64 * $kib);
    my $failed = grep {
        !eval { $reader->pread($_ * 64 * $kib, 64 * $kib); 1 }
    } 0 .. 1023;
    cmp_ok($failed, '>', 0, 'reads fail');
    is(error_of($reader, 0, 512), EIO, 'the error is an I/O error');

    for my $kind (qw(short_read missing_data)) {
        my ($bad, $over) = serve($kind => 512);
        is(error_of(reader($over->handle, $mib), 0, 64 * $kib), EIO, "$kind: an I/O error");
    }
    for my $kind (qw(disconnect_at hang_at)) {
        my ($bad, $over) = serve($kind => 8 * $mib);
        my $loop = reader($over->handle, 64 * $kib);
        my ($interrupted, $error) = (0);
        local $SIG{ALRM} = sub { $interrupted++ };
        alarm($kind eq 'hang_at' ? 2 : 60);
        eval { $loop->pread(0, 16 * $mib); 1 } or $error = $! + 0;
        alarm(0);
        is($error, $kind eq 'hang_at' ? EINTR : EIO, "$kind: the reader gets an error");
        is(
            $interrupted,
            $kind eq 'hang_at' ? 1 : 0,
            "$kind: only a signal ends it if nothing arrives"
        );
        my $begin = time();
        is($over->end, 0, "$kind: the server ends");
        cmp_ok(time() - $begin, '<', 2, "$kind: the server ends within 2 seconds");
    }
}

sub check_refusals () {
    my $server = PBA::Test::NBDServer->start(size => $size);
    my %good = (socket => $server->socket_path, device => $server->{export}, size => $size);
    for my $case (
        [{ size => $size + 512 }, qr/has $size bytes instead of/],
        [{ device => 'another' }, qr/connecting failed/],
        [{ socket => '/nonexistent/socket' }, qr/connecting failed/],
        )
    {
        my ($change, $pattern) = $case->@*;
        ok(!eval { PBA::Test::VFile->start(%good, $change->%*); 1 }, 'refused');
        like($@, $pattern, 'the error says why');
    }
}

sub check_memory () {
    my ($server, $file) = serve();
    my @pids;
    for my $number (1 .. 100) {
        my $pid = fork() // die "fork: $!\n";
        if (!$pid) {
            my $reader = reader($file->handle, 4 * $mib);
            my $offset = $number * 7 % 15 * 4 * $mib + $number * 512;
            my $data = eval { $reader->pread($offset, 4 * $mib) } // '';
            POSIX::_exit($data eq pattern($offset, 4 * $mib) ? 0 : 1);
        }
        push(@pids, $pid);
    }
    my $good = grep { waitpid($_, 0) == $_ && $? == 0 } @pids;
    is($good, 100, 'a hundred readers at a time');
    cmp_ok($file->peak_kib, '<=', $max_memory_kib, 'within 64 MiB: ' . $file->peak_kib . ' KiB');
}

sub opener ($handle) {
    return sub ($code) {
        PVE::BackupAccess::Volume->open(
            'disk',
            {
                size => $size,
                'bitmap-mode' => 'reuse',
                'file-handle' => $handle,
                'next-dirty-region' => $code,
            }
        );
    };
}

# What the class Volume makes of such a hash, whatever its code ref returns.
sub check_volume () {
    my ($server, $file) = serve();
    my $handle = $file->handle;
    my $open = opener($handle);
    my @regions = ([0, 512], [512, 1], [$size - 1, 1]);
    my $volume = $open->(sub { @regions ? shift(@regions)->@* : undef });
    is_deeply(
        [$volume->dirty_regions(9)],
        [0, 512, 512, 1, $size - 1, 1],
        'regions in the order of the map'
    );
    is_deeply([$volume->next_dirty_region], [], 'the end of the regions');
    my $data = $volume->pread(1000, 10 * $mib);
    ok($data eq pattern(1000, 10 * $mib), 'the data');
    check_bad_regions($open);
    close($handle);
    is(length($volume->pread(0, 512)), 512, 'the volume has the file open by itself');
    ok(
        !eval {
            $open->(sub { });
            1;
        },
        'a closed handle'
    );
    like("$@", qr/must be an open file handle/, 'is refused');
}

sub check_bad_regions ($open) {
    for my $case (
        [sub { die { my => 'own' } }, undef],
        [sub { 5 }, qr/not a region/],
        [sub { (0, 0) }, qr/not a region/],
        [sub { ('x', 1) }, qr/not a region/],
        [sub { (undef, undef) }, qr/not a region/],
        [sub { ($size, 1) }, qr/cannot begin at offset $size with length 1/],
        [sub { (1, $size) }, qr/cannot begin at/],
        )
    {
        my ($code, $pattern) = $case->@*;
        my $volume = $open->($code);
        ok(!eval { $volume->next_dirty_region; 1 }, 'a bad region');
        $pattern
            ? like("$@", $pattern, 'is refused')
            : is(ref($@), 'HASH', 'an exception arrives unchanged');
        ok(!eval { $volume->next_dirty_region; 1 }, 'the next call is not the end of the map');
    }
}

check_content();
check_by_clusters();
check_no_overlap();
check_volume();
check_read_ahead();
check_discarding_reader();
check_edges();
check_discard();
check_early_discard();
check_status();
check_errors();
check_refusals();
check_memory();
done_testing;
