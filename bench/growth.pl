#!/usr/bin/perl

# How cost grows with the size of the map, the number of disks and the size of regions, and where the
# machine or a socket is the limit. With --plot, draws the curves.
#
#   regions, 10^3 ... 10^8 extents: all dirty regions of a map, compared with nbdinfo (up to 10^6) and a bare loop
#   copy, 10^3 ... 10^5 extents:    an increment to nowhere, 4 KiB dirty every 8 KiB
#   copy, regions of ...:           1 GiB in regions of 4 KiB to 16 MiB, each as far from the next
#   setup, 10^3 ... 10^8 extents:   an access with such a bitmap, to its first region, and the teardown
#   setup, 1 ... 64 disks:          the same with disks of 1 GiB
#   setup, 1 GiB ... 64 TiB:        the same with an empty disk of that size, all of it dirty
#   limit, ...:                     a full copy to nowhere with more connections, larger requests, from
#                                   several servers at once, and over TCP

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

BEGIN { $ENV{TMPDIR} = '/dev/shm' }

use File::Temp ();
use POSIX ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::Image;
use PBA::Bench::Regions;
use PBA::Bench::Server;
use PBA::Test::VM;

my $kib = 1024;
my $mib = 1024 * $kib;
my $gib = 1024 * $mib;
my $block = 64 * $kib;
my $nbdinfo_up_to = 6;    # powers of ten: more takes minutes and gigabytes
my $target = 'bench';
my $VM = 'PBA::Test::VM';

my $bench = PBA::Bench->new('growth', \@ARGV, 'max=i' => '[--max POWER]');
my $max = $bench->option('max', 8);
my $tmp = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
require PVE::BackupAccess;

sub new_dir () { return File::Temp::tempdir(DIR => "$tmp") }

# { power => figures } of the selected cases.
sub by_power ($what, $most, $code) {
    my %figures;
    for my $power (grep { $_ <= $max } 3 .. $most) {
        my $case = "$what, 10^$power extents";
        $figures{$power} = $code->($case, $power) if $bench->wants($case);
    }
    return %figures;
}

# One curve: the side's seconds (or another figure) against 10^power, or against the key itself.
sub curve ($name, $side, $figures, $key = 'seconds', $x = sub ($power) { 10**$power }) {
    my @points;
    for my $at (sort { $a <=> $b } keys %$figures) {
        my $y = $figures->{$at}{$side}{$key};
        push @points, [$x->($at), $y] if $y;
    }
    return { name => $name, points => \@points };
}

sub plain ($x) { return $x }

# ---- dirty regions ----

sub measure_regions ($case, $power) {
    my $dir = new_dir();
    my $map = PBA::Bench::BigMap->write(file => "$dir/map", size => 10**$power * $block);
    my $server
        = PBA::Bench::Server->start(dir => $dir, file => $map->{file}, bitmap => $map->{bitmap});
    my $regions = PBA::Bench::Regions->new(server => $server, map => $map, dir => $dir);
    my $figures = $bench->compare(
        case => $case,
        ours => $regions->in_batches,
        peer => $power <= $nbdinfo_up_to ? $regions->nbdinfo : undef,
        floor => $regions->bare_loop,
    );
    $regions->check($figures->{counts});
    unlink($map->{file});
    return $figures;
}

my %regions = by_power('regions', 8, \&measure_regions);
$bench->plot_lines(
    'regions',
    title => 'All dirty regions of a map',
    x => 'extents',
    y => 'seconds',
    series => [
        curve('dirty_regions', 'ours', \%regions),
        curve('nbdinfo --map, line by line', 'peer', \%regions),
        curve('bare C loop', 'floor', \%regions),
    ],
);
$bench->plot_lines(
    'memory',
    title => 'Memory for all dirty regions of a map',
    x => 'extents',
    y => 'KiB',
    series => [
        curve('dirty_regions', 'ours', \%regions, 'rss_kib'),
        curve('nbdinfo --map, line by line', 'peer', \%regions, 'rss_kib'),
        curve('bare C loop', 'floor', \%regions, 'rss_kib'),
    ],
);

# ---- copies ----

sub copy_to_nowhere ($server, %options) {
    my %volume = ('nbd-path' => $server->uri, 'bitmap-mode' => 'none');
    %volume = (%volume, 'bitmap-mode' => 'reuse', 'bitmap-name' => $server->{bitmap})
        if $server->{bitmap};
    my $volume = PVE::BackupAccess::Volume->open('disk0', \%volume);
    return $volume->copy(to => '/dev/null', %options)->{'bytes-read'};
}

# An image with data. Every other piece is dirty.
sub serve_pieces ($size, $piece) {
    my $dir = new_dir();
    my $map = PBA::Bench::BigMap->write(
        file => "$dir/map",
        size => $size,
        granularity => $piece,
    );
    my $raw = PBA::Bench::Image::write_raw("$dir/raw", $size);
    my @convert = (qw(convert -n -f raw -O qcow2), $raw, $map->{file});
    system($VM->qemu_img, @convert) == 0 or die "qemu-img failed\n";
    unlink($raw);
    return PBA::Bench::Server->start(dir => $dir, file => $map->{file}, bitmap => $map->{bitmap});
}

sub measure_copy ($case, $size, $piece) {
    my $server = serve_pieces($size, $piece);
    my $figures = $bench->compare(
        case => $case,
        ours => { run => sub ($) { return { bytes => copy_to_nowhere($server) } } },
    );
    unlink($server->{file});
    return $figures;
}

my %copies
    = by_power('copy', 5,
    sub ($case, $power) { measure_copy($case, 10**$power * 4 * $kib, 4 * $kib) });
$bench->plot_lines(
    'copy',
    title => 'An increment of 4 KiB regions to nowhere',
    x => 'extents',
    y => 'seconds',
    series => [curve('copy', 'ours', \%copies)],
);

