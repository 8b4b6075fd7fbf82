# A fleecing image that takes no more data breaks the snapshot, never a guest write (I3): the reader
# is told, teardown works, and the bitmap keeps every bit.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;

my $mib = 1024 * 1024;
my $size = 16 * $mib;
my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    disks => [{ id => 'disk0', size => $size, device_args => 'werror=report' }],
);
my $vm = $backend->vm;
my $guest = $backend->guest;

# As a file system does that is full: every write fails.
open(my $fh, '>', $vm->dir . '/full.raw') or die "full.raw: $!\n";
truncate($fh, $size) or die "truncate: $!\n";
$vm->qmp(
    'blockdev-add',
    driver => 'blkdebug',
    'node-name' => 'full',
    image => { driver => 'file', filename => $vm->dir . '/full.raw' },
    'inject-error' => [{ event => 'none', iotype => 'write', errno => 28 }],
);

my $access = $backend->access;
$access->setup($backend->devices('new'));
$access->teardown(1);
$guest->write('disk0', 4 * $mib, 65536, 0x41);

my $outside = $backend->outside;
$access = $backend->access(fleecing => { disk0 => 'full' });
$access->setup($backend->devices('use'));
my $volume = $access->volume('disk0');
is($volume->pread(4 * $mib, 65536), 'A' x 65536, 'the snapshot can be read at first');
$guest->write('disk0', 4 * $mib, 65536, 0x42);
is($guest->read('disk0', 4 * $mib, 4096), 'B' x 4096, 'the guest\'s write went through');

ok(!eval { $volume->pread(4 * $mib, 65536); 1 }, 'the reader gets an error');
like(
    "$@",
    qr/\Adevice disk0: reading 65536 bytes at offset 4194304 failed .*fleecing image full/,
    'which says what it most likely was'
);
my ($offset, $length) = $volume->next_dirty_region;
is($offset, 4 * $mib, 'the map still answers');

$access->teardown(0);
is_deeply($backend->outside, $outside, 'teardown works');
my ($bitmap) = $backend->target_bitmaps;
is($bitmap->{count}, 65536, 'the bitmap has its bits');

$access = $backend->access;
$access->setup($backend->devices('use'));
is($access->volume('disk0')->pread(4 * $mib, 65536), 'B' x 65536, 'the next backup works');
$access->teardown(1);
$backend->check_manners;
done_testing;
