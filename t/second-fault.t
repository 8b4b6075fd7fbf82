# Two things go wrong: a command of a backup and another one of the same backup a little later, in what is
# done about the first one; or the client is killed, and the next one, recover or a backup, has a fault of
# its own or is killed as well. After each pair the guest runs, recover or the next setup cleans up, and the
# next backup, on the image that the id in QEMU names, is the disk (I2, I3, I5, I8).

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

# Of each kind, of one row. PBA_FULL=1 takes every fault at every place of each row, with one second fault:
# which, and where (some commands further, or anywhere in the next client) is by the seed.
my $part = 4;

# Seconds that a reply may take, where it does not come.
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

# One backup, whose client may be killed: QEMU has the id of it or of the one before.
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

# The second fault is in the way back from the first one, most of which is short. Kinds in turn: each two
# of them meet at several places.
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
    for my $row ($ENV{PBA_FULL} ? @rows : $rows[$seed % @rows]) {
        my %row = (
            $row->%*,
            name => "$row->{ids}->@*, mode $row->{mode}",
            short => $short,
            backup => sub (@point) { faulty_backup($sweep, @point) },
        );
        my $totals = $sweep->totals(\%row);
        for my $pairs ([pairs_of_backup($totals)], [pairs_of_clients($totals)]) {
            my @pairs = share(shuffle($pairs->@*));
            @pairs = @pairs[0 .. $part - 1] if !$ENV{PBA_FULL};
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
