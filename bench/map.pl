#!/usr/bin/perl

# Writes a qcow2 image with a large dirty bitmap, for experiments:
#   bench/map.pl FILE [--size BYTES] [--granularity BYTES] [--pattern NAME] [--bitmap NAME]

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Getopt::Long qw(GetOptions);

use PBA::Bench::BigMap;

my %options;
my $ok = GetOptions(\%options, 'size=i', 'granularity=i', 'pattern=s', 'bitmap=s');
die "usage: $0 FILE [--size N] [--granularity N] [--pattern NAME] [--bitmap NAME]\n"
    if !$ok || @ARGV != 1;

my $map = PBA::Bench::BigMap->write(file => $ARGV[0], %options);
say "$_: $map->{$_}" for qw(size granularity bitmap regions bytes extents);
