package PVE::BackupAccess::CLI::Monitor;

# The QMP queries that the command itself makes. Each has a connection of its own, because a monitor serves
# one client at a time.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(ask hashes log_waits);

my $timeout = 60;
my $log;

# If another client uses the monitor, the wait for it is logged by this function.
sub log_waits ($code) {
    $log = $code;
    return;
}

# Runs a command on the QMP socket, or by a code ref. Returns its value, or dies.
sub ask ($qmp, $command, %arguments) {
    utf8::decode($qmp) if !ref($qmp);    # the core expects text
    return PVE::BackupAccess::_ask($qmp, $timeout, $command, \%arguments, $log);
}

# Checks the reply: the hashes in an array, or the hash.
sub hashes ($command, $array) {
    PVE::BackupAccess::Error->throw('ProtocolError',
        "qmp command '$command' failed - the reply is not an array of objects")
        if ref($array) ne 'ARRAY' || grep { ref ne 'HASH' } $array->@*;
    return $array->@*;
}

1;
