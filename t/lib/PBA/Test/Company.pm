package PBA::Test::Company;

# What others do to a disk of a QEMU, and whether an access and they leave each other alone: for tests of when it
# happens. A cell is a kind of event at a time on a shape of disk.
#
#   my $test = start_cell($shape, $what);
#   ... happen($test); a step of the access with qmp_code($test) and counted ...
#   check_cell($test, $ended);

use v5.36;

use Exporter qw(import);
use File::Temp ();
use JSON::PP ();
use List::Util qw(shuffle);
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Backend;

our @EXPORT_OK = qw(
    %at %events check_cell counted happen possible_cells qmp_code run_cells start_cell write_disk
);

my $mib = 1024 * 1024;
my $size = 16 * $mib;

# Writes before, during and after the access go to different 4 MiB, which is the granularity of Proxmox'
# bitmaps.
our %at = (before => 1 * $mib, during => 5 * $mib, after => 9 * $mib);
my $is_proxmox = PBA::Test::VM->is_proxmox;

# The guest's writes: offset => byte.
sub write_disk ($test, $byte, $at) {
    return if $test->{is_gone};
    $test->{vm}->qemu_io('disk0', "write -P $byte $at 64k");
    $test->{model}{$at} = chr($byte);
    return;
}

sub has ($file, $model) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    for my $at (sort { $a <=> $b } keys $model->%*) {
        seek($fh, $at, 0);
        read($fh, my $data, 65536);
        return "lacks what is at $at" if $data ne $model->{$at} x 65536;
    }
    return 'all';
}

# ---- events ----

sub is_drive ($test) { return $test->{shape} =~ m/\A(?:drive|backed)\z/ }

# The name that libvirt and users would use: that of the drive, or of the node.
sub named ($test) {
    return is_drive($test) ? 'drive-disk0' : 'disk0';
}

sub by_name ($test) {
    return is_drive($test) ? (device => named($test)) : ('node-name' => named($test));
}

# Whether QEMU executed the command. Where it would lose writes, the test requires that QEMU refuses it.
sub try_qmp ($test, $command, %arguments) {
    my $reply = $test->{vm}->qmp_try($command, %arguments);
    $test->{refusal} = $reply->{error} ? $reply->{error}{desc} : undef;
    return !$reply->{error};
}

sub add_target ($test) {
    my $file = $test->{vm}->dir . '/target.raw';
    open(my $fh, '>', $file) or die "$file: $!\n";
    truncate($fh, $size) or die "$file: $!\n";
    my %image = (driver => 'file', filename => $file);
    $test->{vm}->qmp('blockdev-add', driver => 'raw', 'node-name' => 'target', file => \%image);
    return $file;
}

sub status_of ($test) {
    my ($job) = grep { $_->{id} eq 'theirs' } $test->{vm}->qmp('query-jobs')->@*;
    return $job ? $job->{status} : 'gone';
}

sub wait_job ($test, $wanted) {
    for (1 .. 600) {
        return if status_of($test) =~ $wanted;
        sleep(0.05);
    }
    die "the job does not end\n";
}

sub cancel ($test) {
    $test->{vm}->qmp('block-job-cancel', device => 'theirs');
    wait_job($test, qr/gone/);
    return;
}

sub mirror ($test) {
    add_target($test);
    $test->{'at end'} = sub { cancel($test) };
    return try_qmp(
        $test, 'blockdev-mirror',
        'job-id' => 'theirs',
        device => named($test),
        target => 'target',
        sync => 'full'
    );
}

sub own_nodes ($test) {
    return grep { m/\Apba-/ }
        map { $_->{'node-name'} } $test->{vm}->qmp('query-named-block-nodes')->@*;
}

# What stays must not be reported as removed.
sub check_recover ($test) {
    my $backend = $test->{backend};
    my %options = $backend->options(log => sub { });
    delete($options{timeout});
    my $lines = PVE::BackupAccess->recover(%options);
    my @left = own_nodes($test);
    my @said = grep { m/'pba-\S+' stays until what stands on it has ended/ } $lines->@*;
    is(scalar(@said), scalar(@left), 'recover says what stays');
    return;
}

# An overlay over a node of ours that stays would have it in its header.
sub check_no_overlay ($test) {
    ok(!overlay($test, by_name($test)), 'QEMU makes no overlay over our node') if own_nodes($test);
    return;
}

