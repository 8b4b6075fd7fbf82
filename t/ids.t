# IDs of backups in setup and teardown, and the removal of a target's bitmaps: on both backends, and with the
# early form of Proxmox' command.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Overlay qw(commit_overlay put_overlay);

my $size = 1024 * 1024;
my $other_target = 'snapshot-access:other';
my $new_id = sub () { PVE::BackupAccess->new_id };

sub start ($name, $form) {
    return PBA::Test::Backend->start_paused(
        name => $name,
        form => $form,
        disks => [map { { id => $_, size => $size, format => 'qcow2', bus => 'scsi' } } qw(a b)],
    );
}

sub wanted ($backend, $mode, %base) {
    return [
        map {
            { $_->%*, %base }
        } $backend->devices($mode)->@*
    ];
}

# Makes a whole backup, and returns setup's result for the first disk. end => the arguments of teardown.
sub backup ($backend, $devices, %opt) {
    my @log;
    my $access = $backend->access(
        log => sub ($level, $text) { push(@log, $text) },
        ($opt{options} // {})->%*
    );
    my $infos = $access->setup($devices);
    my $volumes = $access->volumes('nbd');
    my $device = $backend->device('a');
    my %seen = $infos->[0]->%{qw(bitmap-action base reason identity)};
    $seen{volume} = $volumes->{$device}{base} if $volumes->{$device};
    $opt{during}->($access) if $opt{during};
    $access->teardown(($opt{end} // [0])->@*);
    return { %seen, log => "@log" };
}

sub bases_of ($backend) {
    return [$backend->access->bases(map { $backend->device($_) } qw(a b))
            ->@{ map { $backend->device($_) } qw(a b) }
    ];
}

# The IDs that status shows, with the name of each bitmap.
sub shown ($backend) {
    return { map { $_->{name} => $_->{base} } $backend->status->{bitmaps}->@* };
}

sub names ($backend) {
    my $bitmaps = $backend->vm->bitmaps;
    return [sort map { keys $bitmaps->{$_}->%* } keys $bitmaps->%*];
}

sub dies_like ($code, $pattern, $what) {
    my $done = eval { $code->(); 1 };
    like($done ? 'it did not die' : $@, $pattern, $what);
}

# Another guest is started at the same socket. An access that has seen the earlier one must not tie bitmaps to that.
sub check_other_guest ($backend) {
    my $id = $new_id->();
    my $access = $backend->access(log => sub { });
    $access->bases($backend->device('a'));
    $backend->restart('-uuid', '11111111-2222-3333-4444-555555555555');
    $access->setup(wanted($backend, 'use', base => undef));
    $access->teardown(1, $id);
    is_deeply(bases_of($backend), [$id, $id], 'bitmaps are tied to the guest that has them');
    forget($backend);
    $backend->restart;
    return;
}

# Creates the bitmaps that a snapshot with RAM or a migration in the middle of an access brings back: the
# target's does not record, and on Proxmox the background bitmap belongs to no access.
sub make_strays ($backend, $name = 'pba-tied:snapshot-access:test') {
    my $vm = $backend->vm;
    my %bitmap = (node => 'a', name => $name);
    $vm->qmp('block-dirty-bitmap-disable', %bitmap);
    return if $backend->name ne 'pve';
    $vm->qmp('block-dirty-bitmap-add', node => $_, name => 'backup-access-background-bitmap')
        for qw(a b);
    return;
}

sub check_strays ($backend, $form) {
    my $id = $new_id->();
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    make_strays($backend);
    is_deeply(bases_of($backend), [undef, $id], 'a bitmap that does not record has no id')
        if $backend->name eq 'pve';
    my $lines = PVE::BackupAccess->recover($backend->options, log => sub { });
    like("@$lines", qr/was removed/, 'recover says that it removed it');
    is_deeply([grep { m/\Apba-.*test\z|background/ } keys $backend->vm->bitmaps->{a}->%*],
        [], 'the strays and their companion are removed');
    is_deeply(PVE::BackupAccess->recover($backend->options, log => sub { }),
        [], 'a second call has nothing to do');

    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    make_strays($backend);
    my $seen = backup($backend, wanted($backend, 'use', base => $id), end => [1, $new_id->()]);
    is($seen->{'bitmap-action'}, remade($form), 'setup removes the stray bitmaps');
    like($seen->{log}, qr/was removed/, 'the log reports the removal');
    return;
}

# The action for a bitmap that is new although mode use was requested.
sub remade ($form) { return $form eq 'devlist' ? 'new' : 'missing-recreated' }

sub check_ids ($backend, $form) {
    my ($first, $second) = ($new_id->(), $new_id->());
    is_deeply(bases_of($backend), [undef, undef], 'at first, there are no IDs');
    my $seen = backup($backend, wanted($backend, 'use', base => undef), end => [1, $first]);
    is($seen->{'bitmap-action'}, remade($form), 'the first backup is full');
    is_deeply(bases_of($backend), [$first, $first], 'the bitmap has an ID');
    is(shown($backend)->{'pba-tied:snapshot-access:test'}, $first, 'status shows it');

    $seen = backup($backend, wanted($backend, 'use', base => $first), end => [0]);
    is_deeply(
        [$seen->@{qw(bitmap-action base reason volume)}],
        ['used', $first, undef, $first],
        'mode use with it: used'
    );
    is_deeply(bases_of($backend), [$first, $first], 'a failed backup leaves it');
    backup($backend, wanted($backend, 'use', base => $first), end => [1, $second]);
    is_deeply(bases_of($backend), [$second, $second], 'a good one replaces it');

    $seen = backup($backend, wanted($backend, 'use', base => $first), end => [0]);
    is($seen->{'bitmap-action'}, remade($form), 'the id of another backup: made anew');
    like($seen->{reason}, qr/relative to backup $second, not $first/, 'the reason names both IDs');
    like($seen->{log}, qr/relative to backup $second, not $first/, 'the log names both IDs');
    is($seen->{volume}, undef, 'the volume has no base');
    is_deeply(bases_of($backend), [undef, undef], 'after the failure, the bitmap has no ID');
    return;
}

sub check_ends ($backend, $form) {
    my $id = $new_id->();
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    backup($backend, wanted($backend, 'use', base => $id), end => [1]);
    is_deeply(bases_of($backend), [undef, undef], 'a success without an ID removes the ID');
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    backup($backend, wanted($backend, 'new', base => undef), end => [0]);
    is_deeply(bases_of($backend), [undef, undef], 'mode new removes the ID');
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    backup($backend, wanted($backend, 'none', base => undef), end => [1]) if $form ne 'devlist';
    my @left = grep { m/\Apba-/ } names($backend)->@*;
    is_deeply(\@left, [], 'mode none removes the bitmap and its companion') if $form ne 'devlist';

    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    backup($backend, wanted($backend, 'use'), end => [1]);
    is_deeply(bases_of($backend), [$id, $id], 'a program that knows of no ids leaves it alone');
    my $seen = backup($backend, wanted($backend, 'use', base => $id), end => [1, $new_id->()]);
    is($seen->{'bitmap-action'}, 'used', 'the bitmap with the ID is still used');
    return;
}

sub check_arguments ($backend) {
    my $id = $new_id->();
    for my $bad ('', 'x', uc($id) =~ s/.\z/F/r, "${id}0", 'sn:ap') {
        dies_like(
            sub { backup($backend, wanted($backend, 'use', base => $bad)) },
            qr/is not the ID of a backup|must be|NUL/,
            "no id: '$bad'"
        );
    }
    my $access = $backend->access(log => sub { });
    $access->setup(wanted($backend, 'use'));
    dies_like(
        sub { $access->teardown(1, $id) },
        qr/without 'base'/,
        "teardown with an ID after a setup without 'base'"
    );
    $access->teardown(0);
    $access = $backend->access(log => sub { });
    $access->setup(wanted($backend, 'use', base => undef));
    dies_like(
        sub { $access->teardown(1, 'x') },
        qr/is not the ID of a backup/,
        'teardown: not an ID'
    );
    $access->teardown(1, $id);
    $access = $backend->access(log => sub { });
    $access->setup(wanted($backend, 'use', base => $id));
    dies_like(sub { $access->teardown(1, $id) }, qr/earlier backup/, 'teardown: the same ID again');
    $access->teardown(0);
    return;
}

# The disk's identity takes precedence over its name.
sub check_identity ($backend, $form) {
    my $id = $new_id->();
    my $open = wanted($backend, 'use', base => undef);
    my $own = backup($backend, $open, end => [1, $id])->{identity};
    my ($disk, @others) = wanted($backend, 'use', base => $id)->@*;

    my $seen = backup($backend, [{ $disk->%*, identity => $own }, @others], end => [0]);
    is_deeply([$seen->@{qw(bitmap-action base)}], ['used', $id], 'its own identity: used');
    $seen = backup($backend, [{ $disk->%*, identity => 'drive other' }, @others], end => [0]);
    is($seen->{'bitmap-action'}, remade($form), "another disk's identity: made anew");
    my $reason = "the base backup is of another disk: drive other, not $own";
    is($seen->{reason}, $reason, 'the reason is reported');

    dies_like(
        sub { backup($backend, [{ $open->[0]->%{qw(device bitmap-mode)}, identity => $own }]) },
        qr/'identity' needs 'base'/,
        'an identity of no backup'
    );
    check_other_name($backend, $open, $own) if $backend->name eq 'upstream';
    return;
}

sub check_other_name ($backend, $open, $own) {
    my $id = $new_id->();
    my $device = $backend->vm->disk('a')->{qdev};
    my $renamed = { device => $device, 'bitmap-mode' => 'use', base => $id };
    my $other = wanted($backend, 'use', base => $id)->[1];

    backup($backend, $open, end => [1, $id]);
    my $seen = backup($backend, [{ $renamed->%*, identity => $own }, $other], end => [0]);
    is_deeply([$seen->@{qw(bitmap-action base)}], ['used', $id], 'under another name: used');
    $seen = backup($backend, [$renamed, $other], end => [0]);
    is($seen->{'bitmap-action'}, 'missing-recreated', 'without its identity: made anew');
    like($seen->{reason}, qr/name/, 'the reason is reported');
    return;
}

sub forget ($backend, %opt) {
    return PVE::BackupAccess->forget($backend->options(%opt), log => sub { });
}

sub check_forget ($backend) {
    my ($id, $other_id) = ($new_id->(), $new_id->());
    my $devices = wanted($backend, 'use', base => undef);
    backup($backend, $devices, end => [1, $id]);
    my %other = ('target-id' => $other_target);
    backup($backend, $devices, end => [1, $other_id], options => \%other);
    my $refused = sub ($access) {
        dies_like(
            sub { forget($backend) },
            qr/already|not finished/,
            'refused while an access is up'
        );
        dies_like(
            sub { forget($backend, %other) },
            qr/already|not finished/,
            'an access for another target exists'
        );
    };
    my $seen
        = backup($backend, wanted($backend, 'use', base => $id), end => [0], during => $refused);
    is_deeply(bases_of($backend), [$id, $id], 'nothing was removed');

    is(scalar(forget($backend)->@*), 2, 'forget reports what it removed');
    is_deeply([grep { m/test\z/ } names($backend)->@*], [], 'the bitmaps are gone');
    is_deeply(forget($backend), [], 'a second call has nothing to do');
    is($backend->access(%other)->bases($backend->device('a'))->{ $backend->device('a') },
        $other_id, "another target's stay");
    forget($backend, %other);
    is_deeply([grep { m/\Apba|snapshot-access/ } names($backend)->@*],
        [], 'after forget for the other target, no bitmap is left');
    return;
}

# A companion whose bitmap was removed by hand also prevents loading an earlier state.
sub check_forget_alone ($backend) {
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $new_id->()]);
    my %bitmap = (node => 'a', name => 'pba-tied:snapshot-access:test');
    $backend->vm->qmp('block-dirty-bitmap-remove', %bitmap);
    my $device = $backend->device('a');
    my $lines = forget($backend);
    my ($line, @others) = sort { $a cmp $b } $lines->@*;
    like($line, qr/\Adevice $device: bitmap 'pba-id:.*' was removed/, 'forget says that, too');
    is(scalar(@others), 1, 'one line for each disk');
    is_deeply([grep { m/\Apba/ } names($backend)->@*], [], 'nothing of it is left');
    return;
}

# QEMU does not change stored bitmaps below an overlay. The others, which prevent loading a state, are removed.
sub check_forget_below ($backend) {
    my ($vm, %stored) = ($backend->vm, options => { persistent => 1 });
    my $open = sub ($device) { { device => $device, 'bitmap-mode' => 'use', base => undef } };
    my @devices = map { $open->($backend->device($_)) } qw(a b);
    backup($backend, \@devices, end => [1, $new_id->()], %stored);
    put_overlay($vm, 'a');
    my @above = ($open->('above'), $devices[1]);
    backup($backend, \@above, end => [1, $new_id->()], %stored);

    my $lines = forget($backend);
    is(scalar(grep { m/was removed/ } $lines->@*), 2, 'forget removes what can be removed');
    is(scalar(grep { m/\Anode a: .* stays, since/ } $lines->@*),
        1, 'forget names the bitmap that stays');
    my $bitmaps = $vm->bitmaps;
    is_deeply([map { keys(($bitmaps->{$_} // {})->%*) } qw(above b)],
        [], 'the other bitmaps are removed');
    $vm->hmp('savevm before');
    is($vm->hmp('loadvm before'), '', 'an earlier state can be loaded');
    commit_overlay($vm);
    $vm->qmp('blockdev-del', 'node-name' => 'above');
    is(scalar(forget($backend)->@*), 1, 'forget removes it when the overlay is gone');
    return;
}

# A stray with its own name: while it was frozen, only the background bitmap recorded, so it lacks bits.
sub check_own_strays ($backend, %named) {
    for my $is_tied (0, 1) {
        my %base = $is_tied ? (base => undef) : ();
        my $devices = wanted($backend, 'use', %base);
        backup($backend, $devices, end => [1], %named);
        make_strays($backend, $is_tied ? 'pba-tied:generation-1' : 'generation-1');
        my $seen = backup($backend, $devices, end => [1], %named);
        is($seen->{'bitmap-action'}, 'new', 'a stray with its own name is not used');
        like($seen->{log}, qr/generation-1' of node 'a' was removed/, 'the log says that');
    }
    return;
}

# The early form's bitmap may have a name that differs from the target's.
sub check_own_name ($backend) {
    my ($first, $second) = ($new_id->(), $new_id->());
    my %named = (options => { 'bitmap-name' => 'generation-1' });
    my @devices = map { $backend->device($_) } qw(a b);
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $first], %named);
    my $bases = $backend->access($named{options}->%*)->bases(@devices);
    is_deeply([$bases->@{@devices}], [$first, $first], 'a bitmap with its own name has an id');
    my $seen = backup($backend, wanted($backend, 'use', base => $first), end => [0], %named);
    is_deeply(
        [$seen->@{qw(bitmap-action base)}],
        ['used', $first],
        'the bitmap is used with its ID'
    );
    $seen = backup($backend, wanted($backend, 'use', base => $second), end => [0], %named);
    is($seen->{'bitmap-action'}, 'new', 'a bitmap with another name is created anew');
    like($seen->{reason}, qr/relative to backup $first, not $second/, 'the reason is reported');
    check_own_strays($backend, %named);
    is(scalar(forget($backend, 'target-id' => 'generation-1')->@*),
        2, 'forget knows it by its name');
    forget($backend);
    is_deeply([grep { m/\Apba/ } names($backend)->@*],
        [], 'forget finds the companion by the target');
    return;
}

# The access of a dead process keeps its bitmaps until it is undone.
sub check_forget_dead ($backend) {
    my $id = $new_id->();
    backup($backend, wanted($backend, 'use', base => undef), end => [1, $id]);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        my $access = $backend->access(log => sub { });
        eval { $access->setup(wanted($backend, 'use', base => $id)) };
        kill(KILL => $$);
    }
    waitpid($pid, 0);
    dies_like(sub { forget($backend) }, qr/call recover/, 'refused after a process has died');
    PVE::BackupAccess->recover($backend->options, log => sub { });
    is_deeply(bases_of($backend), [$id, $id], 'recover leaves the id');
    is(scalar(forget($backend)->@*), 2, 'then forget removes the bitmaps');
    return;
}

my @forms = map {
    $_ eq 'pve' && !PBA::Test::VM->is_proxmox
        ? ([$_, 'devices'], [$_, 'devlist'])
        : [$_, 'devices']
} PBA::Test::Backend->names;
for my $case (@forms) {
    my ($name, $form) = $case->@*;
    subtest "backend $name, form $form" => sub {
        my $backend = start($name, $form);
        my $outside = $backend->outside;
        check_ids($backend, $form);
        check_ends($backend, $form);
        check_arguments($backend);
        check_identity($backend, $form);
        check_strays($backend, $form);
        check_own_name($backend) if $form eq 'devlist';
        check_forget($backend);
        check_forget_alone($backend);
        check_forget_below($backend) if $name eq 'upstream';
        check_forget_dead($backend);
        check_other_guest($backend);
        is_deeply([$backend->problems($outside)], [], 'everything is as before');
    };
}

done_testing;
