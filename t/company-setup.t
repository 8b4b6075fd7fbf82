# What others do to the same QEMU during setup, and during the recovery after a client was killed: setup refuses,
# and names what is in the way, or the backup is right, as t/company-during.t says. QEMU survives, no write is lost,
# and nothing of ours is left.
#
# A plain run includes a part on each QEMU, different ones on each; PBA_CELLS=N includes N cells, chosen by
# PBA_SEED; PBA_FULL=1 includes everything.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Client;
use PBA::Test::Company
    qw(%at %events check_cell counted happen possible_cells qmp_code run_cells start_cell write_disk);
use PBA::Test::QMP;
use PBA::Test::VM;

my $is_proxmox = PBA::Test::VM->is_proxmox;
my @shapes = qw(drive blockdev throttle backed);
push(@shapes, 'iothread')
    if qx(@{[PBA::Test::VM->qemu]} -version) =~ m/version (\d+)/ && $1 >= 10;

# Before which command of setup, or while it freezes the guest; before which command of the recovery.
my @in_setup = (6, 12, 16, 20, 24, 28, 32, 36, 'freeze');
push(@in_setup, $is_proxmox ? 'backup-access-setup' : qw(qom-set blockdev-reopen));
my @in_recovery = (1, 6, 10, 14, 18, 22);

# As at any other time, the guest's disk then has a node with another name.
$events{$_}{next} = qr/there is no such block device|'\S+' of another program is on top of this/
    for 'an overlay', 'an overlay of the node';

# If the first client was not the faster one.
$events{'a second client of another target'}{leaves} = qr/: (?:pba:)?other\z/;

# Why setup may refuse.
my $unplugged = qr/was unplugged, or its medium changed, while the backup began/;
my @reasons = (
    [qr/mirror|backup|commit|stream/, qr/block job 'theirs' \(.*\) uses this disk|$unplugged/],
    [qr/overlay/, qr/node '\S+' of another program is |there is no such block device|$unplugged/],
    [qr/resize/, qr/was resized from \d+ to \d+ bytes|must have exactly the size of the device/],
    [
        qr/unplug/,
        qr/Device '\S+' not found|Cannot find device=|$unplugged|there is no such|no guest device|Permission conflict/
    ],
);

sub check_refusal ($what, $error) {
    my ($reason) = grep { $what =~ $_->[0] } @reasons;
    like($error, $reason ? $reason->[1] : qr/\A\z/, 'setup refuses for this reason');
    return;
}

sub during_setup ($test, $what, $when) {
    my $backend = $test->{backend};
    my $access = $backend->access(qmp => qmp_code($test), log => sub { });
    my $freeze = sub { happen($test) if $when eq 'freeze' };
    my @setup = ($backend->devices('use'), freeze => $freeze, thaw => sub { });
    if (!counted($test, $when, sub { $access->setup(@setup) })) {
        $test->{'no success'} = $test->{done};
        check_refusal($what, $test->{error});
        return 0;
    }
    my $volume = $access->volume($backend->device('disk0'));
    write_disk($test, 0x42, $at{during});
    my $read = '';
    while (my ($offset, $length) = $volume->next_dirty_region) {
        $read .= $volume->pread($offset, $length) =~ s/\0+//gr;
    }
    undef $volume;
    ok($read eq "\x41" x 65536, 'the data is that of the disk at its instant')
        if !$test->{is_gone};
    $test->{'before teardown'}->() if $test->{done} && $test->{'before teardown'};
    return counted($test, 0, sub { $access->teardown(1) });
}

# A client is killed while its access is active.
sub be_killed ($test) {
    my $backend = $test->{backend};
    my $qmp = sub (@call) { return PBA::Test::QMP->once($backend->qmp_path, @call) };
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access(qmp => $qmp, log => sub { });
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            $tell->('up');
        }
    );
    $client->next_word or die "no access\n";
    write_disk($test, 0x42, $at{during});
    $client->kill9;
    return;
}

sub during_recovery ($test, $what, $when) {
    be_killed($test);
    my %options = $test->{backend}->options(qmp => qmp_code($test), log => sub { });
    ok(counted($test, $when, sub { PVE::BackupAccess->recover(%options) }), 'it is recovered')
        or diag($test->{error});
    $test->{'no success'} = 1;

    # A second client may recover first, and have its backup.
    $test->{event} = { $test->{event}->%*, refused => 0 } if $what =~ m/\Aa second client/;
    return 0;
}

sub check ($what, $when, $shape) {
    my ($during, $command) = split(' ', $when);
    my $test = start_cell($shape, $what);
    $test->{is_early} = 1;
    my $step = $during eq 'setup' ? \&during_setup : \&during_recovery;
    check_cell($test, $step->($test, $what, $command));
    return;
}

my @times = ((map { "setup $_" } @in_setup), (map { "recovery $_" } @in_recovery));
my @cells = possible_cells(\@times, \@shapes);

# Proxmox' QEMU aborts (10.2.2) if a backup job of a node below the disk's, which began just before the command of
# setup, ends during the access; no query can be later than the last one before the command, the 16th or 18th.
@cells = grep { "@$_" !~ m/\Aa short backup .* setup (?:backup-access-setup|16) / } @cells
    if $is_proxmox;
my %name = map { $_ => 'before command ' . join(' of ', reverse(split(' ', $_))) } @times;
run_cells(4, \%name, \&check, @cells);

done_testing;
