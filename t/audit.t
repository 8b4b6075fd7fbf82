# A bitmap that has lost bits leads to increments that lack data. An audit detects this and names the offsets,
# and its archive contains the data. On both backends.
#
# One QEMU is enough: crash-points.t runs audits on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Chain;
use PBA::Test::Client;
use PBA::Test::Command qw(run_command);
use PBA::Test::CommandGuest qw(start_guest succeeds);
use PBA::Test::QemuNbd;
use PBA::Test::VM;
use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Provider::Qcow2Chain::Image;
use PVE::BackupAccess::Provider::Qcow2Chain::Server;

$PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $ENV{PBA_QEMU_IMG} // 'qemu-img';
$PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $ENV{PBA_QEMU_NBD} // 'qemu-nbd';

my $mib = 1 << 20;
my $target = 'pba-tied:snapshot-access:test';

sub start ($name, $form) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        form => $form,
        guest => 0,
        disks => [
            { id => 'a', size => 40 * $mib, bus => 'scsi', shape => 'drive' },
            { id => 'b', size => 9 * $mib, bus => 'scsi', shape => 'drive' },
        ],
    );
    my $test = { backend => $backend, vm => $backend->vm, device => $backend->device('a') };
    $test->{store} = $backend->work_dir('store');
    $test->{outside} = $backend->outside;
    $test->{provider}
        = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $test->{store} },
        'test', sub ($level, $text) { push($test->{log}->@*, "$level: $text") });
    return $test;
}

sub write_to ($test, $id, $offset, $byte) {
    $test->{vm}->qemu_io($id, "write -P $byte $offset 64k");
    return;
}

# Makes one backup. Returns the archive's name.
sub backup ($test, $every = 0) {
    $test->{log} = [];
    $test->{provider}->audit_every($every);
    $test->{result} = $test->{backend}->task($test->{provider})->run_job;
    is_deeply([$test->{backend}->problems($test->{outside})], [], 'nothing is left');
    return $test->{result}{'archive-name'};
}

sub logged ($test, $pattern) {
    return scalar(grep { $_ =~ $pattern } $test->{log}->@*);
}

# Whether the archive equals the disks in their current state.
sub is_disks ($test, $name, $text) {
    for my $id (qw(a b)) {
        my $device = $test->{backend}->device($id);
        my $from = $test->{provider}->restore_vm_volume_init($name, $device, {})->{'qemu-img-path'};
        my $file = "$test->{vm}{dir}/restored.raw";
        PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $from, $file);
        $test->{provider}->restore_vm_volume_cleanup($name, $device, {});
        is(system('cmp', '-s', $file, $test->{vm}->raw_image($id)), 0, "$text: $id");
    }
    return;
}

# Removes the bits by hand, without any other change to the bitmap.
sub clear_bits ($test) {
    my ($bitmap)
        = grep { $_->{device} eq $test->{device} && $_->{name} eq $target }
        $test->{backend}->status->{bitmaps}->@*;
    $test->{vm}->qmp('block-dirty-bitmap-clear', node => $bitmap->{node}, name => $target);
    return;
}

sub check_audits ($test) {
    my $device = $test->{device};
    write_to($test, $_, 4 * $mib, 0x11) for qw(a b);
    my $full = backup($test, 1);
    is(logged($test, qr/bitmap was/), 0, 'a first backup has nothing to audit');

    write_to($test, 'a', 4 * $mib, 0x12);
    clear_bits($test);
    write_to($test, 'a', 32 * $mib, 0x13);
    my $blind = backup($test);
    is_deeply($test->{provider}->verify($blind), [], 'verify cannot see that data is missing');

    write_to($test, 'a', 12 * $mib + 4096, 0x14);
    write_to($test, 'b', 8 * $mib, 0x15);
    clear_bits($test);
    write_to($test, 'a', 20 * $mib, 0x16);
    my $audited = backup($test, 1);
    my ($finding, @more) = $test->{provider}->audit_findings->@*;
    is_deeply(\@more, [], 'the audit reports only one bitmap');
    is_deeply(
        [$finding->@{qw(device bytes ranges suspects)}],
        [$device, 3 * 65536, [[4 * $mib, 65536], [12 * $mib, 131072]], [$blind =~ s{.*/}{}r]],
        'the audit reports the ranges that the bitmap called clean'
    );
    like($finding->{text},
        qr/device \Q$device\E: .* 65536 at offset 4194304, 131072 at offset 12582912\./,
        'as text');
    is(logged($test, qr/^err: \Q$finding->{text}\E/), 1, 'the finding is an error in the log');
    is(logged($test, qr/bitmap was right/), 1, 'the log reports the other bitmap as right');
    is_disks($test, $audited, 'the archive has the data');
    is($test->{result}{devices}{$device}{fallback}, undef, 'an audit is not a fallback');

    write_to($test, 'a', 0, 0x17);
    my $next = backup($test);
    is($test->{result}{devices}{$device}{'bitmap-mode'},
        'reuse', 'the next increment continues from it');
    is_disks($test, $next, 'the increment');
    is_deeply($test->{provider}->audit_findings, [], 'without an audit, there are no findings');
    return;
}

