# Many backups of one QEMU from one process, many guests at the same time, many disks at the same time, and a
# very large disk: nothing grows, and nothing is left behind. PBA_FULL=1 includes everything, a plain run a
# small part.
#
# One QEMU is enough: a leak would be in this process; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use List::Util qw(max);
use POSIX ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::Backend;
use PBA::Test::VM;
use PVE::BackupAccess;

my $Backend = 'PBA::Test::Backend';

my $full = $ENV{PBA_FULL};
my $cycles = $full ? 1_000 : 15;
my $warm_up = $full ? 50 : 5;
my $guests = $full ? 10 : 2;
my $disks = $full ? 16 : 4;
my $MiB = 1 << 20;

sub rss_kib ($pid) {
    open(my $fh, '<', "/proc/$pid/status") or die "no process $pid: $!\n";
    my ($kib) = map { m/^VmRSS:\s+(\d+)/ ? $1 : () } <$fh>;
    return $kib;
}

sub descriptors ($pid) {
    opendir(my $dh, "/proc/$pid/fd") or die "no process $pid: $!\n";
    return scalar(grep { m/\d/ } readdir($dh));
}

# The figures that must not grow.
sub figures ($vm) {
    my $bitmaps = $vm->bitmaps;
    return {
        'nodes' => scalar($vm->qmp('query-named-block-nodes', flat => JSON::PP::true)->@*),
        'bitmaps' => scalar(map { keys $bitmaps->{$_}->%* } keys $bitmaps->%*),
        'exports' => scalar($vm->qmp('query-block-exports')->@*),
        'jobs' => scalar($vm->qmp('query-jobs')->@*),
        "QEMU's descriptors" => descriptors($vm->pid),
        'our descriptors' => descriptors($$),
        "QEMU's KiB" => rss_kib($vm->pid),
        'our KiB' => rss_kib($$),
    };
}

