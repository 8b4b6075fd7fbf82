package PVE::BackupAccess::Provider::Qcow2Chain::Store;

# Stores the devices of a guest in an archive. Each device is read back as soon as it is stored.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Provider::Qcow2Chain::Image qw($cluster_size);
use PVE::BackupAccess::Provider::Store::Devices
    qw(begin_devices check_device for_devices store_device);

our @EXPORT_OK = qw(store_devices);

# QEMU's filter writes whole clusters only.
my sub compression ($volume) {
    return $volume->{size} % $cluster_size == 0 ? { compressed => 1 } : {};
}

# Stores all devices of a backup. how, in addition to that of Store/Devices.pm: compress; check, whether the written data
# is read back. Returns what audits found.
sub store_devices ($task, $volumes, %how) {
    $how{about} = \&compression if $how{compress};
    my $jobs = begin_devices($task, $volumes, %how);
    my $work = sub ($job, $log, $copy) {
        my $stored = store_device($job, log => $log, copy => $copy);
        check_device($job, $log) if $how{check};
        return $stored->{finding};
    };
    my $found = for_devices($work, $jobs, %how);
    return grep { defined } $found->@{ sort keys $jobs->%* };
}

1;
