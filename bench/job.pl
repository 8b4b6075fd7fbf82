#!/usr/bin/perl

# The whole job, from the call of setup to the end of teardown: a disk of 4 GiB with data in every other
# 16 MiB, full, and as an increment of 1,000 scattered writes of 64 KiB, with both mechanisms. All storage
# is memory, and the guest is idle. Compared with:
#
#   - today's qemu-server way (PBA::Bench::QemuServer), with and without its fixed sleeps
#   - nbdcopy and qemu-img convert instead of our copy, on the same export
#   - virtnbdbackup, if it and libvirt are installed
#
# The cases of the command are what an administrator runs: backups, verify, restore and prune of archives, beside
# the same without a check, without digests too, and by BorgBackup, if it is installed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

BEGIN { $ENV{TMPDIR} = '/dev/shm' }

use File::Temp ();

use PBA::Bench;
use PBA::Bench::Archives;
use PBA::Bench::Image;
use PBA::Bench::Libvirt;
use PBA::Bench::QemuServer;
use PBA::Test::VM;

my $block = 64 << 10;

my $bench = PBA::Bench->new(
    'job', \@ARGV,
    'size=i' => '[--size BYTES]',
    'writes=i' => '[--writes N]',
);
my $size = $bench->option('size', 4 << 30);
my $writes = $bench->option('writes', 1000);
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
my $image = PBA::Bench::Image::write_raw("$dir/disk.raw", $size);
my $target = "$dir/target";
require PVE::BackupAccess;

my $vm = PBA::Test::VM->start(disks => [{ id => 'disk0', file => $image }]);
my $stride = int($size / $writes / $block) * $block;
my @written = map { [$_ * $stride, $block] } 0 .. $writes - 1;

# Writes as a guest would, different data in each run.
sub next_byte () {
    state $round = 0;
    return ++$round % 255 + 1;
}

sub write_blocks () {
    my $byte = next_byte();
    $vm->qemu_io('disk0', "write -P $byte $_->[0] $block") for @written;
    return;
}

# ---- ours ----

sub new_access ($name) {
    return PVE::BackupAccess->new(
        qmp => $vm->qmp_path,
        'target-id' => $name,
        'run-dir' => "$dir",
        'fleecing-dir' => "$dir",
    );
}

sub with_access ($name, $mode, $mechanism, $code) {
    my $access = new_access($name);
    $access->setup([{ device => 'disk0', 'bitmap-mode' => $mode }]);
    my $bytes = $code->($access->volumes($mechanism)->{disk0});
    $access->teardown(1);
    return { bytes => $bytes };
}

sub copy_ours ($volume, $file) {
    my $reader = PVE::BackupAccess::Volume->open('disk0', $volume);
    my $statistics = $reader->copy(to => $file, 'without-base' => 1);
    $reader->close;
    return $statistics->{'bytes-read'};
}

# The time to the first byte ends with the first read.
sub ours_first_byte ($name, $mechanism) {
    my $start = PBA::Bench::now();
    my $seconds;
    with_access(
        $name, 'use',
        $mechanism,
        sub ($volume) {
            my $reader = PVE::BackupAccess::Volume->open('disk0', $volume);
            my ($offset) = $reader->next_dirty_region or die "nothing is dirty\n";
            $reader->pread($offset, 4096);
            $seconds = PBA::Bench::now() - $start;
            $reader->close;
            return 0;
        },
    );
    return { counts => {}, seconds => $seconds };
}

# ---- the others ----

sub export_uri ($volume) { return "nbd+unix:///disk0?socket=$volume->{'nbd-path'}" }

# Reads the whole export, as our full backup does.
sub copy_with ($volume, @command) {
    system(map { $_ eq 'SOURCE' ? export_uri($volume) : $_ } @command) == 0
        or die "$command[0] failed\n";
    return $size;
}

sub new_task ($name, $sleeps) {
    my $task = PBA::Bench::QemuServer->new(
        qmp => $vm->qmp_path,
        disks => [$vm->disk('disk0')],
        dir => "$dir",
        bitmap => $name,
        sleeps => $sleeps,
    );
    $task->add_bitmaps;
    return $task;
}

