#!/usr/bin/perl

# The test harness itself. The other tests are only valid if the guest, the model of its disks and the
# comparison of QEMU's block graph are correct.
#
# One QEMU is enough: the harness is the same on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::Model;
use PBA::Test::VM;

my $Model = 'PBA::Test::Model';
my $VM = 'PBA::Test::VM';

my $MiB = 1024 * 1024;

sub slurp ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar <$fh>;
}

sub spew ($file, $content) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print $fh $content;
    close($fh) or die "$file: $!\n";
    return;
}

sub flip_byte ($file, $offset) {
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    seek($fh, $offset, 0);
    read($fh, my $byte, 1);
    seek($fh, $offset, 0);
    print $fh chr(ord($byte) ^ 1);
    close($fh) or die "$file: $!\n";
    return;
}

my $tmp = File::Temp->newdir('pba-harness.XXXXXX', TMPDIR => 1);

subtest 'model: a naive replay gives the same' => sub {
    my @sizes = (3 * $MiB, 2 * $MiB + 512);
    my @naive = map { "\0" x $_ } @sizes;
    my $x = 77;
    for my $s (1 .. 999) {
        $x = ($x * 1103515245 + 12345) % 2**31;
        my $i = ($s - 1) % 2;
        my $offset = int($x / 256) % int($sizes[$i] / 4096) * 4096;
        substr($naive[$i], $offset, 4096, pack('NNNN', 0, $s, 0, $offset) x 256);
    }
    my @disks = map { { id => "d$_", size => $sizes[$_] } } 0, 1;
    my $model = $Model->new(seed => 77, disks => \@disks);
    ok($model->state("d$_", 999) eq $naive[$_], "disk $_") for 0, 1;

    spew("$tmp/d$_", $naive[$_]) for 0, 1;
    is_deeply([$model->check_image('d0', "$tmp/d0")], [999, undef], 'disk 0 is as of 999');
    is_deeply([$model->check_image('d1', "$tmp/d1")], [998, undef], 'disk 1 is as of 998');
    my %images = map { $_ => "$tmp/$_" } qw(d0 d1);
    is_deeply([$model->check_images(\%images)], [999, undef], 'together they are as of 999');
};

subtest 'model: errors are detected' => sub {
    my @disks = map { { id => $_, size => 4 * $MiB } } qw(a b);
    my $model = $Model->new(seed => 3, disks => \@disks, blocks => 256);
    my %images = map { $_ => "$tmp/$_" } qw(a b);

    $model->write_state('a', 101, $images{a});
    $model->write_state('b', 101, $images{b});
    is(($model->check_images(\%images))[1], undef, 'the images show the same instant');
    $model->write_state('b', 98, $images{b});
    like(($model->check_images(\%images))[1], qr/not one instant/, 'disk b is older');
    $model->write_state('b', 104, $images{b});
    like(($model->check_images(\%images))[1], qr/not one instant/, 'disk b is newer');

    flip_byte($images{a}, 3 * $MiB + 17);
    is(($model->check_image('a', $images{a}))[1], 3 * $MiB + 17, 'a byte outside the churn');
    $model->write_state('a', 101, $images{a});
    my ($id, $offset) = $model->target(101);
    is($id, 'a', 'write 101 goes to the first disk');
    flip_byte($images{a}, $offset + 4095);
    is(($model->check_image('a', $images{a}))[1], $offset + 4095, 'the last byte of a write');

    $model->write_state('a', 101, $images{a});
    truncate($images{a}, 4 * $MiB - 1);
    is(($model->check_image('a', $images{a}))[1], 4 * $MiB - 1, 'an image one byte short');
    truncate($images{a}, 4 * $MiB + 1);
    is(($model->check_image('a', $images{a}))[1], 4 * $MiB, 'an image one byte long');

    # One lost write in the middle, followed by later ones.
    my $lost = $Model->new(seed => 3, disks => \@disks, blocks => 256);
    $lost->write_state('a', 101, $images{a});
    my ($missing) = grep { $lost->last_writes('a', 101)->{ ($lost->target($_))[1] / 4096 } == $_ }
        map { 2 * $_ + 1 } 10 .. 49;
    my $at = ($lost->target($missing))[1];
    my $content = slurp($images{a});
    substr($content, $at, 4096, "\xff" x 4096);
    spew($images{a}, $content);
    is_deeply([$model->check_image('a', $images{a})], [101, $at], 'a lost write in the middle');
};

