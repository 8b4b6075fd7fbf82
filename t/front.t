# The front with a real guest that writes continuously. Tests of the pve backend are only valid if the front
# makes one instant and correct bitmaps, and leaves nothing behind. t/front-recordings.t compares its replies
# with those of a real Proxmox QEMU.
#
# One QEMU is enough: the front is compared with recordings, not with a QEMU.

use v5.36;

use FindBin ();
use lib "$FindBin::Bin/lib";

use File::Temp ();
use IO::Socket::UNIX ();
use JSON::PP ();
use Test::More;
use Time::HiRes ();

use PBA::Test::Front ();
use PBA::Test::Model ();
use PBA::Test::QMP ();
use PBA::Test::VM ();

my $VM = 'PBA::Test::VM';

my $mib = 1 << 20;
my $cluster = 64 << 10;
my $target = 'snapshot-access:test';
my $tmp = File::Temp->newdir('pba-front-XXXXXXXX', TMPDIR => 1);

# ---- reading an export with the minimum of NBD ----

sub receive_exactly ($socket, $length) {
    my $data = '';
    while (length($data) < $length) {
        my $n = sysread($socket, $data, $length - length($data), length($data));
        die "the NBD connection ended\n" if !$n;
    }
    return $data;
}

sub open_export ($path, $name) {
    my $socket = IO::Socket::UNIX->new($path) // die "cannot connect to $path: $!\n";
    receive_exactly($socket, 18);
    syswrite($socket, pack('N a8 N N a*', 3, 'IHAVEOPT', 1, length($name), $name));
    receive_exactly($socket, 10);
    return $socket;
}

# Returns the error number and the data.
sub nbd_command ($socket, $command, $offset, $length) {
    syswrite($socket, pack('N n n Q> Q> N', 0x25609513, 0, $command, 1, $offset, $length));
    my ($magic, $error) = unpack('N N', receive_exactly($socket, 16));
    return ($error, $error || $command != 0 ? '' : receive_exactly($socket, $length));
}

sub nbd_read ($socket, $offset, $length) { return nbd_command($socket, 0, $offset, $length) }
sub nbd_trim ($socket, $offset, $length) { return (nbd_command($socket, 4, $offset, $length))[0] }

sub dirty_ranges ($path, $name, $bitmap) {
    my $uri = "nbd+unix:///$name?socket=$path";
    open(my $out, '-|', 'nbdinfo', '--json', "--map=qemu:dirty-bitmap:$bitmap", $uri)
        or die "cannot run nbdinfo: $!\n";
    local $/;
    my $map = JSON::PP->new->decode(scalar(<$out>));
    close($out) or die "nbdinfo failed\n";
    return map { [@$_{qw(offset length)}] } grep { $_->{type} } @$map;
}

# Updates an image with the dirty ranges of an export, in pieces, and trims what was read. Each piece is within
# one cluster of the filter: if a request begins in a cluster that was copied and ends in one that was not, QEMU
# 7.2 reads the current content of the disk.
sub copy_ranges ($path, $name, $file, @ranges) {
    my $socket = open_export($path, $name);
    open(my $fh, '+<:raw', $file) or die "cannot open $file: $!\n";
    my $errors = 0;
    for my $range (@ranges) {
        my ($offset, $end) = ($range->[0], $range->[0] + $range->[1]);
        for (; $offset < $end; $offset += $cluster) {
            my $length = $end - $offset < $cluster ? $end - $offset : $cluster;
            my ($error, $data) = nbd_read($socket, $offset, $length);
            $errors++ if $error;
            seek($fh, $offset, 0);
            print $fh $data;
            $errors++ if nbd_trim($socket, $offset, $length);
        }
    }
    close($fh) or die "cannot write $file: $!\n";
    return $errors;
}

sub sum ($ranges) {
    my $sum = 0;
    $sum += $_->[1] for @$ranges;
    return $sum;
}

# ---- one guest, its front and its backups ----

sub begin ($vm, $form) {
    my $front = PBA::Test::Front->start(
        qemu_qmp => $vm->qmp_path,
        listen => $vm->dir . '/front',
        form => $form,
        pid => $vm->pid,
    );
    return ($front, PBA::Test::QMP->new(path => $front->socket_path));
}

