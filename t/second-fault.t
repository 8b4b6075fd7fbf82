# Two faults: at a command of a backup, and a little later at another command of the same backup, which handles
# the first fault; or the client is killed, and the next one, recover or a backup, has a fault or is killed as
# well. After each pair, the guest still runs; recover or the next setup cleans up; and the next backup, on the
# image that the ID in QEMU names, equals the disk (I2, I3, I5, I8).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use List::Util qw(shuffle);
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Repository::ById;
use PBA::Test::Share qw(share);
use PBA::Test::Sweep;

my $size = 8 * 1024 * 1024;
my $seed = $ENV{PBA_SEED} // 20261129;

# The number of pairs of each kind, for one row; with PBA_PAIRS=N, N for each row. PBA_FULL=1 includes every fault
# at every place of each row, with one second fault; the seed (PBA_SEED) decides which, and where (some commands
# later, or anywhere in the next client).
my $part = $ENV{PBA_PAIRS} // 4;
my $all_rows = $ENV{PBA_FULL} || $ENV{PBA_PAIRS};

# The time limit in seconds for replies that never come.
my $short = 1;

my @rows = (
    { ids => [qw(disk0 disk1)], mode => 'use' },
    { ids => [qw(disk0)], mode => 'new' },
    { ids => [qw(disk0)], mode => 'audit' },
);
my @first = qw(drop lose refuse deceive stall signal);
my @then = qw(kill-before kill-after drop lose refuse signal);
my @kills = qw(kill-before kill-after);
my @next = qw(kill-before kill-after drop lose refuse deceive stall signal);

# Makes one backup, whose client may be killed: QEMU has the ID of this backup or of the previous one.
sub faulty_backup ($sweep, $point, $proxy) {
    my %options = (qmp => $proxy->socket_path, log => sub { });
    $options{timeout} = $short if $point->{fault} eq 'stall';
    my $client = $sweep->client(
        sub ($tell) {
            $sweep->repository->backup(
                mode => $point->{mode},
                success => 1,
                disks => $point->{ids},
                options => \%options,
                during => sub ($id) { $tell->($id) },
            );
        }
    );
    while (defined(my $id = $client->next_word)) {
        $sweep->write_more($id);
        $client->let_go_on;
    }
    $client->wait_end;
    return 0;
}

# The second fault occurs during the handling of the first one, which is short in most cases. Kinds alternate,
# so that each pair of kinds occurs at several places.
sub pairs_of_backup ($totals) {
    my @pairs;
    for my $fault (@first) {
        my $turn = int(rand(@then));
        for my $at (1 .. $totals->{backup}) {
            my %then = ($at + 1 + int(rand(8)) => $then[($turn + $at) % @then]);
            push(@pairs, { fault => $fault, at => $at, then => \%then });
        }
    }
    return @pairs;
}

sub pairs_of_clients ($totals) {
    my @pairs;
    for my $fault (@kills) {
        my $turn = int(rand(@next));
        for my $at (1 .. $totals->{backup}) {
            my $by = (qw(recover setup))[int(rand(2))];
            my $next_at = 1 + int(rand($totals->{$by}));
            my %second = (by => $by, next => $next[($turn + $at) % @next], next_at => $next_at);
            push(@pairs, { fault => $fault, at => $at, %second });
        }
    }
    return @pairs;
}

my ($count, $used, $full) = (0, 0, 0);

sub sweep ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [map { { id => $_, size => $size } } qw(disk0 disk1)],
    );
    my $sweep = PBA::Test::Sweep->new(
        backend => $backend,
        seed => $seed,
        repository => PBA::Test::Repository::ById->new($backend),
    );
    for my $row ($all_rows ? @rows : $rows[$seed % @rows]) {
        my %row = (
            $row->%*,
            name => "$row->{ids}->@*, mode $row->{mode}",
            short => $short,
            backup => sub (@point) { faulty_backup($sweep, @point) },
        );
        my $totals = $sweep->totals(\%row);
        for my $pairs ([pairs_of_backup($totals)], [pairs_of_clients($totals)]) {
            my @pairs = share(shuffle($pairs->@*));
            splice(@pairs, $part) if !$ENV{PBA_FULL} && @pairs > $part;
            $sweep->pair(\%row, $_) for @pairs;
        }
    }
    $backend->check_manners;
    $count += $sweep->count;
    $used += $sweep->actions->{used} // 0;
    $full += $sweep->actions->{'missing-recreated'} // 0;
    return;
}

diag("a part of them, seed $seed") if !$ENV{PBA_FULL};
srand($seed + !!$ENV{PBA_QEMU});
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { sweep($name) };
}
diag("$count pairs; the backups after them: $used times a bitmap was used, $full times made anew");

done_testing;
