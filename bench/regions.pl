#!/usr/bin/perl

# How long it takes to read a dirty bitmap: 1 TiB in blocks of 64 KiB, every other one dirty. The peer
# parses the output of nbdinfo; the floor is a bare C loop over libnbd.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use File::Temp ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::Regions;
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
my $regions = PBA::Bench::Regions->new(server => $server, map => $map, dir => "$dir");

sub compare ($case, $ours, $peer, $floor) {
    my $figures = $bench->compare(case => $case, ours => $ours, peer => $peer, floor => $floor)
        or return;
    $regions->check($figures->{counts});
    return;
}

compare('next_dirty_region', $regions->one_by_one, $regions->nbdinfo, $regions->bare_loop);
compare('dirty_regions(10000)', $regions->in_batches, $regions->nbdinfo, $regions->bare_loop);
$bench->compare(
    case => 'first region',
    ours => $regions->first,
    peer => $regions->first_of_nbdinfo,
    floor => $regions->first_of_bare_loop,
);
$bench->finish;