# The backup continues until the access has ended; it must then contain the disk as of its beginning.
sub push_backup ($test, $device) {
    $test->{'target file'} = add_target($test);
    my %then = (map({ $_ => "\0" } values %at), $test->{model}->%*);
    my $done = try_qmp(
        $test, 'blockdev-backup',
        'job-id' => 'theirs',
        device => $device,
        target => 'target',
        sync => 'full',
        speed => 1
    );
    $test->{'at end'} = sub {
        check_recover($test);
        $test->{vm}->qmp('block-job-set-speed', device => 'theirs', speed => 0);
        wait_job($test, qr/gone/);
        is(has($test->{'target file'}, \%then), 'all', 'their backup is the disk as it was');
        check_no_overlay($test);
    };
    return $done;
}

# The disk's own node, below ours.
sub root_node ($test) {
    return $test->{root};
}

# query-block does not show it below a throttle filter.
sub lowest_node ($test) {
    return $test->{shape} eq 'throttle' ? 'disk0-format' : root_node($test);
}

# The job ends before the access does.
sub short_backup ($test, $device) {
    my $done = push_backup($test, $device);
    my $end = sub {
        return if status_of($test) eq 'gone';
        $test->{vm}->qmp('block-job-set-speed', device => 'theirs', speed => 0);
        wait_job($test, qr/gone/);
    };
    @$test{ 'before teardown', 'at end' } = ($end, $end);
    return $done;
}

# The guest continues in the overlay.
sub overlay ($test, @of) {
    my $file = $test->{vm}->dir . '/overlay.qcow2';
    my $done = try_qmp($test, 'blockdev-snapshot-sync', @of, 'snapshot-file' => $file);
    $test->{vm}->disk('disk0')->{file} = $file if $done;
    return $done;
}

sub ends_at_once ($test, $done) {
    $test->{'at end'} = sub { wait_job($test, qr/gone/) };
    return $done;
}

# The name of a node below the guest device's avoids all checks of what uses it. QEMU pauses the guest meanwhile,
# and after a refused load until `cont`. QEMU (10.0) aborts on the load of a throttle filter, without any access.
sub snapshot_job ($test, $command) {
    my $node = lowest_node($test);
    my %snapshot = (tag => 's2', vmstate => $node, devices => [$node]);
    try_qmp($test, $command, 'job-id' => 'theirs', %snapshot) or return 0;
    wait_job($test, qr/concluded/);
    my ($job) = grep { $_->{id} eq 'theirs' } $test->{vm}->qmp('query-jobs')->@*;
    $test->{vm}->qmp('job-dismiss', id => 'theirs');
    $test->{vm}->qmp('cont');
    $test->{refusal} = $job->{error};
    return !$job->{error};
}

sub unplug ($test) {
    $test->{vm}->unplug('disk0');
    $test->{is_gone} = 1;
    return 1;
}

sub replug ($test) {
    unplug($test);
    $test->{is_gone} = !eval { $test->{vm}->plug('disk0'); 1 };
    return 1;
}

sub second_client ($test, $target) {
    my $access = $test->{backend}->access('target-id' => $target);
    my $done = eval { $access->setup($test->{backend}->devices('use', 'disk0')); 1 };
    $test->{refusal} = $@;
    $access->teardown(0) if $done;
    return $done;
}

