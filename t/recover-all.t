# Recovery without a target: it undoes the leftovers of dead processes for all targets, with one query if there
# are none; and, if requested, an access of another program, which has no markers.
#
# One QEMU is enough: crash-points.t sweeps recovery on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::QMP;

my $size = 1 << 20;
my $QMP = 'PBA::Test::QMP';

sub recover ($backend, %more) {
    my %options = $backend->options;
    delete($options{'target-id'});
    return PVE::BackupAccess->recover(%options, log => sub { }, %more);
}

# A process that has an access for that target until it is killed.
sub leave ($backend, $target, $code = sub { }) {
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access('target-id' => $target);
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            $tell->('up');
        }
    );
    is($client->next_word, 'up', "an access for $target");
    return $client;
}

sub refused ($code, $pattern, $name) {
    ok(!eval { $code->(); 1 }, "$name: refused");
    is(ref($@) && $@->class, 'StateError', "$name: class") or diag($@);
    like("$@", $pattern, "$name: the message");
    return;
}

sub check_dead ($backend) {
    my $outside = $backend->outside;
    for my $target ('snapshot-access:one', 'snapshot-access:two') {
        my $client = leave($backend, $target);
        refused(
            sub { recover($backend) },
            qr/process \d+ is already backing it up/,
            'refused while the process lives'
        );
        $client->kill9;
        my $lines = recover($backend);
        cmp_ok(scalar($lines->@*), '>', 2, 'the leftovers are undone');
        is_deeply([grep { !m/\Atarget '\Q$target\E': / } $lines->@*],
            [], 'each line names its target')
            or diag($lines->@*);
        is_deeply($backend->outside, $outside, 'nothing is left');
    }
    my @sent;
    my $qmp = sub ($command, $arguments) {
        push(@sent, $command);
        return $QMP->once($backend->qmp_path, $command, $arguments);
    };
    is_deeply(recover($backend, qmp => $qmp), [], 'nothing to undo, bitmaps of two targets there');
    is_deeply(\@sent, ['query-named-block-nodes'], 'only one query is sent');
    return;
}

# By QEMU's own commands, as qemu-server does today.
# qemu-server gives the volume of a TPM state a node without a guest device.
sub add_tpm_state ($backend, $qmp) {
    for my $node ('tpmstate', 'tpmstate-fleecing') {
        my $path = $backend->work_dir('foreign') . "/$node";
        open(my $fh, '>', $path) or die "$path: $!\n";
        truncate($fh, 1 << 20) && close($fh) or die "$path: $!\n";
        my %file = (driver => 'file', filename => $path);
        $qmp->execute('blockdev-add', driver => 'raw', 'node-name' => $node, file => \%file);
    }
    return { device => 'tpmstate', 'bitmap-mode' => 'none' };
}