subtest 'model: churn after an earlier churn' => sub {
    my $first = $Model->new(seed => 1, disks => [{ id => 'a', size => 4 * $MiB }]);
    $first->write_state('a', 3000, "$tmp/base");
    for my $base ([base_file => "$tmp/base"], [base => slurp("$tmp/base")]) {
        my $second = $Model->new(
            seed => 2,
            disks => [{ id => 'a', size => 4 * $MiB, @$base }],
        );
        is_deeply([$second->check_image('a', "$tmp/base")], [0, undef], "$base->[0]: no write yet");
        $second->write_state('a', 50, "$tmp/image");
        is_deeply([$second->check_image('a', "$tmp/image")], [50, undef], "$base->[0]: 50 writes");
    }
};

subtest 'model: written ranges' => sub {
    my $model = $Model->new(seed => 9, disks => [{ id => 'a', size => 4 * $MiB }]);
    my @ranges = $model->written_ranges('a', 10, 200);
    my %inside;
    for my $range (@ranges) {
        $inside{ $range->[0] + 4096 * $_ } = 1 for 0 .. $range->[1] / 4096 - 1;
    }
    my %targets = map { ($model->target($_))[1] => 1 } 10 .. 200;
    is_deeply(\%inside, \%targets, 'exactly the blocks of those writes');
    ok(!(grep { $ranges[$_ - 1][0] + $ranges[$_ - 1][1] >= $ranges[$_][0] } 1 .. $#ranges),
        'sorted, joined');
};

my $vm = $VM->start(
    disks => [{ id => 'disk0' }, { id => 'disk1', size => 32 * $MiB, format => 'qcow2' }],
    empty_cdrom => 1,
);
my $guest = $vm->guest;
note(sprintf 'guest ready after %.2f s', $vm->boot_seconds);

subtest 'the guest sees its disks' => sub {
    my $hello = $guest->hello;
    is_deeply($hello->{disks}, { disk0 => 64 * $MiB, disk1 => 32 * $MiB }, 'ids and sizes');
    my ($cdrom) = grep { $_->{qdev} eq 'ide2' } $vm->qmp('query-block')->@*;
    ok($cdrom && $cdrom->{removable} && !$cdrom->{inserted}, 'the guest has an empty CD-ROM drive');
    is_deeply([$guest->sh('echo "a\b"; exit 3')], [3, "a\\b\n"], 'a shell command');
};

subtest 'the guest reads and writes' => sub {
    $guest->write('disk0', 8 * $MiB, $MiB + 512, 0xaa);
    my $expected = "\xaa" x ($MiB + 512);
    ok(substr(slurp($vm->disk('disk0')->{file}), 8 * $MiB, $MiB + 512) eq $expected, 'write');
    is($guest->read('disk0', 8 * $MiB - 3, 7), "\0\0\0\xaa\xaa\xaa\xaa", 'read');
    my $sum = unpack '%64N*', slurp($vm->disk('disk0')->{file});
    is($guest->read_sum('disk0'), $sum, 'read-sum of the disk');
    is($guest->read_sum('disk0', 8 * $MiB, 4096), 0xaaaaaaaa * 1024, 'read-sum of a range');
    $guest->zero('disk0', 8 * $MiB, 4096);
    is($guest->read_sum('disk0', 8 * $MiB, 4096), 0, 'zero');

    my $blocks = (stat $vm->disk('disk0')->{file})[12];
    $guest->trim('disk0', 8 * $MiB, $MiB);
    cmp_ok((stat $vm->disk('disk0')->{file})[12], '<', $blocks - 1000, 'trim frees on the host');
    $vm->qemu_io('disk0', 'write -P 0x5b 16M 64k');
    is($guest->read('disk0', 16 * $MiB, 2), "\x5b\x5b", 'qemu-io writes as the guest would');
    ok(!eval { $vm->qemu_io('disk0', 'read -P 0x5c 16M 64k'); 1 },
        'qemu-io: a failed command dies');
    $guest->trim('disk0', 0, 64 * $MiB);
};

subtest 'errors are reported' => sub {
    my %commands = (
        'write disk7 0 512 1' => qr/no disk 'disk7'/,
        'write disk0 0 512' => qr/usage/,
        'write disk0 67108864 512 1' => qr/past the end/,
        'write disk0 512 -512 1' => qr/usage/,
        'write disk0 1 512 1' => qr/Invalid argument/,
        'churn-stop' => qr/does not run/,
        'churn-start 1 disk0,nothing' => qr/no disk 'nothing'/,
        'mount disk0' => qr/mount/,
        'nonsense' => qr/unknown command/,
    );
    for my $command (sort keys %commands) {
        my $ok = eval { $guest->command(split ' ', $command); 1 };
        ok(!$ok && $@ =~ $commands{$command}, $command) or diag($@);
    }
    $guest->hello for 1 .. 200;
    pass('the guest still answers');
};

my @churned = qw(disk0 disk1);
my %churn = (seed => 42, disks => \@churned, blocks => 2048);
my @churned_disks = map { { id => $_, size => $vm->disk($_)->{size} } } @churned;
my $model = $Model->new(%churn, disks => \@churned_disks);

my $last_write;    # the last write of the churn that is known to be done

sub check_churn () {
    return $model->check_images({ map { $_ => $vm->raw_image($_) } @churned });
}

subtest 'churn on two disks' => sub {
    $guest->latency;
    $guest->start_churn(%churn);
    $guest->wait_churn(500);
    ok(!eval { $guest->start_churn(disks => ['disk0']); 1 }, 'only one churn at a time');

    # The guest is stopped between two writes, or during a write.
    for my $round (1 .. 5) {
        $guest->wait_more_churn(50);
        $vm->qmp('stop');
        my ($n, $problem) = check_churn();
        is($problem, undef, "stopped at write $n: the images show one instant");
        $vm->qmp('cont');
    }
    my $first = $guest->churn_status->{last};
    $vm->qmp('stop');
    my $old = slurp($vm->disk('disk0')->{file});
    $vm->qmp('cont');
    $guest->wait_more_churn(50);
    ($last_write, my $rate) = $guest->stop_churn;
    cmp_ok($last_write, '>=', $first + 50, 'churn went on');
    note(sprintf '%.0f writes/s on two disks', $rate);
    is_deeply([check_churn()], [$last_write, undef],
        'stopped: the images are as of the last write');
    spew("$tmp/old", $old);
    my ($n, $problem)
        = $model->check_images({ disk0 => "$tmp/old", disk1 => $vm->raw_image('disk1') });
    like($problem, qr/not one instant/, 'disks copied one after the other are not one instant');
};

subtest 'churn that continues' => sub {
    my $latency = $guest->latency;
    is($latency->{count}, $last_write, 'latency: all writes are counted');
    cmp_ok($latency->{longest_us}, '>=', $latency->{write_us}, 'latency: the longest write');
    cmp_ok($latency->{p50_us}, '>', 0, 'latency: half of the writes took some time');
    cmp_ok($latency->{p50_us}, '<=', $latency->{p99_us}, 'latency: half of them are the fastest');
    cmp_ok(
        $latency->{p99_us}, '<=',
        $latency->{longest_us} * 17 / 16,
        'latency: 99 of 100 writes took no longer than the longest'
    );
    is($guest->latency->{count}, 0, 'latency: begins anew');

    $guest->start_churn(
        %churn,
        first => $last_write + 1,
        pause_us => 1000,
    );
    $guest->wait_churn($last_write + 20);
    $last_write = $guest->stop_churn;
    is_deeply([check_churn()], [$last_write, undef], 'churn continues at the same write');
};

subtest 'the block graph' => sub {
    my $before = $vm->graph;
    ok((grep { $_ eq 'qcow2 disk1' } $before->{nodes}->@*), 'nodes with drivers');
    ok((grep { $_ eq 'disk1 file disk1-file' } $before->{edges}->@*), 'edges');
    is_deeply($vm->graph, $before, 'the graph is equal to itself');
    my $node = $vm->add_fleecing_node('disk0');
    is($node, 'disk0-fleecing', 'a fleecing node as Proxmox VE names it');
    my %sizes = map { $_->{'node-name'} => $_->{image}{'virtual-size'} }
        $vm->qmp('query-named-block-nodes')->@*;
    is($sizes{$node}, 64 * $MiB, 'the fleecing node has the size of the disk');
    ok((grep { $_ eq 'raw disk0-fleecing' } $vm->graph->{nodes}->@*), 'seen in the graph');
    $vm->remove_fleecing_node($node);
    is_deeply($vm->graph, $before, 'the graph without the fleecing node is the original one');
    ok(!eval { $vm->qmp('blockdev-del', 'node-name' => $node); 1 }, 'a QMP error dies');
    like($vm->qmp_try('blockdev-del', 'node-name' => $node)->{error}{class}, qr/\w/, 'or is shown');
};

subtest 'bitmaps, exports, events' => sub {
    $vm->qmp('block-dirty-bitmap-add', node => 'disk0', name => 'b', granularity => 65536);
    $guest->write('disk0', $MiB, 4096, 1);
    my $bitmaps = $vm->bitmaps;
    is_deeply([keys %$bitmaps], ['disk0'], 'bitmaps by node');
    is($bitmaps->{disk0}{b}{count}, 65536, 'bitmap: count');
    is($bitmaps->{disk0}{b}{recording}, 1, 'bitmap: recording');
    $vm->qmp('block-dirty-bitmap-remove', node => 'disk0', name => 'b');
    is_deeply($vm->bitmaps, {}, 'no bitmaps are left');

    is_deeply($vm->exports, [], 'no exports');
    my $socket = { type => 'unix', data => { path => $vm->dir . '/nbd' } };
    $vm->qmp('nbd-server-start', addr => $socket);
    $vm->qmp('block-export-add', id => 'x', type => 'nbd', 'node-name' => 'disk0');
    is_deeply([map { $_->{id} } $vm->exports->@*], ['x'], 'an export');
    $vm->clear_events;
    $vm->qmp('block-export-del', id => 'x');
    is(scalar $vm->wait_event('BLOCK_EXPORT_DELETED'), 1, "the event of the export's end");
    $vm->qmp('nbd-server-stop');
};

subtest 'kill, restart, quit' => sub {
    my $sum = $guest->read_sum('disk1');
    $vm->kill9;
    ok(!$vm->is_alive, 'killed');
    ok(!eval { $vm->qmp('query-status'); 1 }, 'does not answer');
    $vm->restart;
    is($vm->guest->read_sum('disk1'), $sum, 'the disks are the same after a restart');
    ok(!eval { $guest->hello; 1 }, 'the guest object of before is of no use');
    $vm->quit;
    ok(!$vm->is_alive && !$vm->crashed, 'quit');

    my $crashing = $VM->start(guest => 0);
    kill ABRT => $crashing->pid;
    is($crashing->wait_exit & 127, 6, 'QEMU aborts');
    is($crashing->crashed, 6, 'an abort is a crash');
    ok(!eval { $crashing->quit; 1 }, 'a crashed QEMU cannot be quit');
    $crashing->forgive_crash;
};

my @shapes = (
    [{ shape => 'drive' }, { shape => 'drive', format => 'qcow2', throttle => 1 }],
    [{ bus => 'scsi', throttle => 1 }, { bus => 'scsi', shape => 'drive' }],
    [{ iothread => 1 }, { iothread => 1, bus => 'scsi', cache => 'none' }],
);
for my $shape (@shapes) {
    my $name = join ' and ', map {
        my $disk = $_;
        join ',', map { "$_=$disk->{$_}" } sort keys %$disk
    } @$shape;
    subtest "disks of $name" => sub {
        my @disks = map { { id => "disk$_", $shape->[$_]->%* } } 0, 1;
        my $vm = $VM->start(disks => \@disks, empty_cdrom => 1);
        my $seen = $vm->guest->hello->{disks};
        is_deeply($seen, { disk0 => 64 * $MiB, disk1 => 64 * $MiB }, 'disks');
        my %blocks = map { ($_->{qdev} => $_) } $vm->qmp('query-block')->@*;
        for my $disk (map { $vm->disk($_) } $vm->disk_ids) {
            my $block = $blocks{ $disk->{qdev} };
            my $key
                = $disk->{shape} eq 'drive' ? $block->{device} : $block->{inserted}{'node-name'};
            is($key, $disk->{device}, "$disk->{id} is called $disk->{device}");
        }
        my $before = $vm->graph;
        $vm->guest->start_churn(seed => 8, disks => ['disk0', 'disk1']);
        $vm->guest->wait_churn(100);
        my $last = $vm->guest->stop_churn;
        $vm->restart;
        is_deeply($vm->graph, $before, 'the graph is the same after a restart');
        $vm->quit;
        my $model = $Model->new(
            seed => 8,
            disks => [map { { id => $_, size => 64 * $MiB } } $vm->disk_ids],
        );
        my %images = map { $_ => $vm->raw_image($_) } $vm->disk_ids;
        is_deeply([$model->check_images(\%images)], [$last, undef], 'the images are the model\'s');
    };
}

subtest 'a file system in use' => sub {
    my $vm = $VM->start(disks => [{ id => 'disk0', filesystem => 'ext4' }]);
    my $guest = $vm->guest;
    $guest->mount('disk0');
    $guest->start_files;
    my $until = time + 60;
    my $listed = sub { return scalar(() = ($guest->sh('ls /mnt/d*'))[1] =~ m/^f\d+$/mg) };
    Time::HiRes::sleep(0.2) while $listed->() <= 20 && time < $until;
    cmp_ok($guest->stop_files, '>', 20, 'files written');
    my ($status, $list) = $guest->sh('ls /mnt/d*');
    is($status, 0, 'the files exist');
    like($list, qr/^f\d+$/m, 'the names of the files');
    $guest->sync;
    $guest->umount;
    $vm->quit;
    my $image = $vm->raw_image('disk0');
    local $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin";
    is(system("e2fsck -fn '$image' >'$tmp/fsck' 2>&1"), 0, 'e2fsck') or diag(slurp("$tmp/fsck"));
};

subtest 'no guest, paused, an existing image' => sub {
    spew("$tmp/image", 'x' x (4 * $MiB));
    my $vm = $VM->start(
        disks => [{ id => 'disk0', file => "$tmp/image" }, { id => 'tiny', size => 528 * 1024 }],
        guest => 0,
        paused => 1,
    );
    is($vm->qmp('query-status')->{status}, 'prelaunch', 'paused');
    is($vm->disk('disk0')->{size}, 4 * $MiB, 'size of the image');
    $vm->cont;
    is($vm->qmp('query-status')->{status}, 'running', 'running');
    like($vm->qemu_io('disk0', 'read -P 0x78 0 4M'), qr/read/, 'the image has its content');
    $vm->quit;
    ok(slurp("$tmp/image") eq 'x' x (4 * $MiB), 'the file is unchanged');
};

subtest 'nothing is left behind' => sub {
    my $vm = $VM->start(guest => 0);
    my ($pid, $dir) = ($vm->pid, $vm->dir);
    my $child = fork() // die "fork: $!\n";
    if (!$child) {
        undef $vm;
        POSIX::_exit(0);
    }
    waitpid($child, 0);
    ok($vm->is_alive && -d $dir, 'a child\'s copy of the object does nothing');
    undef $vm;
    ok(!kill(0, $pid), 'QEMU ended with the object');
    ok(!-e $dir, 'the directory is gone');

    # A program that dies, one that is interrupted, and one that is killed.
    local $ENV{TMPDIR} = "$tmp";
    for my $end ('die "on purpose\n"', 'kill TERM => $$', 'kill KILL => $$') {
        my $code = 'my $vm = PBA::Test::VM->start(guest => 0); $| = 1; say $vm->pid; ' . $end;
        open(my $out, '-|', $^X, "-I$FindBin::Bin/lib", '-Mv5.36', '-MPBA::Test::VM', '-e',
            "open STDERR, '>', '/dev/null'; $code")
            or die "perl: $!\n";
        chomp(my $qemu = <$out>);
        close($out);
        is($? & 127, 15, 'the signal is what ended it') if $end =~ /TERM/;
        is_deeply([glob "$tmp/pba-vm.*"], [], "no directory is left after: $end")
            if $end !~ /KILL/;
        my $gone;
        for (1 .. 100) {
            last if $gone = !kill(0, $qemu);
            Time::HiRes::sleep(0.05);
        }
        ok($gone, "no QEMU is left after: $end");
    }
};

subtest 'one test: it ends, and leaves nothing running' => sub {
    my $leaving = 'exit(0) if fork(); sleep(60)';
    my %case = (
        'passes' => ['exit(0)', 0, qr/\A\z/],
        'fails' => ['exit(3)', 3, qr/\A\z/],
        'is killed' => ['kill(KILL => $$)', 137, qr/\A\z/],
        'hangs' => ['sleep(60)', 124, qr/^# not ended after 2 s: \d+ perl: \S*perl /m],
        'hangs with a child' => ["fork(); sleep(60)", 124, qr/^(?:# not ended .*\n){2}\z/m],
        'leaves a process' => [$leaving, 125, qr/^# left running by the test: \d+ perl: /m],
        'leaves an orphan' => ["exit(0) if fork(); $leaving", 125, qr/^# left running by /m],
    );
    local $ENV{PBA_LIMIT} = 2;
    for my $name (sort keys %case) {
        my ($code, $status, $text) = $case{$name}->@*;
        spew("$tmp/one", $code);
        system("$^X $FindBin::Bin/one.pl $tmp/one 2>$tmp/one.err");
        is($? >> 8, $status, "$name: exit status");
        like(slurp("$tmp/one.err"), $text, "$name: told");
    }
};

done_testing;
