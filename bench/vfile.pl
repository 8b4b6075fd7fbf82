#!/usr/bin/perl

# How fast the virtual file of the mechanism file-handle is read, from qemu-nbd with images in memory,
# compared with nbdfuse on the same export; the floor is a FUSE file served from memory.
#
#   - a full disk of 4 GiB from its start to its end, in reads of 64 KiB, 1 MiB and 4 MiB
#   - an increment, in reads of its regions: 64 KiB every 128 KiB, and 4 MiB every 8 MiB
#   - 64 KiB at random offsets

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use Fcntl qw(O_RDONLY);
use File::Temp ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::FuseFile;
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

sub measure ($case, $server, $piece, @ranges) {
    my $run = sub ($file) { read_ranges($file, $piece, @ranges) };
    $bench->compare(
        case => $case,
        ours => { prepare => sub { PBA::Bench::FuseFile->ours($server, $size) }, run => $run },
        peer => {
            name => 'nbdfuse',
            prepare => sub { PBA::Bench::FuseFile->nbdfuse($server) },
            run => $run,
        },
        floor => {
            name => 'from memory',
            prepare => sub { PBA::Bench::FuseFile->memory($memory_file, $image) },
            run => $run,
        },
    );
    return;
}

measure('full, 64 KiB', $servers{full}, 64 * $kib, [0, $size]);
measure('full, 1 MiB', $servers{full}, $mib, [0, $size]);
measure('full, 4 MiB', $servers{full}, 4 * $mib, [0, $size]);
measure('random, 64 KiB', $servers{full}, 64 * $kib, random_places());
for my $case (['64 KiB regions', 64 * $kib], ['4 MiB regions', 4 * $mib]) {
    my ($name, $length) = @$case;
    my $server = serve_regions($name =~ tr/ /-/r, $length);

    # The first block of the alternating map is dirty.
    measure(
        "increment, $name",
        $server,
        $mib < $length ? $mib : $length,
        every($length, 2 * $length)
    );
}

$bench->finish;
