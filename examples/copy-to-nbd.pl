# Copies a disk to an NBD export: the whole disk the first time, then only what has changed.
#
#     perl examples/copy-to-nbd.pl QMP-SOCKET DEVICE FLEECING-DIRECTORY NBD-URI
#
# Use the same export each time. It must be at least as large as the disk:
#
#     qemu-img create -f qcow2 disk.qcow2 32G
#     qemu-nbd --persistent --socket=/run/disk.nbd --format=qcow2 disk.qcow2
#     perl examples/copy-to-nbd.pl /run/guest.qmp disk0 /var/tmp nbd+unix:///?socket=/run/disk.nbd

use v5.36;

use PVE::BackupAccess;

my ($qmp, $device, $fleecing_dir, $uri) = @ARGV;
die "usage: $0 QMP-SOCKET DEVICE FLEECING-DIRECTORY NBD-URI\n" if @ARGV != 4;

my $access = PVE::BackupAccess->new(
    qmp => $qmp,
    'target-id' => 'copy-to-nbd',
    'fleecing-dir' => $fleecing_dir,
);
my $infos = $access->setup([{ device => $device, 'bitmap-mode' => 'use' }]);
say "the bitmap is $infos->[0]{'bitmap-action'}";

# If this dies, the access ends as after a failed backup, and the next run copies these changes again.
my $statistics = $access->volume($device)->copy(to => $uri);
$access->teardown(1);
say "$statistics->{'bytes-read'} bytes in $statistics->{regions} regions";
