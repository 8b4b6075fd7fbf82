#!/usr/bin/perl

# How fast volumes are copied, from qemu-nbd over images in memory of which every other 16 MiB hold
# data:
#
#   - a full copy of 4 GiB to nowhere and to a file, beside nbdcopy on the same export
#   - an increment, 64 KiB dirty every 128 KiB: beside a full copy of the same image, and beside a loop
#     that has one request in flight

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::Image;
use PBA::Bench::Server;

my $bench = PBA::Bench->new('copy', \@ARGV, 'size=i' => '[--size BYTES]');
my $size = $bench->option('size', 4 << 30);
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', DIR => '/dev/shm');

# ---- images ----

sub qemu_img (@arguments) {
    system($ENV{PBA_QEMU_IMG} // 'qemu-img', @arguments) == 0 or die "qemu-img @arguments failed\n";
    return;
}

# A qcow2 image of the same kind whose bitmap has such a pattern.
sub write_mapped ($file, $length, $pattern) {
    my $map = PBA::Bench::BigMap->write(file => $file, size => $length, pattern => $pattern);
    my $raw = PBA::Bench::Image::write_raw("$file.raw", $length);
    qemu_img(qw(convert -n -f raw -O qcow2), $raw, $file);
    unlink($raw);
    return $map;
}

sub serve ($name, %options) {
    mkdir("$dir/$name");
    return PBA::Bench::Server->start(dir => "$dir/$name", %options);
}

# ---- ours ----

sub load_module () {
    require PVE::BackupAccess::Volume;
    return;
}

sub open_volume ($server, %more) {
    return PVE::BackupAccess::Volume->open(
        'drive-scsi0',
        {
            'nbd-path' => $server->uri,
            'bitmap-mode' => $server->{bitmap} ? 'reuse' : 'none',
            $server->{bitmap} ? ('bitmap-name' => $server->{bitmap}) : (),
            %more,
        },
    );
}

# What nbdcopy's null: is: the data is read, and looked at for zeroes.
sub copy_to_nowhere ($server, @more) {
    my $statistics = open_volume($server, @more)->copy(to => '/dev/null');
    return { bytes => $statistics->{'bytes-read'} };
}

sub copy_to_file ($server, $file) {
    my $start = PBA::Bench::now();
    my $statistics = open_volume($server)->copy(to => $file);
    return checked($file, PBA::Bench::now() - $start, $statistics->{'bytes-read'});
}

# ---- the others ----

sub nbdcopy ($server, @arguments) {
    system('nbdcopy', $server->uri, @arguments) == 0 or die "nbdcopy failed\n";
    return;
}

sub nbdcopy_to_file ($server, $file) {
    my $start = PBA::Bench::now();
    nbdcopy($server, $file);
    return checked($file, PBA::Bench::now() - $start, -s $file);
}

# A figure for a copy that is not one would be no figure.
sub checked ($file, $seconds, $bytes) {
    PBA::Bench::Image::compare($file, "$dir/full.raw");
    return { counts => { bytes => $bytes }, seconds => $seconds };
}

sub one_by_one ($server) {
    my $volume = open_volume($server);
    my $bytes = 0;
    while (my ($offset, $length) = $volume->next_dirty_region) {
        $bytes += length($volume->pread($offset, $length));
    }
    return { bytes => $bytes };
}

# ---- the cases ----

my $full
    = serve('full', file => PBA::Bench::Image::write_raw("$dir/full.raw", $size), format => 'raw');
my $target = "$dir/target";

$bench->compare(
    case => 'full, to nowhere',
    ours => { prepare => sub { load_module() }, run => sub ($) { copy_to_nowhere($full) } },
    peer => {
        name => 'nbdcopy',
        run => sub ($) { nbdcopy($full, 'null:'); return { bytes => $size } },
    },
);
$bench->compare(
    case => 'full, to a file',
    ours => {
        prepare => sub { load_module(); unlink($target) },
        run => sub ($) { copy_to_file($full, $target) },
    },
    peer => {
        name => 'nbdcopy',
        prepare => sub { unlink($target) },
        run => sub ($) { nbdcopy_to_file($full, $target) },
    },
);
undef $full;
unlink($target, "$dir/full.raw");

my $increment = serve('increment', write_mapped("$dir/increment.qcow2", $size, 'alternate')->%*);

# Two of them are as many bytes as all of the image.
$bench->compare(
    case => 'increment, twice',
    ours => {
        prepare => sub { load_module() },
        run => sub ($) {
            my $bytes = 0;
            $bytes += copy_to_nowhere($increment)->{bytes} for 1 .. 2;
            return { bytes => $bytes };
        },
    },
    peer => {
        name => 'full copy',
        prepare => sub { load_module() },
        run => sub ($) { copy_to_nowhere($increment, 'bitmap-mode' => 'none') },
    },
);
$bench->compare(
    case => 'increment',
    ours => { prepare => sub { load_module() }, run => sub ($) { copy_to_nowhere($increment) } },
    peer => {
        name => 'one request in flight',
        prepare => sub { load_module() },
        run => sub ($) { one_by_one($increment) },
    },
);

$bench->finish;
