# Runs the small examples as a user would, on a running guest.
#
# One QEMU is enough: other tests show on both what the examples use.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QemuNbd;

my $mib = 1024 * 1024;
my $size = 16 * $mib;
my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    disks => [{ id => 'disk0', size => $size }],
);
my $outside = $backend->outside;
my $dir = $backend->work_dir('fleecing');
my $work = $backend->vm->dir;
my $disk = $backend->vm->raw_image('disk0');

# The status, and the output.
sub example ($name, @arguments) {
    my @command = ($^X, '-Mblib', "$FindBin::Bin/../examples/$name.pl", $backend->qmp_path);
    open(my $pipe, '-|', @command, @arguments) or die "cannot run $name: $!\n";
    my $text = do { local $/; <$pipe> };
    close($pipe);
    return ($?, $text);
}

# The guest bypasses the page cache, so its writes are in the file.
sub is_the_disk ($file, $name) {
    is(system('cmp', '-s', '--bytes', $size, $disk, $file), 0, $name);
    return;
}

$backend->guest->write('disk0', 0, 2 * $mib, 0x41);

subtest 'copy-to-nbd' => sub {
    open(my $fh, '>', "$work/copy.raw") or die "copy.raw: $!\n";
    truncate($fh, $size) or die "copy.raw: $!\n";
    my $server = PBA::Test::QemuNbd->start(file => "$work/copy.raw");
    my @arguments = ('disk0', $dir, $server->uri);
    my ($status, $text) = example('copy-to-nbd', @arguments);
    is($status, 0, 'the full backup is done');
    is(
        $text,
        "the bitmap is missing-recreated\n$size bytes in 1 regions\n",
        'the output of the full backup'
    );
    $backend->guest->write('disk0', 7 * $mib, 65536, 0x42);
    ($status, $text) = example('copy-to-nbd', @arguments);
    is($text, "the bitmap is used\n65536 bytes in 1 regions\n", 'the increment has what changed');
    $server->stop;
    is_the_disk("$work/copy.raw", 'the image is the disk');
};

subtest 'dirty-regions' => sub {
    $backend->guest->write('disk0', 3 * $mib, 65536, 0x43);
    my @arguments = ('copy-to-nbd', 'disk0', $dir);
    my ($status, $text) = example('dirty-regions', @arguments);
    is($text, 3 * $mib . " 65536\n", 'the region that was written');
    ($status, $text) = example('dirty-regions', @arguments);
    is($text, 3 * $mib . " 65536\n", 'the region is still dirty');
};

subtest 'file-handle' => sub {
    plan(skip_all => 'no /dev/fuse') if !-e '/dev/fuse';
    my ($status, $text) = example('file-handle', 'disk0', $dir, "$work/file.raw");
    is($text, "$size bytes\n", 'the whole disk is read');
    is_the_disk("$work/file.raw", 'the image is the disk');
};

subtest 'recover' => sub {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        my $access = PVE::BackupAccess->new(
            qmp => $backend->qmp_path,
            'target-id' => 'killed',
            'fleecing-dir' => $dir,
        );
        $access->setup($backend->devices('new'));
        kill(KILL => $$);
    }
    waitpid($pid, 0);
    isnt(scalar(grep { m/pba/ } map { $_->{'node-name'} } nodes()), 0, 'something is left');
    my ($status, $text) = example('recover', 'killed', $dir);
    is($status, 0, 'undone');
    like($text, qr/./, 'recover prints what it undid');
    ($status, $text) = example('recover', 'killed', $dir);
    is("$status$text", '0', 'nothing is left to do');
};

sub nodes () { return $backend->vm->qmp('query-named-block-nodes')->@* }

is_deeply([$backend->problems($outside)], ['a bitmap is left'], 'only the bitmaps are left');
done_testing;
