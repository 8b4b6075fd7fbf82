# A bitmap that cannot be brought to its right state is removed, so that the next backup is a full one: a bitmap
# must never lack bits (I2). The commands go through a code ref, which can act between two of them.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;

my $size = 16 * 1024 * 1024;
my @ids = qw(disk0 disk1);
my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    guest => 0,
    disks => [map { { id => $_, size => $size, format => 'qcow2' } } @ids],
);
my $vm = $backend->vm;
my $outside = $backend->outside;

# Runs $before->($command, $arguments) before every command.
sub access_through ($before) {
    return $backend->access(
        qmp => sub ($command, $arguments) {
            $before->($command, $arguments);
            return $vm->qmp($command, $arguments->%*);
        }
    );
}

sub bitmap_of ($id) {
    my ($bitmap) = grep { $_->{node} eq $id } $backend->target_bitmaps;
    return $bitmap;
}

sub make_base () {
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
}

sub next_actions () {
    my $access = $backend->access;
    my $infos = $access->setup($backend->devices('use'));
    my %actions = map { $_->{device} => $_->{'bitmap-action'} } $infos->@*;
    for my $id (@ids) {
        my ($offset, $length) = $access->volume($id)->next_dirty_region;
        is($length // 0, $size, "$id: everything is dirty") if $actions{$id} ne 'used';
    }
    $access->teardown(1);
    return \%actions;
}

# Removes the background bitmap once, when the bitmaps are about to be joined.
sub remove_background ($command, $arguments) {
    return if $command ne 'transaction';
    return if !grep { $_->{type} =~ m/merge/ } $arguments->{actions}->@*;
    my ($background) = grep { m/background/ } sort keys $vm->bitmaps->{disk0}->%*;
    $vm->qmp('block-dirty-bitmap-remove', node => 'disk0', name => $background) if $background;
}

for my $success (1, 0) {
    subtest "the background bitmap is gone at teardown, success $success" => sub {
        make_base();
        my @log;
        my $access = access_through(\&remove_background);
        $access->setup($backend->devices('use'));
        $backend->write($_, 0, 65536, 0x44) for @ids;
        {
            local $SIG{__WARN__} = sub ($text) { push(@log, $text) };
            ok(!eval { $access->teardown($success); 1 }, 'teardown reports it');
        }
        like(
            "$@",
            qr/\Adevice disk0: qmp command 'transaction' failed/,
            'naming device and command'
        );
        like(
            "@log",
            qr/device disk0: bitmap '.*' may lack bits and is removed: the next backup is a full one/,
            'a warning says what that means'
        );
        is(bitmap_of('disk0'), undef, 'the bitmap that may lack bits is removed');
        cmp_ok(bitmap_of('disk1')->{count}, '>=', 65536, "the other disk's bitmap has its bits");
        is(bitmap_of('disk1')->{recording}, 1, "the other disk's bitmap records");
        is_deeply($backend->outside, $outside, 'everything else is undone');
        is_deeply(
            next_actions(),
            { disk0 => 'missing-recreated', disk1 => 'used' },
            'the next setup reports the missing bitmap'
        );
    };
}

subtest 'a bitmap that may lack bits, and that cannot be removed' => sub {
    make_base();
    my @log;
    my $access = access_through(
        sub ($command, $arguments) {
            remove_background($command, $arguments);
            die "not today\n" if $command eq 'block-dirty-bitmap-remove';
        }
    );
    $access->setup($backend->devices('use'));
    {
        local $SIG{__WARN__} = sub ($text) { push(@log, $text) };
        ok(!eval { $access->teardown(1); 1 }, 'teardown reports an error');
    }
    unlike("@log", qr/is removed/, 'the log does not say that it is removed');
    is(bitmap_of('disk0')->{recording}, 0, 'it is frozen, which shows that it may lack bits');
    is_deeply(
        next_actions(),
        { disk0 => 'missing-recreated', disk1 => 'used' },
        'the next backup is full for this disk only'
    );
};

subtest 'the bitmap itself is removed during the access' => sub {
    make_base();
    my $access = $backend->access;
    my $infos = $access->setup($backend->devices('use'));
    $vm->qmp(
        'block-dirty-bitmap-remove',
        node => $infos->[0]{'bitmap-node-name'},
        name => $infos->[0]{'bitmap-name'}
    );
    my @log;
    local $SIG{__WARN__} = sub ($text) { push(@log, $text) };
    $access->teardown(1);
    like(
        "@log",
        qr/device disk0: bitmap '.*' may lack bits and is removed: the next backup is a full one/,
        'a warning says what that means'
    );
    is_deeply($backend->other_bitmaps, [], 'no background bitmap is left');
    is_deeply($backend->outside, $outside, 'everything else is undone');
    is_deeply(
        next_actions(),
        { disk0 => 'missing-recreated', disk1 => 'used' },
        'the next backup is full for this disk only'
    );
};

subtest 'the bitmap is disabled when setup has looked for leftovers' => sub {
    make_base();
    my $done = 0;
    my $access = access_through(
        sub ($command, $) {
            return if $command ne 'blockdev-add' || $done++;
            my $bitmap = bitmap_of('disk0');
            $vm->qmp('block-dirty-bitmap-disable', node => 'disk0', name => $bitmap->{name});
        }
    );
    my %action
        = map { $_->{device} => $_->{'bitmap-action'} }
        $access->setup($backend->devices('use'))->@*;
    is_deeply(\%action, { disk0 => 'missing-recreated', disk1 => 'used' }, 'it is not used');
    $access->teardown(1);
    is_deeply($backend->outside, $outside, 'nothing is left');
};

# QEMU does not stop the writes to a disk in an iothread during a transaction, so the order matters: a write after
# the last merge must be recorded by the target's bitmap, too.
subtest 'writes while a failure is joined' => sub {
    make_base();
    my @joins;
    my $access = access_through(
        sub ($command, $arguments) {
            my @actions = ($arguments->{actions} // [])->@*;
            push(@joins, \@actions) if grep { $_->{type} =~ m/enable/ } @actions;
        }
    );
    $access->setup($backend->devices('use'));
    $access->teardown(0);
    is(scalar(@joins), 1, 'one transaction joins all disks');
    for my $id (@ids) {
        my @types = map { $_->{type} =~ s/\Ablock-dirty-bitmap-//r }
            grep { $_->{data}{node} eq $id } $joins[0]->@*;
        my ($enabled) = grep { $types[$_] eq 'enable' } 0 .. $#types;
        ok((grep { $_ eq 'merge' } @types[$enabled .. $#types]),
            "$id: a merge after the bitmap records")
            or diag("@types");
        is($types[0], 'merge', "$id: what QEMU refuses without a crash comes first");
    }
};

subtest 'setup fails late' => sub {
    for my $failing (qw(blockdev-reopen transaction copy-before-write snapshot-access)) {
        make_base();
        $backend->write($_, 65536, 65536, 0x45) for @ids;
        my $access = access_through(
            sub ($command, $arguments) {
                my $what = $command eq 'blockdev-add' ? $arguments->{driver} : $command;
                my $file = $command eq 'blockdev-reopen' ? $arguments->{options}[0]{file} : 'cbw';
                my $type = $command eq 'transaction' ? $arguments->{actions}[0]{type} : 'disable';
                die "no $failing today\n"
                    if $what eq $failing && $file =~ m/cbw/ && $type =~ m/disable/;
            }
        );
        ok(!eval { $access->setup($backend->devices('use')); 1 },
            "$failing fails: setup fails, too");
        like("$@", qr/failed - no \Q$failing\E today/, "$failing fails: the error comes through");
        is_deeply($backend->outside, $outside, "$failing fails: everything is undone");
        is_deeply($backend->other_bitmaps, [], "$failing fails: no background bitmap is left");
        for my $id (@ids) {
            my $bitmap = bitmap_of($id);
            is($bitmap->{count}, 65536, "$failing fails: $id: the bitmap has its bits");
            is($bitmap->{recording}, 1, "$failing fails: $id: and records");
        }
    }
};

$backend->check_manners;
done_testing;
