# The benches still run, and print what is promised; a plain run includes half of them. The figures themselves
# are not checked: the sizes are the smallest possible, and each side runs once.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use JSON::PP ();

use PBA::Test::Share qw(share);

my $mib = 1 << 20;
my @benches = (
    [regions => '--size', $mib * 64],
    [growth => 'regions', '--max', 3],
    [job => 'increment, nbd', '--size', $mib * 64, '--writes', 10],
    [job => 'command, increment', '--size', $mib * 64, '--writes', 10],
    [copy => 'to a file', '--size', $mib * 64],
    [guest => 'full speed', '--size', $mib * 64],
    [setup => '1 disk, nbd', '--rounds', 1],
    [vfile => 'full, 1 MiB', '--size', $mib * 64],
    [vzdump => 'one object, JSON::PP, nbd', 'to a file, from', '--size', $mib * 64],
);

sub check_side ($side, $what) {
    return pass("$what: none") if !defined($side);
    cmp_ok($side->{seconds}, '>', 0, "$what: seconds");
    ok(exists($side->{rss_kib}), "$what: rss_kib");
    return;
}

sub check_record ($record, $name) {
    my $case = $record->{case};
    is($record->{bench}, $name, "$case: bench");
    check_side($record->{$_}, "$case: $_") for qw(ours peer floor);
    my ($ours, $peer) = @$record{qw(ours peer)};
    return is($record->{ratio}, undef, "$case: no ratio") if !$peer;
    ok(defined($peer->{name}), "$case: the peer has a name");

    cmp_ok($ours->{seconds_min}, '<=', $ours->{seconds}, "$case: the least is no more");

    # The seconds are rounded, too.
    my $ratio = $peer->{seconds} / $ours->{seconds};
    cmp_ok(abs($record->{ratio} - $ratio), '<', 0.01 * $ratio + 0.001, "$case: ratio");
    return;
}

for my $bench (share(@benches)) {
    my ($name, @options) = @$bench;
    my @command = ($^X, '-Mblib', "$FindBin::Bin/../bench/$name.pl", qw(--json --runs 1), @options);
    open(my $lines, '-|', @command) or die "cannot run bench $name: $!\n";
    my @records = map { JSON::PP::decode_json($_) } <$lines>;
    ok(close($lines), "$name: ends well");
    ok(scalar(@records), "$name: prints something");
    check_record($_, $name) for @records;
}
done_testing();