sub todays ($task, $file, %options) {
    my $volumes = $task->setup(%options);
    my $bytes = PBA::Bench::QemuServer::copy($volumes->{disk0}, $file);
    undef $volumes;
    $task->teardown;
    return { bytes => $bytes };
}

sub todays_first_byte ($task) {
    my $start = PBA::Bench::now();
    my $volume = $task->setup(incremental => 1)->{disk0};
    my ($offset) = $volume->{next_dirty_region}->() or die "nothing is dirty\n";
    PBA::Bench::QemuServer::read_at($volume, $offset, 4096);
    my $seconds = PBA::Bench::now() - $start;
    undef $volume;
    $task->teardown;
    return { counts => {}, seconds => $seconds };
}

my @tasks = (
    ["qemu-server's way", new_task('sleeping', 1)],
    ["qemu-server's way, no sleeps", new_task('not-sleeping', 0)],
);

# [{ name, run }] of today's qemu-server way, with and without sleeps.
sub by_qemu_server ($code) {
    return map {
        my ($name, $task) = @$_;
        { name => $name, run => sub ($) { $code->($task) } }
    } @tasks;
}

# virtnbdbackup finds data by itself and writes its own format, so its bytes are not counted.
sub by_virtnbdbackup ($level, $before, $bytes) {
    state $other = PBA::Bench::Libvirt->available
        && PBA::Bench::Libvirt->start(dir => "$dir", image => $image);
    return () if !$other;
    return {
        name => 'virtnbdbackup',
        before => sub { $before->($other) },
        run => sub ($) { $other->backup($level); return { bytes => $bytes } },
    };
}

sub full_by_virtnbdbackup () {
    return by_virtnbdbackup('full', sub ($other) { $other->remove_backups }, $size);
}

sub increment_by_virtnbdbackup () {
    my $before = sub ($other) {
        state $has_full = do { $other->remove_backups; $other->backup('full'); 1 };
        $other->write_blocks(next_byte(), @written);
    };
    return by_virtnbdbackup('inc', $before, @written * $block);
}

# ---- the cases ----

# Checks one copy of each side, because the time of a wrong copy means nothing.
sub side ($side, $before, @ranges) {
    my $checked;
    return {
        %$side,
        before => sub { unlink($target); $before->() },
        after => sub {
            PBA::Bench::Image::compare($target, $image, @ranges) if !$checked++;
        },
    };
}

sub sides ($before, $ranges, @sides) {
    return map { side($_, $before, @$ranges) } @sides;
}

sub nothing () { return }

sub full ($mechanism, @peers) {
    my $run = sub ($) {
        with_access('full', 'new', $mechanism, sub ($volume) { copy_ours($volume, $target) });
    };
    $bench->compare(
        case => "full to a raw file, $mechanism",
        ours => side({ run => $run }, \&nothing),
        peer => [sides(\&nothing, [], @peers), full_by_virtnbdbackup()],
    );
    return;
}

# QEMU before 10.0 returns wrong data for larger reads of a snapshot while the guest writes, and may
# abort when asked for base:allocation. So our copy reads like this, and nbdcopy has to as well.
my @nbdcopy_by_clusters = qw(nbdcopy --no-extents --request-size=65536);

# Instead of our copy; setup and teardown are ours.
sub full_with ($name, @command) {
    my $run = sub ($) {
        with_access('full', 'new', 'nbd', sub ($volume) { copy_with($volume, @command) });
    };
    return { name => $name, run => $run };
}

sub full_by_qemu_server () {
    return by_qemu_server(sub ($task) { todays($task, $target) });
}

sub increment ($mechanism) {
    my $name = "increment-$mechanism";
    with_access($name, 'new', 'nbd', sub ($) { 0 });
    my $run = sub ($) {
        with_access($name, 'use', $mechanism, sub ($volume) { copy_ours($volume, $target) });
    };
    $bench->compare(
        case => "increment, $mechanism",
        ours => side({ run => $run }, \&write_blocks, @written),
        peer => [
            sides(
                \&write_blocks, \@written,
                by_qemu_server(sub ($task) { todays($task, $target, incremental => 1) }),
            ),
            increment_by_virtnbdbackup(),
        ],
    );
    return;
}

