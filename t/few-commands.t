# The number of QMP commands of a backup: each may open a connection, as qemu-server's code ref does, and the
# schema alone takes Perl code 60 to 300 ms. With Proxmox' commands, an increment of one disk, including
# companions, takes 30 commands if the disk is below a throttle filter, as qemu-server configures it since QEMU 10.0, and two
# less if not; on a stock QEMU 55. A guest without a UUID takes one more.
#
# One QEMU is enough: versions differ by a command; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Provider;
use PBA::Test::QMP;
use PBA::Test::VM;

my $size = 1 << 20;

# For an increment of one disk, and for each further disk. The front reports the version of a stock QEMU, so the
# module must query its capabilities.
my %limit = (
    'pve' => [PBA::Test::VM->is_proxmox ? 28 : 30, 4],
    'pve, throttle' => [PBA::Test::VM->is_proxmox ? 30 : 32, 6],
    'upstream' => [55, 20],
);

# The names of the commands that the code sends through a code ref.
sub sent ($backend, $code) {
    my @names;
    my $carry = sub ($command, $arguments) {
        push(@names, $command);
        return PBA::Test::QMP->once($backend->qmp_path, $command, $arguments);
    };
    $code->($carry);
    return @names;
}

sub check ($names, $count, $what) {
    cmp_ok(scalar($names->@*), '<=', $count, "$what: at most $count") or diag("@$names");
    cmp_ok(scalar(grep { $_ eq 'query-qmp-schema' } $names->@*),
        '<=', 1, "$what: the schema at most once");
    return;
}

# As with an object for each call: without IDs.
sub call_by_call ($backend, $carry) {
    my $access = $backend->access(qmp => $carry);
    $access->sizes(map { $_->{device} } $backend->devices('use')->@*);
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    $access->teardown(1);
    return;
}

sub check_disks ($name, $disks, $throttle) {
    my %shape = (shape => $throttle ? 'proxmox' : 'blockdev', throttle => $throttle);
    my $backend = PBA::Test::Backend->start_paused(
        name => $name,
        args => ['-uuid', '11111111-2222-3333-4444-555555555555'],
        disks => [map { { id => "d$_", size => $size, bus => 'scsi', %shape } } 1 .. $disks],
    );
    my $what = $throttle ? "$name, throttle" : $name;
    my ($first, $further) = $limit{$what}->@*;
    my $count = $first + $further * ($disks - 1);
    my $provider = PBA::Test::Provider->new;
    $backend->task($provider)->run;
    my @names = sent($backend, sub ($qmp) { $backend->task($provider, qmp => $qmp)->run });
    check(\@names, $count, "$what, $disks disks, a task");
    call_by_call($backend, $backend->qmp_path);
    @names = sent($backend, sub ($qmp) { call_by_call($backend, $qmp) });
    check(\@names, $count, "$what, $disks disks, call by call");

    # A second backup with the same object does not query QEMU's capabilities again.
    my $access;
    my $setup = sub ($qmp) {
        $access //= $backend->access(qmp => $qmp);
        $access->setup($backend->devices('use'));
        $access->teardown(1);
    };
    @names = sent($backend, sub ($qmp) { $setup->($qmp) for 1, 2 });
    my @asked = grep { m/\Aquery-(?:version|commands|qmp-schema|name|uuid)\z/ } @names;
    my %times;
    $times{$_}++ for @asked;
    is_deeply([grep { $times{$_} > 1 } sort keys %times],
        [], "$what: capabilities are queried only once");
    $backend->check_manners;
    return;
}

for my $name (PBA::Test::Backend->names) {
    for my $throttle ($name eq 'pve' ? (0, 1) : 0) {
        check_disks($name, $_, $throttle) for 1, 3;
    }
}

done_testing;
