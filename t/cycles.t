# Backups in every order of modes and outcomes while the guest writes to both disks: every restored pair of
# images equals, byte by byte, the disks at one instant (I1, I2).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Model;
use PBA::Test::Repository;

my $size = 64 * 1024 * 1024;
my $odd_size = 32 * 1024 * 1024 + 512;
my $seed = 20261122;

# The guest writes to the first 8 MiB of each disk, so that not all of a map with 4 MiB blocks is dirty.
my $blocks = 2048;

my %disks = (
    upstream => [
        { id => 'disk0', format => 'qcow2', size => $size },
        { id => 'disk1', format => 'raw', size => $odd_size, bus => 'scsi', shape => 'drive' },
    ],
    pve => [
        { id => 'disk0', format => 'raw', size => $size, throttle => 1 },
        { id => 'disk1', format => 'qcow2', size => $odd_size, bus => 'scsi', shape => 'drive' },
    ],
);

# Every mode after every mode, each after both outcomes.
my @steps = (
    [use => 1],
    [use => 1],
    [use => 0],
    [use => 1],
    [new => 1],
    [use => 1],
    [new => 0],
    [use => 1],
    [none => 1],
    [use => 1],
    [none => 0],
    [use => 0],
    [use => 1],
    [new => 1],
    [new => 1],
    [none => 1],
    [none => 1],
    [new => 1],
    [use => 0],
    [new => 1],
    [use => 1],
    [use => 1],
    [use => 0],
    [use => 0],
    [use => 1],
    [use => 1],
    [use => 1],
    [use => 1],
    [use => 1],
    [use => 1],
);

# A plain run includes one half on each QEMU.
@steps = splice(@steps, $ENV{PBA_QEMU} ? @steps / 2 : 0, @steps / 2) if !$ENV{PBA_FULL};

# The action that QEMU must report: a bitmap can be used only after a backup with a bitmap, successful or not.
sub expected_action ($mode, $has_bitmap) {
    return 'none' if $mode eq 'none';
    return 'new' if $mode eq 'new';
    return $has_bitmap ? 'used' : 'missing-recreated';
}

sub check_step ($context, $number, $mode, $success) {
    my ($backend, $repository, $model) = $context->@{qw(backend repository model)};
    my $name = "step $number, $mode " . ($success ? 'succeeds' : 'fails');
    my $result = $repository->backup(mode => $mode, success => $success);

    my $action = expected_action($mode, $context->{has_bitmap});
    for my $id (sort keys $result->%*) {
        my $disk = $result->{$id};
        is($disk->{action}, $action, "$name: $id: bitmap action");
        is(
            $disk->{status},
            PVE::BackupAccess::bitmap_status($action eq 'none' ? undef : $action),
            "$name: $id: bitmap status"
        );

        # After new and a failure, the bitmap is used, and all of it is dirty.
        is($disk->{bytes}, $backend->vm->disk($id)->{size}, "$name: $id: every byte is in the map")
            if $action ne 'used' || !$context->{has_base};
        cmp_ok($disk->{bytes}, '<', $backend->vm->disk($id)->{size}, "$name: $id: not all is dirty")
            if $action eq 'used' && $context->{has_base};
    }
    $context->{has_bitmap} = $mode ne 'none';
    $context->{has_base} = 0 if $action ne 'used';
    $context->{has_base} ||= $success && $mode ne 'none';

    if ($success) {
        my %images = map { $_ => $repository->image($_) } qw(disk0 disk1);
        my ($write, $problem) = $model->check_images(\%images);
        is($problem, undef, "$name: the images are the disks after write $write");
        cmp_ok($write, '>', $context->{last_write}, "$name: a later instant than the last one");
        $context->{last_write} = $write;
    }
    is_deeply($backend->outside, $context->{outside}, "$name: nothing is left");
    is_deeply($backend->other_bitmaps, [], "$name: no bitmap but the target's own");
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(name => $name, disks => $disks{$name});
    my @disks = map { { id => $_, size => $backend->vm->disk($_)->{size} } } qw(disk0 disk1);
    my $context = {
        backend => $backend,
        repository => PBA::Test::Repository->new($backend),
        model => PBA::Test::Model->new(seed => $seed, disks => \@disks, blocks => $blocks),
        outside => $backend->outside,
        has_bitmap => 0,
        has_base => 0,
        last_write => 0,
    };
    $backend->guest->start_churn(seed => $seed, disks => [qw(disk0 disk1)], blocks => $blocks);
    $backend->guest->wait_churn(20);
    for my $i (0 .. $#steps) {
        check_step($context, $i + 1, $steps[$i]->@*);
        $backend->guest->wait_more_churn(20);
    }
    $backend->guest->stop_churn;
    $backend->check_manners;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
