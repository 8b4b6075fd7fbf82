# Disks of all kinds and sizes, and disks that cannot be backed up: they are refused before the guest is
# changed, with a message that names the device.
#
# One QEMU is enough: the module's code decides about the kinds of disks; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;

my $mib = 1024 * 1024;
my @disks = (
    { id => 'efi', size => 528 * 1024 },
    { id => 'tpm', size => 4608, bus => 'scsi' },
    { id => 'odd', size => 3 * $mib + 512, format => 'qcow2', shape => 'drive', bus => 'scsi' },
    { id => 'slow', size => 4 * $mib, throttle => 1, format => 'qcow2' },
    { id => 'plain', size => 4 * $mib, shape => 'drive' },
    { id => 'locked', size => 2 * $mib, bus => 'scsi', readonly => 1 },
);

# Reads everything that is dirty; every byte must have the value from before the setup.
sub read_all ($volume, $byte) {
    my ($bytes, $bad) = (0, 0);
    while (my ($offset, $length) = $volume->next_dirty_region) {
        my $data = $volume->pread($offset, $length);
        $bad++ if $data ne $byte x $length;
        $volume->discard($offset, $length);
        $bytes += $length;
    }
    return ($bytes, $bad);
}

sub check_kinds ($backend) {
    my @ids = grep { $_ ne 'locked' } $backend->vm->disk_ids;
    for my $id (@ids) {
        $backend->write($id, 0, $backend->vm->disk($id)->{size}, 0x41);
    }
    my $outside = $backend->outside;
    my $access = $backend->access;
    $access->setup([$backend->devices('use')->@*]);
    $backend->write($_, 0, 512, 0x42) for @ids;
    for my $id ($backend->vm->disk_ids) {
        my $size = $backend->vm->disk($id)->{size};
        my $volume = $access->volume($backend->device($id));
        is($volume->size, $size, "$id: size");
        my ($bytes, $bad) = read_all($volume, $id eq 'locked' ? "\0" : 'A');
        is($bytes, $size, "$id: a bitmap that is recreated covers every byte");
        is($bad, 0, "$id: the data is that of the instant");
    }
    $access->teardown(1);
    is_deeply($backend->outside, $outside, 'nothing is left');
    check_increment($backend, @ids);
}

sub check_increment ($backend, @ids) {
    my $access = $backend->access;
    my $infos = $access->setup($backend->devices('use', @ids));
    is(join(' ', map { $_->{'bitmap-action'} } $infos->@*), join(' ', map { 'used' } @ids), 'used');
    for my $id (@ids) {
        my $volume = $access->volume($backend->device($id));
        my ($offset, $length) = $volume->next_dirty_region;
        is($offset, 0, "$id: the block written during the last access is dirty");
        is($volume->pread(0, 512), 'B' x 512, "$id: the block has the new data");
        is_deeply([$volume->next_dirty_region], [], "$id: no other block is dirty")
            if $length < $volume->size;
    }
    $access->teardown(1);
}

# Names with characters that are special in paths, shells, JSON or formats.
sub check_odd_targets ($backend) {
    my @ids = ('a b/c', "it's \"quoted\"\\", '%s%n', "gr\x{fc}n-\x{20ac}", '../../etc', 'x' x 991);
    for my $id (@ids) {
        my $outside = $backend->outside;
        my $name = length($id) > 40 ? length($id) . ' bytes' : $id =~ s{[^ -~]}{?}gr;
        for my $action (qw(new used)) {
            my $access = $backend->access('target-id' => $id);
            my $mode = $action eq 'new' ? 'new' : 'use';
            my $infos = $access->setup($backend->devices($mode, 'plain'));
            is($infos->[0]{'bitmap-action'}, $action, "target $name: $action");
            $access->volume($backend->device('plain'))->next_dirty_region;
            $access->teardown(1);
        }
        my $access = $backend->access('target-id' => $id);
        $access->setup($backend->devices('none', 'plain'));
        $access->teardown(1);
        is_deeply($backend->outside, $outside, "target $name: nothing is left");
        my $left = grep { m/\Q$id\E/ } map { keys $_->%* } values $backend->vm->bitmaps->%*;
        is($left, 0, "target $name: mode none removed its bitmap");
    }
}

sub refused ($backend, $name, $pattern, $devices, %options) {
    my $outside = $backend->outside;
    my $bitmaps = $backend->vm->bitmaps;
    my $access = $backend->access(%options);
    ok(!eval { $access->setup($devices); 1 }, "$name: refused");
    isa_ok($@, 'PVE::BackupAccess::Error', "$name: the error");
    like("$@", $pattern, "$name: the message");
    is_deeply($backend->outside, $outside, "$name: nothing is left");
    is_deeply($backend->vm->bitmaps, $bitmaps, "$name: the bitmaps are as before");
}

