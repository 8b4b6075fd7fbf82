# Compressed archives are smaller, can be above and below other archives, and are merged, verified and restored
# like them.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Chain;
use PBA::Test::QemuNbd;

my $KiB = 1 << 10;
my $device = 'drive-scsi0';
my $Chain = 'PBA::Test::Chain';

sub backup ($chain, $is_compressed) {
    $chain->provider->compress($is_compressed);
    return $chain->backup // die $chain->error;
}

sub image ($chain, $name) { return $chain->path_of($name, "$device.qcow2") }

sub blocks_of ($file) { return (stat($file))[12] }

subtest 'smaller' => sub {
    my $chain = $Chain->new;
    $chain->disk($device)->write([0, 2048 * $KiB, 0x41]);
    my $plain = backup($chain, 0);
    $chain->provider->make_full(1);
    my $small = backup($chain, 1);
    cmp_ok(
        blocks_of(image($chain, $small)),
        '<',
        blocks_of(image($chain, $plain)) / 4,
        'a compressed image takes less space on disk'
    );
    like(
        PBA::Test::QemuNbd::output_of('info', '-U', image($chain, $small)),
        qr/compression type: zstd/,
        'the image is compressed by zstd'
    );
    $chain->check('both');
};

subtest 'mixed chains' => sub {
    my $chain = $Chain->new;
    my @names;
    for my $is_compressed (1, 0, 1, 1, 0) {
        $chain->write_random;
        push(@names, backup($chain, $is_compressed));
    }
    $chain->check('a chain of both kinds');
    for my $index (0, 3, 1) {
        $chain->provider->remove($names[$index]);
        $chain->forget($names[$index]);
        $chain->check("without number $index");
    }
};

subtest 'the space for a merge' => sub {
    my $chain = $Chain->new;
    $chain->disk($device)->write([0, 1024 * $KiB, 0x41]);
    my $full = backup($chain, 1);
    $chain->disk($device)->write([0, 1024 * $KiB, 0x42]);
    my $next = backup($chain, 0);
    no warnings 'redefine';
    local *PVE::BackupAccess::_free_bytes = sub ($dir) { return 2560 * $KiB };
    eval { $chain->provider->remove($full) };
    like(
        $@,
        qr/cannot be merged .* may need 3\.0 MiB/,
        'the data that replaces compressed data is counted'
    );
    local *PVE::BackupAccess::_free_bytes = sub ($dir) { return 4096 * $KiB };
    $chain->provider->remove($full);
    $chain->forget($full);
    $chain->check('the archives after a merge with enough space');
};

subtest 'the space for a merge into data that was merged' => sub {
    my $chain = $Chain->new;
    $chain->disk($device)->write([0, 1024 * $KiB, 0x41]);
    my $full = backup($chain, 1);
    $chain->disk($device)->write([2048 * $KiB, 64 * $KiB, 0x42]);
    my $next = backup($chain, 0);
    $chain->provider->remove($full);
    $chain->forget($full);
    $chain->disk($device)->write([0, 1024 * $KiB, 0x43]);
    backup($chain, 0);
    no warnings 'redefine';
    local *PVE::BackupAccess::_free_bytes = sub ($dir) { return 2560 * $KiB };
    eval { $chain->provider->remove($next) };
    like($@, qr/cannot be merged .* may need 3\.0 MiB/, 'it is still compressed');
    $chain->check('no merge was begun');
};

subtest 'rot' => sub {
    my $chain = $Chain->new;
    $chain->disk($device)->write([256 * $KiB, 64 * $KiB, 0x41]);
    my $name = backup($chain, 1);
    my $file = image($chain, $name);
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    my $content = <$fh>;
    my $at = index($content, "\x28\xb5\x2f\xfd");    # zstd's magic number
    cmp_ok($at, '>', 0, 'a compressed cluster');
    seek($fh, $at + 9, 0);
    print {$fh} chr(ord(substr($content, $at + 9, 1)) ^ 4);
    close($fh) or die "$file: $!\n";
    like(join("\n", $chain->provider->verify($name)->@*), qr/\Q$device\E/, 'is found');
};

# Makes one of the compressed clusters something else.
sub spoil ($file, $number) {
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    my $content = <$fh>;
    my @at;
    push(@at, $-[0]) while $content =~ m/\x28\xb5\x2f\xfd/g;
    seek($fh, $at[$number], 0);
    print {$fh} 'no zstd';
    close($fh) or die "$file: $!\n";
    return;
}

# QEMU cannot read a cluster whose data is not compressed. The others can still be restored.
subtest 'a cluster that cannot be read' => sub {
    my $chain = $Chain->new;
    $chain->disk($device)->write(map { [$_ * 128 * $KiB, 64 * $KiB, 0x41 + $_] } 0 .. 9);
    my $name = backup($chain, 1);
    spoil(image($chain, $name), 4);
    my ($range) = join("\n", $chain->provider->verify($name)->@*) =~ m/: (65536 at offset [0-9]+) /;
    ok(defined($range), 'verify names it') or return;
    my ($status, $said, $content) = $chain->restored_by_command($name, $device);
    is($status, 1, 'restore: exit status');
    like($said, qr/65536 bytes cannot be read: $range;/, 'restore names it');
    my $expected = $chain->{expected}{$name}{$device};
    my ($offset) = $range =~ m/([0-9]+)\z/;
    substr($_, $offset, 64 * $KiB) = '' for grep { length } $expected, $content;
    ok($content eq $expected, 'everything else is restored');
};

done_testing;