my %by_region;
for my $power (2, 4, 6, 8, 10, 12, 14) {
    my $case = sprintf('copy, regions of %d KiB', 1 << $power);
    next if !$bench->wants($case);
    $by_region{ 1 << $power } = measure_copy($case, 2 * $gib, $kib << $power);
}
$bench->plot_lines(
    'region-size',
    title => '1 GiB in regions of a size, to nowhere',
    x => 'KiB in a region',
    y => 'seconds',
    series => [curve('copy', 'ours', \%by_region, 'seconds', \&plain)],
);

# ---- setup and teardown ----

sub setup_and_teardown ($vm, @devices) {
    my $dir = new_dir();
    my @times = (PBA::Bench::now());
    my $access = PVE::BackupAccess->new(
        qmp => $vm->qmp_path,
        'target-id' => $target,
        'run-dir' => $dir,
        'fleecing-dir' => $dir,
    );
    $access->setup([map { { device => $_, 'bitmap-mode' => 'use' } } @devices]);
    my $volume = $access->volume($devices[0]);
    $volume->next_dirty_region or die "nothing is dirty\n";
    push @times, PBA::Bench::now();
    $volume->close;

    # As a failure, so that the bitmap is the same for the next run.
    $access->teardown(0);
    my %seconds
        = ('first region' => $times[1] - $times[0], teardown => PBA::Bench::now() - $times[1]);
    return { counts => {}, times => \%seconds };
}

sub measure_setup ($case, @disks) {
    my $vm = $VM->start(guest => 0, disks => \@disks);
    my @devices = map { $_->{id} } @disks;
    setup_and_teardown($vm, @devices);
    return $bench->compare(
        case => $case,
        ours => { run => sub ($) { setup_and_teardown($vm, @devices) } },
    );
}

# An image of this size has no data, so that its size is no limit.
sub empty_disk ($size) {
    my $file = new_dir() . '/disk';
    system($VM->qemu_img, qw(create -q -f qcow2), $file, $size) == 0
        or die "qemu-img failed\n";
    return $file;
}

sub measure_setup_of_map ($case, $power) {
    my $map = PBA::Bench::BigMap->write(
        file => new_dir() . '/disk',
        size => 10**$power * $block,
        bitmap => "pba:$target",
        enabled => 1,
    );
    return measure_setup($case,
        { id => 'disk0', file => $map->{file}, format => 'qcow2', size => $map->{size} });
}

my %setups = by_power('setup', 8, \&measure_setup_of_map);
$bench->plot_lines(
    'setup',
    title => 'Setup, to the first dirty region',
    x => 'extents',
    y => 'seconds',
    series => [curve('setup', 'ours', \%setups)],
);

# A PCI bus has 32 slots, and a slot 8 functions.
sub disk_in_slot ($number) {
    my $slot = sprintf('multifunction=on,addr=0x%x.%d', 8 + $number / 8, $number % 8);
    return { id => "disk$number", size => $gib, device_args => $slot };
}

my %by_disks;
for my $count (1, 2, 4, 8, 16, 32, 64) {
    my $case = "setup, $count disk" . ($count > 1 ? 's' : '');
    next if !$bench->wants($case);
    $by_disks{$count} = measure_setup($case, map { disk_in_slot($_) } 0 .. $count - 1);
}
$bench->plot_lines(
    'disks',
    title => 'Setup, to the first dirty region',
    x => 'disks',
    y => 'seconds',
    series => [curve('setup', 'ours', \%by_disks, 'seconds', \&plain)],
);

for my $power (30, 33, 36, 40, 43, 46) {
    my $case
        = 'setup, '
        . ($power < 40 ? 1 << $power - 30 : 1 << $power - 40)
        . ($power < 40 ? ' GiB' : ' TiB');
    next if !$bench->wants($case);
    my $size = 1 << $power;
    measure_setup($case,
        { id => 'disk0', size => $size, file => empty_disk($size), format => 'qcow2' });
}

# ---- limits ----

# A full copy from each server. If there are several servers, each copy has its own process; memory that
# these share with this one is counted too.
sub copy_all ($servers, %options) {
    return { bytes => copy_to_nowhere($servers->[0], %options) } if @$servers == 1;
    my @pids;
    for my $server (@$servers) {
        my $pid = fork() // die "cannot fork: $!\n";
        if (!$pid) {
            my $ok = eval { copy_to_nowhere($server, %options); 1 };
            POSIX::_exit($ok ? 0 : 1);
        }
        push @pids, $pid;
    }
    for my $pid (@pids) {
        waitpid($pid, 0);
        die "a copy failed\n" if $?;
    }
    return { counts => {}, rss_kib => undef };
}

my $image;

sub measure_limit ($what, $count, $options, %server) {
    my $case = "limit, $what";
    return if !$bench->wants($case);
    $image //= PBA::Bench::Image::write_raw("$tmp/full", 2 * $gib);
    my @servers = map {
        PBA::Bench::Server->start(dir => new_dir(), file => $image, format => 'raw', %server)
    } 1 .. $count;
    $bench->compare(
        case => $case,
        ours => { run => sub ($) { return copy_all(\@servers, %$options) } },
    );
    return;
}

for my $connections (1, 2, 4, 8) {
    my $text = $connections == 1 ? 'connection' : 'connections';
    measure_limit("$connections $text", 1, { connections => $connections });
}
for my $size (64, 256, 1024, 4096) {
    measure_limit("requests of $size KiB", 1, { 'request-size' => $size * $kib });
}
for my $count (2, 4, 8, 16) {
    measure_limit("$count servers at once", $count, {});
}
measure_limit('over TCP', 1, {}, tcp => 1);
$bench->finish;
