# The requests that an NBD target gets: only whole aligned blocks of zeroes, and no two requests for the same
# block at the same time. QEMU 11.0.0 with a fix of its own loses a write beside zeroes in the same cluster, and
# does not report the size of its clusters.
#
# One QEMU is enough: no QEMU is involved.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use List::Util qw(min);
use Test::More;

use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::Watchdog;

my $KiB = 1 << 10;
my $MiB = 1 << 20;
my $sector = 4 * $KiB;
my $seed = $ENV{PBA_SEED} // time;
my $rounds = $ENV{PBA_FULL} ? 60 : 10;

diag("PBA_SEED=$seed");
srand($seed);

sub pick (@choices) { return $choices[rand(@choices)] }

# Runs of data and zeroes of all lengths, some of them at the edges of blocks.
sub random_layout ($size) {
    my $data = '';
    my $is_zero = pick(0, 1);
    while (length($data) < $size) {
        my $length = pick($sector, $sector * (1 + int(rand(40))), 64 * $KiB, 128 * $KiB, 2 * $MiB);
        $length = min($length, $size - length($data));
        $data .= ($is_zero ? "\0" : chr(1 + int(rand(255)))) x $length;
        $is_zero = !$is_zero;
    }
    return $data;
}

# Dirty areas, mostly of whole clusters, otherwise of any sectors.
sub random_map ($size) {
    return [[0, $size]] if rand() < 0.3;
    my $unit = pick(64 * $KiB, 64 * $KiB, $sector);
    my @areas;
    for (my $at = int(rand(4)) * $unit; $at < $size;) {
        my $end = min($size, $at + $unit * (1 + int(rand(pick(3, 40)))));
        push(@areas, [$at, $end - $at]);
        $at = $end + $unit * (1 + int(rand(3)));
    }
    return \@areas;
}

sub holes_in ($data) {
    my @holes;
    while ($data =~ m/(\0{4096,})/g) {
        push(@holes, [pos($data) - length($1), length($1)]);
    }
    return \@holes;
}

# Requests for one block that overlapped in time, and zeroes that were no whole blocks. The record has the time
# when a request arrived, and the time before it was answered.
sub wrong_requests ($target, $block, $size) {
    my @wrong;
    my %busy;
    for my $event ($target->changes) {
        my ($offset, $length) = $event->@{qw(offset length)};
        my @blocks = int($offset / $block) .. int(($offset + $length - 1) / $block);
        if ($event->{answered}) {
            delete($busy{$_}) for @blocks;
            next;
        }
        my $name = "$event->{command} $offset+$length";
        my $end = $offset + $length;
        push(@wrong, "$name: part of a block")
            if $event->{command} eq 'write-zeroes'
            && ($offset % $block || ($end % $block && $end != $size));
        for my $number (@blocks) {
            push(@wrong, "$name beside $busy{$number}") if $busy{$number};
            $busy{$number} = $name;
        }
    }
    return @wrong;
}

sub try_copy ($round, %more) {
    my $size = 4 * $MiB + pick(0, 512, $sector, 60 * $KiB);
    my $data = random_layout($size);
    my $map = $more{map} // random_map($size);
    my $block = pick(64 * $KiB, 64 * $KiB, 128 * $KiB, 2 * $MiB);
    my %options = (
        connections => pick(1, 2, 4),
        'request-size' => pick(undef, 4096, 20480, 64 * $KiB, 192 * $KiB, $MiB),
        'bandwidth-limit' => pick(undef, undef, 8 * $MiB),
        'cluster-size' => $block == 64 * $KiB ? pick(undef, $block) : $block,
        %more,
    );
    delete($options{map});
    my $name = join(' ', map { "$_ " . ($options{$_} // '-') } sort keys %options);
    my $source = PBA::Test::NBDServer->start(
        size => $size,
        dirty => $map,
        holes => pick([], holes_in($data)),
        data => sub ($offset, $length) { substr($data, $offset, $length) },
    );
    my $target = PBA::Test::NBDServer->start(
        size => $size,
        keep => 1,
        delay => pick(0, 0.002, 0.02),
        zero_error => pick((undef) x 5, 95),
    );
    my $statistics = open_volume($source)->copy(to => $target->uri, %options);
    my @wrong = wrong_requests($target, $block, $size);
    is_deeply([splice(@wrong, 0, 3)], [], "round $round: $name");

    my $expected = "\xee" x $size;
    substr($expected, $_->[0], $_->[1]) = substr($data, $_->[0], $_->[1]) for @$map;
    ok($target->content eq $expected, "round $round: the data");
    return $statistics;
}

try_copy($_) for 1 .. $rounds;

subtest 'pieces that share a block' => sub {
    for my $connections (1, 4) {
        try_copy(
            'small',
            connections => $connections,
            'request-size' => 4096,
            map => [[4096, 4 * $MiB - 8192]]
        );
    }
};

done_testing;
