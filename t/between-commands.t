# Actions of others between two commands of a backup, or on its leftovers, that would remain unnoticed with one
# query less: our nodes are deleted by hand, a disk is unplugged, a mirror is completed, a marker has our name.
# None of our commands may end QEMU, give the guest another disk, or use a bitmap that lacks bits (I2, I3, I10).
#
# On a Proxmox QEMU, its own commands are used.
#
# One QEMU is enough: the order of our commands is the same on all; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Digest::SHA qw(sha256_hex);
use File::Temp ();
use JSON::PP ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::QMP;
use PBA::Test::QMPProxy;

my $Backend = 'PBA::Test::Backend';
my $QMP = 'PBA::Test::QMP';
my $size = 16 << 20;
my ($true, $false) = (JSON::PP::true, JSON::PP::false);

# A disk of shape drive takes its nodes with it when it is unplugged.
sub start ($name, $shape = 'blockdev', %more) {
    my %disk = (size => $size, bus => 'scsi', shape => $shape);
    return $Backend->start(
        name => $name,
        guest => 0,
        disks => [map { { id => $_, %disk } } qw(disk0 disk1)],
        %more,
    );
}

sub recover ($backend, %more) {
    return PVE::BackupAccess->recover($backend->options(%more), log => sub { });
}

sub nodes ($backend, $pattern) {
    return grep { $_ =~ $pattern }
        map { $_->{'node-name'} } $backend->vm->qmp('query-named-block-nodes', flat => $true)->@*;
}

sub delete_nodes ($backend, $pattern) {
    my @nodes = nodes($backend, $pattern);
    $backend->vm->qmp('blockdev-del', 'node-name' => $_) for @nodes;
    return scalar(@nodes);
}

sub good_backup ($backend) {
    my $access = $backend->access;
    $access->setup($backend->devices('use'));
    $access->teardown(1);
    return;
}

# Kills a client while its access is active, or right after QEMU has executed a command of its teardown.
sub leave_access ($backend, $mode, $after = undef) {
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access(
                qmp => sub ($command, $arguments) {
                    my $value = $QMP->once($backend->qmp_path, $command, $arguments);
                    kill(KILL => $$) if $command eq ($after // '');
                    return $value;
                }
            );
            $access->setup($backend->devices($mode));
            $tell->('up');
            $access->teardown(1);
        }
    );
    is($client->next_word, 'up', 'a client has an access');
    return $client;
}

# Recovers with the code ref above. The directories of its guest have other names than with a socket.
sub by_code ($backend) {
    return (qmp => sub (@call) { $QMP->once($backend->qmp_path, @call) });
}

# ---- on Proxmox ----

# A node that was added by blockdev-add remains when its guest device is unplugged.
sub is_recovered ($backend) {
    ok(eval { recover($backend, by_code($backend)); 1 }, 'recover undoes it') or diag($@);
    ok($backend->vm->is_alive, 'the VM lives') or return;
    is_deeply([nodes($backend, qr/\Apba-/), $backend->vm->exports->@*],
        [], 'nothing of the access is left');
    $backend->check_manners;
    return;
}

# The access of a dead process with a disk that was unplugged after its hold had been deleted.
sub unplug_without_hold ($mode, $shape) {
    my $backend = start('pve', $shape);
    my $client = leave_access($backend, $mode);
    my $key = substr(sha256_hex($backend->device('disk0')), 0, 8);
    is(delete_nodes($backend, qr/\Apba-hold-.*-$key\z/), 1, 'the hold of a disk is deleted');
    $backend->vm->unplug('disk0');
    $client->kill9;
    return is_recovered($backend) if $shape eq 'blockdev';

    # QEMU's filter has lost the disk, so a teardown would crash QEMU.
    for my $word (qw(recover setup)) {
        my $done = eval {
            $word eq 'recover'
                ? recover($backend, by_code($backend))
                : $backend->access(by_code($backend), log => sub { })
                ->setup($backend->devices('use', 'disk1'));
        };
        ok(!$done, "mode $mode: $word is refused");
        like("$@", qr/the guest device or its node was removed/, "mode $mode: $word says why");
        ok($backend->vm->is_alive, "mode $mode: $word: the VM lives") or return;
    }
    $backend->check_manners;
    return;
}