# refused: QEMU must refuse it while the access is active. succeeds: QEMU may execute it, and the access still
# ends as a success.
our %events = (
    'a mirror' => { happens => \&mirror, refused => 1 },
    'a backup of the drive' => {
        happens => sub ($test) { push_backup($test, named($test)) },
        succeeds => 1,
    },
    'a backup of the node' => {
        happens => sub ($test) { push_backup($test, root_node($test)) },
        succeeds => 1,
    },
    'a short backup of the lowest node' => {
        happens => sub ($test) { short_backup($test, lowest_node($test)) },
        succeeds => 1,
    },
    'a commit' => {
        happens => sub ($test) {
            $test->{'at end'} = sub { cancel($test) };
            try_qmp($test, 'block-commit', 'job-id' => 'theirs', device => named($test));
        },
        refused => 1,
    },
    'a stream' => {
        happens => sub ($test) {
            ends_at_once($test,
                try_qmp($test, 'block-stream', 'job-id' => 'theirs', device => root_node($test)));
        },

        # If QEMU refuses this below a throttle filter, a block backend of it remains.
        stays => 1,
    },
    'an overlay' => {
        happens => sub ($test) { overlay($test, by_name($test)) },
        refused => 1,
        stays => 1,
    },
    'an overlay of the node' => {
        happens => sub ($test) {
            overlay($test, 'node-name' => root_node($test), 'snapshot-node-name' => 'overlay');
        },

        # Below Proxmox' own filter, this works as at any other time: the node then has another disk.
        refused => !$is_proxmox,
        stays => 1,
        next => qr/node 'overlay' of another program is on top of this disk's node/,
    },
    'an internal snapshot' => {
        happens => sub ($test) {
            my %names = (device => named($test), name => 's1');
            try_qmp($test, 'blockdev-snapshot-internal-sync', %names);
        },
        refused => 1,
    },
    'savevm' => {
        happens => sub ($test) {
            $test->{refusal} = $test->{vm}->hmp('savevm s1');
            return $test->{refusal} !~ m/Error/;
        },

        # At the end of a teardown it succeeds, which is harmless.
        refused => $is_proxmox ? 'while up' : 'while guarded',
    },
    'a snapshot of the node' => { happens => sub ($test) { snapshot_job($test, 'snapshot-save') } },
    'a load of a snapshot of the node' => {
        before => sub ($test) { snapshot_job($test, 'snapshot-save') or die $test->{refusal} },
        happens => sub ($test) { snapshot_job($test, 'snapshot-load') },
        refused => 1,
    },
    'a resize' => {
        happens =>
            sub ($test) { try_qmp($test, 'block_resize', by_name($test), size => 2 * $size) },
        refused => 1,
        next => qr/must have exactly the size of the device/,
    },
    'an unplug' => { happens => \&unplug },
    'an unplug and replug' => { happens => \&replug },
    'a second client' => {
        happens => sub ($test) { second_client($test, 'snapshot-access:test') },
        refused => 1,
    },
    'a second client of another target' => {
        happens => sub ($test) { second_client($test, 'other') },
        refused => 1,
    },
);

# Runs a step of the access, in which it happens before that command.
sub counted ($test, $before, $step) {
    @$test{qw(counts count before)} = (1, 0, $before);
    my $done = eval { $step->(); 1 } ? 1 : 0;
    $test->{error} = $@;
    $test->{counts} = 0;
    return $done;
}

# The commands of the access go through this code ref, so that something can happen between two of them.
sub qmp_code ($test) {
    return sub ($command, $arguments) {
        if ($test->{counts} && grep { $_ eq $test->{before} } ++$test->{count}, $command) {
            happen($test);
        }
        return $test->{vm}->qmp($command, $arguments->%*);
    };
}

