#!/usr/bin/perl

# How fast a dirty bitmap can be gone through: 1 TiB in blocks of 64 KiB, every other one dirty.
# The peer is the way through the output of nbdinfo, the floor a bare C loop over libnbd.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Config;
use File::Temp ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::Server;

my $bench = PBA::Bench->new(
    'regions', \@ARGV,
    'size=i' => '[--size BYTES]',
    'pattern=s' => '[--pattern alternate|all|none|sparse|runs|random]',
);
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
my $map = PBA::Bench::BigMap->write(
    file => "$dir/map.qcow2",
    size => $bench->option('size', 1 << 40),
    pattern => $bench->option('pattern', 'alternate'),
);
my $server = PBA::Bench::Server->start(
    dir => "$dir",
    file => $map->{file},
    bitmap => $map->{bitmap},
);

# ---- ours ----

# The module is loaded before the measuring begins; opening a volume is measured.
sub load_module () {
    require PVE::BackupAccess::Volume;
    return;
}

sub open_volume () {
    return PVE::BackupAccess::Volume->open(
        'drive-scsi0',
        {
            size => $map->{size},
            'bitmap-mode' => 'reuse',
            'bitmap-name' => $map->{bitmap},
            'nbd-path' => $server->uri,
        },
    );
}

sub ours_one_by_one ($) {
    my $volume = open_volume();
    my ($regions, $bytes) = (0, 0);
    while (my ($offset, $length) = $volume->next_dirty_region) {
        $regions++;
        $bytes += $length;
    }
    return { regions => $regions, bytes => $bytes };
}

sub ours_in_batches ($) {
    my $volume = open_volume();
    my ($regions, $bytes) = (0, 0);
    while (my @batch = $volume->dirty_regions(10_000)) {
        for (my $i = 1; $i < @batch; $i += 2) {
            $regions++;
            $bytes += $batch[$i];
        }
    }
    return { regions => $regions, bytes => $bytes };
}

# How long the first region is depends on how far ahead is looked, so only its place is compared.
sub ours_first ($) {
    my ($offset) = open_volume()->next_dirty_region;
    return { regions => defined($offset) ? 1 : 0 };
}

# ---- the peer: nbdinfo's output, line by line ----

sub start_nbdinfo () {
    my $context = $server->context;
    my $pid = open(my $fh, '-|', 'nbdinfo', "--map=$context", $server->uri)
        // die "cannot run nbdinfo: $!\n";
    return ($fh, $pid);
}

sub peer_whole_map ($) {
    my ($fh) = start_nbdinfo();
    my ($regions, $bytes) = (0, 0);
    while (my $line = <$fh>) {
        my ($offset, $length, $type) = $line =~ /^\s*(\d+)\s+(\d+)\s+(\d+)\s/
            or die "unexpected line from nbdinfo: $line";
        next if $type != 1;
        $regions++;
        $bytes += $length;
    }
    close($fh) or die "nbdinfo ended with status $?\n";
    return { regions => $regions, bytes => $bytes };
}

sub peer_first ($) {
    my ($fh, $pid) = start_nbdinfo();
    my $regions = 0;
    while (my $line = <$fh>) {
        next if $line !~ /^\s*\d+\s+\d+\s+1\s/;
        $regions = 1;
        last;
    }
    kill('TERM', $pid);
    close($fh);
    return { regions => $regions };
}

# ---- the floor ----

sub compile ($source, $program) {
    my $flags = `pkg-config --cflags --libs libnbd`;
    die "pkg-config knows no libnbd\n" if $?;
    my @command = ($Config{cc}, '-O2', '-o', $program, $source, split(' ', $flags));
    system(@command) == 0 or die "cannot compile $source\n";
    return $program;
}

my $bare_loop = compile("$FindBin::Bin/bare-loop.c", "$dir/bare-loop");

# The program measures itself: what starting it takes is no part of the loop.
sub run_bare_loop (@arguments) {
    open(my $fh, '-|', $bare_loop, $server->uri, $server->context, @arguments)
        or die "cannot run $bare_loop: $!\n";
    my ($regions, $bytes, $seconds, $rss_kib) = split(' ', <$fh> // '');
    close($fh) or die "$bare_loop ended with status $?\n";
    return { regions => $regions + 0, bytes => $bytes + 0 }, $seconds + 0, $rss_kib + 0;
}

sub floor_whole_map ($) {
    my ($counts, $seconds, $rss_kib) = run_bare_loop();
    return { counts => $counts, seconds => $seconds, rss_kib => $rss_kib };
}

sub floor_first ($) {
    my ($counts, $seconds, $rss_kib) = run_bare_loop('first');
    my $first = { regions => $counts->{regions} > 0 ? 1 : 0 };
    return { counts => $first, seconds => $seconds, rss_kib => $rss_kib };
}

# ---- the cases ----

sub check ($figures, $case) {
    my $counts = $figures->{counts};
    my $expected = $case eq 'first region' ? { regions => $map->{regions} ? 1 : 0 } : $map;
    for my $key (sort keys(%$counts)) {
        next if $counts->{$key} == $expected->{$key};
        die "$case: $counts->{$key} $key, but the map has $expected->{$key}\n";
    }
    return;
}

my $peer = 'nbdinfo --map, line by line';
my $floor = 'bare C loop';
my @cases = (
    ['next_dirty_region', \&ours_one_by_one, \&peer_whole_map, \&floor_whole_map],
    ['dirty_regions(10000)', \&ours_in_batches, \&peer_whole_map, \&floor_whole_map],
    ['first region', \&ours_first, \&peer_first, \&floor_first],
);
for my $case (@cases) {
    my ($name, $ours, $peer_code, $floor_code) = @$case;
    my $figures = $bench->compare(
        case => $name,
        ours => { prepare => \&load_module, run => $ours },
        peer => { name => $peer, run => $peer_code },
        floor => { name => $floor, run => $floor_code },
    );
    check($figures, $name) if $figures;
}

$bench->finish;
