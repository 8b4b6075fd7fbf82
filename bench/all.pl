#!/usr/bin/perl

# Runs all benches, one after the other, and prints one table, or JSON with --json. Takes the options of each.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use JSON::PP ();

use PBA::Bench::Table;

my @benches = qw(job regions vfile copy setup guest vzdump growth);

my $as_json = grep { $_ eq '--json' } @ARGV;
STDOUT->autoflush(1);
print PBA::Bench::Table::head() if !$as_json;
my @failed;
for my $name (@benches) {
    my @command = ($^X, (map { "-I$_" } @INC), "$FindBin::Bin/$name.pl", '--json', @ARGV);
    open(my $lines, '-|', @command) or die "cannot run bench $name: $!\n";
    while (my $line = <$lines>) {
        print $as_json ? $line : PBA::Bench::Table::row(JSON::PP::decode_json($line));
    }
    close($lines) or push @failed, $name;
}
die 'failed: ', join(' ', @failed), "\n" if @failed;
