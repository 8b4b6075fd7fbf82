# What rots in a store is named, also where a table or a sector of an image is damaged. It costs no other data.
#
# One QEMU is enough: qemu-img and qemu-nbd only use files.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use JSON::PP ();
use Time::HiRes ();

use PBA::Test::Chain qw(problems rot said_of_block with_entries with_three_archives);
use PBA::Test::QemuNbd;

my $KiB = 1 << 10;
my $device = 'drive-scsi0';
my $Chain = 'PBA::Test::Chain';
my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

# The same, but like a disk that rots: the file's time stays.
sub rot_entries ($image, $code) {
    my @times = (Time::HiRes::stat($image))[8, 9];
    with_entries($image, $code);
    Time::HiRes::utime($times[0], $times[1], $image);
    return;
}

# The same of a byte of any file.
sub flip_bit ($file, $at) {
    my @times = (Time::HiRes::stat($file))[8, 9];
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    seek($fh, $at, 0);
    read($fh, my $byte, 1);
    seek($fh, $at, 0);
    print {$fh} $byte ^. "\1";
    close($fh) or die "$file: $!\n";
    Time::HiRes::utime($times[0], $times[1], $file);
    return;
}

# Where the guest's data at an offset is in the image.
sub place_of ($image, $offset) {
    my $map = JSON::PP->new->utf8->decode(
        PBA::Test::QemuNbd::output_of('map', '-U', '--output=json', $image));
    my ($part) = grep { $_->{start} <= $offset && $offset < $_->{start} + $_->{length} } $map->@*;
    return $part->{offset} + $offset - $part->{start};
}

# With QEMU's own disk that fails.
subtest 'a sector that cannot be read' => sub {
    my ($chain, @names) = with_three_archives();
    my $image = $chain->path_of($names[0], "$device.qcow2");
    my $sector = place_of($image, 256 * $KiB) / 512;
    my $arguments = $Server->can('_image_arguments');
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Qcow2Chain::Server::_image_arguments
        = sub ($class, $file, %options) {
        return $class->$arguments($file, %options) if $file ne $image;
        my $disk = 'file.driver=blkdebug,file.image.driver=file,file.image.filename=' . $file;
        my $fault = 'file.inject-error.0';
        return ('--image-opts',
            "driver=qcow2,$disk,$fault.event=none,$fault.iotype=read,$fault.sector=$sector");
        };
    my $range = qr/65536 at offset 262144(?![0-9]|,)/;
    like(problems($chain, $names[0]), $range, 'verify names the block');
    for my $how ([], ['no-verify' => 1]) {
        my ($status, $said, $content)
            = $chain->restored_by_command($names[0], $device, $how->@*);
        is($status, 1, "restore @$how: exit status");
        like($said, qr/65536 bytes cannot be read: $range/, 'it names the block');
        my $expected = $chain->{expected}{ $names[0] }{$device};
        substr($_, 256 * $KiB, 64 * $KiB) = '' for grep { length } $expected, $content;
        ok($content eq $expected, 'everything else is restored');
    }
};

# Later data may hide what is damaged, but not what cannot be read.
subtest 'damaged data beside data that cannot be read' => sub {
    my ($chain, @names) = with_three_archives();
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Store::Content::compare = sub ($serve, $size, $digests) {
        return ([], []) if $digests !~ m{\Q$names[0]/$device\E};
        return ([[1024 * $KiB, 64 * $KiB]], [[256 * $KiB, 64 * $KiB]]);
    };
    like(problems($chain, $names[1]), said_of_block(256 * $KiB), 'is named');
};

