# All disks of one setup show the same instant while the guest writes to them in turn (I1). The control inserts
# the filters one by one, as a tool without the cut would, and must fail.
#
# One QEMU is enough: the cut is one command on both; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Model;

my $size = 16 * 1024 * 1024;
my $seed = 4711;
my $blocks = 256;
my $trials = 30;
my $control_trials = 5;

my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    disks => [
        { id => 'a', size => $size, format => 'qcow2', cache => 'none' },
        { id => 'b', size => $size },
    ],
);
my $vm = $backend->vm;
my $model = PBA::Test::Model->new(
    seed => $seed,
    blocks => $blocks,
    disks => [map { { id => $_, size => $size } } qw(a b)],
);

sub read_image ($volume, $file) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    for (my $at = 0; $at < $size; $at += 1 << 20) {
        print {$fh} $volume->pread($at, 1 << 20);
    }
    close($fh) or die "$file: $!\n";
    return $file;
}

sub read_images ($volumes) {
    my $dir = $backend->work_dir('images');
    return {
        map {
            my $volume = PVE::BackupAccess::Volume->open($_, $volumes->{$_});
            $_ => read_image($volume, "$dir/$_.raw")
        } qw(a b)
    };
}

sub snapshot () {
    my $access = $backend->access;
    $access->setup($backend->devices('none'));
    my $images = read_images($access->volumes('nbd'));
    $access->teardown(1);
    return $model->check_images($images);
}

# The same nodes, but the filters are inserted one by one.
sub insert_filter ($id) {
    my $disk = $vm->disk($id);
    $vm->add_fleecing_node($id, as => "$id-fleecing");
    $vm->qmp(
        'blockdev-add',
        driver => 'copy-before-write',
        'node-name' => "$id-cbw",
        file => $id,
        target => "$id-fleecing"
    );
    $vm->qmp('qom-set', path => $disk->{qdev}, property => 'drive', value => "$id-cbw");
    $vm->qmp(
        'blockdev-add',
        driver => 'snapshot-access',
        'node-name' => "$id-snap",
        file => "$id-cbw"
    );
    $vm->qmp(
        'block-export-add',
        id => "$id-export",
        type => 'nbd',
        name => $id,
        'node-name' => "$id-snap"
    );
}

sub remove_filter ($id) {
    $vm->qmp('block-export-del', id => "$id-export", mode => 'hard');
    $vm->qmp('blockdev-del', 'node-name' => "$id-snap");
    $vm->qmp('qom-set', path => $vm->disk($id)->{qdev}, property => 'drive', value => $id);
    $vm->qmp('blockdev-del', 'node-name' => "$id-cbw");
    $vm->remove_fleecing_node("$id-fleecing");
}

sub control_snapshot () {
    my $socket = $vm->dir . '/control.sock';
    $vm->qmp('nbd-server-start', addr => { type => 'unix', data => { path => $socket } });
    insert_filter('a');
    $backend->guest->wait_more_churn(4);
    insert_filter('b');
    my $images = read_images({ map { $_ => { 'nbd-path' => $socket, size => $size } } qw(a b) });
    remove_filter($_) for qw(a b);
    $vm->qmp('nbd-server-stop');
    return $model->check_images($images);
}

$backend->guest->start_churn(seed => $seed, disks => [qw(a b)], blocks => $blocks);
$backend->guest->wait_churn(100);

my $last = 0;
for my $trial (1 .. $trials) {
    my ($write, $problem) = snapshot();
    is($problem, undef, "setup $trial: one instant, after write $write");
    cmp_ok($write, '>', $last, "setup $trial: the guest is writing");
    $last = $write;
    $backend->guest->wait_more_churn(5);
}

my $torn = 0;
for my $trial (1 .. $control_trials) {
    my ($write, $problem) = control_snapshot();
    $torn++ if defined($problem) && $problem =~ m/not one instant/;
}
is($torn, $control_trials, 'filters inserted one by one never show one instant');

$backend->guest->stop_churn;
$backend->check_manners;
done_testing;