# An access of another program to a disk without a guest device, before its exports or after them: only QEMU's
# refusal shows that it is active. The bitmap of the same target is still needed for its end.
sub meet_foreign ($backend) {
    my $outside = $backend->outside;
    my $qmp = $QMP->new(path => $backend->qmp_path);
    my %target = ('target-id' => 'snapshot-access:foreign');
    my $tpm = { add_tpm_state($backend, $qmp)->%*, 'bitmap-mode' => 'use' };
    my ($info) = $qmp->execute('backup-access-setup', %target, devices => [$tpm])->@*;
    $qmp->close;
    my $access = $backend->access(%target, log => sub { });
    ok(
        !eval { $access->setup([{ $tpm->%*, base => undef }]); 1 },
        'a setup during the access of another program is refused'
    );
    like("$@", qr/previous backup for target .* not finished/, 'with the words of QEMU');
    my $bitmaps = $backend->vm->bitmaps->{ $info->{'bitmap-node-name'} };
    ok($bitmaps->{ $info->{'bitmap-name'} }, 'the bitmap that the access needs is still there');
    my $lines = PVE::BackupAccess->recover(qmp => $backend->qmp_path, %target, foreign => 1);
    like("@$lines", qr/was ended/, 'the access can be ended');
    $QMP->once($backend->qmp_path, 'blockdev-del', { 'node-name' => $_ })
        for 'tpmstate', 'tpmstate-fleecing';
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

sub start_foreign ($backend, $target, $mode) {
    my $qmp = $QMP->new(path => $backend->qmp_path);
    my @devices = map {
        { $_->%* }
    } $backend->devices($mode)->@*, add_tpm_state($backend, $qmp);
    my $infos = $qmp->execute(
        'backup-access-setup',
        'target-id' => $target,
        devices => \@devices
    );
    my %address = (type => 'unix', data => { path => $backend->work_dir('foreign') . '/nbd' });
    $qmp->execute('nbd-server-start', addr => \%address);
    for my $info ($infos->@*) {
        my @bitmaps = map { { node => $info->{'bitmap-node-name'}, name => $_ } }
            grep { defined } $info->{'bitmap-name'};
        $qmp->execute(
            'block-export-add',
            id => $info->{device},
            type => 'nbd',
            'node-name' => $info->{'node-name'},
            @bitmaps ? (bitmaps => \@bitmaps) : (),
        );
    }
    $qmp->close;
    return;
}

# A backup job has a filter like that of an access. Its program may have started the NBD server.
sub check_job ($backend, %foreign) {
    my ($vm, $dir) = ($backend->vm, $backend->work_dir('foreign'));
    open(my $fh, '>', "$dir/copy") or die "$dir/copy: $!\n";
    truncate($fh, $size) && close($fh) or die "$dir/copy: $!\n";
    my %file = (driver => 'file', filename => "$dir/copy");
    $vm->qmp('nbd-server-start', addr => { type => 'unix', data => { path => "$dir/nbd" } });
    $vm->qmp('blockdev-add', driver => 'raw', 'node-name' => 'copy', file => \%file);
    my %job = ('job-id' => 'copy', device => 'a', sync => 'full');
    $vm->qmp('blockdev-backup', %job, target => 'copy', 'auto-finalize' => JSON::PP::false);
    is_deeply(recover($backend, %foreign), [], 'a backup job is not an access');
    $vm->qmp('nbd-server-stop');    # it is still there
    $vm->clear_events;
    $vm->qmp('block-job-cancel', device => 'copy', force => JSON::PP::true);
    $vm->wait_event('BLOCK_JOB_CANCELLED');
    $vm->qmp('blockdev-del', 'node-name' => 'copy');
    return;
}

sub check_foreign ($backend) {
    my $outside = $backend->outside;
    my %foreign = (foreign => 1, 'target-id' => 'snapshot-access:foreign');
    is_deeply(recover($backend, %foreign), [], 'there is no access of another program');
    check_job($backend, %foreign);
    for my $mode ('use', 'none') {
        start_foreign($backend, $foreign{'target-id'}, $mode);
        my @log;
        my $log = sub ($level, $message) { push(@log, "$level $message") };
        is_deeply(recover($backend, log => $log), [], "$mode: the access is left alone");
        like("@log", qr/\Awarn another program has .* stays .* foreign/, "$mode: the log names it");
        ok(
            !eval { recover($backend, foreign => 1); 1 },
            "$mode: without its target, recovery is refused"
        );
        my %wrong = (%foreign, 'target-id' => 'snapshot-access:wrong');
        refused(sub { recover($backend, %wrong) }, qr/not of target/, "$mode: another target");
        is(scalar($backend->vm->exports->@*), 3, "$mode: the exports stay");
        my $lines = PVE::BackupAccess->recover(qmp => $backend->qmp_path, %foreign);
        like("@$lines", qr/export .* was removed.*NBD server was stopped.*was ended/,
            "$mode: lines");
        $QMP->once($backend->qmp_path, 'blockdev-del', { 'node-name' => $_ })
            for 'tpmstate', 'tpmstate-fleecing';
        is_deeply($backend->outside, $outside, "$mode: nothing is left");
    }
    $backend->check_manners;
    my $client = leave($backend, 'snapshot-access:one');
    $client->kill9;
    refused(sub { recover($backend, %foreign) }, qr/without foreign/, 'an access with markers');
    recover($backend);
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $backend = PBA::Test::Backend->start_paused(
            name => $name,
            disks => [map { { id => $_, size => $size, bus => 'scsi' } } qw(a b)],
        );
        check_dead($backend);
        check_foreign($backend) if $name eq 'pve';
        meet_foreign($backend) if $name eq 'pve';
    };
}

done_testing;