sub setup_arguments ($form, $mode, @devices) {
    if ($form eq 'devlist') {
        my %bitmap = $mode eq 'none' ? () : ('bitmap-name' => $mode);
        return ('target-id' => $target, devlist => join(';', @devices), %bitmap);
    }
    my @list = map { { device => $_, 'bitmap-mode' => $mode } } @devices;
    return ('target-id' => $target, devices => \@list);
}

sub start_exports ($qmp, $path, $infos) {
    my %address = (type => 'unix', data => { path => $path });
    $qmp->execute('nbd-server-start', addr => \%address);
    for my $info (@$infos) {
        my ($name, $node) = @$info{qw(device node-name)};
        my %export = (id => $name, name => $name, type => 'nbd', 'node-name' => $node);
        my %bitmap = (node => $info->{'bitmap-node-name'}, name => $info->{'bitmap-name'});
        $export{bitmaps} = [\%bitmap] if defined($bitmap{name});
        $qmp->execute('block-export-add', %export, writable => JSON::PP::true);
    }
    return;
}

# Makes one backup of all disks into $images, from the dirty ranges. Returns the number of dirty bytes.
sub back_up ($vm, $qmp, $model, $images, %option) {
    my %device = map { $vm->disk($_)->{device} => $_ } keys(%$images);
    my @arguments = setup_arguments($option{form}, $option{mode}, sort(keys(%device)));
    my $infos = $qmp->execute('backup-access-setup', @arguments);
    my @actions = map { $_->{'bitmap-action'} // 'no action' } @$infos;
    is("@actions", $option{actions}, 'actions');
    ok($qmp->execute('query-status')->{running}, 'the guest runs');
    my $path = "$tmp/nbd";
    unlink($path);
    start_exports($qmp, $path, $infos);
    $vm->guest->wait_more_churn(20);

    my $dirty = 0;
    for my $info (@$infos) {
        my $name = $info->{device};
        my @ranges
            = defined($info->{'bitmap-name'})
            ? dirty_ranges($path, $name, $info->{'bitmap-name'})
            : [0, $info->{size}];
        $dirty += sum(\@ranges);
        my $errors = copy_ranges($path, $name, $images->{ $device{$name} }, @ranges);
        is($errors, 0, "$name: every dirty range can be read and trimmed");
        my ($error) = @ranges ? nbd_read(open_export($path, $name), $ranges[0][0], 512) : 22;
        is($error, 22, "$name: trimmed data cannot be read again");
        check_clean($path, $info, @ranges) if !$option{iothread};
    }
    $qmp->execute('nbd-server-stop');
    my $success = $option{success} // 1 ? JSON::PP::true : JSON::PP::false;
    $qmp->execute('backup-access-teardown', 'target-id' => $target, success => $success);
    is(($model->check_images($images))[1], undef, 'the images show one instant');
    return $dirty;
}

sub check_clean ($path, $info, @ranges) {
    my $end = 0;
    for my $range (@ranges, [$info->{size}, 0]) {
        if ($range->[0] > $end) {
            my ($error) = nbd_read(open_export($path, $info->{device}), $end, 512);
            return is($error, 22, "$info->{device}: what is clean cannot be read");
        }
        $end = $range->[0] + $range->[1];
    }
    return;
}

sub create_image ($file, $size) {
    open(my $fh, '>', $file) or die "cannot create $file: $!\n";
    truncate($fh, $size) or die "cannot extend $file: $!\n";
    close($fh) or die "cannot write $file: $!\n";
    return $file;
}

# After a backup, the graph must be as before, and only the target's bitmaps must exist, which record.
sub check_left ($vm, $before) {
    is_deeply($vm->graph, $before, 'the block graph is as before');
    my $nodes = $vm->bitmaps;
    for my $bitmaps (values(%$nodes)) {
        my ($bitmap, @more) = values(%$bitmaps);
        ok($bitmap->{recording}, 'the bitmap records');
        is(scalar(@more), 0, 'there is no other bitmap');
    }
    return;
}

sub check_events ($qmp, $label) {
    my @odd = grep { !/\A(?:BLOCK_EXPORT_DELETED|NIC_RX_FILTER_CHANGED|RTC_CHANGE)\z/ }
        map { $_->{event} } $qmp->events;
    is_deeply(\@odd, [], "$label: the client sees no events of the front's own doing");
    return;
}

my @disks = (
    { id => 'one', size => 24 * $mib, throttle => 1 },
    { id => 'two', size => 17 * $mib + 512, format => 'raw', bus => 'scsi', shape => 'drive' },
    { id => 'three', size => 16 * $mib, format => 'qcow2' },
);

sub start_writing ($vm) {
    $vm->guest->start_churn(seed => 5, disks => [$vm->disk_ids], blocks => 1024);
    my @known = map { { id => $_->{id}, size => $_->{size} } } @disks;
    return PBA::Test::Model->new(seed => 5, disks => \@known, blocks => 1024);
}

# With iothreads, the front does not stop the guest, and does not hide the clean parts.
sub run_backups ($form, $iothread, @rounds) {
    my @these = map {
        { %$_, iothread => $iothread }
    } @disks;
    my $vm = $VM->start(disks => \@these);
    my $model = start_writing($vm);
    $vm->add_fleecing_node($_) for $vm->disk_ids;
    my $before = $vm->graph;
    my ($front, $qmp) = begin($vm, $form);
    my %images = map { $_->{id} => create_image("$tmp/$form-$_->{id}", $_->{size}) } @disks;
    my $with = $iothread ? ' with iothreads' : '';

    for my $round (@rounds) {
        my ($mode, $actions, $dirty, %option) = @$round;
        subtest(
            "$form$with: $mode, expecting $actions" => sub {
                my %all = (form => $form, mode => $mode, actions => $actions, %option);
                $all{iothread} = $iothread;
                my $got = back_up($vm, $qmp, $model, \%images, %all);
                ok($dirty->($got), "$got bytes are dirty");
                check_left($vm, $before);
                check_events($qmp, $mode);
            }
        );
    }
    $vm->guest->stop_churn;
    is($front->fatal_call, undef, "$form: nothing was fatal");
    return;
}

my $all = 0;
$all += $_->{size} for @disks;
my $is_all = sub ($n) { $n == $all };
my $is_some = sub ($n) { $n > 0 && $n < $all };

run_backups(
    'devices',
    0,
    ['new', 'new new new', $is_all],
    ['use', 'used used used', $is_some],
    ['use', 'used used used', $is_some, success => 0],
    ['use', 'used used used', $is_some],
    ['new', 'new new new', $is_all, success => 0],
    ['use', 'used used used', $is_all],
    ['none', 'no action no action no action', $is_all],
    ['use', 'missing-recreated missing-recreated missing-recreated', $is_all],
);

run_backups(
    'devlist',
    0,
    ['bitmap-a', 'new new new', $is_all],
    ['bitmap-a', 'used used used', $is_some],
    ['bitmap-a', 'used used used', $is_some, success => 0],
    ['bitmap-a', 'used used used', $is_some],
);

# QEMU 7.2 does not survive NBD clients of disks in iothreads.
sub survives_iothreads () {
    my $vm = $VM->start(disks => [{ id => 'one' }], paused => 1, guest => 0);
    return $vm->version->[0] >= 10;
}

run_backups(
    'devices', 1,
    ['new', 'new new new', $is_all],
    ['use', 'used used used', $is_some],
    ['use', 'used used used', $is_some, success => 0],
    ['use', 'used used used', $is_some],
) if survives_iothreads();

subtest 'devlist: one remembered name for each target' => sub {
    my $vm = $VM->start(disks => [{ id => 'one' }], paused => 1, guest => 0);
    $vm->add_fleecing_node('one');
    my ($front, $qmp) = begin($vm, 'devlist');
    for my $step (
        [a => 'new', 'a'],
        [a => 'used', 'a'],
        [b => 'new', 'b'],
        [b => 'used', 'b'],
        [none => 'no action', ''],
        [b => 'new', 'b'],
        )
    {
        my ($name, $action, $left) = @$step;
        my @arguments = setup_arguments('devlist', $name, 'one');
        my ($info) = $qmp->execute('backup-access-setup', @arguments)->@*;
        is($info->{'bitmap-action'} // 'no action', $action, "$name: $action");
        my %end = ('target-id' => $target, success => JSON::PP::true);
        $qmp->execute('backup-access-teardown', %end);
        is(join(' ', keys(%{ $vm->bitmaps->{one} // {} })),
            $left, "then the node has the bitmap '$left'");
    }
    my $schema = $qmp->execute('query-qmp-schema');
    my %schema = map { $_->{name} => $_ } @$schema;
    my $type = $schema{ $schema{'backup-access-setup'}{'arg-type'} };
    my @members = map { $_->{name} } $type->{members}->@*;
    is("@members", 'target-id devlist bitmap-name', 'the schema tells the form');
};

sub raw_client ($front) {
    my $socket = IO::Socket::UNIX->new($front->socket_path) // die "cannot connect: $!\n";
    return $socket;
}

sub next_line ($socket, $seconds) {
    my $line = '';
    my $deadline = Time::HiRes::time() + $seconds;
    while ($line !~ /\n/) {
        my $left = $deadline - Time::HiRes::time();
        my $ready = '';
        vec($ready, fileno($socket), 1) = 1;
        return undef if $left <= 0 || !select($ready, undef, undef, $left);
        sysread($socket, $line, 1, length($line)) or return undef;
    }
    return JSON::PP->new->decode($line);
}

sub ask ($socket, $text) {
    syswrite($socket, $text);
    return next_line($socket, 10);
}

subtest 'the front behaves like a monitor' => sub {
    my $vm = $VM->start(disks => [{ id => 'one' }], paused => 1, guest => 0);
    my $front = (begin($vm, 'devices'))[0];
    my $first = raw_client($front);
    ok(next_line($first, 10)->{QMP}, 'a greeting');
    is(ask($first, '{"execute": "query-status"}')->{error}{class},
        'CommandNotFound', 'commands only after the handshake');
    ask($first, '{"execute": "qmp_capabilities"}');
    is_deeply(ask($first, '{"execute": "query-backup", "id": [1, "x"]}')->{id},
        [1, 'x'], 'the id comes back, ours');
    is(ask($first, '{"execute": "query-status", "id": "y"}')->{id},
        'y', 'the id of a command of QEMU comes back');
    is(ask($first, '{"execute": "nope", "id": 7}')->{error}{class},
        'CommandNotFound', 'an unknown command');
    like(ask($first, '{"execute": ]')->{error}{desc}, qr/JSON/, 'invalid JSON is an error');
    is(ask($first, '{"execute": "query-kvm"} ')->{return}{enabled},
        JSON::PP::false, 'the next command works');

    my $second = raw_client($front);
    is(next_line($second, 0.3), undef, 'a second client waits for its greeting');
    $vm->cont;
    is(next_line($first, 10)->{event}, 'RESUME', 'events go to the client');
    syswrite($first, '{"execute": "stop"}');
    is(next_line($first, 10)->{event}, 'STOP', 'the client gets the event of its own stop');
    close($first);
    ok(next_line($second, 10)->{QMP},
        'the second client gets its greeting when the first has disconnected');
    my @names = $front->names;
    is($names[-1], 'stop', 'the front has recorded what came');
    is($front->connections, 3, 'the front has counted the connections');
};

subtest 'the end of the front' => sub {
    my $vm = $VM->start(disks => [{ id => 'one' }], paused => 1, guest => 0);
    my ($front, $qmp) = begin($vm, 'devices');
    my $path = $front->socket_path;
    ok(-S $path, 'the front has a socket');
    undef $front;
    ok(!-e $path, 'the socket is removed when the front ends');
    ok($vm->is_alive, 'QEMU is still there');

    ($front, $qmp) = begin($vm, 'devices');
    $vm->quit;
    for (1 .. 500) {
        last if !$front->running;
        Time::HiRes::sleep(0.01);
    }
    ok(!$front->running, 'the front ends with the QEMU below');
    ok(!-e $path, 'the socket is removed');
};

done_testing;
