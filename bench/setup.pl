#!/usr/bin/perl

# The cost of setting up and tearing down an access on a stock QEMU, while a real guest writes to all its
# disks:
#
#   - the time from the call to the first dirty region of the first disk, and that of the teardown, with
#     1, 4 and 16 disks, compared with QEMU's commands as qemu-server sends them, with nbdinfo and nbdfuse;
#     the floor for the mechanism nbd is a minimal sequence of commands
#   - the guest's longest write during this, compared with a minimal sequence of the same commands; the
#     floor is the longest write in the same time without an access

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use File::Temp ();
use Time::HiRes ();

use PBA::Bench;
use PBA::Bench::HandMade;
use PBA::Bench::QemuServer;
use PBA::Test::VM;

my $disk_size = 1 << 30;
my $rest_seconds = 0.2;

my $bench = PBA::Bench->new('setup', \@ARGV, 'rounds=i' => '[--rounds N]');
my $rounds = $bench->option('rounds', 20);
require PVE::BackupAccess;

sub disks_text ($count) { return $count == 1 ? '1 disk' : "$count disks" }

# A guest that writes to all disks, and the data about it that the sides need.
sub start_guest ($count, $cache) {
    my @ids = map { "disk$_" } 1 .. $count;
    my $vm = PBA::Test::VM->start(
        disks => [map { { id => $_, size => $disk_size, cache => $cache } } @ids],);
    $vm->guest->start_churn(disks => \@ids, pause_us => 1000);
    $vm->guest->wait_more_churn(20);
    my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
    return { vm => $vm, dir => $dir, disks => [map { $vm->disk($_) } @ids] };
}

# ---- ours ----

sub new_access ($setting) {
    return PVE::BackupAccess->new(
        qmp => $setting->{vm}->qmp_path,
        'target-id' => 'bench',
        'run-dir' => "$setting->{dir}",
        'fleecing-dir' => "$setting->{dir}",
    );
}

sub devices ($setting) {
    return [map { { device => $_->{id}, 'bitmap-mode' => 'use' } } $setting->{disks}->@*];
}

sub ours ($setting, $mechanism) {
    my @times = (PBA::Bench::now());
    my $access = new_access($setting);
    $access->setup(devices($setting));
    my $volumes = $access->volumes($mechanism);
    my $first = $setting->{disks}[0]{id};
    my $volume = PVE::BackupAccess::Volume->open($first, $volumes->{$first});
    $volume->next_dirty_region or die "nothing is dirty\n";
    push @times, PBA::Bench::now();
    $volume->close;
    undef $volumes;
    $access->teardown(1);
    return figures(@times, PBA::Bench::now());
}

sub figures ($start, $region, $end) {
    my %times = ('first region' => $region - $start, teardown => $end - $region);
    return { counts => {}, times => \%times };
}

# ---- the qemu-server way ----

sub new_task ($setting, $sleeps) {
    my $task = PBA::Bench::QemuServer->new(
        qmp => $setting->{vm}->qmp_path,
        disks => $setting->{disks},
        dir => "$setting->{dir}",
        bitmap => "by-qemu-server-$sleeps",
        sleeps => $sleeps,
    );
    $task->add_bitmaps;
    return $task;
}

sub todays ($setting, $task) {
    my @times = (PBA::Bench::now());
    my $volumes = $task->setup(incremental => 1);
    my $first = $setting->{disks}[0]{id};
    $volumes->{$first}{next_dirty_region}->() or die "nothing is dirty\n";
    push @times, PBA::Bench::now();
    undef $volumes;
    $task->teardown;
    return figures(@times, PBA::Bench::now());
}

# ---- by hand ----

sub new_hand_made ($setting, $name) {
    my $access = PBA::Bench::HandMade->new(
        execute => PBA::Bench::HandMade::one_connection($setting->{vm}->qmp_path),
        disks => $setting->{disks},
        dir => "$setting->{dir}",
        bitmap => $name,
    );
    return $access;
}

# The floor for the mechanism nbd.
sub hand_made ($setting) {
    my @times = (PBA::Bench::now());
    my $access = new_hand_made($setting, 'by-hand');
    $access->setup;
    $access->export(with_bitmaps => 1);
    my $first = $setting->{disks}[0];
    my $volume = PVE::BackupAccess::Volume->open(
        $first->{id},
        {
            'nbd-path' => $access->uri($first),
            'bitmap-mode' => 'reuse',
            'bitmap-name' => 'by-hand',
        },
    );
    $volume->next_dirty_region or die "nothing is dirty\n";
    push @times, PBA::Bench::now();
    $volume->close;
    $access->teardown;
    return figures(@times, PBA::Bench::now());
}

