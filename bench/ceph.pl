#!/usr/bin/perl

# Backups onto Ceph: the command's, with digests and its check, beside qemu-img convert of the same access and
# rbd import of the disk's file, which are full each time. The disks have 1 GiB together, half of it data; in
# an increment, 100 blocks of 64 KiB on each disk have changed. The cluster is one node in memory with 8 GiB, and
# needs Ceph's programs (t/one-node-ceph.sh): with less, it waits for what was removed, which it frees late.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

BEGIN { $ENV{TMPDIR} = '/dev/shm' }

use File::Temp ();
use POSIX ();

use PBA::Bench;
use PBA::Bench::Image;
use PBA::Test::Ceph;
use PBA::Test::VM;

my $block = 64 << 10;
my $blocks = 100;

my $bench = PBA::Bench->new('ceph', \@ARGV, 'size=i' => '[--size BYTES]');
my $size = $bench->option('size', 1 << 30);
die "Ceph's programs are not installed\n" if !PBA::Test::Ceph->is_installed;
require PVE::BackupAccess;

my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);

# The cluster's script is beside the tests.
my $ceph = do { local $FindBin::Bin = "$FindBin::Bin/../t"; PBA::Test::Ceph->start(0) };
my $namespace;

sub place () { return "backup/$namespace" }

# A side begins with a cluster that has its own data only.
sub begin_anew () {
    if (defined($namespace)) {
        for my $image (split(' ', $ceph->run('rbd', 'ls', place()))) {
            $ceph->run(qw(rbd snap purge --no-progress), place() . "/$image");
            $ceph->run(qw(rbd rm --no-progress), place() . "/$image");
        }
    }
    $namespace = $ceph->new_namespace;
    return;
}

sub start_guest ($disks, $bytes) {
    my @files = map { PBA::Bench::Image::write_raw("$dir/$_.raw", $bytes) } @$disks;
    my @disks = map { { id => $disks->[$_], file => $files[$_] } } 0 .. $#files;
    return PBA::Test::VM->start(guest => 0, disks => \@disks);
}

sub write_blocks (@guests) {
    state $byte = 0;
    $byte = $byte % 255 + 1;
    for my $guest (@guests) {
        for my $id ($guest->disk_ids) {
            my $stride = int($guest->disk($id)->{size} / $blocks / $block) * $block || $block;
            $guest->qemu_io($id, "write -P $byte " . $_ * $stride . " $block") for 0 .. $blocks - 1;
        }
    }
    return;
}

sub program (@command) {
    local $ENV{CEPH_CONF} = $ceph->conf;
    open(my $fh, '-|', @command) or die "$command[0]: $!\n";
    my $text = join('', <$fh>);
    close($fh) or die "'@command' failed\n$text";
    return;
}

# Runs the code for each guest, in processes at the same time.
sub for_each ($code, @guests) {
    my @pids;
    for my $number (1 .. @guests) {
        my $pid = fork() // die "cannot fork: $!\n";
        if (!$pid) {
            my $is_done = eval { $code->($guests[$number - 1], $number); 1 };
            warn $@ if !$is_done;
            POSIX::_exit($is_done ? 0 : 1);
        }
        push(@pids, $pid);
    }
    my @failed = grep { waitpid($_, 0); $? } @pids;
    die "a backup failed\n" if @failed;
    return { counts => {} };
}

sub by_command ($guest, $number) {
    my @perl = ($^X, '-T', map { "-I$_" } @INC);
    return program(
        @perl, "$FindBin::Bin/../bin/pve-backup-access",
        'backup', 'rbd:' . place(),
        '--ceph-conf', $ceph->conf,
        '--qmp', $guest->qmp_path,
        '--vmid', $number,
        '--target-id', "rbd-$number",
        qw(--quiet),
    );
}

sub by_convert ($guest, $number) {
    my @ids = $guest->disk_ids;
    my $access = PVE::BackupAccess->new(
        qmp => $guest->qmp_path,
        'target-id' => 'convert',
        'run-dir' => "$dir",
        'fleecing-dir' => "$dir",
    );
    $access->setup([map { { device => $_, 'bitmap-mode' => 'none' } } @ids]);
    my $volumes = $access->volumes('nbd');
    for my $id (@ids) {
        my $from = "nbd+unix:///$id?socket=$volumes->{$id}{'nbd-path'}";
        my $to = 'rbd:' . place() . "/$number-$id:conf=" . $ceph->conf;
        program(qw(qemu-img convert -f raw -O raw), $from, $to);
    }
    $access->teardown(1);
    return;
}

sub by_import ($guest, $number) {
    for my $id ($guest->disk_ids) {
        program(qw(rbd import --no-progress), $guest->disk($id)->{file}, place() . "/$number-$id");
    }
    return;
}

sub side ($code, $before, @guests) {
    return (before => $before, run => sub ($) { for_each($code, @guests) });
}

sub full ($case, @guests) {
    $bench->compare(
        case => "full, $case",
        ours => { side(\&by_command, \&begin_anew, @guests) },
        peer => [
            { name => 'qemu-img convert', side(\&by_convert, \&begin_anew, @guests) },
            { name => 'rbd import', side(\&by_import, \&begin_anew, @guests) },
        ],
    );
    return;
}

# The first run's increment builds on a full backup that is made here.
sub increment ($case, @guests) {
    return if !$bench->wants("increment, $case");
    begin_anew();
    for_each(\&by_command, @guests);
    $bench->compare(
        case => "increment, $case",
        ours => { side(\&by_command, sub { write_blocks(@guests) }, @guests) },
    );
    return;
}

my @shapes = (['1 disk', 1, 1], ['4 disks', 1, 4], ['2 guests', 2, 1], ['4 guests', 4, 1],);
for my $shape (@shapes) {
    my ($case, $count, $disks) = @$shape;
    next if !grep { $bench->wants("$_, $case") } qw(full increment);
    my @guests = map {
        my $guest = $_;
        start_guest([map { "disk$guest$_" } 1 .. $disks], $size / $count / $disks);
    } 1 .. $count;
    full($case, @guests);
    increment($case, @guests);
}
$bench->finish;
