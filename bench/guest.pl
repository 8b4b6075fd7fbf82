#!/usr/bin/perl

# The effect of a full backup on a guest that writes as fast as it can, 4 KiB at a time, each flushed:
# the time of 1,000 writes, and the median, the 99th percentile and the longest of one write, during the
# backup, with cache=none and cache=writeback. Compares our backup at full speed and at a bandwidth limit with
# QEMU's own fleecing read by nbdcopy; the floor is no backup. All storage is memory.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

BEGIN { $ENV{TMPDIR} = '/dev/shm' }

use File::Temp ();
use Time::HiRes ();

use PBA::Bench;
use PBA::Bench::HandMade;
use PBA::Bench::Image;
use PBA::Test::VM;

my $bench = PBA::Bench->new('guest', \@ARGV, 'size=i' => '[--size BYTES]');
my $size = $bench->option('size', 4 << 30);
my $limit = 512 << 20;
my $floor_seconds = 2;
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
my $target = "$dir/target";
require PVE::BackupAccess;

my $image = PBA::Bench::Image::write_raw("$dir/disk.raw", $size);
my ($vm, $guest);

my $no_backup = sub { Time::HiRes::sleep($floor_seconds) };

# The guest's figures while the code ran.
sub noticed ($code) {
    $guest->latency;
    my $start = PBA::Bench::now();
    $code->();
    my $seconds = PBA::Bench::now() - $start;
    my $latency = $guest->latency;
    return {
        counts => {},
        times => {
            '1000 writes' => 1000 * $seconds / $latency->{count},
            'p50 of a write' => $latency->{p50_us} / 1e6,
            'p99 of a write' => $latency->{p99_us} / 1e6,
            'longest write' => $latency->{longest_us} / 1e6,
            $code == $no_backup ? () : ('the backup' => $seconds),
        },
    };
}

sub ours ($bandwidth_limit) {
    my $access = PVE::BackupAccess->new(
        qmp => $vm->qmp_path,
        'target-id' => 'bench',
        'run-dir' => "$dir",
        'fleecing-dir' => "$dir",
    );
    $access->setup([{ device => 'disk0', 'bitmap-mode' => 'none' }]);
    my $volume = $access->volume('disk0');
    $volume->copy(
        to => $target,
        $bandwidth_limit ? ('bandwidth-limit' => $bandwidth_limit) : (),
    );
    $volume->close;
    $access->teardown(1);
    return;
}

sub by_hand () {
    my $access = PBA::Bench::HandMade->new(
        execute => PBA::Bench::HandMade::one_connection($vm->qmp_path),
        disks => [$vm->disk('disk0')],
        dir => "$dir",
        bitmap => 'by-hand',
    );
    $access->add_bitmaps;
    $access->setup;
    $access->export;
    system('nbdcopy', $access->uri($vm->disk('disk0')), $target) == 0 or die "nbdcopy failed\n";
    $access->teardown;
    $vm->qmp('block-dirty-bitmap-remove', node => 'disk0', name => 'by-hand');
    return;
}

sub side ($code) {
    return (before => sub { unlink($target) }, run => sub ($) { noticed($code) });
}

my @speeds = (
    ['full speed', sub { ours(0) }],
    ['at most ' . ($limit >> 20) . ' MiB/s', sub { ours($limit) }],
);

sub measure ($cache) {
    my @cases = grep { $bench->wants($_->[0]) } map { ["$cache, $_->[0]", $_->[1]] } @speeds;
    return if !@cases;
    undef $_ for $guest, $vm;    # it has the image's lock
    $vm = PBA::Test::VM->start(disks => [{ id => 'disk0', file => $image, cache => $cache }]);
    $guest = $vm->guest;
    $guest->start_churn(disks => ['disk0']);
    for my $case (@cases) {
        $bench->compare(
            case => $case->[0],
            ours => { side($case->[1]) },
            peer => { name => 'fleecing by hand, nbdcopy', side(\&by_hand) },
            floor => { name => 'no backup', side($no_backup) },
        );
    }
    $guest->stop_churn;
    return;
}

measure($_) for qw(none writeback);
$bench->finish;