# The sequence: a full backup or an audit, two increments, an audit, and so on.
sub check_every ($test) {
    my @audits;
    for (1 .. 4) {
        write_to($test, 'a', $_ * $mib, 0x20 + $_);
        backup($test, 3);
        push(@audits, logged($test, qr/\Q$test->{device}\E: its bitmap was right/));
    }
    is_deeply(\@audits, [0, 1, 0, 0], 'one backup of three is audited');
    return;
}

# The next setup, or recover, removes what a killed audit leaves behind.
sub check_killed ($test, $by_recover) {
    my $backend = $test->{backend};
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            $test->{provider}->on_progress(sub (@) { $tell->('up') });
            backup($test, 1);
        }
    );
    is($client->next_word, 'up', 'the first audit is running');
    my @copies = grep { m/: pba-audit:/ } $backend->other_bitmaps->@*;
    is(scalar(@copies), 2, 'copies of the bitmaps');
    write_to($test, 'a', 7 * $mib, 0x31);   # before QEMU reports that the readers have disconnected
    $client->kill9;
    if ($by_recover) {
        my %options = ($backend->options, log => sub { });
        my $lines = PVE::BackupAccess->recover(%options);
        is(scalar(grep { m/bitmap 'pba-audit:.* was removed/ } $lines->@*),
            2, 'recover removes them');
        is_deeply([$backend->problems($test->{outside})], [], 'recover leaves nothing behind');
    }
    $test->{provider}->wait_for_others(30);  # its processes end when they notice that it was killed
    is_disks($test, backup($test), 'the next backup');
    return;
}

# The node of a disk that was unplugged, and configured by -drive, goes with the last node above it. The copies of
# the other disks are removed nevertheless.
sub check_unplugged ($name) {
    my ($backend, $vm) = start($name, 'devices')->@{qw(backend vm)};
    my ($first, $second) = map { PVE::BackupAccess->new_id } 1, 2;
    my @log;
    my $access = $backend->access(log => sub ($level, $text) { push(@log, "$level: $text") });
    $access->setup(
        [
            map {
                { $_->%*, base => undef }
            } $backend->devices('new')->@*
        ]
    );
    $access->teardown(1, $first);
    my %audit = (base => $first, audit => 1);
    $access->setup(
        [
            map {
                { $_->%*, %audit }
            } $backend->devices('use')->@*
        ]
    );
    is(scalar(grep { m/: pba-audit:/ } $backend->other_bitmaps->@*), 2, 'copies of the bitmaps');
    $vm->unplug('b');
    ok(eval { $access->teardown(1, $second); 1 }, 'the backup is a success') or diag($@);
    is_deeply([grep { m/not all was undone/ } @log], [], 'everything is undone');
    is_deeply($backend->other_bitmaps, [], 'no copy is left');
    return;
}

for my $case (['upstream', 'devices'], ['pve', 'devices'], ['pve', 'devlist']) {
    my ($name, $form) = $case->@*;
    next if !grep { $_ eq $name } PBA::Test::Backend->names;
    subtest "backend $name, $form" => sub {
        my $test = start($name, $form);
        check_audits($test);
        check_every($test) if $form eq 'devices';
        check_killed($test, $_) for $form eq 'devices' ? (0, 1) : ();
        $test->{backend}->check_manners;
    };
}
subtest 'a disk is unplugged' =>
    sub { check_unplugged(PBA::Test::VM->is_proxmox ? 'pve' : 'upstream') };

# Clears the bits of all bitmaps that record, by hand.
sub clear_all ($vm) {
    my $all = $vm->bitmaps;
    for my $node (sort keys $all->%*) {
        for my $name (grep { $all->{$node}{$_}{recording} } sort keys $all->{$node}->%*) {
            $vm->qmp('block-dirty-bitmap-clear', node => $node, name => $name);
        }
    }
    return;
}

# Also if the backup then fails, because the archive is damaged that it is compared with: the bitmap begins anew, so no
# later audit can find it.
subtest 'the command' => sub {
    my $test = start_guest(PBA::Test::VM->is_proxmox ? 'pve' : 'upstream');
    my $vm = $test->{vm};
    $vm->qemu_io('scsi0', "write -P 0x11 $_") for '4M 64k', '8M 64k';
    chomp(my $archive = succeeds('full', PBA::Test::CommandGuest::backup($test))->{out});
    my $lie
        = qr/^pve-backup-access backup: device drive-scsi0: its dirty bitmap was wrong: .* 65536 at/m;
    my $audit = sub ($byte) {
        $vm->qemu_io('scsi0', "write -P $byte 4M 64k");
        clear_all($vm);
        my $run = run_command(PBA::Test::CommandGuest::backup($test, '--audit'));
        is($run->{status}, 1, 'exit status');
        like($run->{err}, qr/$lie offset 4194304/m, 'what it found');
        is(scalar(my @told = $run->{err} =~ m/bitmap was wrong/g), 1, 'once');
        return $run;
    };
    isnt($audit->('0x12')->{out}, '', 'there is an archive');
    PBA::Test::Chain::rot("$archive/drive-scsi0.qcow2", 8 * $mib);
    my $run = $audit->('0x13');
    is($run->{out}, '', 'there is no archive');
    like($run->{err}, qr/which this one builds on, is damaged; the next/, 'why the backup failed');
};

done_testing;