# The same with an access of another program; the disk is unplugged before that command of the recovery, or at once.
sub unplug_of_foreign ($when) {
    my $backend = start('pve', 'drive');
    my @devices = map {
        { $_->%* }
    } $backend->devices('none')->@*;
    my %foreign = ('target-id' => 'snapshot-access:foreign');
    $QMP->once($backend->qmp_path, 'backup-access-setup', { %foreign, devices => \@devices });
    my $gone = 0;
    my $qmp = sub ($command, $arguments) {
        $backend->vm->unplug('disk0') if $command =~ $when && !$gone++;
        return $QMP->once($backend->qmp_path, $command, $arguments);
    };
    my $done = eval { PVE::BackupAccess->recover(qmp => $qmp, %foreign, foreign => 1); 1 };
    ok($gone, 'a disk was unplugged');
    ok(!$done, 'recover of another program\'s access is refused');
    like("$@", qr/a guest device or its node was removed/, 'the error says why');
    ok($backend->vm->is_alive, 'the VM lives') or return;
    $backend->check_manners;
    return;
}

# Only the mark of the end shows that QEMU may have cleared the bitmaps.
sub end_without_holds ($backend) {
    my $outside = $backend->outside;
    good_backup($backend);
    my $client = leave_access($backend, 'use', 'backup-access-teardown');
    is(delete_nodes($backend, qr/\Apba-hold-/), 2, 'the holds are deleted');
    $client->let_go_on;
    $client->wait_end;
    is(scalar(nodes($backend, qr/\Apba-ending-/)), 1, 'QEMU has the mark of an end');
    my $access = $backend->access(by_code($backend), log => sub { });
    my @actions = map { $_->{'bitmap-action'} } $access->setup($backend->devices('use'))->@*;
    is_deeply(\@actions, [('missing-recreated') x 2], 'the next backup is full');
    $access->teardown(1);
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

sub proxy ($backend, @fault) {
    return PBA::Test::QMPProxy->start(
        target => $backend->qmp_path,
        listen => $backend->vm->dir . '/proxy.qmp',
        @fault,
    );
}

# The number of the first command that adds a node after the server was stopped.
sub number_of_mark ($backend) {
    my $proxy = proxy($backend);
    my $access = $backend->access(qmp => $proxy->socket_path);
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    $access->teardown(1);
    my @names = map { $_->{name} } $proxy->commands;
    $proxy->stop;
    my ($stop) = grep { $names[$_] eq 'nbd-server-stop' } 0 .. $#names;
    my ($mark) = grep { $names[$_] eq 'blockdev-add' } $stop .. $#names;
    return $mark + 1;
}

# The next teardown does not wait for a mark that was never added.
sub mark_is_lost ($backend) {
    my $outside = $backend->outside;
    my $proxy = proxy($backend, fault => 'drop', at => number_of_mark($backend));
    my $access = $backend->access(qmp => $proxy->socket_path, log => sub { });
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    ok(!eval { $access->teardown(1); 1 }, 'the mark of an end is lost: teardown fails');
    ok($access->_is_up, 'teardown can be tried again');
    ok(!eval { $access->teardown(1); 1 }, 'the second teardown fails, too');
    like(
        "$@",
        qr/as after a failed backup/,
        'the error says that the bitmaps are as after a failure'
    );
    ok(!$access->_is_up, 'the access has ended');
    is_deeply($backend->outside, $outside, 'nothing is left');
    $proxy->stop;
    return;
}

# ---- on both ----

sub start_time ($pid) {
    open(my $fh, '<', "/proc/$pid/stat") or die "/proc/$pid/stat: $!\n";
    return (split(' ', readline($fh) =~ s/.*\) //r))[19];
}

# For example, a process in a container has the same PID and start time. Its marker appears after our process
# has looked.
sub same_name ($backend) {
    my $outside = $backend->outside;
    my $name = "pba-owner-$$-" . start_time($$);
    my %node = (driver => 'null-co', 'node-name' => $name, size => 512 << 30, 'read-only' => $true);
    my $come = 0;
    my $access = $backend->access(
        qmp => sub ($command, $arguments) {
            $backend->vm->qmp('blockdev-add', %node) if $command eq 'blockdev-add' && !$come++;
            return $QMP->once($backend->qmp_path, $command, $arguments);
        }
    );
    ok(!eval { $access->setup($backend->devices('use')); 1 }, 'setup is refused');
    is(scalar(nodes($backend, qr/\A\Q$name\E\z/)), 1, 'the marker of another place stays');
    delete_nodes($backend, qr/\Apba-owner-/);
    is_deeply($backend->outside, $outside, 'nothing of ours stays');
    return;
}

# An export that was deleted, and that QEMU keeps until a request of a client is done: QEMU refuses to delete it
# again, so that teardown must wait.
sub export_goes_late ($backend) {
    my $outside = $backend->outside;
    my $to_delete;
    my $access = $backend->access(
        qmp => sub ($command, $arguments) {
            if ($command eq 'block-export-del') {
                $to_delete = $arguments;
                die "Export '$arguments->{id}' is already shutting down\n";
            }
            my $reply = $QMP->once($backend->qmp_path, $command, $arguments);
            return $reply if $command ne 'query-block-exports' || !$to_delete;
            $_->{'shutting-down'} = $true for $reply->@*;
            $QMP->once($backend->qmp_path, 'block-export-del', $to_delete);
            undef $to_delete;
            return $reply;
        }
    );
    $access->setup($backend->devices('use', 'disk0'));
    $access->volumes('nbd');
    ok(eval { $access->teardown(1); 1 }, 'teardown waits for it') or diag($@);
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

# QEMU is busy: the code ref gives up waiting, and QEMU executes the command before it answers the next one. QEMU
# has only one NBD server, so one that stays would be in the way of every later backup.
sub server_starts_late ($backend) {
    my $outside = $backend->outside;
    my (@late, $given_up);
    my $access = $backend->access(
        log => sub { },
        qmp => sub (@call) {
            if ($call[0] eq 'nbd-server-start' && !$given_up++) {
                @late = @call;
                die "got timeout\n";
            }
            $QMP->once($backend->qmp_path, splice(@late)) if @late;
            return $QMP->once($backend->qmp_path, @call);
        }
    );
    ok(!eval { $access->setup($backend->devices('use')); 1 }, 'setup fails');
    like("$@", qr/got timeout/, 'the error comes through');
    is_deeply($backend->outside, $outside, 'nothing is left');
    ok(eval { good_backup($backend); 1 }, 'the NBD server is gone: the next backup is made')
        or diag($@);
    return;
}

sub wait_job ($vm, $wanted) {
    for (1 .. 600) {
        my ($job) = $vm->qmp('query-jobs')->@*;
        return if ($job ? $job->{status} : 'gone') eq $wanted;
        sleep(0.05);
    }
    die "the job does not become $wanted\n";
}

# The guest moves to the mirror's target, as when a disk is moved.
sub move_disk ($vm) {
    my %job = ('job-id' => 'move', device => 'disk0', target => 'moved', sync => 'full');
    $vm->qmp('blockdev-mirror', %job);
    wait_job($vm, 'ready');
    $vm->qmp('job-complete', id => 'move');
    wait_job($vm, 'gone');
    return;
}

sub node_of ($vm) {
    my ($device) = grep { ($_->{qdev} // '') =~ m/disk0-dev/ } $vm->qmp('query-block')->@*;
    return $device->{inserted}{'node-name'};
}

# QEMU has the same nodes as before, but the guest uses another one of them.
sub moved_between ($name, $when) {
    my $backend = start($name, 'blockdev', guest => 0, paused => 1, memory => 32);
    my $vm = $backend->vm;
    my $file = $vm->dir . '/moved.raw';
    open(my $fh, '>', $file) or die "$file: $!\n";
    truncate($fh, $size) or die "$file: $!\n";
    $vm->qmp(
        'blockdev-add',
        driver => 'raw',
        'node-name' => 'moved',
        file => { driver => 'file', filename => $file }
    );
    my $seen = 0;
    my $access = $backend->access(
        log => sub { },
        qmp => sub ($command, $arguments) {
            move_disk($vm) if $command eq $when && !$seen++;
            return $QMP->once($backend->qmp_path, $command, $arguments);
        }
    );
    my $done = eval { $access->setup($backend->devices('use')); 1 };
    ok($seen, "the disk is moved before $when");
    ok(!$done, 'setup is refused') or $access->teardown(0);
    like("$@", qr/device disk0: was unplugged, or its medium changed/, 'the error says why');
    is(node_of($vm), 'moved', 'the guest keeps the disk that it has');
    is_deeply([nodes($backend, qr/\Apba-/)], [], 'nothing is left');
    return;
}

# Mode none removes the target's bitmap, which others may just have removed.
sub bitmap_goes ($backend) {
    my $outside = $backend->outside;
    good_backup($backend);
    my %bitmap = (node => 'disk0', name => 'pba:snapshot-access:test');
    my $gone = 0;
    my $access = $backend->access(
        qmp => sub ($command, $arguments) {
            $backend->vm->qmp('block-dirty-bitmap-remove', %bitmap)
                if $command eq 'qom-set' && !$gone++;
            return $QMP->once($backend->qmp_path, $command, $arguments);
        }
    );
    ok(eval { $access->setup($backend->devices('none')); 1 }, 'setup does not need it') or diag($@);
    ok($gone, 'the bitmap was removed');
    $access->teardown(1) if $access->_is_up;
    is_deeply($backend->outside, $outside, 'nothing is left');
    is_deeply([map { keys $_->%* } values $backend->vm->bitmaps->%*], [], 'no bitmap is left');
    return;
}

# Another program has put its NBD server in the place of the access' own one.
sub other_server ($backend) {
    my ($vm, $outside) = ($backend->vm, $backend->outside);
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $vm->qmp('nbd-server-stop');
    my %socket = (type => 'unix', data => { path => $vm->dir . '/theirs.sock' });
    $vm->qmp('nbd-server-start', addr => \%socket);
    ok(!eval { $access->volumes('nbd'); 1 }, 'volumes are refused');
    like(
        "$@",
        qr/NBD server of this access, .* was stopped by another program/,
        'the error says why'
    );
    is_deeply($vm->exports, [], 'their server exports nothing of ours');
    $access->teardown(0);
    is_deeply($backend->outside, $outside, 'nothing is left');
    ok($vm->qmp_try('nbd-server-start', addr => \%socket)->{error}, 'their server still runs');
    $vm->qmp('nbd-server-stop');
    return;
}

# A CD-ROM drive with a medium, and its fleecing image.
sub start_cdrom ($name) {
    my $dir = File::Temp->newdir('pba-cdrom-XXXXXXXX', TMPDIR => 1);
    my $node = sub ($node, $is_fixed) {
        my $file = "$dir/$node";
        open(my $fh, '>', $file) or die "$file: $!\n";
        truncate($fh, 1 << 20) or die "$file: $!\n";
        my %file = (driver => 'file', filename => $file, discard => 'unmap');
        my %raw = (driver => 'raw', 'node-name' => $node, file => \%file, discard => 'unmap');
        $raw{'read-only'} = $true if $is_fixed;
        return \%raw;
    };
    my @cdrom = ('-blockdev', JSON::PP->new->encode($node->('cd', 1)));
    push(@cdrom, '-device', 'ide-cd,bus=ide.1,drive=cd,id=cd-dev');
    my $backend = $Backend->start_paused(name => $name, disks => [], args => \@cdrom);
    $backend->vm->qmp('blockdev-add', $node->('cd-fleecing', 0)->%*) if $name eq 'pve';
    return ($backend, $dir);
}

# The drive must not get its medium back. Returns whether there was such a command.
sub ejected_before ($name, $number) {
    my ($backend, $dir) = start_cdrom($name);
    my $vm = $backend->vm;
    my $count = 0;
    my $is_empty = 0;
    my $access = $backend->access(
        log => sub { },
        qmp => sub ($command, $arguments) {
            $is_empty = !$vm->qmp_try('eject', id => 'cd-dev', force => $true)->{error}
                if ++$count == $number;
            return $QMP->once($backend->qmp_path, $command, $arguments);
        }
    );
    eval {
        $access->setup([{ device => 'cd', 'bitmap-mode' => 'none' }]);
        $access->volumes('nbd');
        $access->teardown(1);
    };
    $access->teardown(0) if $access->_is_up;
    ok($vm->is_alive, "ejected before command $number: the VM lives") or return 0;
    is_deeply([nodes($backend, qr/\Apba-/)], [], 'nothing is left');
    my ($drive) = grep { ($_->{qdev} // '') eq 'cd-dev' } $vm->qmp('query-block')->@*;
    is(!$drive->{inserted}, !!$is_empty, 'the drive is empty if QEMU has ejected the medium');
    return $count >= $number;
}

sub ejected ($name) {
    my $step = $ENV{PBA_FULL} ? 1 : 4;
    my $number = 1;
    $number += $step while ejected_before($name, $number);
    return;
}

for my $name ($Backend->names) {
    subtest "backend $name: a medium is ejected" => sub { ejected($name) };
    my $backend = start($name, 'blockdev', guest => 0, paused => 1, memory => 32);
    subtest "backend $name: a marker of the same name" => sub { same_name($backend) };
    subtest "backend $name: a server that starts late" => sub { server_starts_late($backend) };
    subtest "backend $name: an export that goes late" => sub { export_goes_late($backend) };
    subtest "backend $name: another NBD server" => sub { other_server($backend) };
    subtest 'a bitmap that others remove' => sub { bitmap_goes($backend) }
        if $name eq 'upstream';

    if ($name eq 'pve') {
        subtest 'the end of a killed process' => sub { end_without_holds($backend) };
        subtest 'the mark of an end is lost' => sub { mark_is_lost($backend) };
    }
    subtest "backend $name: moved before $_" => sub { moved_between($name, $_) }
        for qw(nbd-server-start);
}
for my $how ([use => 'drive'], [none => 'blockdev']) {
    subtest "unplugged without a hold, @$how" => sub { unplug_without_hold(@$how) };
}
for my $when (['at once', qr/\A/], ['after its exports', qr/\Anbd-server-stop\z/]) {
    my ($name, $command) = $when->@*;
    subtest "an access of another program, unplugged $name" => sub { unplug_of_foreign($command) };
}

done_testing;
