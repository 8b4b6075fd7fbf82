# Every QMP command of a backup goes wrong once in every possible way: the connection ends before it or instead
# of its reply, it is refused, its reply is false, or no reply arrives in time. After each fault, the guest
# still runs; teardown has cleaned up (after a time-out, recover or the next setup does); and the next increment
# on top of the last good backup equals the disk (I2, I5).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Share qw(share);
use PBA::Test::Sweep;

my $size = 8 * 1024 * 1024;
my $seed = 20261122;

# All faults take almost an hour; PBA_FULL=1 includes all.
my $points = $ENV{PBA_FULL} ? undef : 1;

# The time limit in seconds for replies that never come.
my $short = 1;

my @rows = (
    [[qw(disk0 disk1)], use => 1, qw(drop lose refuse deceive)],
    [[qw(disk0)], new => 1, qw(drop lose refuse deceive)],
    [[qw(disk0 disk1)], new => 1, qw(stall)],
    [[qw(disk0)], use => 1, qw(stall)],
);

# If teardown dies, the caller considers the backup failed.
sub faulty_backup ($sweep, $point, $proxy) {
    local $SIG{__WARN__} = sub { };
    my %options = (qmp => $proxy->socket_path);
    $options{timeout} = $short if $point->{fault} eq 'stall';
    return eval {
        $sweep->repository->backup(
            mode => $point->{mode},
            success => 1,
            disks => $point->{ids},
            options => \%options,
            during => sub ($id) { $sweep->write_more($id) },
        );
        1;
    };
}

my $count = 0;

sub sweep ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [map { { id => $_, size => $size } } qw(disk0 disk1)],
    );
    my $sweep = PBA::Test::Sweep->new(backend => $backend, seed => $seed);
    for my $row (share(@rows)) {
        my ($ids, $mode, $success, @faults) = $row->@*;
        $sweep->run(
            name => "@$ids, mode $mode",
            ids => $ids,
            mode => $mode,
            faults => \@faults,
            points => $points,
            ends_clean => $faults[0] ne 'stall',
            backup => sub (@point) { faulty_backup($sweep, @point) },
        );
    }
    $backend->check_manners;
    $count += $sweep->count;
}

diag("$points places of each row, seed $seed") if $points;
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { sweep($name) };
}
diag("$count faults");

done_testing;