# A bit of the table of an increment, which says that zeroes hide what the increment builds on.
subtest 'a table that rots where an increment has no data' => sub {
    my ($chain, @names) = with_three_archives();
    my $image = $chain->path_of($names[1], "$device.qcow2");
    my $flip = sub () {
        rot_entries($image, sub ($entries) { $entries->[4] ^= 1 });
    };
    $flip->();
    ok(!eval { $chain->provider->remove($names[0]); 1 }, 'no merge replaces data by the zeroes');
    like($@, qr/65536 bytes differ .*: 65536 at offset 262144 - remove \w+ first/, 'and says why');
    is(problems($chain, $names[0]), '', 'the archive before is whole');
    like(problems($chain, $_), said_of_block(256 * $KiB), 'verify finds the damage')
        for @names[1, 2];
    is($chain->next_modes->{$device}, 'new', 'nothing builds on it');
    $chain->log;
    $chain->restored($names[2], $device);
    my ($name) = $names[1] =~ m{([^/]+)\z};
    like(
        $chain->log,
        qr/^warn: .* verification of archive $name found damage/m,
        'a restore by another program warns'
    );
    $flip->();
    $chain->check('nothing was lost');
};

# The data of the next archive is read before a merge. If it is damaged, the archive that was to go may be the last good one.
subtest 'a removal that finds damage' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[1], "$device.qcow2"), 1024 * $KiB);
    my $marks = sub () {
        return [map { $_->{mark} } $chain->provider->retention(100, 1)->@*];
    };
    is_deeply($marks->(), [qw(remove remove keep)], 'nobody has read it yet');
    ok(!eval { $chain->provider->prune(100, 1); 1 }, 'the archive before it stays');
    like($@, qr/65536 bytes differ .*: 65536 at offset 1048576/, 'with a reason');
    is_deeply([$chain->names], \@names, 'nor is another one removed');
    is(problems($chain, $names[0]), '', 'it is intact');
    like(problems($chain, $names[2]), said_of_block(1024 * $KiB), 'the damage stays known');
    is($marks->()->[0], 'keep', 'from now on it is kept');
    $chain->provider->remove($names[0]);
    like(
        problems($chain, $names[2]),
        said_of_block(1024 * $KiB),
        'the damage stays known without it'
    );
};

subtest 'damage that cannot be noted' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[1], "$device.qcow2"), 1024 * $KiB);
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Store::DirectoryArchive::write_file
        = sub ($file, $text) { die "$file: no space\n" };
    like(problems($chain, $names[2]), qr/^$device: the damage cannot be noted/m, 'verify says so');
};

# A reference count that says that a cluster is free: what is written next may be written there.
subtest 'reference counts that rot' => sub {
    my ($chain, @names) = with_three_archives();
    my $image = $chain->path_of($names[0], "$device.qcow2");
    my @times = (Time::HiRes::stat($image))[8, 9];
    open(my $fh, '+<:raw', $image) or die "$image: $!\n";
    my $number = sub ($at, $template, $length) {
        seek($fh, $at, 0);
        read($fh, my $bytes, $length) == $length or die "$image: $!\n";
        return unpack($template, $bytes);
    };
    my $counts = $number->($number->(48, 'Q>', 8), 'Q>', 8);
    my @used = grep { $number->($counts + 2 * $_, 'n', 2) } 0 .. (-s $image) / 65536 - 1;
    for my $cluster (@used[-3 .. -1]) {
        seek($fh, $counts + 2 * $cluster, 0);
        print {$fh} pack('n', 0);
    }
    close($fh) or die "$image: $!\n";
    Time::HiRes::utime($times[0], $times[1], $image);
    ok(!eval { $chain->provider->remove($names[0]); 1 }, 'nothing is merged into the image');
    like($@, qr/\Q$image\E is damaged - .*refcount/, 'and says why');
    like($chain->provider->verify($names[2])->[0], qr/\Q$image\E is damaged/, 'as verify does');
    is_deeply([map { $chain->problem($_) } @names], ['', '', ''], 'all archives can be restored');
};

subtest 'no backup builds on digests with a damaged header' => sub {
    my ($chain, @names) = with_three_archives();
    my $file = $chain->path_of($names[1], "$device.digests");
    for my $at (3, 13, 17, 38, 41, 47) {
        flip_bit($file, $at);
        is($chain->next_modes->{$device}, 'new', "byte $at: the next backup is full");
        flip_bit($file, $at);
    }
    is($chain->next_modes->{$device}, 'use', 'undamaged, a backup builds on it');
};

done_testing;
