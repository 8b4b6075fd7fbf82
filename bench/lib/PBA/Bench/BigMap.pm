package PBA::Bench::BigMap;

# Writes an empty qcow2 image with a persistent dirty bitmap of any pattern, directly in the file's format:
# a guest would need hours to write millions of blocks.
#
#   my $map = PBA::Bench::BigMap->write(
#       file => $path, size => 1 << 40, granularity => 1 << 16, bitmap => 'bitmap0',
#       pattern => 'alternate',     # or all, none, sparse, runs, random, or bytes to be repeated
#   );
#   # { file, size, granularity, bitmap, regions, bytes, extents }
#
# The bitmap is stored as disabled, so that it can be exported from a writable node. With enabled => 1, it
# records writes once the image is opened.

use v5.36;
no warnings 'portable';    # 64 bit numbers

use List::Util qw(max);

use constant {
    CLUSTER => 1 << 16,
    CLUSTER_BITS => 16,
    HEADER_LENGTH => 104,
    BITMAPS_EXTENSION => 0x23852875,
    AUTOCLEAR_BITMAPS => 1,
    DIRTY_TRACKING_BITMAP => 1,
    ENABLED => 2,
};

# Bit 0 of the first byte is the first block of the disk.
my %pattern = (
    alternate => "\x55",
    all => "\xff",
    none => "\x00",
    sparse => "\x01" . "\x00" x 127,
    runs => "\xff" x 16 . "\x00" x 48,
    random => undef,
);

sub write ($class, %options) {
    my %map = (
        size => 1 << 40,
        granularity => 1 << 16,
        bitmap => 'bitmap0',
        pattern => 'alternate',
        %options,
    );
    my $data = _bitmap_data(\%map);
    _write_image(\%map, $data);
    return { %map, _count($data, \%map) };
}

sub _bits ($map) { return _divide_up($map->{size}, $map->{granularity}) }
sub _divide_up ($number, $by) { return int(($number + $by - 1) / $by) }
sub _clusters ($bytes) { return max(1, _divide_up($bytes, CLUSTER)) }

sub _bitmap_data ($map) {
    my ($bits, $pattern) = (_bits($map), $map->{pattern});
    my $bytes = _divide_up($bits, 8);
    my $unit = exists($pattern{$pattern}) ? $pattern{$pattern} : $pattern;
    my $data = defined($unit) ? $unit x _divide_up($bytes, length($unit)) : _random_bytes($bytes);
    $data = substr($data, 0, $bytes);
    vec($data, $bytes - 1, 8) &= (1 << $bits % 8) - 1 if $bits % 8;
    return $data;
}

# The same in every run, so that figures of two runs can be compared.
sub _random_bytes ($bytes) {
    my $state = 88172645463325252;
    my $next = sub {
        $state ^= $state << 13;
        $state ^= $state >> 7;
        return $state ^= $state << 17;
    };
    return substr(pack('Q*', map { $next->() } 1 .. _divide_up($bytes, 8)), 0, $bytes);
}

# A region starts where a bit is set and the previous one is not.
sub _count ($data, $map) {
    my $bits = substr(unpack('b*', $data), 0, _bits($map));
    my $changes = $bits ^. ('0' . substr($bits, 0, -1));
    my $regions = ($changes &. $bits) =~ tr/\x01//;
    my $bytes = ($bits =~ tr/1//) * $map->{granularity};
    my $rest = $map->{size} % $map->{granularity};
    $bytes -= $map->{granularity} - $rest if $rest && substr($bits, -1) eq '1';
    my $extents = ($changes =~ tr/\x01//) + (substr($bits, 0, 1) eq '0' ? 1 : 0);
    return (regions => $regions, bytes => $bytes, extents => $extents);
}

# ---- the file: header, refcount table and block, L1 table, bitmap directory, table and data ----

sub _write_image ($map, $data) {
    my $layout = _layout($map, $data);
    open(my $fh, '>:raw', $map->{file}) or die "cannot write $map->{file}: $!\n";
    my $put = sub ($cluster, $bytes) {
        seek($fh, $cluster * CLUSTER, 0) or die "cannot seek in $map->{file}: $!\n";
        print {$fh} $bytes or die "cannot write $map->{file}: $!\n";
    };
    $put->(0, _header($map, $layout));
    $put->($layout->{refcount_table}, pack('Q>', $layout->{refcount_block} * CLUSTER));
    $put->($layout->{refcount_block}, pack('n*', (1) x $layout->{end}));
    $put->($layout->{directory}, _directory_entry($map, $layout));
    $put->($layout->{table}, pack('Q>*', _data_offsets($layout)));
    $put->($layout->{data}, $data);
    truncate($fh, $layout->{end} * CLUSTER) or die "cannot set the size of $map->{file}: $!\n";
    close($fh) or die "cannot write $map->{file}: $!\n";
    return;
}

sub _layout ($map, $data) {
    my $l1_entries = _divide_up($map->{size}, CLUSTER * CLUSTER / 8);
    my $data_clusters = _clusters(length($data));
    my @parts = (
        header => 1,
        refcount_table => 1,
        refcount_block => 1,
        l1 => _clusters($l1_entries * 8),
        directory => 1,
        table => _clusters($data_clusters * 8),
        data => $data_clusters,
    );
    my %layout = (l1_entries => $l1_entries, data_clusters => $data_clusters, end => 0);
    while (my ($name, $clusters) = splice(@parts, 0, 2)) {
        $layout{$name} = $layout{end};
        $layout{end} += $clusters;
    }
    die "the bitmap is too large for one refcount block\n" if $layout{end} > CLUSTER / 2;
    return \%layout;
}

sub _data_offsets ($layout) {
    return map { ($layout->{data} + $_) * CLUSTER } 0 .. $layout->{data_clusters} - 1;
}

sub _header ($map, $layout) {
    my $header = pack(
        'a4NQ>NNQ>NNQ>Q>NNQ>Q>Q>Q>NN',
        "QFI\xfb", 3,
        0, 0,    # no backing file
        CLUSTER_BITS, $map->{size},
        0,       # not encrypted
        $layout->{l1_entries}, $layout->{l1} * CLUSTER,
        $layout->{refcount_table} * CLUSTER, 1,
        0, 0,    # no snapshots
        0, 0, AUTOCLEAR_BITMAPS,
        4,       # refcounts of 16 bits
        HEADER_LENGTH,
    );
    my $directory = pack('NNQ>Q>',
        1, 0,
        length(_directory_entry($map, $layout)),
        $layout->{directory} * CLUSTER,
    );
    my $extension = pack('NN', BITMAPS_EXTENSION, length($directory)) . $directory;
    return $header . $extension . pack('NN', 0, 0);
}

sub _directory_entry ($map, $layout) {
    my $name = $map->{bitmap};
    my $granularity_bits = length(sprintf('%b', $map->{granularity})) - 1;
    my $entry = pack(
        'Q>NNCCnN',
        $layout->{table} * CLUSTER, $layout->{data_clusters},
        $map->{enabled} ? ENABLED : 0,    # never in use
        DIRTY_TRACKING_BITMAP, $granularity_bits, length($name), 0,
    ) . $name;
    return $entry . "\0" x (-length($entry) % 8);
}

1;