sub first_byte ($mechanism) {
    my $name = "first-byte-$mechanism";
    with_access($name, 'new', 'nbd', sub ($) { 0 });
    $bench->compare(
        case => "first byte, $mechanism",
        ours => {
            before => \&write_blocks,
            run => sub ($) { ours_first_byte($name, $mechanism) },
        },
        peer => [map { { before => \&write_blocks, %$_ } } by_qemu_server(\&todays_first_byte)],
    );
    return;
}

# ---- the command ----

sub all_archives () {
    my @ways = (
        ['command', 'pve-backup-access'],
        ['command', 'without check', '--no-check'],
        ['plain', 'without digests and check'],
        PBA::Bench::Archives::Borg->is_installed ? ['borg', 'borg'] : (),
    );
    state @all = map {
        my ($kind, $name, @arguments) = $ways[$_]->@*;
        PBA::Bench::Archives->new(
            $kind,
            name => $name,
            arguments => \@arguments,
            dir => "$dir/archives-$_",
            vm => $vm,
            file => $image,
        );
    } 0 .. $#ways;
    return @all;
}

# The seconds of a step, the CPU seconds of its programs and of QEMU, and what is stored afterwards.
sub measured_step ($archives, $step) {
    my ($start, $cpu) = (PBA::Bench::now(), PBA::Bench::Measure::cpu_seconds($vm->pid));
    $archives->$step;
    my %times = (
        '' => PBA::Bench::now() - $start,
        'CPU seconds' => PBA::Bench::Measure::cpu_seconds($vm->pid) - $cpu,
        'GiB stored' => $archives->bytes / (1 << 30),
    );
    return { counts => {}, times => \%times };
}

# before prepares the archives, in this process. needs is a step of which a way without it is left out.
sub command_case ($case, $step, $before, %more) {
    my @sides = map {
        my $archives = $_;
        {
            name => $archives->name,
            before => sub { $before->($archives) },
            run => sub ($) { measured_step($archives, $step) },
            after => sub { $more{after}->($archives) if $more{after} },
        };
    } grep { $_->can($more{needs} // $step) } all_archives();
    return $bench->compare(case => $case, ours => shift(@sides), peer => \@sides);
}

sub next_increment ($archives) {
    $archives->begin;
    write_blocks();
    return $archives->next_backup;
}

my %steps = (
    'command, full' => [
        'backup',
        sub ($archives) {
            $archives->begin_anew;
            $archives->next_backup;
        },
    ],
    'command, increment' => ['backup', \&next_increment],
    'command, bitmap lost' => [
        'backup',
        sub ($archives) {
            next_increment($archives);
            $archives->lose_bitmap;
        },
        needs => 'lose_bitmap',
    ],
    'command, verify' => ['verify', sub ($archives) { $archives->begin }],
    'command, restore' => [
        'restore',
        sub ($archives) {
            $archives->next_backup;
            $archives->backup;
        },
        after => sub ($archives) { PBA::Bench::Image::compare($archives->restored_file, $image) },
    ],
    'command, prune' => [
        'prune',
        sub ($archives) {
            next_increment($archives);
            $archives->backup;
        },
    ],
);

my %cases = (
    (
        map {
            my $case = $_;
            $case => sub { command_case($case, $steps{$case}->@*) }
        } keys %steps
    ),
    'full to a raw file, nbd' => sub {
        full(
            'nbd',
            full_with('nbdcopy', 'nbdcopy', 'SOURCE', $target),
            full_with('nbdcopy, by clusters', @nbdcopy_by_clusters, 'SOURCE', $target),
            full_with(
                'qemu-img convert', PBA::Test::VM->qemu_img,
                qw(convert -f raw -O raw), 'SOURCE',
                $target
            ),
            full_by_qemu_server(),
        );
    },
    'full to a raw file, file-handle' => sub { full('file-handle', full_by_qemu_server()) },
    'increment, nbd' => sub { increment('nbd') },
    'increment, file-handle' => sub { increment('file-handle') },
    'first byte, nbd' => sub { first_byte('nbd') },
    'first byte, file-handle' => sub { first_byte('file-handle') },
);
$cases{$_}->() for grep { $bench->wants($_) } sort keys(%cases);
$bench->finish;
