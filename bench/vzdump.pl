#!/usr/bin/perl

# The time of VZDump on a Proxmox host: archive_external and cleanup for a disk of 2 GiB, over the monitor's
# socket, and by a code ref that opens a connection for each QMP command, decoded by JSON::PP and, if
# installed, JSON::XS. Compared with today's commands and programs, over such connections, with and without
# their sleeps. The QEMU is that of PBA_QEMU if it has Proxmox' commands, else the stand-in (Front), whose
# share of the time is the same for all.
#
#   - an increment of 4 MiB and a full backup, read by PVE::BackupAccess::Volume with the mechanism nbd, and
#     by plain sysread of 4 MiB with file-handle; also the part of this in which backup_vm reads
#   - the time from freeze to thaw, and the number of QMP commands
#   - from today's code, the read loop of PVE::BackupProvider::Plugin::Demo, a public provider, and instead of it
#     copy of PVE::BackupAccess::Volume, both to a file
#
# With --throttle, the disk is below a throttle filter, as on Proxmox VE since machine version 10.0. At the end, the
# figures are shown as the tables of doc/qemu-server.md.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

BEGIN { $ENV{TMPDIR} = '/dev/shm' }

use File::Temp ();

use PBA::Bench;
use PBA::Bench::Image;
use PBA::Bench::MonCmd;
use PBA::Bench::ProxmoxMade;
use PBA::Bench::QemuServer;
use PBA::Test::Backend;
use PBA::Test::Provider;

my $mib = 1 << 20;

my $bench = PBA::Bench->new(
    'vzdump', \@ARGV,
    'size=i' => '[--size BYTES]',
    throttle => '[--throttle]'
);
my $size = $bench->option('size', 2 << 30);
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', TMPDIR => 1);
my $image = PBA::Bench::Image::write_raw("$dir/disk.raw", $size, full => 1);
my %shape
    = $bench->option('throttle', 0) ? (shape => 'proxmox', throttle => 1) : (shape => 'drive');
my $backend = PBA::Test::Backend->start(
    name => 'pve',
    guest => 0,
    memory => 32,
    args => ['-uuid', '11111111-2222-3333-4444-555555555555'],
    disks => [{ id => 'scsi0', file => $image, bus => 'scsi', %shape }],
);
my $device = $backend->device('scsi0');
my @decoders = PBA::Bench::MonCmd->decoders;

# ---- the sides: each takes a code ref, mode and mechanism, and returns bytes and times ----

# What a provider does with a volume.
sub backup_vm ($seen, $mechanism, $volume) {
    my $began = PBA::Bench::now();
    if ($mechanism eq 'nbd') {
        my $reader = PVE::BackupAccess::Volume->open($device, $volume);
        $seen->{bytes} = $reader->copy(to => sub (@) { })->{'bytes-read'};
        $reader->close;
    }
    else {
        my %plain = (handle => $volume->{'file-handle'});
        $plain{next_dirty_region} = $volume->{'next-dirty-region'};
        $seen->{bytes} = PBA::Bench::QemuServer::copy(\%plain);
    }
    $seen->{reads} = PBA::Bench::now() - $began;
    return;
}