# The peak of each figure. Memory varies with what the allocator returns.
sub note_peaks ($vm, $peaks) {
    my $now = figures($vm);
    for my $what (keys $now->%*) {
        $peaks->{$what} = max($now->{$what}, $peaks->{$what} // 0);
    }
    return;
}

# One backup of all disks whose data is read and dropped; every tenth backup fails.
sub back_up ($backend, $mode, $success) {
    my $access = $backend->access;
    my $infos = $access->setup($backend->devices($mode));
    my $bytes = 0;
    for my $info ($infos->@*) {
        my $sink = sub ($offset, $data) { $bytes += length($data); return };
        $access->volume($info->{device})->copy(to => $sink, discard => 1);
    }
    $access->teardown($success);
    return $bytes;
}

sub check_cycles ($name) {
    my $backend = $Backend->start(
        name => $name,
        disks => [{ id => 'disk0', size => 32 * $MiB }, { id => 'disk1', size => 32 * $MiB }]
    );
    my $vm = $backend->vm;
    $backend->guest->start_churn(seed => 7, disks => [qw(disk0 disk1)], blocks => 1024);
    $backend->guest->wait_churn(20);
    my (%early, %late, $bytes);
    my $stops = 0;
    my $started = time;
    for my $i (1 .. $cycles) {
        $bytes += back_up($backend, 'use', $i % 10 != 0);
        $stops += () = $vm->events('STOP');
        $vm->clear_events;    # the stored events would count as our memory
        note_peaks($vm, \%early) if $i <= $warm_up;
        note_peaks($vm, \%late) if $i > $cycles - $warm_up;
    }
    note('first: ', join(', ', map { "$_ $early{$_}" } sort keys %early));
    note('last: ', join(', ', map { "$_ $late{$_}" } sort keys %late));
    note(sprintf('%d bytes in %.0f s', $bytes, time - $started));

    # A QEMU that has just started still grows: with the translated code of the guest, and with its buffers.
    for my $what (sort grep { $full || $_ ne "QEMU's KiB" } keys %early) {
        my $more = $what =~ m/KiB/ ? 8 * 1024 : $what =~ m/descriptors/ ? 2 : 0;
        cmp_ok($late{$what}, '<=', $early{$what} + $more, "$what: no growth");
    }
    is($stops, 0, 'the guest was never paused') if !$backend->front;
    $backend->guest->stop_churn;
    $backend->check_manners;
}

for my $name ($Backend->names) {
    subtest "$cycles backups, backend $name" => sub { check_cycles($name) };
}

# Each process has its own guest; all use the same directories.
subtest "$guests guests at once" => sub {
    plan(skip_all => 'only for a stock QEMU') if PBA::Test::VM->is_proxmox;
    my $shared = File::Temp->newdir('pba-soak-XXXXXXXX', TMPDIR => 1);
    mkdir("$shared/$_", 0700) for qw(run fleecing);
    my @vms
        = map { PBA::Test::VM->start(disks => [{ id => 'disk0', size => 64 * $MiB }], guest => 0) }
        1 .. $guests;
    $vms[$_]->qemu_io('disk0', "write -P " . ($_ + 1) . ' 0 1M') for 0 .. $#vms;
    my %wanted;
    for my $i (0 .. $#vms) {
        my $pid = fork() // die "cannot fork: $!\n";
        if (!$pid) {
            my $good = eval { back_up_own($vms[$i]->qmp_path, "$shared", chr($i + 1)) };
            print STDERR $@ if !$good;
            POSIX::_exit($good ? 0 : 1);
        }
        $wanted{$pid} = $i;
    }
    while (%wanted) {
        my $pid = waitpid(-1, 0);
        my $i = delete($wanted{$pid}) // next;
        is($?, 0, "guest $i: each backup has its own data");
    }
    is_deeply([glob("$shared/*/*")], [], 'nothing is left');
};

sub back_up_own ($qmp, $shared, $byte) {
    for my $round (1 .. 5) {
        my $access = PVE::BackupAccess->new(
            qmp => $qmp,
            'target-id' => 'soak',
            'run-dir' => "$shared/run",
            'fleecing-dir' => "$shared/fleecing",
            timeout => 120
        );
        $access->setup([{ device => 'disk0', 'bitmap-mode' => 'new' }]);
        my $volume = $access->volume('disk0');
        my $bad = 0;
        while (my ($offset, $length) = $volume->next_dirty_region) {
            for (my $at = $offset; $at < $offset + $length; $at += $MiB) {
                my $data = $volume->pread($at, $MiB);
                my $expected = $at == 0 ? $byte : "\0";
                $bad++ if $data ne $expected x $MiB;
            }
        }
        undef $volume;
        $access->teardown(1);
        die "round $round: $bad wrong pieces\n" if $bad;
    }
    return 1;
}

subtest "$disks disks in one access" => sub {
    my @disks = map { { id => "disk$_", size => 8 * $MiB, bus => 'scsi' } } 0 .. $disks - 1;
    my $backend = $Backend->start(name => 'upstream', disks => \@disks, guest => 0);
    my $outside = $backend->outside;
    is(back_up($backend, 'new', 1), $disks * 8 * $MiB, 'a full backup reads all disks');
    $backend->vm->qemu_io("disk$_", "write -P 5 1M 64k") for 0 .. $disks - 1;
    is(
        back_up($backend, 'use', 1),
        $disks * 65536,
        'an increment reads what was written to each disk'
    );
    is_deeply($backend->outside, $outside, 'nothing is left');
};

# Its fleecing image exceeds the maximum file size of ext4, but not that of tmpfs.
subtest 'a disk of 16 TiB' => sub {
    my $fleecing = File::Temp->newdir('pba-soak-XXXXXXXX', DIR => '/dev/shm');
    my $size = 16 << 40;
    my $backend = $Backend->start(
        name => 'upstream',
        disks => [{ id => 'disk0', size => $size, format => 'qcow2' }],
        guest => 0
    );
    my $started = time;
    my %fleecing = ('fleecing-dir' => "$fleecing");
    my $access = $backend->access(%fleecing);
    my ($info) = $access->setup($backend->devices('new'))->@*;
    is($info->{size}, $size, 'the size of the disk');
    my $volume = $access->volume('disk0');
    is_deeply([$volume->next_dirty_region], [0, $size], 'one dirty region');
    is_deeply([$volume->next_dirty_region], [], 'there is no other region');
    undef $volume;
    $access->teardown(1);
    note(sprintf('full: set up, map read, torn down in %.1f s', time - $started));
    my @written = map { $_ * 65536 } 0, ($size / 65536) >> 1, $size / 65536 - 1;
    $backend->vm->qemu_io('disk0', "write -P 9 $_ 64k") for @written;
    $started = time;
    $access = $backend->access(%fleecing);
    $access->setup($backend->devices('use'));
    $volume = $access->volume('disk0');
    my @regions;

    while (my ($offset, $length) = $volume->next_dirty_region) {
        push(@regions, [$offset, $length]);
        is($volume->pread($offset, $length), "\x09" x $length, "the data written at $offset");
    }
    is_deeply(\@regions, [map { [$_, 65536] } @written], 'first, middle and last cluster');
    undef $volume;
    $access->teardown(1);
    note(sprintf('increment: %.1f s, we have %d KiB', time - $started, rss_kib($$)));
};

done_testing();
