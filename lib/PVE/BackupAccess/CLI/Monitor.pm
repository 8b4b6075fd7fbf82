package PVE::BackupAccess::CLI::Monitor;

# The QMP queries that the command itself makes. Each has a connection of its own, because a monitor serves
# one client at a time.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess;
use PVE::BackupAccess::Reply ();

our @EXPORT_OK = qw(ask log_waits);

my $log;

# If another client uses the monitor, the wait for it is logged by this function.
sub log_waits ($code) {
    $log = $code;
    return;
}

# Runs a command on the QMP socket, or by a code ref. Returns its value, or dies.
sub ask ($qmp, $command, %arguments) {
    return PVE::BackupAccess::Reply::ask({ qmp => $qmp, log => $log }, $command, %arguments);
}

1;