# The read loop of PVE::BackupProvider::Plugin::Demo.
sub read_loop ($seen, $mechanism, $volume) {
    my $began = PBA::Bench::now();
    open(my $out, '>:raw', "$dir/copy.raw") or die "copy.raw: $!\n";
    while (my $count = sysread($volume->{'file-handle'}, my $buffer, 8192)) {
        my $written = syswrite($out, $buffer, $count);
        die "copy.raw: $!\n" if ($written // -1) != $count;
        $seen->{bytes} += $count;
    }
    $seen->{reads} = PBA::Bench::now() - $began;
    unlink("$dir/copy.raw");
    return;
}

# The line that replaces it.
sub copy_to_file ($seen, $mechanism, $volume) {
    my $began = PBA::Bench::now();
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    $seen->{bytes} = $reader->copy(to => "$dir/copy.raw")->{'bytes-read'};
    $seen->{reads} = PBA::Bench::now() - $began;
    unlink("$dir/copy.raw");
    return;
}

sub frozen_hooks ($seen) {
    my $began;
    return (
        freeze => sub { $began = PBA::Bench::now() },
        thaw => sub { $seen->{frozen} = PBA::Bench::now() - $began },
    );
}

sub one_object ($qmp, $mode, $mechanism, $name) {
    my $seen = {};
    my $provider = PBA::Test::Provider->new(mechanism => $mechanism, mode => $mode);
    $provider->{on}{backup_vm} = sub ($, $vmid, $config, $volumes, $info) {
        backup_vm($seen, $mechanism, $volumes->{$device});
    };
    PVE::BackupAccess->recover(qmp => $qmp);
    $backend->task($provider, qmp => $qmp, 'target-id' => $name, frozen_hooks($seen))->run;
    return $seen;
}

sub call_by_call ($qmp, $mode, $mechanism, $name) {
    my $seen = {};
    PVE::BackupAccess->recover(qmp => $qmp);
    my $access = $backend->access(qmp => $qmp, 'target-id' => $name, log => sub { });
    $access->sizes($device);
    my $infos
        = $access->setup([{ device => $device, 'bitmap-mode' => $mode }], frozen_hooks($seen));
    $access->bitmap_state($infos->[0]);
    backup_vm($seen, $mechanism, $access->volumes($mechanism)->{$device});
    $access->teardown(1);
    return $seen;
}

sub todays ($qmp, $mode, $mechanism, $name, $sleeps, $store = \&backup_vm) {
    my $seen = {};
    my $access = PBA::Bench::ProxmoxMade->new(
        execute => $qmp,
        disks => [$backend->vm->disk('scsi0')],
        dir => "$dir",
        target => $name,
        froze => sub ($seconds) { $seen->{frozen} = $seconds },
    );
    if ($mechanism eq 'nbd') {
        $access->setup(mode => $mode);
        $access->export;
        $store->($seen, $mechanism, $access->volume(0));
        $access->teardown;
        return $seen;
    }
    my $task = PBA::Bench::QemuServer->new(
        access => $access,
        disks => [$backend->vm->disk('scsi0')],
        dir => "$dir",
        sleeps => $sleeps,
    );
    my $volume = $task->setup(incremental => 1, mode => $mode)->{scsi0};
    $store->(
        $seen,
        $mechanism,
        {
            'file-handle' => $volume->{handle},
            'next-dirty-region' => $volume->{next_dirty_region},
            'bitmap-mode' => 'new',
            size => $volume->{size},
        }
    );
    undef($volume);
    $task->teardown;
    return $seen;
}

# ---- the cases ----

my %forms = ('one object' => \&one_object, 'call by call' => \&call_by_call);

sub write_increment () {
    state $round = 0;
    my $byte = ++$round % 255 + 1;
    $backend->vm->qemu_io('scsi0', "write -P $byte 8M 4M");
    return;
}

# A side in the form that PBA::Bench needs. Today's way does not use the socket.
sub side ($code, $way, $mode, $mechanism, @more) {
    my $name = join(' ', 'bench', $more[0], $mechanism, $way);
    my $is_socket = $way eq 'socket' && $code != \&todays;
    my ($json) = grep { $way eq 'socket' || $way eq $_ } reverse(@decoders);
    my $run = sub ($) {
        my $mon_cmd = PBA::Bench::MonCmd->new(path => $backend->qmp_path, json => $json);
        my $qmp = $is_socket ? $backend->qmp_path : $mon_cmd->code;
        my $began = PBA::Bench::now();
        my $seen = $code->($qmp, $mode, $mechanism, $name, @more[1 .. $#more]);
        my %times = ('all' => PBA::Bench::now() - $began);
        $times{$_} = $seen->{$_} for grep { defined($seen->{$_}) } qw(frozen reads);
        $times{'QMP commands'} = $mon_cmd->count if !$is_socket;
        return { counts => { bytes => $seen->{bytes} }, times => \%times };
    };
    $run->(undef) if $mode eq 'use';    # the first one is full
    return { before => $mode eq 'use' ? \&write_increment : sub { }, run => $run };
}

sub measure ($form, $way, $kind, $mechanism) {
    my $case = "$form, $way, $mechanism, $kind";
    return if !$bench->wants($case);
    my $mode = $kind eq 'full' ? 'new' : 'use';
    my @sleeps = $mechanism eq 'nbd' ? 0 : (1, 0);
    my @peers = map {
        my $name = $_ || $mechanism eq 'nbd' ? "today's" : "today's, no sleeps";
        { name => $name, side(\&todays, $way, $mode, $mechanism, "today $_", $_)->%* }
    } @sleeps;
    my $ours = side($forms{$form}, $way, $mode, $mechanism, $form);
    $bench->compare(case => $case, ours => $ours, peer => \@peers);
    remove_bitmaps();
    return;
}

sub remove_bitmaps () {
    for my $node (sort keys $backend->vm->bitmaps->%*) {
        my $bitmaps = $backend->vm->bitmaps->{$node};
        $backend->vm->qmp('block-dirty-bitmap-remove', node => $node, name => $_)
            for sort keys $bitmaps->%*;
    }
    return;
}

sub measure_loop () {
    my ($decoder) = reverse(@decoders);
    my $read_by = sub ($mechanism, $store) {
        return side(\&todays, $decoder, 'new', $mechanism, "loop $mechanism", 0, $store);
    };
    my $case = 'to a file, from file-handle';
    return if !$bench->wants($case);
    $bench->compare(
        case => $case,
        ours => { $read_by->('file-handle', \&copy_to_file)->%* },
        peer => [
            { name => 'read loop of 8 KiB', $read_by->('file-handle', \&read_loop)->%* },
            { name => 'copy, from nbd', $read_by->('nbd', \&copy_to_file)->%* },
        ],
    );
    remove_bitmaps();
    return;
}

# ---- the tables ----

my @columns = ("today's", "today's, no sleeps", 'one object', 'call by call');
my %scale = (
    frozen => [1000, '%.1f'],
    'QMP commands' => [1, '%d'],
    all => [1, '%.3f'],
    reads => [1, '%.3f']
);
my $increment = 'nbd, increment of 4 MiB';
my @rows = (
    (
        map { [$_, $_, 'all'] } $increment,
        'nbd, full',
        'file-handle, increment of 4 MiB',
        'file-handle, full'
    ),
    ['of which backup_vm reads', 'file-handle, full', 'reads'],
    ['frozen, ms', $increment, 'frozen'],
    ['QMP commands of an increment', $increment, 'QMP commands'],
);

sub figure ($column, $way, $case, $time) {
    for my $record ($bench->{records}->@*) {
        my ($form) = grep { $record->{case} eq "$_, $way, $case: $time" } keys %forms;
        my $side
            = !defined($form) ? undef
            : $form eq $column ? $record->{ours}
            : ($record->{peer}{name} // '') eq $column ? $record->{peer}
            : undef;
        next if !$side;
        my ($factor, $format) = $scale{$time}->@*;
        return sprintf($format, $factor * $side->{seconds});
    }
    return '';
}

sub show_tables () {
    my @ways = grep {
        my $way = $_;
        grep { $_->{case} =~ m/, \Q$way\E, / } $bench->{records}->@*
    } 'socket', @decoders;
    for my $way ($bench->{json} ? () : @ways) {
        say join(' | ', "\n| $way", @columns), " |\n|", '---|' x (1 + @columns);
        for my $row (@rows) {
            my ($name, $case, $time) = $row->@*;
            say join(' | ', "| $name", map { figure($_, $way, $case, $time) } @columns), ' |';
        }
    }
    return;
}

require PVE::BackupAccess::Task;
for my $way ('socket', @decoders) {
    for my $mechanism (qw(nbd file-handle)) {
        for my $kind ('increment of 4 MiB', 'full') {
            measure($_, $way, $kind, $mechanism) for reverse sort keys %forms;
        }
    }
}
measure_loop();
show_tables();
$bench->finish;
