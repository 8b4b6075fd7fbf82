# A client is killed before and after every QMP command, NBD connection and discard of a whole backup, with one
# and two disks, as a success and a failure, while the guest writes. After each kill, the guest still runs; one
# call of recover, or the next setup by itself, cleans up; and the next increment on top of the last good backup
# equals the disk (I2, I3, I5).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::Repository::ById;
use PBA::Test::Share qw(share);
use PBA::Test::Sweep;

my $size = 8 * 1024 * 1024;
my $seed = 20261122;

# All points take almost an hour; PBA_FULL=1 includes all. A plain run includes a quarter of the rows on each QEMU,
# and one point of half of the faults.
my @faults = qw(kill-before kill-after kill-before-nbd kill-after-nbd);

my @rows = (
    [[qw(disk0)], use => 1],
    [[qw(disk0 disk1)], use => 1],
    [[qw(disk0 disk1)], use => 0],
    [[qw(disk0 disk1)], new => 1],
    [[qw(disk0)], new => 0],
);

# With IDs: whatever was killed, the next backup continues from the image that the ID in QEMU names.
my @id_rows = (
    [[qw(disk0 disk1)], use => 1],
    [[qw(disk0 disk1)], use => 0],
    [[qw(disk0)], new => 1],
    [[qw(disk0)], audit => 1]
);
my @iothread_rows = ([[qw(disk0 disk1)], use => 1], [[qw(disk0)], new => 0]);

# What QEMU was told decides whether a backup is a success, whatever the client noticed before its end.
sub was_told ($proxy, $point) {
    my @sent = map { $_->{name} } $proxy->commands;
    pop(@sent) if $proxy->struck && $point->{fault} eq 'kill-before';
    my ($export) = grep { $sent[$_] eq 'block-export-add' } 0 .. $#sent;
    return
           $point->{success}
        && defined($export)
        && grep { m/\A(?:transaction|backup-access-teardown)\z/ } @sent[$export .. $#sent];
}

sub killed_backup ($sweep, $point, $proxy) {
    my @ids = $point->{ids}->@*;
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            $sweep->repository->backup(
                mode => $point->{mode},
                success => $point->{success},
                disks => \@ids,
                options => { qmp => $proxy->socket_path },
                during => sub ($id) { $tell->('up') if $id eq $ids[0] },
            );
        }
    );
    while (defined(my $word = $client->next_word)) {
        fail("$point->{name}: the client $word") if $word ne 'up';
        $sweep->write_more(@ids);
        $client->let_go_on;
    }
    $client->wait_end;
    return was_told($proxy, $point);
}

my $count = 0;

sub sweep ($name, $disk, $repository, @rows) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [map { { id => $_, size => $size, $disk->%* } } qw(disk0 disk1)],
    );
    my $sweep = PBA::Test::Sweep->new(
        backend => $backend,
        seed => $seed,
        repository => $repository->new($backend),
    );
    for my $row (share(@rows)) {
        my ($ids, $mode, $success) = $row->@*;
        my %row = (
            name => "@$ids, mode $mode, success $success",
            ids => $ids,
            mode => $mode,
            success => $success,
            backup => sub (@point) { killed_backup($sweep, @point) },
        );
        $sweep->run(%row, points => $ENV{PBA_FULL} ? undef : 1, faults => [share(@faults)]);
    }
    $backend->check_manners;
    $count += $sweep->count;
    return $backend->vm->version->[0];
}

diag("a part of them, seed $seed") if !$ENV{PBA_FULL};
for my $name (PBA::Test::Backend->names) {
    my $version;
    subtest "backend $name" =>
        sub { $version = sweep($name, {}, 'PBA::Test::Repository', share(@rows)) };
    subtest "backend $name, with ids" =>
        sub { sweep($name, {}, 'PBA::Test::Repository::ById', share(@id_rows)) };
    subtest "backend $name, disks in an iothread" => sub {
        plan(skip_all => 'needs QEMU 10.0 or later') if ($version // 0) < 10;
        sweep($name, { iothread => 1 }, 'PBA::Test::Repository', @iothread_rows);
    };
}
diag("$count points");

done_testing;
