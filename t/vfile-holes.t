# A virtual file reports its zeroes (lseek: SEEK_DATA, SEEK_HOLE), and only them.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use File::Temp ();
use List::Util qw(max min sum0);
use POSIX qw(EINVAL);
use Test::More;
use Time::HiRes qw(sleep time);

use PVE::BackupAccess::Volume;

use PBA::Test::Backend;
use PBA::Test::Handle;
use PBA::Test::NBDServer;
use PBA::Test::VFile;

my $missing = PBA::Test::Handle->missing;
plan(skip_all => $missing) if defined($missing);

my ($SEEK_DATA, $SEEK_HOLE) = (3, 4);
my $kib = 1024;
my $mib = 1024 * $kib;
my $block = 64 * $kib;    # holes begin and end at a multiple of it
my $min_hole = 256 * $kib;
my $ahead = 5 * $mib;     # may be read ahead before a hole is known
our $size = 96 * $mib + 512;

my $seed = $ENV{PBA_SEED} // int(rand(2**31));
note("PBA_SEED=$seed");
srand($seed);

# [offset, length] in order, of sizes around the reported minimum, at any sector.
sub random_holes () {
    my @holes;
    my $at = int(rand(2)) * 512 * int(rand(4096));
    while ($at < $size) {
        my $length = 512 * (1 + int(rand(int(2**rand(15)))));
        push(@holes, [$at, min($length, $size - $at)]);
        $at += $length + 512 * (1 + int(rand(int(2**rand(13)))));
    }
    return \@holes;
}

# The holes that readers are told about.
sub told_of ($holes) {
    return grep { $_->[1] - $_->[0] >= $min_hole } map {
        my ($begin, $end) = ($_->[0], $_->[0] + $_->[1]);
        [
            $block * int(($begin + $block - 1) / $block),
            $end == $size ? $end : $block * int($end / $block)
        ]
    } @$holes;
}

sub content ($holes) {
    my $data = "\xa5" x $size;
    substr($data, $_->[0], $_->[1]) = "\0" x $_->[1] for @$holes;
    return $data;
}

sub serve ($holes, %more) {
    my $data = content($holes);
    my $server = PBA::Test::NBDServer->start(
        size => $size,
        holes => $holes,
        data => sub ($offset, $length) { substr($data, $offset, $length) },
        %more,
    );
    my $file = PBA::Test::VFile->start(
        socket => $server->socket_path,
        device => $server->{export},
        size => $size,
        bitmap => $more{dirty} ? $server->{bitmap} : undef,
    );
    return ($server, $file, $data);
}

# undef and $! on an error.
sub seek_to ($handle, $offset, $whence) {
    my $at = sysseek($handle, $offset, $whence);
    return defined($at) ? $at + 0 : undef;
}

# [begin, end] of all holes that a pass through the file finds.
sub walk ($handle) {
    my @holes;
    my $at = 0;
    while ($at < $size) {
        my $hole = seek_to($handle, $at, $SEEK_HOLE) // die "SEEK_HOLE $at: $!\n";
        my $data = $hole < $size ? seek_to($handle, $hole, $SEEK_DATA) : $size;
        $data //= $!{ENXIO} ? $size : die "SEEK_DATA $hole: $!\n";
        push(@holes, [$hole, $data]) if $hole < $size;
        $at = $data;
    }
    return @holes;
}

# Whether an answer is true: only zeroes are skipped, and what is reported as a hole is one; and whether it is
# useful: all holes that a pass through the file would find are reported, except for the block of the query.
sub is_true ($told, $data, $offset, $whence, $answer) {
    my ($next) = grep { $_->[1] > $offset } @$told;
    my $end = $answer // $size;
    if ($whence == $SEEK_DATA) {
        return substr($data, $offset, $end - $offset) !~ m/[^\0]/;
    }
    return 0 if substr($data, $end, min($block - $end % $block, $size - $end)) =~ m/[^\0]/;
    my ($whole) = grep { $_->[0] >= $offset } @$told;
    my $inside = $next && $next->[0] < $offset && $next->[1] - $offset >= $min_hole + $block;
    my $latest = $inside ? $offset + $block : $whole ? $whole->[0] : $size;
    return $end >= $offset && $end <= $latest;
}

sub read_at ($handle, $offset, $length) {
    my $data = '';
    sysseek($handle, $offset, 0) // die "sysseek: $!\n";
    while (length($data) < $length) {
        my $got = sysread($handle, $data, $length - length($data), length($data));
        die $got // $! if !$got;
    }
    return $data;
}

sub all_is_data ($handle, $name) {
    for my $offset (0, 8 * $mib, 40 * $mib, $size - 512) {
        is(seek_to($handle, $offset, $SEEK_DATA), $offset, "$name: data at $offset");
        is(seek_to($handle, $offset, $SEEK_HOLE), $size, "$name: there is no hole from $offset on");
    }
}

# ---- reported holes ----

