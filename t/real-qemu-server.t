# The real PVE::VZDump and its plugin for VMs, from the sources or the Proxmox host that PBA_QEMU_SERVER names,
# on a real Proxmox QEMU (PBA_QEMU): its own archive_external and cleanup, compared with the two forms in
# doc/qemu-server.md, inserted word for word. HACKING.md describes the required tree.
#
# One QEMU is enough: Proxmox VE has only one.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use IO::Socket::UNIX ();
use Test::More;

use PBA::Test::QMP;
use PBA::Test::VZDump::Guest;
use PBA::Test::VZDump::Host qw(write_file);
use PVE::BackupAccess;

my $mib = 1 << 20;
my @forms = ('today', 'one object', 'call by call');
my @mechanisms = ('nbd', 'file-handle');
my $guest = PBA::Test::VZDump::Guest->start;
my ($vm, $agent, $vzdump, $dir) = ($guest->vm, $guest->agent, $guest->vzdump, $guest->dir);

# The other checks are of the guest's disks and of QEMU's bitmaps after the backup.
sub backup ($form, $mechanism, %opt) {
    my $before = $agent->records('command');
    my $made = $vzdump->backup($form, $mechanism, %opt);
    my @commands = $agent->records('command');
    my %times = map { $_->{execute} => $_->{time} } @commands[$before .. $#commands];
    my ($freeze, $thaw) = map { $times{"guest-fsfreeze-$_"} } qw(freeze thaw);
    $made->{frozen} = $thaw - $freeze if $freeze && $thaw;
    return $made;
}

# The bitmaps of a target: { node => [count, recording, granularity] }. A bitmap with the ID of a backup has
# another name.
sub bitmaps_of ($form, $mechanism) {
    my $target = 'snapshot-access:' . $vzdump->storage($form, $mechanism);
    my $nodes = $vm->bitmaps;
    return {
        map {
            my ($bitmap) = grep { defined } $nodes->{$_}->@{ $target, "pba-tied:$target" };
            $bitmap ? ($_ => [$bitmap->@{qw(count recording granularity)}]) : ();
        } keys $nodes->%*
    };
}

# The lines that today's log has, in the form in which ours may have them.
my @lines = (
    qr/starting external backup via test$/,
    qr/attaching TPM drive to QEMU for backup$/,
    (map { qr/drive-$_: attaching fleecing image / } qw(scsi0 scsi1 tpmstate0-backup)),
    qr/backup mechanism:? '?(?:nbd|file-handle)'?$/,
    qr/setting up (?:snapshot-|backup )access/,
    qr/issuing guest-agent 'fs-freeze' command$/,
    qr/issuing guest-agent 'fs-thaw' command$/,
    qr/resuming VM again$/,
    (map { qr/(?:drive-)?$_: dirty-bitmap status: / } qw(scsi0 scsi1 tpmstate0-backup)),
    qr/NBD export/,
    qr/tearing down backup.access$/,
);

sub has_lines ($made, $what) {
    for my $line (@lines) {
        cmp_ok(scalar(grep { $_ =~ $line } $made->{log}->@*), '>=', 1, "$what: a line like $line");
    }
    is_deeply([$guest->told($made)], [], "$what: no warning");
    return;
}

# The commands that qemu-server sent while the guest was frozen. t/freeze.t tests ours.
sub sent_frozen ($made) {
    my ($between) = join(' ', $made->{qmp}->@*) =~ m/fsfreeze-freeze ?(.*?) guest-fsfreeze-thaw/;
    return $between;
}

# The volumes without the name of the target and what a task adds.
sub without_target ($volumes, $form, $mechanism) {
    my $target = 'snapshot-access:' . $vzdump->storage($form, $mechanism);
    for my $volume (values $volumes->%*) {
        delete($volume->@{qw(base identity node)});
        $volume->{'bitmap-name'} =~ s/\A(?:pba-tied:)?\Q$target\E\z/TARGET/
            if $volume->{'bitmap-name'};
    }
    return $volumes;
}

# A full backup, then 4 MiB are written, then an increment.
my %today;
my @figures;

sub check_form ($form, $mechanism) {
    for my $kind ('full', 'increment') {
        my $what = "$form, $mechanism, $kind";
        $vm->guest->write('scsi0', 8 * $mib, 4 * $mib, 0x40 + @figures) if $kind eq 'increment';
        my $made = backup($form, $mechanism, bwlimit => 1 << 20);
        is($made->{state}, 'ok', $what) or diag($made->{msg} // $made->{status});
        $guest->stored_all($form, $mechanism, $what);
        $guest->is_outside($what);
        has_lines($made, $what);
        my $is_today = $form eq 'today';
        is(
            sent_frozen($made),
            $is_today ? 'backup-access-setup' : '',
            "$what: what qemu-server sends while it is frozen"
        );
        my %seen = (
            calls => $made->{calls},
            volumes => without_target($made->{volumes}, $form, $mechanism),
            bitmaps => bitmaps_of($form, $mechanism),
            $made->%{qw(info config bytes)},
        );
        $today{"$mechanism $kind"} = \%seen if $is_today;
        is_deeply($seen{$_}, $today{"$mechanism $kind"}{$_}, "$what: $_ equal today's")
            for sort keys %seen;
        push(@figures, [$form, $mechanism, $kind, $made]);
    }
    return;
}

for my $mechanism (@mechanisms) {
    check_form($_, $mechanism) for @forms;
}

# ---- other results ----

# The backup after one that did not succeed contains everything again.
sub check_next ($form, $mechanism, $what, @expected) {
    my $made = backup($form, $mechanism);
    is($made->{state}, 'ok', "$what: the next backup") or diag($made->{msg} // $made->{status});
    $guest->stored_all($form, $mechanism, "$what, the next backup");
    $guest->is_outside("$what, the next backup");
    my @told = $guest->told($made);
    for my $pattern (@expected) {
        cmp_ok(scalar(grep { $_ =~ $pattern } @told), '>', 0, "$what: it says $pattern")
            or diag(explain(\@told));
    }
    is("@told", '', "$what: no warning is left for the next one") if !@expected;
    return $made;
}

sub check_interrupted ($form, $mechanism) {
    my $what = "$form, $mechanism, TERM";
    $guest->spoil(0x51);
    my $made = backup($form, $mechanism, signal => 'TERM');
    is($made->{state}, 'err', "$what: failed");
    like($made->{died} // '', qr/\Ainterrupted by signal$/, "$what: the backup dies of the signal");
    $guest->is_outside($what);
    my ($last) = reverse(grep { m/\A(?:cont|guest-fsfreeze-thaw)\z/ } $made->{qmp}->@*);
    is($last, 'cont', "$what: thawed and resumed");
    check_next($form, $mechanism, $what);
    return;
}

# The archive is complete when the hook fails, and the bitmap has been cleared, as today: the provider must know
# what it keeps.
sub check_hook ($form, $mechanism) {
    my $what = "$form, $mechanism, hook";
    my $script = "$dir/hook";
    write_file($script, "#!/bin/sh\n[ \$1 != backup-end ]\n");
    chmod(0755, $script);
    $guest->spoil(0x52);
    my $made = backup($form, $mechanism, script => $script);
    is($made->{state}, 'err', "$what: failed");
    $guest->stored_all($form, $mechanism, $what);
    $guest->is_outside($what);
    my $next = check_next($form, $mechanism, $what);
    is($next->{bytes}{'drive-scsi0'}, 0, "$what: the stored data is not dirty");
    return;
}

sub eventually ($code) {
    my $left = 100;
    select(undef, undef, undef, 0.05) while !$code->() && --$left;
    return $left;
}

sub check_killed ($form, $mechanism) {
    my $what = "$form, $mechanism, killed";
    $guest->spoil(0x53);
    my $made = backup($form, $mechanism, signal => 'KILL');
    is($made->{status}, 9, "$what: killed");
    ok(eventually(sub { !kill(0, -$made->{group}) }), "$what: no process is left");
    $guest->spoil(0x54);
    $guest->unlock;
    check_next($form, $mechanism, $what, qr/undone|undoing/);
    return;
}

# The leftovers of today's code have no marker.
sub check_killed_today ($mechanism) {
    my $what = "today, $mechanism, killed";
    $guest->spoil(0x55);
    my $group = backup('today', $mechanism, signal => 'KILL')->{group};
    $guest->unlock;
    for my $form (@forms) {
        my $made = backup($form, $mechanism);
        is($made->{state}, 'err', "$what: the next backup as $form fails");
        diag("$what, then $form: $made->{msg}");
    }
    my $target = 'snapshot-access:' . $vzdump->storage('today', $mechanism);
    PVE::BackupAccess->recover(qmp => $vm->qmp_path, foreign => 1, 'target-id' => $target);
    check_next($_, $mechanism, "$what, undone, $_") for @forms;
    $vzdump->end_group($group);
    return;
}

for my $mechanism (@mechanisms) {
    for my $form (@forms) {
        check_interrupted($form, $mechanism);
        check_hook($form, $mechanism);
    }
    check_killed($_, $mechanism) for grep { $_ ne 'today' } @forms;
    check_killed_today($mechanism);
}

# ---- guests that are suspended or shut down for the backup ----

sub qmp ($command) {
    return PBA::Test::QMP->once($vm->qmp_path, $command, {});
}

# The same lines as today's, except for what the two forms say themselves, and a guest that runs.
sub check_mode ($mode, $form, $mechanism) {
    my $what = "$form, $mechanism, mode $mode";
    my $made = backup($form, $mechanism, mode => $mode);
    is($made->{state}, 'ok', $what) or diag($made->{msg} // $made->{status});
    $guest->stored_all($form, $mechanism, $what);
    is(qmp('query-status')->{status}, 'running', "$what: the guest runs");
    is(scalar(grep { m/ resuming VM again after \d+ seconds$/ } $made->{log}->@*),
        1, "$what: the log says since when");
    is_deeply([$guest->told($made)], [], "$what: no warning");
    for my $method (qw(backup_get_mechanism backup_vm_query_incremental backup_vm)) {
        $made = backup($form, $mechanism, mode => $mode, dies => $method);
        is($made->{state}, 'err', "$what: $method fails");
        is(qmp('query-status')->{status}, 'running', "$what, $method fails: the guest runs");
        is_deeply(qmp('query-block-exports'), [], "$what, $method fails: no export is left");
    }
    return;
}

# A guest that is off is started for the backup, and is off again whatever happens.
sub is_off ($what) {
    ok(!IO::Socket::UNIX->new(Peer => $vm->qmp_path), "$what: the guest is off");
    return;
}

sub check_off ($form, $mechanism) {
    my $what = "$form, $mechanism, guest off";
    my $made = backup($form, $mechanism);
    is($made->{state}, 'ok', $what) or diag($made->{msg} // $made->{status});
    is_off($what);
    $guest->stored_all($form, $mechanism, $what);
    is_deeply([$guest->told($made)], [], "$what: no warning");
    for my $how (
        (map { { dies => $_ } } qw(backup_get_mechanism backup_vm_query_incremental backup_vm)),
        { signal => 'TERM' })
    {
        my $name = join(' ', $how->%*);
        is(backup($form, $mechanism, $how->%*)->{state}, 'err', "$what, $name: failed");
        is_off("$what, $name");
    }
    return;
}

# The VM process that this test has started ends at the first shutdown.
sub check_modes () {
    for my $mode (qw(suspend stop)) {
        for my $mechanism (@mechanisms) {
            check_mode($mode, $_, $mechanism) for @forms;
        }
    }
    system(qw(qm shutdown), $guest->vmid);
    for my $mechanism (@mechanisms) {
        check_off($_, $mechanism) for @forms;
    }
    return;
}

check_modes();
for my $figure (@figures) {
    my ($form, $mechanism, $kind, $made) = $figure->@*;
    my ($archive, $cleanup) = $made->{took}->@{qw(archive_external cleanup)};
    my $commands = grep { !m/\Aguest-/ } $made->{qmp}->@*;
    diag(
        sprintf(
            '%-12s %-11s %-9s archive %.3f s, cleanup %.3f, frozen %.1f ms, %d QMP commands',
            $form, $mechanism, $kind, $archive, $cleanup, 1000 * $made->{frozen}, $commands
        )
    );
}

done_testing;
