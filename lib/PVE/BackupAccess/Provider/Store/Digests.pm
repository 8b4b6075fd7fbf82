package PVE::BackupAccess::Provider::Store::Digests;

# Files of digests, as copies write them: see FILES OF DIGESTS in PVE::BackupAccess::Volume.

use v5.36;

use Digest::SHA qw(sha256);
use Exporter qw(import);
use Fcntl qw(O_CREAT O_EXCL O_WRONLY SEEK_SET);
use List::Util qw(min);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(open_if_there);

our @EXPORT_OK
    = qw(bytes_to_add digests_size each_digest each_known has_header known_in merge_digests);

my $header_size = 4096;
my $digest_size = 32;
my $part = 1 << 20;    # bytes of digests in memory at a time

# How many clusters of 64 KiB an L2 table of an image locates, in bytes of their digests; and how many a refcount block counts.
my $table = $digest_size * (1 << 13);
my $counted = 1 << 15;

my sub fail ($message, $class = 'ArchiveError') {
    PVE::BackupAccess::Error->throw($class, $message);
}

my sub fail_to ($what) { fail("cannot $what - $!", 'SystemError') }

my sub read_at ($file, $at, $length) {
    sysseek($file->{fh}, $at, SEEK_SET) // fail_to("read $file->{path}");
    my $got = sysread($file->{fh}, my $data, $length) // fail_to("read $file->{path}");
    fail("the file of digests $file->{path} is too short: it ends at byte " . ($at + $got))
        if $got != $length;
    return $data;
}

my sub open_file ($path) {
    my $fh = open_if_there($path) // fail("$path is missing");
    my $file = { path => $path, fh => $fh };
    $file->{header} = read_at($file, 0, $header_size);
    my ($magic, undef, undef, @numbers) = unpack('a12 a4 a16 Q> N N', $file->{header});
    my ($size, $block, $complete) = map { m/\A([0-9]+)\z/ ? $1 : 0 } @numbers;    # without taint
    fail("$path is not a file of digests: its header is wrong")
        if $magic ne "PBA-DIGESTS\n" || !$block;
    $file->@{qw(size block complete)} = ($size, $block, $complete);
    $file->{blocks} = int($size / $block) + ($size % $block ? 1 : 0);
    return $file;
}

# Whether the file begins like the digests of such a volume.
sub has_header ($path, $size, $block, $is_complete) {
    my $fh = open_if_there($path) // return 0;
    my $wanted
        = pack('a12 a4 a16 Q> N N', "PBA-DIGESTS\n", '1', 'SHA-256', $size, $block, $is_complete);
    sysread($fh, my $found, length($wanted)) // fail_to("read $path");
    return $found eq $wanted;
}

# The size of the file of digests for a volume of that size.
sub digests_size ($size, $block) {
    return $header_size + $digest_size * (int($size / $block) + ($size % $block ? 1 : 0));
}

# Returns a function that says whether the file has a digest for the block at an offset of the volume. In a complete file, no
# digest means zeroes.
sub known_in ($path) {
    my $file = open_file($path);
    return sub ($offset) {
        my $at = $header_size + int($offset / $file->{block}) * $digest_size;
        return $file->{complete} || read_at($file, $at, $digest_size) =~ m/[^\0]/;
    };
}

# Calls the function with offset, length and digest of each block that has a digest in the file, in ascending order. In
# a complete file, the other blocks are zeroes.
sub each_digest ($path, $code) {
    my $file = open_file($path);
    for (my $first = 0; $first < $file->{blocks}; $first += $part / $digest_size) {
        my $count = min($file->{blocks} - $first, $part / $digest_size);
        my $slots = read_at($file, $header_size + $first * $digest_size, $count * $digest_size);
        next if $slots !~ m/[^\0]/;
        for my $i (0 .. $count - 1) {
            my $slot = substr($slots, $i * $digest_size, $digest_size);
            next if $slot !~ m/[^\0]/;
            my $offset = ($first + $i) * $file->{block};
            $code->($offset, min($file->{block}, $file->{size} - $offset), $slot);
        }
    }
    return;
}

# Calls the function with offset and length of each block whose content the file tells, in ascending order.
sub each_known ($path, $code) {
    my $file = open_file($path);
    return each_digest($path, sub ($offset, $length, $digest) { $code->($offset, $length) })
        if !$file->{complete};
    for (my $offset = 0; $offset < $file->{size}; $offset += $file->{block}) {
        $code->($offset, min($file->{block}, $file->{size} - $offset));
    }
    return;
}

# Takes each digest from the newer file, or, where that has none, from the older one.
my sub join_slots ($newer, $older) {
    return $older if $newer !~ m/[^\0]/;
    return join(
        '',
        map {
            my $slot = substr($newer, $_, $digest_size);
            $slot =~ m/[^\0]/ ? $slot : substr($older, $_, $digest_size)
            }
            map { $_ * $digest_size } 0 .. length($newer) / $digest_size - 1
    );
}

# Writes the digests of an older image with a newer one merged into it to a new file.
sub merge_digests ($newer_path, $older_path, $path) {
    my ($newer, $older) = map { open_file($_) } $newer_path, $older_path;
    fail(
        "cannot merge the digests $newer_path into $older_path - their sizes or block sizes differ")
        if grep { $newer->{$_} != $older->{$_} } qw(size block);
    unlink($path);
    sysopen(my $fh, $path, O_WRONLY | O_CREAT | O_EXCL, 0600) or fail_to("write $path");
    my $put = sub ($at, $data) {
        sysseek($fh, $at, SEEK_SET) // fail_to("write $path");
        while ($data ne '') {    # on a full disk, a part may fit
            my $written = syswrite($fh, $data) // fail_to("write $path");
            substr($data, 0, $written, '');
        }
    };
    my $end = $header_size + $newer->{blocks} * $digest_size;
    truncate($fh, $end) or fail_to("write $path");
    for (my $at = $header_size; $at < $end; $at += $part) {
        my $length = $end - $at < $part ? $end - $at : $part;
        my $slots = join_slots(map { read_at($_, $at, $length) } $newer, $older);
        $put->($at, $slots) if $slots =~ m/[^\0]/;
    }
    $put->(0, $older->{header});
    close($fh) or fail_to("write $path");
    return;
}

# The most bytes by which an image grows when a newer one is merged into it: the data that replaces nothing or zeroes there, or
# all of it, because data that replaces compressed data needs new space; and the tables that the older image lacks. Zeroes
# take no space: in a complete file they have no digest, in another one the digest of a block of zeroes.
sub bytes_to_add ($newer_path, $older_path, $is_compressed = 0) {
    my ($newer, $older) = map { open_file($_) } $newer_path, $older_path;
    my $end = $header_size + $newer->{blocks} * $digest_size;
    my %is_empty = map { $_ => 1 } "\0" x $digest_size, sha256("\0" x $newer->{block});
    my $blocks = 0;
    for (my $at = $header_size; $at < $end; $at += $table) {
        my $length = $end - $at < $table ? $end - $at : $table;
        my $new = read_at($newer, $at, $length);
        next if $new !~ m/[^\0]/;
        my $old = read_at($older, $at, $length);
        for (my $i = 0; $i < $length; $i += $digest_size) {
            next if $is_empty{ substr($new, $i, $digest_size) };
            $blocks++ if $is_compressed || $is_empty{ substr($old, $i, $digest_size) };
        }
        $blocks++ if $old !~ m/[^\0]/;
    }
    return ($blocks + int($blocks / $counted)) * $newer->{block};
}

1;
