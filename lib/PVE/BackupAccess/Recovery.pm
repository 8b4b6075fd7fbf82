package PVE::BackupAccess::Recovery;

# Undoes what dead processes left, for all targets, and an access that another program made with
# QEMU's own commands and left without markers.

use v5.36;

use Exporter qw(import);
use JSON::PP ();
use Time::HiRes ();

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Reply qw(ask edges_of);
use PVE::BackupAccess::Try qw(attempt attempt_any);

our @EXPORT_OK = qw(recover_all recover_foreign);

my $Error = 'PVE::BackupAccess::Error';
my $export_limit = 600;    # seconds, as for exports of our own
my $background = 'backup-access-background-bitmap';

# Only the marker of a process can be left without a target. Any target can be used to remove it.
my $any_target = 'pve-backup-access';

my sub nodes_of ($options) {
    return
        grep { ref($_) eq 'HASH' }
        ask($options, 'query-named-block-nodes', flat => JSON::PP::true)->@*;
}

my sub bitmaps_of ($node) {
    return grep { defined($_->{name}) } ($node->{'dirty-bitmaps'} // [])->@*;
}

my sub is_snapshot ($node) { return ($node->{drv} // '') eq 'snapshot-access' }

# Whether a node is a sign of something to recover: one of our nodes, a snapshot, or one with a bitmap
# that does not record and is not a companion.
my sub is_suspicious ($node) {
    return 1 if ($node->{'node-name'} // '') =~ m/\Apba-/ || is_snapshot($node);
    return grep {
               $_->{name} =~ m/\Apba-background/
            || $_->{name} eq $background
            || (!$_->{recording} && $_->{name} !~ m/\Apba-id:/)
    } bitmaps_of($node);
}

# What stays would otherwise only show as an error of the caller's next step.
my sub tell_foreign ($options, $status) {
    my $target = ($status->{access} // {})->{'target-id'};
    my $for = defined($target) ? " for target '$target'" : '';
    my $log = $options->{log} // sub ($level, $message) { warn "$message\n" };
    $log->(
        'warn',
        "another program has a backup access$for, which stays - if that program has ended, call"
            . ' recover with foreign and the target-id of that access'
    );
    return;
}

# If there is nothing to do, this takes one query.
sub recover_all ($class, $options) {
    my @nodes = nodes_of($options);
    return [] if !grep { is_suspicious($_) } @nodes;
    my %look = map { $_ => $options->{$_} }
        grep { m/\A(?:qmp|timeout|log|qemu-.*|.*-dir)\z/ } keys $options->%*;
    my $status = $class->status(%look);
    my @left = $status->{'left-overs'}->@*;
    my $access = $status->{access};
    my $is_dead = !$access || (defined($access->{alive}) && !$access->{alive});
    $Error->throw('StateError',
              'a dead process left an access, and nothing in QEMU shows its target any more'
            . ' - call recover with its target-id')
        if $is_dead && grep { !defined($_->{'target-id'}) && !$_->{harmless} } @left;

    my %seen;
    my @targets = grep { defined && !$seen{$_}++ }
        map { $_->{'target-id'} } (grep { !$_->{harmless} } @left),
        (grep { !$_->{recording} } $status->{bitmaps}->@*), @left;
    my @lines;
    for my $target (@targets ? @targets : $any_target) {
        my $done = $class->_make({ $options->%*, 'target-id' => $target })->_recover;
        push(@lines, map { @targets ? "target '$target': $_" : $_ } $done->@*);
    }
    @nodes = nodes_of($options) if @lines;
    tell_foreign($options, $status)
        if $status->{backend} eq 'pve' && grep { is_snapshot($_) } @nodes;
    return \@lines;
}

# ---- accesses of another program ----

my sub refuse ($problem) {
    $Error->throw('StateError', $problem);
}

# The access' bitmaps of the target. QEMU would crash at a teardown if one is missing.
my sub frozen_bitmaps ($target, @nodes) {
    my @frozen;
    for my $node (@nodes) {
        my %bitmaps = map { $_->{name} => $_ } bitmaps_of($node);
        next if !$bitmaps{$background};
        push(
            @frozen,
            $bitmaps{$target} // refuse(
                      "the access is not of target '$target', or its bitmap of node"
                    . " '$node->{'node-name'}' was removed, and QEMU would crash at a teardown"
            )
        );
    }
    return @frozen;
}

# Without bitmaps, only QEMU's refusal tells whose access it is (to 11.0, before it changes anything). If
# its text is another one, QEMU refuses later, but then the exports are gone.
my sub refuse_other_target ($options, $target) {
    my %other = ('target-id' => "$target?", success => JSON::PP::false);
    my $error = attempt_any { ask($options, 'backup-access-teardown', %other) };
    my ($owner) = ($error // '') =~ m/ got target \Q$target\E\? instead of (.*)\n\z/ or return;
    refuse("the access is not of target '$target', but of '$owner' - give that one")
        if $owner ne $target;
    return;
}

# QEMU's filter above an unplugged disk: only its snapshot still uses it. A disk's node with a name was added
# by blockdev-add and stays when the filter goes, whether a guest device uses it or not: qemu-server adds a
# TPM state's volume so.
my sub refuse_lost_disks ($options, @nodes) {
    my %driver = map { ($_->{'node-name'} // '') => $_->{drv} // '' } @nodes;
    my (%users, %disk);
    for my $edge (edges_of(ask($options, 'x-debug-query-block-graph'))) {
        my ($user, $node) = $edge->@{qw(parent child)};
        push($users{$node}->@*, $driver{$user} // '');
        $disk{$user} = $node if $edge->{name} eq 'file';
    }
    for my $filter (grep { $driver{$_} eq 'copy-before-write' } sort keys %driver) {
        my @users = ($users{$filter} // [])->@*;
        refuse(
            'a guest device or its node was removed while the access was up, and QEMU would crash at'
                . ' a teardown: the access stays up until the VM is stopped')
            if ($disk{$filter} // '') =~ m/\A#/ && @users && !grep { $_ ne 'snapshot-access' }
            @users;
    }
    return;
}

my sub remove_exports ($options, $lines, @nodes) {
    my %is_snapshot = map { $_->{'node-name'} => 1 }
        grep { is_snapshot($_) && defined($_->{'node-name'}) } @nodes;
    my $deadline = now() + $export_limit;
    my %deleted;
    while (1) {
        my @exports = ask($options, 'query-block-exports')->@*;
        my @stale = grep { $is_snapshot{ $_->{'node-name'} // '' } } @exports;
        return scalar(@exports) if !@stale;
        for my $id (grep { !$deleted{$_}++ } map { $_->{id} } @stale) {
            ask($options, 'block-export-del', id => $id, mode => 'hard');
            push($lines->@*, "export '$id' was removed");
        }
        refuse(
            "the access still has exports after $export_limit seconds - end the programs that read them"
        ) if now() > $deadline;
        Time::HiRes::sleep(0.05);
    }
}

# A filter alone does not show an access: a backup job has one, too.
my sub is_up (@nodes) {
    return grep { is_snapshot($_) } @nodes;
}

my sub refuse_markers (@nodes) {
    refuse('what is left has markers of this module - call recover without foreign')
        if grep { ($_->{'node-name'} // '') =~ m/\Apba-/ } @nodes;
    return;
}

# Whether the access can be ended now: returns its bitmaps.
my sub check_end ($options, $target, @nodes) {
    refuse_markers(@nodes);
    my @frozen = frozen_bitmaps($target, @nodes);
    refuse_lost_disks($options, @nodes);
    return @frozen;
}

# Exports first: QEMU aborts at a teardown while a bitmap is exported. They may take minutes to go, so that
# everything is checked again after that.
sub recover_foreign ($class, $options) {
    my $target = $options->{'target-id'} // $Error->throw('ArgumentError',
        "recover with 'foreign' needs the target-id of that access");
    my @nodes = nodes_of($options);
    refuse_markers(@nodes);
    return [] if !is_up(@nodes);
    my %ask = map { $_ => $options->{$_} } grep { exists($options->{$_}) } qw(qmp timeout);
    refuse('a stock QEMU has no accesses of other programs - call recover without foreign')
        if $class->capabilities(%ask)->{backend} ne 'pve';
    my @frozen = check_end($options, $target, @nodes);
    refuse_other_target($options, $target) if !@frozen;
    my @lines;
    my $others = remove_exports($options, \@lines, @nodes);

    if (!$others && !attempt { ask($options, 'nbd-server-stop') }) {
        push(@lines, 'the NBD server was stopped');
    }
    @nodes = nodes_of($options);
    return \@lines if !is_up(@nodes);
    refuse(
        "bitmap '$target' is exported or used by another program - end that program, then try again"
    ) if grep { $_->{busy} } check_end($options, $target, @nodes);
    ask(
        $options, 'backup-access-teardown',
        'target-id' => $target,
        success => JSON::PP::false
    );
    push(@lines,
        "the access of another program for target '$target' was ended, as after a failure");
    return \@lines;
}

1;
