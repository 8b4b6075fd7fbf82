# Disks of a guest that are stored in parallel: one bandwidth limit and one progress for all, and the first
# failure ends the others.
#
# One QEMU is enough: the processes are ours.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use Time::HiRes qw(sleep time);

use PBA::Test::Chain;
use PVE::BackupAccess::Provider::Store::Workers qw(side_by_side);

my $MiB = 1 << 20;
my $device = 'drive-scsi0';

sub new_chain ($jobs) {
    my $chain = PBA::Test::Chain->new;
    $chain->provider->jobs($jobs);
    $chain->disk($_)->write([0, 512 * 1024, 0x11]) for $chain->devices;
    return $chain;
}

# The remaining process groups and children of this process.
sub children () {
    open(my $fh, '<', "/proc/$$/task/$$/children") or die "children: $!\n";
    return split(' ', <$fh> // '');
}

subtest 'side by side' => sub {
    my $chain = new_chain(2);
    my %last;
    $chain->provider->on_progress(sub ($name, @state) { $last{$name} = \@state });
    my $name = $chain->backup // die $chain->error;
    is_deeply(
        \%last,
        { map { my $size = $chain->disk($_)->size; $_ => [$size, $size] } $chain->devices },
        'the progress of each device reaches its size'
    );
    my $log = $chain->log;
    like($log, qr/^info: $_: .*; image checked in /m, "$_: its lines are in the log")
        for $chain->devices;
    $chain->disk($device)->write([2 * $MiB, 65536, 0x12]);
    $chain->backup // die $chain->error;
    $chain->check('full and increment');
    is_deeply([children()], [], 'no process is left');
};

subtest 'two at a time' => sub {
    my @items = qw(a b c d);
    my %running;
    my $most = 0;
    my $results = side_by_side(
        2,
        \@items,
        sub ($item, $tell) { $tell->('begins'); sleep(0.2); $tell->('ends'); return "$item!" },
        sub ($item, $word) {
            $running{$item} = $word eq 'begins';
            my $now = grep { $_ } values %running;
            $most = $now if $now > $most;
        }
    );
    is_deeply($results, { map { $_ => "$_!" } @items }, 'the results of all items');
    is($most, 2, 'two at once, and no more');
};

subtest 'random numbers' => sub {
    rand();
    my $results = side_by_side(4, [1 .. 4], sub ($, $) { return rand() }, sub (@) { });
    my %seen = map { $_ => 1 } values $results->%*;
    is(scalar(keys %seen), 4, 'each process has its own random numbers');
};

subtest 'the first failure' => sub {
    my $chain = new_chain(2);
    my $open = $chain->disk($device)->can('open');
    my $began = time;
    no warnings 'redefine';
    local *PBA::Test::BitmapDisk::open = sub ($disk, $mode) {
        my $volume = $open->($disk, $mode);
        $volume->{'nbd-path'} .= '.gone' if $disk->{device} ne $device;
        return $volume;
    };
    is($chain->backup(info => { 'bandwidth-limit' => 100_000 }), undef, 'the backup fails');
    like($chain->error, qr/^device drive-efidisk0: connecting failed/, 'whose error is told');
    is($chain->error->class, 'NbdError', 'the error keeps its class');
    is($chain->error->device, 'drive-efidisk0', 'the error keeps its device');
    cmp_ok(time - $began, '<', 20, 'the other disk is not waited for');
    is_deeply([children()], [], 'no process is left');
    is_deeply([$chain->names], [], 'there is no archive');
};

subtest 'a signal' => sub {
    my $chain = new_chain(2);
    local $SIG{ALRM} = sub { die "alarm\n" };
    is(
        $chain->backup(
            info => { 'bandwidth-limit' => 100_000 },
            during => sub { alarm(2) }
        ),
        undef,
        'a signal ends the backup'
    );
    is($chain->error, "alarm\n", "the exception is the handler's");
    is_deeply([children()], [], 'no process is left');
};

subtest 'progress in lines' => sub {
    my $chain = new_chain(2);
    no warnings 'once';
    local $PVE::BackupAccess::Provider::Store::Devices::seconds_between_lines = 0;
    $chain->backup // die $chain->error;
    like(
        $chain->log,
        qr/^info: $device: 4\.0 MiB of 4\.0 MiB$/m,
        'without a code ref, progress is logged'
    );
};

subtest 'a process that is killed' => sub {
    my $end = eval {
        side_by_side(
            2, [1, 2],
            sub ($item, $) { kill('KILL', $$) if $item == 1; sleep(60) },
            sub (@) { }
        );
        1;
    };
    like($@, qr/^1: its worker process ended without a result/, 'is an error');
    is_deeply([children()], [], 'no process is left');
};

subtest 'one limit for all' => sub {
    my $chain = new_chain(2);
    my $began = time;
    $chain->backup(info => { 'bandwidth-limit' => 1 << 18 }) // die $chain->error;
    my $seconds = time - $began;

    # 512 KiB of each disk, of which a quarter of a second's worth passes at once.
    cmp_ok($seconds, '>=', 3.5, 'the limit is kept together');
};

done_testing;
