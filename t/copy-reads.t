# How a copy reads: a guest must not wait for it, and the snapshots of older QEMUs must be read with care.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use List::Util qw(max uniq);
use POSIX qw(EIO);
use Test::More;

use PBA::Test::CopySource qw(start);
use PBA::Test::NBDServer qw(open_volume);
use PVE::BackupAccess::Volume;

my $KiB = 1 << 10;
my $MiB = 1 << 20;

# As QEMU before 9.2 requires: a longer read of a snapshot returns wrong data (before 8.0), and a block status
# that overlaps a read makes QEMU abort.
subtest 'a server to be read by clusters' => sub {
    my $size = 20 * $MiB + 512;
    my @options = (
        size => $size,
        holes => [[0, 17 * $MiB]],
        data => sub ($offset, $length) { "\0" x $length },
    );
    for my $description (undef, 'pba: read by clusters of 65536 bytes') {
        my $server = start(@options, description => $description, dirty_only => 0);
        my $volume = open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        $volume->copy(to => '/dev/null');
        my $crossing = 0;
        for my $read ($server->requests('read')) {
            my ($first, $end) = ($read->{offset}, $read->{offset} + $read->{length});
            $crossing++ if int($first / 65536) != int(($end - 1) / 65536);
        }
        my $questions = () = $server->requests('block-status');
        if (!defined($description)) {
            cmp_ok($crossing, '>', 0, 'any other server: reads cross clusters');
            cmp_ok($questions, '>', 0, 'any other server: holes are queried');
            next;
        }
        is($crossing, 0, 'no read crosses the edge of a cluster');
        is($questions, 0, 'holes are not queried');
        my $whole = grep { $_->{flags} & 4 } $server->requests('read');
        is($whole, scalar(() = $server->requests('read')), 'all reads have the flag DF');
    }
};

# The guest's I/O waits behind all requests in QEMU's main loop.
subtest 'a guest whose snapshot is read' => sub {
    my %expected = (
        'a snapshot' => [0, $MiB, 2],
        'any other export' => [1, 256 * $KiB, 2],
        'a snapshot that is read by clusters' =>
            [0, 64 * $KiB, 1, 'pba: read by clusters of 65536 bytes'],
    );
    for my $name (sort keys %expected) {
        my ($no_trim, $longest, $connections, $description) = $expected{$name}->@*;
        my $server = start(
            size => 20 * $MiB,
            data => sub ($, $length) { 'x' x $length },
            dirty_only => 0,
            no_trim => $no_trim,
            description => $description,
        );
        my $volume = open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        $volume->copy(to => '/dev/null');
        my @reads = $server->requests('read');
        is(max(map { $_->{length} } @reads), $longest, "$name: the longest read");
        is(scalar(uniq(map { $_->{connection} } @reads)), $connections, "$name: connections");
    }
};

# After one answer, the C library of qemu-nbd keeps the memory of requests. Nothing depends on it.
subtest 'a target is asked once' => sub {
    for my $case (
        [20 * $MiB, 1],
        [20 * $MiB, 1, allocation_error => EIO],
        [32 * $KiB, 0],
        [20 * $MiB, 0, description => 'pba: read by clusters of 65536 bytes'],
        )
    {
        my ($size, $times, @options) = @$case;
        my @data = (size => $size, data => sub ($, $length) { 'x' x $length });
        my $server = start(@data, dirty_only => 0);
        my $target = PBA::Test::NBDServer->start(size => $size, keep => 1, @options);
        my $volume = open_volume($server, 'bitmap-mode' => 'none', 'bitmap-name' => undef);
        $volume->copy(to => $target->uri);
        is(scalar(() = $target->requests('block-status')), $times, "$size bytes, @options");
        ok($target->content eq 'x' x $size, "$size bytes, @options: all is written");
    }
};

done_testing;
