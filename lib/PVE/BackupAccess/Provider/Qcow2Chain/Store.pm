package PVE::BackupAccess::Provider::Qcow2Chain::Store;

# Stores the devices of a guest in an archive. Each device is read back while it is stored.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Provider::Qcow2Chain::Image qw($cluster_size);
use PVE::BackupAccess::Provider::Qcow2Chain::Content qw(check_image);
use PVE::BackupAccess::Provider::Store::Devices
    qw(begin_devices check_compared for_devices store_device);

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
        my $stored = store_device($job, log => $log, copy => $copy, check => $how{check});
        if ($how{check}) {
            check_image($task->{archive}, $job->{device}, $log);
            check_compared($job, $log);
        }
        return $stored->{finding};
    };
    my $found = for_devices($work, $jobs, %how);
    return grep { defined } $found->@{ sort keys $jobs->%* };
}

1;
