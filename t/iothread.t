# Disks in an iothread: QEMU before 10.0 aborts when an NBD client disconnects from such a disk of a running
# guest, so they are refused there before anything is changed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Model;
use PBA::Test::Repository;

my $size = 32 * 1024 * 1024;
my $seed = 99;
my $blocks = 1024;
my @ids = qw(virtio scsi slow);

my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    disks => [
        { id => 'virtio', size => $size, iothread => 1, format => 'qcow2' },
        { id => 'scsi', size => $size, iothread => 1, bus => 'scsi' },
        { id => 'slow', size => $size, iothread => 1, throttle => 1, format => 'qcow2' },
    ],
);

sub check_refusal () {
    my $outside = $backend->outside;
    for my $id (@ids) {
        ok(!eval { $backend->access->setup($backend->devices('use', $id)); 1 }, "$id: refused");
        is($@->class, 'UnsupportedError', "$id: class");
        like(
            "$@",
            qr/\Adevice $id: is in an iothread, and this QEMU may abort .*10\.0 or later/,
            "$id: the message says what to do"
        );
    }
    is_deeply($backend->outside, $outside, 'nothing is left');
    is_deeply($backend->vm->bitmaps, {}, 'no bitmap was created');
}

sub check_cycles () {
    my $repository = PBA::Test::Repository->new($backend);
    my $model = PBA::Test::Model->new(
        seed => $seed,
        blocks => $blocks,
        disks => [map { { id => $_, size => $size } } @ids],
    );
    my $outside = $backend->outside;
    $backend->guest->start_churn(seed => $seed, disks => \@ids, blocks => $blocks);
    for my $step ([use => 1], [use => 1], [use => 0], [use => 1], [new => 1], [use => 1]) {
        my ($mode, $success) = $step->@*;
        $backend->guest->wait_more_churn(50);
        $repository->backup(mode => $mode, success => $success);
        is_deeply($backend->outside, $outside, "$mode: nothing is left");
        next if !$success;
        my ($write, $problem) = $model->check_images({ map { $_ => $repository->image($_) } @ids });
        is($problem, undef, "$mode: the images are the disks after write $write");
    }
    $backend->guest->stop_churn;
}

if ($backend->vm->version->[0] < 10) {
    check_refusal();
}
else {
    check_cycles();
}
$backend->guest->write($_, 0, 4096, 0x55) for @ids;
pass('the guest is running');
$backend->check_manners;
done_testing;
