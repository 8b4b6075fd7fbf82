# The marker that distinguishes a live process from a dead one: possible replies of a monitor when it is added,
# looked for again, and deleted.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;

my $own_mark = 'pba-owner-' . join('-', $$, start_time($$));
my $refused = action({ error => { class => 'GenericError', desc => 'no more nodes' } });

# proc(5): field 22, counted from the name, which ends with the last parenthesis.
sub start_time ($pid) {
    open(my $fh, '<', "/proc/$pid/stat") or die "/proc/$pid/stat: $!\n";
    return (split(' ', readline($fh) =~ s/.*\) //r))[19];
}

# A guest that also has these nodes, and others after a node has been added.
sub returns ($before, $after, %more) {
    my %returns = pve_returns(%more);
    my ($add, $nodes) = @returns{qw(blockdev-add query-named-block-nodes)};
    my ($added, $size) = (0, 0);
    return {
        %returns,
        'blockdev-add' => sub ($arguments) {
            $size ||= $arguments->{size};
            return $added++ ? {} : $add;
        },

        # The other process has version 0.1.0, whose markers have no size.
        'query-named-block-nodes' => sub (@) {
            return [
                $nodes->@*,
                map { mark($_, $_ eq $own_mark ? $size : 0) } $added ? $after->@* : $before->@*
            ];
        },
    };
}

sub number_of ($peer, $command) {
    return scalar(grep { $_ eq $command } $peer->names);
}

sub deleted ($peer) {
    return map { $_->{arguments}{'node-name'} }
        grep { $_->{execute} eq 'blockdev-del' } $peer->commands;
}

subtest 'refused' => sub {
    my $peer = start_peer({ pve_returns('blockdev-add' => $refused) });
    dies(
        sub { new_access($peer)->setup(\@one) }, qr/\AGenericError\z/,
        qr/'blockdev-add' failed - no more nodes/, 'setup'
    );
    is(number_of($peer, 'backup-access-setup'), 0, 'nothing was set up');
};

# An access of this process whose end failed has left the marker.
subtest 'refused, because the marker exists' => sub {
    my $peer = start_peer(returns([$own_mark], [$own_mark], 'blockdev-add' => $refused));
    my $access = new_access($peer);
    ok(eval { $access->setup(\@one); 1 }, 'setup continues') or diag($@);
    $access->teardown(1);
    is((deleted($peer))[-1], $own_mark, 'the marker is deleted at the end');
};

subtest 'another process at the same time' => sub {
    my $other = getppid();
    my $other_mark = 'pba-owner-' . join('-', $other, start_time($other));
    my $peer = start_peer(returns([], [$own_mark, $other_mark]));
    dies(sub { new_access($peer)->setup(\@one) },
        qr/\AStateError\z/, qr/not finished: process $other is already backing it up/, 'setup');
    is(number_of($peer, 'backup-access-setup'), 0, 'nothing was set up');
    is_deeply([deleted($peer)], [$own_mark], 'the own marker is deleted, and the other one is not');
};

subtest 'a PID that is used again' => sub {
    my $gone = 'pba-owner-' . join('-', getppid(), start_time(getppid()) + 1);
    my $peer = start_peer(returns([$gone], [$gone, $own_mark]));
    my $access = new_access($peer);
    ok(eval { $access->setup(\@one); 1 }, 'setup continues') or diag($@);
    $access->teardown(1);
};

subtest 'a marker that stays' => sub {
    my @log;
    my $peer = start_peer(returns([], [$own_mark], 'blockdev-del' => $refused));
    my $access
        = new_access($peer, log => sub ($level, $message) { push(@log, "$level: $message") });
    $access->setup(\@one);
    ok(eval { $access->teardown(1); 1 }, 'the backup is not a failure for that') or diag($@);
    my ($warning) = grep { m/marker/ } @log;
    like($warning, qr/\Awarn: the marker of this process stays.*no more nodes/, 'a warning');
};

done_testing();
