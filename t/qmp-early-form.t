# Proxmox' early form of backup-access-setup, which has one bitmap name and no modes.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;

sub early_setup_reply ($actions, $arguments) {
    my @reply;
    for my $device (split(/,/, $arguments->{devlist})) {
        my ($number) = $device =~ m/(\d+)/;
        my $info = { device => $device, 'node-name' => "#snap$number", size => $size };
        if (defined(my $name = $arguments->{'bitmap-name'})) {
            $info->{'bitmap-name'} = $name;
            $info->{'bitmap-node-name'} = '#block' . ($number + 1);
            $info->{'bitmap-action'} = $actions->{$name} // 'new';
        }
        push @reply, $info;
    }
    return \@reply;
}

sub early_peer ($bitmaps, $actions = {}, %more) {
    my @bitmaps = @$bitmaps;
    my $nodes = sub (@) {
        my @disks = map { node("#block$_", @bitmaps) } 1, 2;
        return [@disks, map { node("drive-scsi$_-fleecing") } 0, 1];
    };
    my $setup = sub ($arguments) {
        push @bitmaps, $arguments->{'bitmap-name'} // ();
        return early_setup_reply($actions, $arguments);
    };
    return start_peer(
        {
            pve_returns(
                'query-qmp-schema' => schema('devlist'),
                'query-named-block-nodes' => $nodes,
                'backup-access-setup' => $setup,
                %more,
            )
        }
    );
}

sub setup_arguments ($peer) {
    my ($setup) = grep { $_->{execute} eq 'backup-access-setup' } $peer->commands;
    return $setup && $setup->{arguments};
}

my @both = map { { device => "drive-scsi$_", 'bitmap-mode' => 'use' } } 0, 1;
my @new = ({ device => 'drive-scsi0', 'bitmap-mode' => 'new' });

subtest 'mode use' => sub {
    my $peer = early_peer([$target], { $target => 'used' });
    my $access = new_access($peer);
    my $infos = $access->setup(\@both);
    is_deeply(
        setup_arguments($peer),
        { 'target-id' => $target, devlist => 'drive-scsi0,drive-scsi1', 'bitmap-name' => $target },
        'use: the same name is sent again'
    );
    is_deeply([map { $_->{'bitmap-action'} } @$infos], ['used', 'used'], 'actions');
    $access->teardown(1);

    $peer = early_peer(['gen-2'], { 'gen-2' => 'used' });
    $access = new_access($peer, 'bitmap-name' => 'gen-2');
    is($access->setup(\@one)->[0]{'bitmap-name'}, 'gen-2', 'use: another name');
    is_deeply(
        setup_arguments($peer),
        { 'target-id' => $target, devlist => 'drive-scsi0', 'bitmap-name' => 'gen-2' },
        'use: the arguments with another name'
    );
    $access->teardown(1);
};

subtest 'mode new' => sub {
    my $peer = early_peer([$target, 'gen-3'], { 'gen-3' => 'new' });
    dies(
        sub { new_access($peer)->setup(\@new) },
        qr/UnsupportedError/,
        qr/'\Q$target\E' exists/,
        'new: a name in use'
    );
    is(setup_arguments($peer), undef, 'nothing was begun');
    $peer = early_peer([$target, 'gen-4'], { 'gen-4' => 'new' });
    dies(
        sub { new_access($peer, 'bitmap-name' => 'gen-4')->setup(\@new) },
        qr/UnsupportedError/,
        qr/'gen-4' exists/,
        'new: another name in use'
    );
    $peer = early_peer([$target], {});
    my $access = new_access($peer, 'bitmap-name' => 'gen-5');
    is(eval { $access->setup(\@new)->[0]{'bitmap-action'} }, 'new', 'new: a name not in use');
    is(setup_arguments($peer)->{'bitmap-name'}, 'gen-5', 'is sent');
    is(eval { $access->volumes('nbd')->{'drive-scsi0'}{'bitmap-name'} },
        'gen-5', 'the volume has the name');
    $access->teardown(0);
};

subtest 'mode none, and several modes' => sub {
    my $peer = early_peer([]);
    my $access = new_access($peer);
    my $infos = $access->setup([map { { device => "drive-scsi$_" } } 0, 1]);
    is_deeply(
        setup_arguments($peer),
        { 'target-id' => $target, devlist => 'drive-scsi0,drive-scsi1' },
        'none: no name is sent'
    );
    ok(!exists($infos->[0]{'bitmap-name'}), 'none: there is no bitmap');
    $access->teardown(1);

    $peer = early_peer([]);
    my @mixed = ($both[0], { device => 'drive-scsi1', 'bitmap-mode' => 'none' });
    dies(
        sub { new_access($peer)->setup(\@mixed) },
        qr/UnsupportedError/, qr/device drive-scsi1: .*one bitmap mode.*'none'.*'use'.*drive-scsi0/,
        'mixed modes'
    );
    is(setup_arguments($peer), undef, 'nothing was begun');
};

subtest 'devices that a list cannot name' => sub {
    for my $separator (',', ';', ':') {
        my $odd = "drive-scsi0${separator}x";
        my $block = [device($odd, '#block1')];
        my $nodes = [node('#block1', $target), node("$odd-fleecing")];
        my $peer = early_peer([], {}, 'query-block' => $block, 'query-named-block-nodes' => $nodes);
        dies(
            sub { new_access($peer)->setup([{ device => $odd }]) },
            qr/UnsupportedError/,
            qr/device \Q$odd\E: .*list of devices/,
            "name with '$separator'"
        );
        is(setup_arguments($peer), undef, 'nothing was begun');
    }
};

done_testing();
