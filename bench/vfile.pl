#!/usr/bin/perl

# How fast the virtual file of the mechanism file-handle is read, from qemu-nbd with images in memory,
# compared with nbdfuse on the same export. The floor is a FUSE file served from memory. The peer "NBD alone" reads
# the same by a bare C loop over the socket, without a file: no file can be faster than the slower of the two.
#
#   - a full disk of 4 GiB from its start to its end, in reads of 64 KiB, 1 MiB and 4 MiB
#   - an increment, in reads of its regions: 64 KiB every 128 KiB, and 4 MiB every 8 MiB
#   - 64 KiB at random offsets
#   - a disk of which every other 16 MiB are zeroes, by programs that copy or archive files

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use Fcntl qw(O_RDONLY);
use File::Temp ();
use List::Util ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::FuseFile;
use PBA::Bench::Image;
use PBA::Bench::Program;
use PBA::Bench::Server;

my $kib = 1024;
my $mib = 1024 * $kib;
my $random_reads = 16384;

my $bench = PBA::Bench->new('vfile', \@ARGV, 'size=i' => '[--size BYTES]');
my $size = $bench->option('size', 4 << 30);
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', DIR => '/dev/shm');

# Each MiB is different, and none is zero.
sub write_image ($file) {
    open(my $random, '<:raw', '/dev/urandom') or die "/dev/urandom: $!\n";
    read($random, my $bytes, $mib) == $mib or die "cannot read /dev/urandom\n";
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    for (my $at = 0; $at < $size; $at += $mib) {
        substr($bytes, 0, 8) = pack('Q', $at + 1);
        print {$fh} $bytes;
    }
    close($fh) or die "$file: $!\n";
    return $file;
}

sub serve ($name, %options) {
    mkdir("$dir/$name");
    return PBA::Bench::Server->start(dir => "$dir/$name", %options);
}

# ---- the reads: a list of [offset, length], each split into pieces ----

sub every ($length, $step) {
    return map { [$_ * $step, $length] } 0 .. $size / $step - 1;
}

# The same reads for each side and run.
sub random_places () {
    my $x = 20261122;
    my @places;
    for (1 .. $random_reads) {
        $x = ($x * 1103515245 + 12345) & 0x7fffffff;
        push @places, [$x % ($size / (64 * $kib)) * 64 * $kib, 64 * $kib];
    }
    return @places;
}

sub read_ranges ($file, $piece, @ranges) {
    my $handle = $file->handle(O_RDONLY);
    my $bytes = 0;
    my $buffer = "\0" x $piece;
    for my $range (@ranges) {
        my ($offset, $left) = @$range;
        sysseek($handle, $offset, 0) // die "sysseek: $!\n";
        while ($left > 0) {
            my $got = sysread($handle, $buffer, $left < $piece ? $left : $piece);
            die 'read: ' . ($! || 'end of file') . "\n" if !$got;
            $left -= $got;
            $bytes += $got;
        }
    }
    return { counts => { bytes => $bytes }, rss_kib => $file->peak_kib };
}

my $image = write_image("$dir/disk.raw");
my $bare_read = PBA::Bench::Program::compile("$FindBin::Bin/bare-read.c", "$dir", 'libnbd');
my $memory_file = PBA::Bench::Program::compile("$FindBin::Bin/memory-file.c", "$dir", 'fuse3');
my %servers = (full => serve('full', file => $image, format => 'raw'));

