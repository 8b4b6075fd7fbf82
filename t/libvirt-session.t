# A guest of an ordinary user's libvirt, qemu:///session, backed up by that user: QEMU runs as the same user, so
# its user need not be given, and nothing that requires root is needed.
#
# One QEMU is enough: libvirt uses the machine's.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use PBA::Test::Command qw(run_command);
use PBA::Test::Libvirt;

my $problem = PBA::Test::Libvirt->problem;
plan(skip_all => $problem) if defined($problem);

my $mib = 1 << 20;
my %device = (vda => 'virtio-disk0', sda => 'scsi0-0-0-0', sdb => 'usb-disk1');

my $libvirt = PBA::Test::Libvirt->start('session');
$libvirt->add_disk('vda', bus => 'virtio', size => 16 * $mib, format => 'qcow2');
$libvirt->add_disk('sda', bus => 'scsi', size => 4 * $mib, format => 'raw');
$libvirt->add_disk('sdb', bus => 'usb', size => 4 * $mib, format => 'raw');
$libvirt->start_domain;

my $dir = $libvirt->dir . '/home';
my @guest = ('--libvirt', 'web1', '--connect', $libvirt->uri);

sub back_up ($name, @options) {
    my $run = run_command('backup', "$dir/store", @guest, @options);
    is($run->{status}, 0, "$name: the backup is done") or diag($run->{err});
    chomp($run->{out});
    my $out = "$dir/out-" . $name =~ tr/ ,/-/dr;
    mkdir($out) or die "$out: $!\n";
    my $restored = run_command('restore', $run->{out}, $out);
    is($restored->{status}, 0, "$name: restored") or diag($restored->{err});
    for my $target (sort keys %device) {
        my ($image, $format) = $libvirt->active_image($target);
        my @command = ($ENV{PBA_QEMU_IMG} // 'qemu-img', qw(compare -q -U -f raw -F), $format);
        is(system(@command, "$out/$device{$target}.raw", $image), 0, "$name: $target is the disk");
    }
    return $run;
}

sub change ($byte) {
    $libvirt->write($device{$_}, $byte, $byte * $mib, 65536) for sort keys %device;
    return;
}

sub run_tests () {
    isnt($>, 0, 'an ordinary user');
    mkdir("$dir/store") or die "$dir/store: $!\n";
    change(1);
    my $xml = $libvirt->must('dumpxml', 'web1');
    back_up('full');
    change(2);
    my $run = back_up('incremental');
    like($run->{err}, qr/^\Q$_\E: storing an increment/m, "an increment of $_")
        for sort values %device;
    is($libvirt->must('dumpxml', 'web1'), $xml, q(libvirt's view of the domain is unchanged));
    my $status = run_command('status', @guest)->{out};
    like($status, qr/^no backup is running$/m, 'status');
    like($status, qr/ \Q$_\E +0 B +recording/, "status: $_") for sort values %device;
    my $one = run_command('backup', "$dir/store", @guest, qw(--device sdb));
    like($one->{err}, qr/^usb-disk1: storing an increment/m, '--device by target');
    $libvirt->must('destroy', 'web1');
    back_up('off', '--target-id', 'default');
    done_testing;
    return;
}

# The tests run in a process of the user; this process keeps libvirt.
my $pid = fork() // die "fork: $!\n";
if (!$pid) {
    $libvirt->as_user(\&run_tests);
    exit(0);
}
waitpid($pid, 0);
exit($? >> 8 || $? & 127);
