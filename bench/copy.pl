#!/usr/bin/perl

# Time and CPU time of copies, from qemu-nbd with images in memory:
#
#   - a full copy of 4 GiB to nowhere, to a file, and from NBD to NBD, compared with nbdcopy and qemu-img
#     convert on the same export; of a disk full of data, and of one with data in every other 16 MiB
#   - an increment, 64 KiB dirty every 128 KiB, compared with a full copy of the same image, a bare C loop
#     over libnbd that reads the same pieces, and a loop with one request in flight
#   - the same two from nbdkit, which costs less, so they show the cost of the copy itself
#   - digests: a full copy to a qcow2 image by qemu-nbd, with and without them
#   - detection of zeroes: a target that supports zeroes, and one that does not

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use File::Temp ();

use PBA::Bench;
use PBA::Bench::BigMap;
use PBA::Bench::Image;
use PBA::Bench::Program;
use PBA::Bench::Server;

my $bench = PBA::Bench->new('copy', \@ARGV, 'size=i' => '[--size BYTES]');
my $size = $bench->option('size', 4 << 30);
my $dir = File::Temp->newdir('pba-bench-XXXXXXXX', DIR => '/dev/shm');

# ---- images ----

sub qemu_img (@arguments) {
    system($ENV{PBA_QEMU_IMG} // 'qemu-img', @arguments) == 0 or die "qemu-img @arguments failed\n";
    return;
}

# A qcow2 image with the same content and a bitmap with this pattern.
sub write_mapped ($file, $pattern) {
    my $map = PBA::Bench::BigMap->write(file => $file, size => $size, pattern => $pattern);
    my $raw = PBA::Bench::Image::write_raw("$file.raw", $size, full => 1);
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

sub copy_to ($target, $server, %volume) {
    my $statistics = open_volume($server, %volume)->copy(to => $target, 'without-base' => 1);
    return { bytes => $statistics->{'bytes-read'} };
}

# Corresponds to nbdcopy's null: target: data is read and searched for zeroes.
sub copy_to_nowhere ($server, %volume) {
    return copy_to('/dev/null', $server, %volume);
}

sub one_by_one ($server) {
    my $volume = open_volume($server);
    my $bytes = 0;
    while (my ($offset, $length) = $volume->next_dirty_region) {
        $bytes += length($volume->pread($offset, $length));
    }
    return { bytes => $bytes };
}

# ---- the others ----

sub run_tool (@command) {
    system(@command) == 0 or die "$command[0] failed\n";
    return { bytes => $size };
}

sub nbdcopy ($server, $target) { return run_tool('nbdcopy', $server->uri, $target) }

sub convert ($server, $target) {
    my $qemu_img = $ENV{PBA_QEMU_IMG} // 'qemu-img';
    return run_tool($qemu_img, qw(convert -f raw -O raw), $server->uri, $target)
        if $target !~ m/^nbd/;
    return run_tool($qemu_img, qw(convert -n -f raw -O raw -W), $server->uri, $target);
}

# Measures only the copy. Checks its result, because the time of a wrong copy means nothing.
sub checked ($file, $source, $code) {
    my @before = times();
    my $start = PBA::Bench::now();
    my $counts = $code->();
    my $seconds = PBA::Bench::now() - $start;
    my @after = times();
    PBA::Bench::Image::compare($file, $source);
    my $cpu = 0;
    $cpu += $after[$_] - $before[$_] for 0 .. 3;
    return { counts => $counts, seconds => $seconds, cpu_seconds => $cpu };
}

# ---- the cases ----

my $target = "$dir/target";

sub ours ($run) {
    return { prepare => \&load_module, run => $run };
}

sub full_to_nowhere ($case, $full) {
    $bench->compare(
        case => "$case, to nowhere",
        ours => ours(sub ($) { copy_to_nowhere($full) }),
        peer => { name => 'nbdcopy', run => sub ($) { nbdcopy($full, 'null:') } },
    );
    return;
}

sub full_to_file ($case, $full) {
    my $side = sub ($name, $copy) {
        return {
            name => $name,
            prepare => sub { load_module(); unlink($target) },
            run => sub ($) {
                checked($target, $full->{file}, sub { $copy->($full, $target) });
            },
        };
    };
    $bench->compare(
        case => "$case, to a file",
        ours => $side->(undef, sub ($server, $file) { copy_to($file, $server) }),
        peer => [$side->('nbdcopy', \&nbdcopy), $side->('qemu-img convert', \&convert)],
    );
    unlink($target);
    return;
}

# Each run has a new target.
sub full_to_nbd ($case, $full) {
    my $server;
    my $side = sub ($name, $copy) {
        return {
            name => $name,
            before => sub {
                undef $server;
                unlink($target);
                open(my $fh, '>', $target) or die "$target: $!\n";
                truncate($fh, $size) or die "$target: $!\n";
                $server = serve('sink', file => $target, format => 'raw', writable => 1);
            },
            prepare => \&load_module,
            run => sub ($) {
                checked($target, $full->{file}, sub { $copy->($full, $server->uri) });
            },
        };
    };
    $bench->compare(
        case => "$case, NBD to NBD",
        ours => $side->(undef, sub ($from, $to) { copy_to($to, $from) }),
        peer => [$side->('nbdcopy', \&nbdcopy), $side->('qemu-img convert', \&convert)],
    );
    undef $server;
    unlink($target);
    return;
}

# As the provider stores data.
sub full_with_digests ($case, $full) {
    my $server;
    my $side = sub (%options) {
        return {
            before => sub {
                undef $server;
                qemu_img(qw(create -q -f qcow2), $target, $size);
                $server = serve('sink', file => $target, format => 'qcow2', writable => 1);
            },
            prepare => \&load_module,
            run => sub ($) {
                my $statistics = open_volume($full)->copy(to => $server->uri, %options);
                return { bytes => $statistics->{'bytes-read'} };
            },
        };
    };
    $bench->compare(
        case => "$case, digests",
        ours => $side->(digests => "$dir/digests"),
        peer => { name => 'without digests', $side->()->%* },
    );
    undef $server;
    unlink($target);
    return;
}

for my $case (qw(full thin)) {
    next if !grep { $bench->wants("$case, $_") } 'to nowhere', 'to a file', 'NBD to NBD', 'digests';
    my $image = PBA::Bench::Image::write_raw("$dir/$case.raw", $size, full => $case eq 'full');
    my $full = serve($case, file => $image, format => 'raw');
    full_to_nowhere($case, $full);
    full_to_file($case, $full);
    full_to_nbd($case, $full);
    full_with_digests($case, $full);
    undef $full;
    unlink($image);
}

# ---- the floor: the program measures itself, so its start is not counted ----

my $program = PBA::Bench::Program::compile("$FindBin::Bin/bare-read.c", "$dir", 'libnbd');

sub bare_read ($server, $length, $step) {
    my ($bytes, $seconds) = PBA::Bench::Program::figures($program, $server->uri, $length, $step);
    return { counts => { bytes => $bytes }, seconds => $seconds };
}

# Two of these have as many bytes as the whole image.
sub twice ($server) {
    my $bytes = 0;
    $bytes += copy_to_nowhere($server)->{bytes} for 1 .. 2;
    return { bytes => $bytes };
}

sub bare_twice ($server) {
    my @halves = map { bare_read($server, 64 << 10, 128 << 10) } 1 .. 2;
    return {
        counts => { bytes => $halves[0]{counts}{bytes} + $halves[1]{counts}{bytes} },
        seconds => $halves[0]{seconds} + $halves[1]{seconds},
    };
}

my $increment = serve('increment', write_mapped("$dir/increment.qcow2", 'alternate')->%*);
$bench->compare(
    case => 'increment, twice',
    ours => ours(sub ($) { twice($increment) }),
    peer => {
        name => 'full copy',
        prepare => \&load_module,
        run => sub ($) { copy_to_nowhere($increment, 'bitmap-mode' => 'none') },
    },
    floor => {
        name => 'bare C loop',
        run => sub ($) { bare_twice($increment) },
    },
);
$bench->compare(
    case => 'increment',
    ours => ours(sub ($) { copy_to_nowhere($increment) }),
    peer => {
        name => 'one request in flight',
        prepare => \&load_module,
        run => sub ($) { one_by_one($increment) },
    },
);
undef $increment;
unlink("$dir/increment.qcow2");

# The cost of the increment's short requests alone: the same bytes from two servers.
my $data = PBA::Bench::Image::write_raw("$dir/data.raw", $size, full => 1);
my %servers = (
    'qemu-nbd' => serve('short', file => $data, format => 'raw'),
    'nbdkit' => serve('nbdkit', nbdkit => ['--readonly', 'file', $data]),
);
for my $name (sort keys %servers) {
    my $of_size = sub ($request) {
        my $volume = open_volume($servers{$name});
        my $statistics = $volume->copy(to => '/dev/null', 'request-size' => $request);
        return { bytes => $statistics->{'bytes-read'} };
    };
    $bench->compare(
        case => "requests of 64 KiB, $name",
        ours => ours(sub ($) { $of_size->(64 << 10) }),
        peer => {
            name => 'requests of 256 KiB',
            prepare => \&load_module,
            run => sub ($) { $of_size->(256 << 10) },
        },
    );
}
%servers = ();

# From a server with data to one that drops it.
my $pattern = serve('pattern', nbdkit => ['pattern', "size=$size"]);
my %forgets = (
    ours => serve('zero', nbdkit => ['null', "size=$size"]),
    peer => serve('nozero', nbdkit => ['--filter=nozero', 'null', "size=$size"]),
);
$bench->compare(
    case => 'looking for zeroes',
    ours => ours(sub ($) { copy_to($forgets{ours}->uri, $pattern) }),
    peer => {
        name => 'not looking',
        prepare => \&load_module,
        run => sub ($) { copy_to($forgets{peer}->uri, $pattern) },
    },
);
$bench->finish;
