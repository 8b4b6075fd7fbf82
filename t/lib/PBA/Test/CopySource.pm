package PBA::Test::CopySource;

# A volume to copy from: its data, dirty maps of all shapes, and NBD servers for it. Like a snapshot, these
# answer reads outside of dirty regions, or after a discard, with an error.

use v5.36;

use Exporter qw(import);
use List::Util qw(min);
use Test::More;

use PBA::Test::NBDServer;

our @EXPORT_OK = qw($image $odd_size %maps start write_file read_file same);

my $KiB = 1 << 10;
my $MiB = 1 << 20;
our $odd_size = 6 * $MiB + 4608;

# Data that contains zeroes in pieces of all sizes from 4 KiB up.
sub make_image ($size) {
    my $image = PBA::Test::NBDServer::pattern(0, $size);
    for (my ($at, $i) = (8 * $KiB, 1); $at < $size; $at += $i++ * 28 * $KiB) {
        my $length = min($i * 4 * $KiB, $size - $at);
        substr($image, $at, $length) = "\0" x $length;
    }
    return $image;
}

our $image = make_image($odd_size);

our %maps = (
    'one region' => [[64 * $KiB, 64 * $KiB]],
    'all' => [[0, $odd_size]],
    'nothing' => [],
    'every other cluster' => [map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 47],
    'the odd end' => [[0, 192 * $KiB], [6 * $MiB, 4608]],
    'long and short' =>
        [[$MiB, 3 * $MiB - 64 * $KiB], [4 * $MiB, 64 * $KiB], [5 * $MiB, 512 * $KiB]],
    'small blocks' => [map { [$_ * 12 * $KiB, 4 * $KiB] } 0 .. 300],
    'sectors' => [map { [$_ * 2560, 512] } 7 .. 400],
);

# A server ends with its object; these servers must outlive the volumes that a test opens on them.
my @servers;

sub start (%options) {
    push @servers,
        PBA::Test::NBDServer->start(
        size => $odd_size,
        export => 'disk',
        dirty_only => 1,
        data => sub ($offset, $length) { substr($image, $offset, $length) },
        %options,
        );
    shift(@servers) if @servers > 4;
    return $servers[-1];
}

sub write_file ($file, $data) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print {$fh} $data;
    close($fh) or die "$file: $!\n";
    return $file;
}

sub read_file ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# Used instead of is(), which would print megabytes.
sub same ($got, $expected, $name) {
    return pass($name) if $got eq $expected;
    my $difference = $got ^. $expected;
    $difference =~ m/[^\0]/;
    return fail(
        "$name: differs from byte $-[0] on, lengths " . length($got) . ' and ' . length($expected));
}

1;
