# Every QMP command of a backup goes wrong once, in every way it can. After each the guest runs, one
# more teardown cleans up, and no bitmap lacks a bit (I2, I5).

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QMPProxy;

my $mib = 1024 * 1024;
my $size = 16 * $mib;
my $block = 4 * $mib;    # Proxmox' granularity
my @ids = qw(disk0 disk1);

# Every point takes minutes, so that a plain run takes one in four; PBA_FULL=1 takes all.
my $stride = $ENV{PBA_FULL} ? 1 : 4;
my $seed = 1;

# What must be dirty: written before the setup, and while it was up.
my ($before, $during) = (0, 8 * $mib);

sub quietly ($code) {
    local $SIG{__WARN__} = sub { };
    return eval { $code->(); 1 };
}

sub make_base ($backend) {
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    $backend->guest->write($_, $before, 65536, 0x31) for @ids;
}

# One backup through a proxy; returns the step that failed ('' if none did) and the proxy.
sub faulty_backup ($backend, $mode, $fault, $at) {
    my $proxy
        = PBA::Test::QMPProxy->start(target => $backend->qmp_path, fault => $fault, at => $at);
    my $failed = 'new';
    quietly(
        sub {
            my $access = $backend->access(qmp => $proxy->socket_path, timeout => 10);
            $failed = 'setup';
            $access->setup($backend->devices($mode));
            $failed = 'volumes';
            $access->volumes('nbd');
            $backend->guest->write($_, $during, 65536, 0x32) for @ids;
            $failed = 'teardown';

            # As a caller does it who takes a teardown that died for a failed backup.
            eval { $access->teardown(1); $failed = ''; 1 } or $access->teardown(0);
        }
    );
    return ($failed, $proxy);
}

sub check_after ($backend, $outside, $failed, $name) {
    my @problems = $backend->problems($outside);
    my $dirty = eval { $backend->next_dirty };
    push(@problems, "the next backup: $@") if !$dirty;
    for my $device (sort keys %{ $dirty // {} }) {
        my $wrote_during = $failed eq '' || $failed eq 'teardown';
        my @needed = ($failed eq '' ? () : $before, $wrote_during ? $during : ());
        for my $offset (grep { !$dirty->{$device}{$_} } @needed) {
            push(@problems, "$device: the write at $offset is in no bitmap");
        }
    }
    is("@problems", '', "$name (failed: " . ($failed || 'nothing') . ')');
    return !@problems;
}

sub sweep ($name, $mode, @faults) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [map { { id => $_, size => $size, format => 'qcow2' } } @ids],
    );
    my $outside = $backend->outside;
    for my $fault (@faults) {
        for (my $at = 1 + $seed % $stride;; $at += $stride) {
            make_base($backend);
            my ($failed, $proxy) = faulty_backup($backend, $mode, $fault, $at);
            my ($struck) = $proxy->records('fault');
            check_after($backend, $outside, $failed,
                "$mode: $fault command $at, " . ($struck ? $struck->{name} : 'none'))
                or return;
            last if !$struck;
        }
    }
    $backend->check_manners;
}

diag("one fault in $stride, seed $seed") if $stride > 1;
for my $name (PBA::Test::Backend->names) {
    for my $mode (qw(use new)) {
        subtest "backend $name, mode $mode" =>
            sub { sweep($name, $mode, qw(drop lose refuse deceive)) };
    }
}

done_testing;
