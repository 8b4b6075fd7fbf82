# What others do to the same QEMU while an access is active: either QEMU refuses it, because of the nodes that
# are there for that, or it is done and has the same result as without an access. At any time, QEMU survives, no
# write of the guest is lost (on the disk, in the next increment, in the result of the other program), and
# nothing of ours is left.
#
# On a Proxmox QEMU, its own commands are used. A plain run includes a part on each QEMU, different ones on
# each; PBA_CELLS=N includes N cells, chosen by PBA_SEED; PBA_FULL=1 includes everything.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Company
    qw(%at check_cell counted happen possible_cells qmp_code run_cells start_cell write_disk);

# While setup freezes the guest; before which step; or before which command of the teardown, by its number or name.
my @steps = qw(freeze volumes copy teardown);
my @in_teardown = (2, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22);
push(@in_teardown, PBA::Test::VM->is_proxmox ? 'backup-access-teardown' : 'qom-set');

# Dies only with an error for which the event is a reason.
sub back_up ($test, $when) {
    my $backend = $test->{backend};
    my $access
        = $backend->access(qmp => qmp_code($test), log => sub { push($test->{log}->@*, $_[1]) });
    my $check = sub ($step) { happen($test) if $when eq $step };
    my %hooks = (freeze => sub { $check->('freeze') }, thaw => sub { });
    if (!eval { $access->setup($backend->devices('use'), %hooks); 1 }) {
        @$test{ 'error', 'no success' } = ($@, $test->{done});
        return 0;
    }
    $check->('volumes');
    my $volume = $access->volume($backend->device('disk0'));
    $check->('copy');
    write_disk($test, 0x42, $at{during});
    my $read = '';

    while (my ($offset, $length) = $volume->next_dirty_region) {
        $read .= $volume->pread($offset, $length) =~ s/\0+//gr;
    }
    undef $volume;
    ok($read eq "\x41" x 65536, "the data is that of the disk at its instant")
        if !$test->{is_gone} || $when !~ m/freeze|volumes/;
    $test->{'before teardown'}->() if $test->{done} && $test->{'before teardown'};
    $check->('teardown');
    return counted($test, $when, sub { $access->teardown(1) });
}

sub check ($what, $when, $shape) {
    my $test = start_cell($shape, $what);
    check_cell($test, back_up($test, $when));
    return;
}

my %name = (
    (map { $_ => "before $_" } @steps),
    (map { $_ => "before command $_ of the teardown" } @in_teardown)
);
my @cells = possible_cells([@steps, @in_teardown], [qw(drive blockdev throttle)]);
run_cells(12, \%name, \&check, @cells);

done_testing;
