# With a bitmap that is reused, the snapshot contains only its dirty parts: the clean parts cannot be read, and
# the guest's writes to them take no fleecing space.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;

my $mib = 1024 * 1024;
my $size = 64 * $mib;

# The image of the upstream backend has no name any more, but QEMU has it open.
sub fleecing_bytes ($backend) {
    my $vm = $backend->vm;
    my @open = grep { (readlink($_) // '') =~ m{/fleecing/pba-fleece-} }
        glob('/proc/' . $vm->pid . '/fd/*');
    my ($file) = (@open, $vm->fleecing_file('disk0-fleecing') // ());
    return (stat($file))[12] * 512;
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => [{ id => 'disk0', size => $size }],
    );
    my $device = $backend->device('disk0');
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    $backend->write('disk0', 8 * $mib, 65536, 0x41);
    $backend->write('disk0', 40 * $mib, 65536, 0x42);

    $access->setup($backend->devices('use'));
    my $volume = $access->volume($device);
    $backend->write('disk0', 16 * $mib, 8 * $mib, 0x43);
    cmp_ok(fleecing_bytes($backend), '<', 2 * $mib, 'writes to clean parts are not kept');
    $backend->write('disk0', 8 * $mib, 65536, 0x44);
    cmp_ok(fleecing_bytes($backend), '>=', 65536, 'a write to a dirty part is kept');

    my @regions = $volume->dirty_regions(10);
    is(scalar(@regions), 4, 'two dirty regions');
    is($volume->pread(8 * $mib, 65536), 'A' x 65536, 'the first has the data of the instant');
    is($volume->pread(40 * $mib, 65536), 'B' x 65536, 'the second, too');
    for my $offset (0, 16 * $mib, $size - 65536) {
        ok(!eval { $volume->pread($offset, 65536); 1 }, "offset $offset is clean: unreadable");
        is($@->class, 'NbdError', "offset $offset: class");
        like("$@", qr/reading 65536 bytes at offset $offset failed/, "offset $offset: message");
    }
    $volume->discard(8 * $mib, 65536);
    ok(!eval { $volume->pread(8 * $mib, 65536); 1 }, 'a discarded range cannot be read again');
    is(
        $volume->pread(40 * $mib, 65536),
        'B' x 65536,
        'errors of the server leave the rest readable'
    );
    $access->teardown(1);
    $backend->check_manners;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