sub add_bitmaps_by_hand ($setting, $name) {
    new_hand_made($setting, $name)->add_bitmaps;
    return;
}

# ---- from the call to the first dirty region ----

sub compare_times ($setting, $mechanism) {
    my $count = $setting->{disks}->@*;
    my @tasks = map { [$_ ? '' : ', no sleeps', new_task($setting, $_)] } 1, 0;
    my $before = sub { $setting->{vm}->guest->wait_more_churn($count) };
    $bench->compare(
        case => disks_text($count) . ", $mechanism",
        ours => { before => $before, run => sub ($) { ours($setting, $mechanism) } },
        peer => [
            map {
                my ($name, $task) = @$_;
                {
                    name => "qemu-server's way$name",
                    before => $before,
                    run => sub ($) { todays($setting, $task) },
                }
            } @tasks
        ],
        $mechanism eq 'nbd' ? (floor => floor_of($setting, $before)) : (),
    );
    remove_bitmaps($setting);
    return;
}

sub floor_of ($setting, $before) {
    add_bitmaps_by_hand($setting, 'by-hand');
    return {
        name => 'by hand, one connection',
        before => $before,
        run => sub ($) { hand_made($setting) },
    };
}

# Each run makes the guest's writes a little slower.
sub remove_bitmaps ($setting) {
    my ($vm, $bitmaps) = ($setting->{vm}, $setting->{vm}->bitmaps);
    for my $disk ($setting->{disks}->@*) {
        for my $name (sort keys(($bitmaps->{ $disk->{id} } // {})->%*)) {
            $vm->qmp('block-dirty-bitmap-remove', node => $disk->{id}, name => $name);
        }
    }
    return;
}

# ---- the guest's longest write ----

# Waits for the write in flight at the end, because it counts.
sub longest_write ($guest, $code) {
    $guest->latency;
    $code->();
    $guest->wait_more_churn(1);
    return $guest->latency->{longest_us} / 1e6;
}

sub longest_writes ($setting, $setup, $teardown) {
    my $guest = $setting->{vm}->guest;
    my %times = ('longest write in setup' => longest_write($guest, $setup));
    Time::HiRes::sleep($rest_seconds);
    $times{'longest write in teardown'} = longest_write($guest, $teardown);
    Time::HiRes::sleep($rest_seconds);
    return { counts => {}, times => \%times };
}

sub ours_noticed ($setting) {
    my $access = new_access($setting);
    return longest_writes(
        $setting,
        sub { $access->setup(devices($setting)); $access->volumes('nbd') },
        sub { $access->teardown(1) },
    );
}

sub hand_made_noticed ($setting) {
    my $access = new_hand_made($setting, 'by-hand');
    return longest_writes(
        $setting,
        sub { $access->setup; $access->export(with_bitmaps => 1) },
        sub { $access->teardown },
    );
}

sub nothing_noticed ($setting) {
    my $wait = sub { Time::HiRes::sleep(0.02) };
    return longest_writes($setting, $wait, $wait);
}

sub compare_longest_writes ($setting, $cache) {
    add_bitmaps_by_hand($setting, 'by-hand');
    local $bench->{runs} = $rounds;
    $bench->compare(
        case => disks_text(scalar($setting->{disks}->@*)) . ", cache=$cache",
        ours => { run => sub ($) { ours_noticed($setting) } },
        peer => { name => 'by hand', run => sub ($) { hand_made_noticed($setting) } },
        floor => { name => 'nothing set up', run => sub ($) { nothing_noticed($setting) } },
    );
    remove_bitmaps($setting);
    return;
}

for my $count (1, 4, 16) {
    my @mechanisms = grep { $bench->wants(disks_text($count) . ", $_") } qw(nbd file-handle)
        or next;
    my $setting = start_guest($count, 'none');
    compare_times($setting, $_) for @mechanisms;
}
for my $cache (qw(none writeback)) {
    for my $count (grep { $bench->wants(disks_text($_) . ", cache=$cache") } 1, 4) {
        compare_longest_writes(start_guest($count, $cache), $cache);
    }
}
$bench->finish;