sub check_walks () {
    my $holes = random_holes();
    my @told = told_of($holes);
    my ($server, $file, $data) = serve($holes);
    my $handle = $file->handle;
    cmp_ok(scalar(@told), '>', 2, scalar(@told) . ' holes');
    is_deeply([walk($handle)], \@told, 'the holes from beginning to end');
    is_deeply([walk($handle)], \@told, 'the holes in a second pass');
    for (1 .. 300) {
        my $offset
            = rand() < 0.3
            ? max(0, $told[rand(@told)][int(rand(2))] - int(rand(2)))
            : int(rand($size));
        next if $offset >= $size;
        my $whence = rand() < 0.5 ? $SEEK_DATA : $SEEK_HOLE;
        my $answer = seek_to($handle, $offset, $whence);
        die "at $offset: $!\n" if !defined($answer) && !($whence == $SEEK_DATA && $!{ENXIO});
        next if is_true(\@told, $data, $offset, $whence, $answer);
        fail("at $offset with $whence: " . ($answer // 'ENXIO'));
        last;
    }
    ok(!defined(seek_to($handle, $size, $SEEK_DATA)) && $!{ENXIO}, 'nothing behind the end');
}

# Reads inside of reported holes, except for read-ahead before the report.
sub reads_inside ($server, @told) {
    my @reads = map { [$_->{offset}, $_->{offset} + $_->{length}] } $server->requests('read');
    return grep {
        my $read = $_;
        grep { $read->[0] >= $_->[0] + $ahead && $read->[1] <= $_->[1] } @told
    } @reads;
}

# A reader that skips holes gets the same content as one that does not, and no read is made inside of them.
sub check_content () {
    my $holes = random_holes();
    my @told = told_of($holes);
    my ($server, $file, $data) = serve($holes);
    my $handle = $file->handle;
    my $copy = "\0" x $size;
    for (my $at = 0; defined($at = seek_to($handle, $at, $SEEK_DATA));) {
        my $end = seek_to($handle, $at, $SEEK_HOLE);
        while ($at < $end) {
            my $length = min($end - $at, 4 * $mib);
            substr($copy, $at, $length) = read_at($handle, $at, $length);
            $at += $length;
        }
        last if $at >= $size;
    }
    ok($copy eq $data, 'a reader that passes over the holes has all');
    is(scalar(reads_inside($server, @told)), 0, 'little of a hole is read, ahead');
    for my $offset (0, map { max(0, $_->[0] - $mib) } @told[0 .. min(3, $#told)]) {
        my $length = min(3 * $mib, $size - $offset);
        ok(read_at($handle, $offset, $length) eq substr($data, $offset, $length),
            "a plain read at $offset");
    }
}

# ---- programs ----

# Programs that look at the number of blocks before they ask for holes.
sub check_programs () {
    my $holes = random_holes();
    my @told = told_of($holes);
    my $tmp = File::Temp->newdir('pba-holes-XXXXXXXX', TMPDIR => 1);
    my %programs = (
        'cp --sparse=auto' => sub ($path) {
            return ('cp', '--sparse=auto', $path, "$tmp/copy");
        },
        'tar -S' =>
            sub ($path) { return (qw(tar -S -cf), "$tmp/copy", '-C', '/', substr($path, 1)) },
    );
    for my $name (sort keys %programs) {
        my ($server, $file, $data) = serve($holes);
        is(system($programs{$name}->($file->{path})), 0, "$name reads the file");
        is(scalar(reads_inside($server, @told)), 0, "$name: little of a hole is read, ahead");
        next if $name =~ m/tar/;
        ok(slurp("$tmp/copy") eq $data, "$name: the copy is the disk");
    }
}

# Programs may take a file without blocks as one without data.
sub check_small_disks () {
    my $tmp = File::Temp->newdir('pba-holes-XXXXXXXX', TMPDIR => 1);
    for my $length (512, 1024, 4608) {
        local $size = $length;
        my ($server, $file, $data) = serve([]);
        my $name = "a disk of $length bytes";
        cmp_ok((stat($file->{path}))[12], '>', 0, "$name has blocks");
        is(system(qw(tar -P -S -cf), "$tmp/tar", $file->{path}), 0, "$name: tar -S reads it");
        my $restored = qx(tar -P -x -O -f $tmp/tar);
        ok($restored eq $data, "$name: the archive has its data");
    }
}

# ---- a copy ----

sub slurp ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# The statistics of a copy of the regions over the handle, to a file with other content.
sub copy_over ($handle, $old, @regions) {
    my $target = File::Temp->new;
    syswrite($target, $old) // die "write: $!\n";
    my $volume = PVE::BackupAccess::Volume->open(
        'disk',
        {
            size => $size,
            'bitmap-mode' => 'new',
            'file-handle' => $handle,
            'next-dirty-region' => sub { return (shift(@regions) // [])->@* },
        }
    );
    sysseek($handle, 12345 * 512, 0);
    my $statistics = $volume->copy(to => "$target");
    is(sysseek($handle, 0, 1), 12345 * 512, "the caller's place in the file stays");
    return ($statistics, slurp("$target"));
}

sub sum (@ranges) {
    return sum0(map { $_->[1] - $_->[0] } @ranges);
}

sub check_copy () {
    my $holes = random_holes();
    my @told = told_of($holes);
    my ($server, $file, $data) = serve($holes);
    my ($statistics, $got) = copy_over($file->handle, "\xee" x $size, [0, $size]);
    ok($got eq $data, 'a copy of all: the data');
    is(scalar(reads_inside($server, @told)), 0, 'a copy of all: little of a hole is read, ahead');
    cmp_ok($statistics->{'bytes-zero'}, '>=', sum(@told), 'a copy of all: holes are zeroes');

    # Regions that begin and end in holes; long and short ones alternate.
    my @regions = grep { $_->[0] + $_->[1] <= $size }
        map { [$_ * 24 * $mib, rand() < 0.7 ? 20 * $mib : 64 * $kib] } 0 .. 3;
    my $expected = "\xee" x $size;
    substr($expected, $_->[0], $_->[1]) = substr($data, $_->[0], $_->[1]) for @regions;
    (undef, $got) = copy_over($file->handle, "\xee" x $size, @regions);
    ok($got eq $expected, 'a copy of regions: only the regions were written');

    my $sparse = File::Temp->new;
    truncate($sparse, $size) or die "truncate: $!\n";
    for my $at (grep { substr($data, $_, $mib) =~ m/[^\0]/ } map { $_ * $mib } 0 .. $size / $mib) {
        sysseek($sparse, $at, 0);
        syswrite($sparse, substr($data, $at, $mib)) // die "write: $!\n";
    }
    (undef, $got) = copy_over($sparse, "\xee" x $size, [0, $size]);
    ok($got eq $data, 'a copy of a sparse file');
}

# ---- files without holes ----

# A reader that skips a hole would keep the old data of its older copy.
sub check_part () {
    my ($server, $file) = serve([[8 * $mib, 16 * $mib]], dirty => [[0, $size]]);
    all_is_data($file->handle, 'a part');
    my ($statistics, $got) = copy_over($file->handle, "\xee" x $size, [0, $size]);
    is($statistics->{'bytes-read'}, $size, 'a part: a copy reads all of it');
}

sub check_unknown () {
    my $holes = [[8 * $mib, 16 * $mib], [40 * $mib, 20 * $mib]];
    my ($old, $by_cluster) = serve($holes, description => 'pba: read by clusters of 65536 bytes');
    all_is_data($by_cluster->handle, 'a server that must not get two queries at a time');
    my ($silent, $failing) = serve($holes, allocation_error => EINVAL);
    all_is_data($failing->handle, 'a server that fails');
    my ($gone, $cut) = serve($holes, disconnect_after => 0);
    all_is_data($cut->handle, 'a server that hangs up');
}

# A reader that is told to end while the server does not answer.
sub check_hang () {
    my ($server, $file) = serve([[8 * $mib, 16 * $mib]], hang_at => 20 * $mib);
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        seek_to($file->handle, 0, $SEEK_HOLE);
        POSIX::_exit(0);
    }
    sleep(0.5);
    is(waitpid($pid, POSIX::WNOHANG()), 0, 'a server that hangs: the reader waits');
    kill('TERM', $pid);
    my $end = time() + 10;
    my $ended;
    sleep(0.05) while !($ended = waitpid($pid, POSIX::WNOHANG())) && time() < $end;
    is($ended, $pid, 'a server that hangs: a signal ends the reader') or kill('KILL', $pid);
    is($file->end, 0, 'a server that hangs: the file can be ended');
}

# ---- a QEMU ----

# QEMU before 9.2 must not get queries of a snapshot during reads.
sub check_qemu ($name) {
    my @disks = ({ id => 'disk0', format => 'raw', size => 64 * $mib });
    my $backend = PBA::Test::Backend->start(name => $name, guest => 0, disks => \@disks);
    my $vm = $backend->vm;
    my $device = $backend->device('disk0');
    $vm->qemu_io('disk0', 'write -P 0x41 8M 1M');
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    my $handle = $access->volumes('file-handle')->{$device}{'file-handle'};
    local $size = 64 * $mib;

    if ($vm->version->[0] >= 10) {
        is_deeply([walk($handle)], [[0, 8 * $mib], [9 * $mib, $size]], "$name: the holes");
    }
    else {
        all_is_data($handle, "$name: QEMU before 10.0");
    }
    ok(read_at($handle, 7 * $mib, 3 * $mib) eq "\0" x $mib . "\x41" x $mib . "\0" x $mib,
        "$name: the data");
    close($handle);
    $access->teardown(1);

    $vm->qemu_io('disk0', 'write -z 8M 1M');
    $access = $backend->access;
    $access->setup($backend->devices('use'));
    $handle = $access->volumes('file-handle')->{$device}{'file-handle'};
    all_is_data($handle, "$name: an increment");
    close($handle);
    $access->teardown(1);
}

check_walks();
check_content();
check_programs();
check_small_disks();
check_copy();
check_part();
check_unknown();
check_hang();
check_qemu($_) for PBA::Test::Backend->names;
done_testing();