# An image with the same content and a bitmap with these regions.
sub serve_regions ($name, $length) {
    my $file = "$dir/$name.qcow2";
    my $map = PBA::Bench::BigMap->write(
        file => $file,
        size => $size,
        pattern => 'alternate',
        granularity => $length,
    );
    my @convert = (qw(convert -n -f raw -O qcow2), $image, $file);
    system($ENV{PBA_QEMU_IMG} // 'qemu-img', @convert) == 0 or die "qemu-img failed\n";
    return serve($name, file => $file, bitmap => $map->{bitmap});
}

# The bare loop reads [length, step]; it measures itself.
sub nbd_alone ($server, $bytes, $length, $step) {
    my $run = sub ($) {
        my (undef, $seconds)
            = PBA::Bench::Program::figures($bare_read, $server->uri, $length, $step);
        return { counts => { bytes => $bytes }, seconds => $seconds };
    };
    return { name => 'NBD alone', run => $run };
}

sub measure ($case, $server, $piece, $bare, @ranges) {
    my $run = sub ($file) { read_ranges($file, $piece, @ranges) };
    my $bytes = List::Util::sum0(map { $_->[1] } @ranges);
    $bench->compare(
        case => $case,
        ours => { prepare => sub { PBA::Bench::FuseFile->ours($server, $size) }, run => $run },
        peer => [
            {
                name => 'nbdfuse',
                prepare => sub { PBA::Bench::FuseFile->nbdfuse($server) },
                run => $run,
            },
            $bare ? nbd_alone($server, $bytes, @$bare) : (),
        ],
        floor => {
            name => 'from memory',
            prepare => sub { PBA::Bench::FuseFile->memory($memory_file, $image) },
            run => $run,
        },
    );
    return;
}

my $all = [256 * $kib, 256 * $kib];
measure('full, 64 KiB', $servers{full}, 64 * $kib, $all, [0, $size]);
measure('full, 1 MiB', $servers{full}, $mib, $all, [0, $size]);
measure('full, 4 MiB', $servers{full}, 4 * $mib, $all, [0, $size]);
measure('random, 64 KiB', $servers{full}, 64 * $kib, undef, random_places());
for my $case (['64 KiB regions', 64 * $kib], ['4 MiB regions', 4 * $mib]) {
    my ($name, $length) = @$case;
    my $server = serve_regions($name =~ tr/ /-/r, $length);

    # The first block of the alternating map is dirty.
    measure(
        "increment, $name",
        $server,
        $mib < $length ? $mib : $length,
        $length == 64 * $kib ? [$length, 2 * $length] : undef,
        every($length, 2 * $length)
    );
}

# ---- programs ----

my %programs = (
    'cp --sparse=auto' => sub ($path, $to) { ('cp', '--sparse=auto', $path, $to) },
    'tar -S' => sub ($path, $to) { (qw(tar -P -S -cf), $to, $path) },
    'qemu-img convert' => sub ($path, $to) {
        return ($ENV{PBA_QEMU_IMG} // 'qemu-img', qw(convert -f raw -O raw), $path, $to);
    },
    'borg create' => sub ($path, $to) {
        return (qw(borg create --compression none --sparse --files-cache disabled),
            '--chunker-params', 'fixed,65536', "${to}::disk", $path,);
    },
);

sub run_program ($name, $path) {
    my $to = File::Temp->newdir('pba-bench-XXXXXXXX', DIR => "$dir");
    local %ENV
        = (%ENV, BORG_BASE_DIR => "$to", BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK => 'yes');
    system(qw(borg init --encryption none), "$to/copy") if $name =~ m/\Aborg/;
    my $start = PBA::Bench::now();
    system($programs{$name}->($path, "$to/copy")) == 0 or die "$name failed\n";
    return { counts => {}, seconds => PBA::Bench::now() - $start };
}

sub measure_programs () {
    my @names
        = grep { my $name = $_; $bench->wants("half of it zeroes, $name") } sort keys %programs;
    return if !@names;
    unlink($image);
    undef %servers;
    my $half = PBA::Bench::Image::write_raw("$dir/half.raw", $size);
    my $server = serve('half', file => $half, format => 'raw');
    for my $name (@names) {
        my $run = sub ($file) { run_program($name, $file->{path}) };
        $bench->compare(
            case => "half of it zeroes, $name",
            ours => { prepare => sub { PBA::Bench::FuseFile->ours($server, $size) }, run => $run },
            peer => {
                name => 'nbdfuse',
                prepare => sub { PBA::Bench::FuseFile->nbdfuse($server) },
                run => $run,
            },
            floor => { name => 'the file itself', run => sub ($) { run_program($name, $half) } },
        );
    }
    return;
}

measure_programs();
$bench->finish;