sub happen ($test) {
    return if exists($test->{done});
    $test->{done} = undef;
    my $kind = $is_proxmox ? 'hold' : 'guard';
    my @nodes = $test->{vm}->qmp('query-named-block-nodes')->@*;
    my @filters = grep { $_->{drv} eq 'copy-before-write' } @nodes;
    $test->{guarded}
        = ($test->{event}{refused} // '') eq 'while up'
        ? @filters
        : 2 == grep { $_->{'node-name'} =~ m/\Apba-$kind-/ } @nodes;
    $test->{done} = $test->{event}{happens}->($test) ? 1 : 0;
    $test->{refusal} //= '';
    return;
}

# ---- one combination ----

# A drive whose image has a backing file, as commits and streams need.
sub add_backed ($dir, $id) {
    my @create = (PBA::Test::VM->qemu_img, qw(create -q -f qcow2));
    system(@create, "$dir/$id.base", $size) == 0 or die "qemu-img: $?\n";
    my @of = (qw(-F qcow2 -b), "$dir/$id.base");
    system(@create, @of, "$dir/$id.qcow2") == 0 or die "qemu-img: $?\n";
    return (file => "$dir/$id.qcow2", shape => 'drive');
}

sub start_cell ($shape, $what) {
    my %disk = (size => $size, format => 'qcow2', bus => 'scsi');
    $disk{ $shape =~ m/throttle|iothread/ ? $shape : 'shape' } = $shape;
    my $dir = File::Temp->newdir('company-XXXXXXXX', TMPDIR => 1);
    my $more = sub ($id) { return $shape eq 'backed' ? add_backed($dir, $id) : () };
    my $backend = PBA::Test::Backend->start(
        name => $is_proxmox ? 'pve' : 'upstream',
        guest => 0,
        disks => [map { { id => $_, %disk, $more->($_) } } qw(disk0 disk1)],
    );
    my $vm = $backend->vm;
    my %test = (
        backend => $backend,
        vm => $vm,
        dir => $dir,
        shape => $shape,
        event => $events{$what}
    );
    my ($device) = grep { ($_->{qdev} // '') eq 'disk0-dev' } $vm->qmp('query-block')->@*;
    $test{root} = $device->{inserted}{'node-name'};
    $test{outside} = $backend->outside;
    $test{event}{before}->(\%test) if $test{event}{before};
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    write_disk(\%test, 0x41, $at{before});
    return \%test;
}

sub check_next ($test, $ended) {
    my $backend = $test->{backend};
    my $next = eval {
        $backend->next_dirty(log => sub { });
    };
    if ($test->{is_gone} && (!$is_proxmox || is_drive($test))) {
        like(
            $@,
            qr/device (?:drive-)?disk0: (?:there is no such|no guest device)/,
            'the disk is gone'
        );
        return;
    }
    if ($test->{done} && $test->{event}{next} && !$next) {
        like($@, $test->{event}{next}, 'the next backup fails for the expected reason');
        return;
    }
    ok($next, 'the next backup is made') or return diag($@);
    my $dirty = $next->{ $backend->device('disk0') } // return pass('the next backup is full');
    my @wanted
        = grep { exists($test->{model}{$_}) } @at{ $ended ? () : 'before', qw(during after) };
    is(join(' ', grep { !$dirty->{$_} } @wanted), '', 'the next increment lacks nothing');
    return;
}

sub check_outcome ($test, $ended) {
    my $vm = $test->{vm};
    ok($vm->is_alive, 'QEMU lives') or return;
    my $refused = $test->{event}{refused} // '';
    ok(!$test->{done}, 'QEMU refuses it')
        if exists($test->{done})
        && $refused
        && ($test->{guarded} || (!$is_proxmox && $refused eq '1' && !$test->{is_early}));
    diag($test->{error}) if !$ended;
    ok($ended || $test->{'no success'}, 'the backup is a success, or it need not be')
        if $test->{event}{refused} || $test->{event}{succeeds};
    write_disk($test, 0x43, $at{after});
    $test->{'at end'}->() if $test->{'at end'} && $test->{done};
    $vm->qmp_try('blockdev-del', 'node-name' => 'target');
    check_next($test, $ended);
    return if $test->{is_gone};
    my $own = sub ($outside) {
        my @nodes = grep { m/pba-/ } $outside->{graph}{nodes}->@*;
        return { $outside->%*, graph => \@nodes };
    };
    my $what = exists($test->{done}) && $test->{event}{stays} ? $own : sub ($outside) { $outside };
    my ($now, $before) = map { $what->($_) } $test->{backend}->outside, $test->{outside};
    is_deeply($now, $before, 'nothing of ours is left');
    my $others = $test->{event}{leaves} // qr/\A\z/;
    my @bitmaps = grep { $_ !~ $others } $test->{backend}->other_bitmaps->@*;
    is_deeply(\@bitmaps, [], 'no bitmap of ours is left');
    return;
}

sub check_cell ($test, $ended) {
    check_outcome($test, $ended);
    my $vm = $test->{vm};
    return if !$vm->is_alive;
    $vm->quit;

    # The backing file of the overlay would be the throttle filter, with a group that only this QEMU has.
    return if $test->{done} && $test->{event}{stays} && $test->{shape} eq 'throttle';
    is(has($vm->raw_image('disk0'), $test->{model}), 'all', 'the disk has what the guest wrote');
    return;
}

# All combinations of the events with these times and shapes.
sub possible_cells ($times, $shapes) {
    my @cells;
    for my $what (sort keys %events) {
        for my $when ($times->@*) {
            push(@cells, map { [$what, $when, $_] } $shapes->@*);
        }
    }

    # Proxmox' QEMU does not lock images: a drive that is added again while an access to it is active opens its
    # image twice, and what one of them has not stored yet is lost, whichever program made the access.
    @cells = grep { "@$_" !~ m/replug .*(?:drive|backed)\z/ } @cells if $is_proxmox;

    # It also crashes (10.2.2) on snapshot-save, without any access.
    @cells = grep { $_->[0] !~ m/a snapshot of the node\z/ } @cells if $is_proxmox;
    return @cells;
}

# A part of them, or PBA_CELLS, chosen by PBA_SEED; PBA_FULL=1: all.
sub run_cells ($part, $name, $check, @cells) {
    my ($seed, $count) = ($ENV{PBA_SEED} // 20261129 + !!$ENV{PBA_QEMU}, $ENV{PBA_CELLS} // $part);
    if (!$ENV{PBA_FULL}) {
        srand($seed);
        diag("$count of " . @cells . " cells, seed $seed");
        @cells = (shuffle(@cells))[0 .. $count - 1];
    }
    for my $cell (@cells) {
        my ($what, $when, $shape) = $cell->@*;
        subtest "$what $name->{$when}, $shape" => sub { $check->($cell->@*) };
    }
    return;
}

1;
