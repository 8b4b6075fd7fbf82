package PBA::Test::StoreLife::Rot;

# Flips a bit of a file in a store, like a disk that rots.

use v5.36;

use Exporter qw(import);
use Fcntl qw(SEEK_SET);
use File::Find ();
use Time::HiRes ();

our @EXPORT_OK = qw(flip_bit);

my $SEEK_DATA = 3;
my $tables = 5 * 65536;    # of a small image: its header and metadata

# The offset of a byte that is not in a hole.
my sub place_in ($fh, $path) {
    my $size = -s $fh;
    my $at = int(rand($path =~ m/qcow2\z/ && rand() < 0.4 && $size > $tables ? $tables : $size));
    my $data = sysseek($fh, $at, $SEEK_DATA) // return 0;
    return $data == $at
        || $data >= $size ? $at : $data + int(rand($size - $data < 65536 ? $size - $data : 65536));
}

# Returns { place, such as vm/100/20261122T064953Z, file }, or undef if there is no such bit. In most cases, the
# file's time does not change.
sub flip_bit ($store) {
    my @files;
    File::Find::find({ no_chdir => 1, wanted => sub { push(@files, $_) if -f && -s _ } },
        "$store/vm")
        if -d "$store/vm";
    @files = sort @files or return undef;
    my $path = $files[rand(@files)];
    my @times = (Time::HiRes::stat($path))[8, 9];
    open(my $fh, '+<:raw', $path) or return undef;
    my $at = place_in($fh, $path);
    sysseek($fh, $at, SEEK_SET);
    sysread($fh, my $byte, 1) or return undef;
    sysseek($fh, $at, SEEK_SET);
    my $bit = int(rand(8));
    syswrite($fh, chr(ord($byte) ^ 1 << $bit));
    close($fh);
    Time::HiRes::utime($times[0], $times[1], $path) if rand() < 0.8;
    my $file = $path =~ s{\A\Q$store\E/}{}r;
    my ($place) = $file =~ m{\A(vm/[0-9]+/[^/]+)/};
    return {
        place => ($place // '') =~ s{/\.(?:tmp|del)-}{/}r,
        file => "$file, bit $bit of byte $at"
    };
}

1;
