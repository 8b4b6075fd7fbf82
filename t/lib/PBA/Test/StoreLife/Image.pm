package PBA::Test::StoreLife::Image;

# The content of a small qcow2 image with its backing files, read without QEMU's code. Dies if it cannot be
# determined.

use v5.36;

use Exporter qw(import);
use Time::HiRes ();

use PBA::Test::StoreLife::Kept qw(keep kept slurp);

our @EXPORT_OK = qw(digest_of forget state_of);

my $most = 64 << 20;
my $longest = 120;                         # images in a chain
my $offset_bits = (1 << 56) - (1 << 9);    # in a table's entry
my %cache;    # inode => [state of the chain, digest of the content, name of the backing file]

# A state that changes when a file does, unless the file's time is set back. A copy of the file that keeps its time has the
# same state.
sub state_of ($path) {
    return join(' ', (Time::HiRes::stat($path))[7, 9]);
}

# The inode, and a state that changes even then.
my sub inode_of ($path) {
    my ($device, $inode, $time) = (Time::HiRes::stat($path))[0, 1, 10] or die "$path: $!\n";
    return ("$device $inode", $time);
}

sub forget () {
    %cache = ();
    return;
}

my sub header ($path, $image) {
    my %header;
    @header{qw(magic version backing-at backing-length bits size crypt l1-entries l1-at)}
        = unpack('a4 N Q> N N Q> N N Q>', $image);
    die "$path: no qcow2 image\n" if length($image) < 104 || $header{magic} ne "QFI\xfb";
    die "$path: an odd header\n"
        if $header{bits} != 16 || $header{size} > $most || $header{crypt} || $header{version} != 3;
    my $features = unpack('Q>', substr($image, 72, 8));
    die "$path: cannot tell\n" if $features;
    return \%header;
}

# The cluster to which an entry of an L2 table refers; undef if the image does not contain it.
my sub cluster ($image, $entry, $length) {
    die "compressed\n" if $entry & 1 << 62;
    return "\0" x $length if $entry & 1;
    my $at = $entry & $offset_bits;
    return undef if !$at;
    my $data = substr($image, $at, $length) // '';
    return $data . "\0" x ($length - length($data));
}

my sub entry_at ($image, $at) { return unpack('Q>', substr($image, $at, 8) // '') // 0 }

my sub lay_over ($image, $header, $content) {
    my ($size, $bits, $per_table) = ($header->{size}, 16, 1 << 13);
    for (my ($at, $i) = (0, 0); $at < $size; $at += 1 << $bits, $i++) {
        my $l1 = entry_at($image, $header->{'l1-at'} + 8 * int($i / $per_table));
        my $table = $l1 & $offset_bits or next;
        my $length = $size - $at < 1 << $bits ? $size - $at : 1 << $bits;
        my $data = cluster($image, entry_at($image, $table + 8 * ($i % $per_table)), $length);
        substr(${$content}, $at, $length) = $data if defined($data);
    }
    return;
}

# The name of the image's backing file; undef if it has none.
my sub below ($image, $header) {
    return undef if !$header->{'backing-at'};
    return substr($image, $header->{'backing-at'}, $header->{'backing-length'}) // '';
}

my sub beside ($path, $name) { return $path =~ s{[^/]+\z}{$name}r }

my sub chain_state ($path) {
    my $state = '';
    for (1 .. $longest) {
        my ($inode, $time) = inode_of($path);
        $state .= "$inode $time\n";
        my $known = $cache{$inode} // return $state;
        $path = beside($path, $known->[2] // return $state);
    }
    die "$path: its chain has no end\n";
}

# The digest of the content, as of Kept.
sub digest_of ($path, $depth = 0) {
    die "$path: its chain has no end\n" if $depth > $longest;
    my ($inode) = inode_of($path);
    my $known = $cache{$inode};
    return $known->[1] if $known && $known->[0] eq chain_state($path);
    my $image = slurp($path);
    my $header = header($path, $image);
    my $below = below($image, $header);
    my $content = defined($below) ? kept(digest_of(beside($path, $below), $depth + 1)) : '';
    $content = substr($content, 0, $header->{size});
    $content .= "\0" x ($header->{size} - length($content));
    lay_over($image, $header, \$content);
    $known = $cache{$inode} = ['', keep($content), $below];
    $known->[0] = chain_state($path);
    return $known->[1];
}

1;
