package PBA::Bench::Image;

# Images for the benches, and comparison of two files.

use v5.36;

my $stretch = 16 << 20;
my $block = 64 << 10;

# A raw image with data in every other 16 MiB, or everywhere with full => 1. No two blocks are equal, so that a
# program which stores equal blocks once has to store all of them.
sub write_raw ($file, $size, %options) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    truncate($fh, $size) or die "$file: $!\n";
    my $bytes = _random_bytes($stretch);
    for (my $at = 0; $at < $size; $at += $stretch * ($options{full} ? 1 : 2)) {
        substr($bytes, $_ * $block, 8) = pack('Q', $at + $_ + 1) for 0 .. $stretch / $block - 1;
        sysseek($fh, $at, 0) // die "$file: $!\n";
        my $length = $size - $at < $stretch ? $size - $at : $stretch;
        (syswrite($fh, $bytes, $length) // -1) == $length or die "cannot write $file\n";
    }

    # Memory of this process is counted for the programs that it starts.
    undef($bytes);
    close($fh) or die "$file: $!\n";
    return $file;
}

sub _random_bytes ($length) {
    open(my $fh, '<:raw', '/dev/urandom') or die "/dev/urandom: $!\n";
    read($fh, my $bytes, $length) == $length or die "cannot read /dev/urandom\n";
    return $bytes;
}

# Dies if the files differ in the ranges, [offset, length], or anywhere if none are given. Reads them in this
# process, because the memory of another program would be counted.
sub compare ($left, $right, @ranges) {
    my @handles = map { open(my $fh, '<:raw', $_) or die "$_: $!\n"; $fh } $left, $right;
    die "$left and $right differ in size\n" if !@ranges && -s $left != -s $right;
    for my $range (@ranges ? @ranges : [0, -s $left]) {
        my ($offset, $left_over) = @$range;
        sysseek($_, $offset, 0) for @handles;
        while ($left_over > 0) {
            my $length = $left_over < 1 << 20 ? $left_over : 1 << 20;
            my @got = map { sysread($_, my $data, $length) // die "read: $!\n"; $data } @handles;
            die "$left is not what was to be copied\n" if $got[0] ne $got[1] || $got[0] eq '';
            $left_over -= length($got[0]);
        }
    }
    return;
}

1;