sub check_refusals ($backend) {
    my $plain = $backend->device('plain');
    my $efi = $backend->device('efi');
    my @good = ({ device => $efi, 'bitmap-mode' => 'use' });
    refused(
        $backend,
        'unknown device',
        qr/\Adevice drive-nope: there is no such block device in this guest, which has .*\b\Q$plain\E\b/,
        [@good, { device => 'drive-nope' }]
    );
    refused(
        $backend,
        'empty removable drive',
        qr/\Adevice ide2: has no medium/,
        [@good, { device => 'ide2' }]
    );
    refused(
        $backend,
        'a device twice',
        qr/\Adevice \Q$plain\E: is listed twice/,
        [@good, { device => $plain }, { device => $plain }]
    );
    refused($backend, 'no device', qr/\Asetup needs at least one device/, []);
}

sub check_pve_fleecing ($backend) {
    my $vm = $backend->vm;
    my $plain = $backend->device('plain');
    $vm->remove_fleecing_node("$plain-fleecing");
    refused(
        $backend,
        'no fleecing image',
        qr/\Adevice \Q$plain\E: its fleecing image '\Q$plain\E-fleecing' is not attached/,
        $backend->devices('new', 'efi', 'plain')
    );
    $backend->attach_fleecing('plain', size => 5 * $mib);
    refused(
        $backend,
        'wrong fleecing size',
        qr/\Adevice \Q$plain\E: fleecing image .* must have exactly the size .* 5242880 .* 4194304/,
        $backend->devices('new', 'efi', 'plain')
    );
    refused(
        $backend,
        'id of a guest device',
        qr/\Adevice plain-dev: is the id of a guest device/,
        [{ device => 'plain-dev' }]
    );
}

sub check_upstream_fleecing ($backend) {
    my $vm = $backend->vm;
    my $plain = $backend->device('plain');
    my $devices = $backend->devices('new', 'plain');
    my %options = $backend->options;
    delete($options{'fleecing-dir'});
    my $outside = $backend->outside;
    ok(!eval { PVE::BackupAccess->new(%options)->setup($devices); 1 }, 'no fleecing: refused');
    like(
        "$@",
        qr/\Adevice \Q$plain\E: has no fleecing image - give 'fleecing-dir'/,
        'no fleecing: the message'
    );
    refused(
        $backend,
        'fleecing directory that is not there',
        qr/\Adevice \Q$plain\E: cannot use fleecing-dir .* No such file or directory/,
        $devices, 'fleecing-dir' => $vm->dir . '/nowhere'
    );
    refused(
        $backend,
        'fleecing node that is not there',
        qr/\Adevice \Q$plain\E: fleecing node 'mine' does not exist/,
        $devices, fleecing => { $plain => 'mine' }
    );
    $vm->add_fleecing_node('plain', as => 'small', size => 2 * $mib);
    refused(
        $backend,
        'wrong fleecing size',
        qr/\Adevice \Q$plain\E: fleecing node 'small' must have exactly the size/,
        $devices, fleecing => { $plain => 'small' }
    );
    check_callers_node($backend);
}

# The caller's own fleecing node stays, and discards free its space.
sub check_callers_node ($backend) {
    my $vm = $backend->vm;
    my $plain = $backend->device('plain');
    my $node = $vm->add_fleecing_node('plain', as => 'mine');
    my $outside = $backend->outside;
    my $access = $backend->access(fleecing => { $plain => 'mine' });
    $access->setup($backend->devices('none', 'plain'));
    $backend->write('plain', 0, 2 * $mib, 0x43);
    my $file = $vm->fleecing_file('mine');
    cmp_ok((stat($file))[12] * 512, '>=', 2 * $mib, 'old data went to the fleecing image');
    my $volume = $access->volume($plain);
    $volume->pread(0, 2 * $mib);
    $volume->discard(0, 2 * $mib);
    cmp_ok((stat($file))[12] * 512, '<=', $mib / 4, 'discarding frees the fleecing space');
    $access->teardown(1);
    is_deeply($backend->outside, $outside, 'the fleecing node of the caller stays');
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $backend = PBA::Test::Backend->start(
            name => $name,
            guest => 0,
            disks => \@disks,
            empty_cdrom => 1
        );
        check_kinds($backend);
        check_refusals($backend);
        check_odd_targets($backend);
        $name eq 'pve' ? check_pve_fleecing($backend) : check_upstream_fleecing($backend);
        $backend->check_manners;
    };
}

done_testing;
