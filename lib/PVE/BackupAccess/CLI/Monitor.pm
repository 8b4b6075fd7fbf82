package PVE::BackupAccess::CLI::Monitor;

# Questions to a QEMU that are not the module's own: a connection for each, since a monitor serves
# one client at a time.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(ask disks_of);

my $timeout = 60;

# Runs a command on the QMP socket; returns its value, or dies.
sub ask ($path, $command, %arguments) {
    utf8::decode($path);    # the core takes it as text
    return PVE::BackupAccess::_ask($path, $timeout, $command, \%arguments);
}

# What the reply has to be: the hashes in an array, or the hash.
my sub hashes ($command, $array) {
    PVE::BackupAccess::Error->throw('ProtocolError',
        "qmp command '$command' failed - the reply is not an array of objects")
        if ref($array) ne 'ARRAY' || grep { ref ne 'HASH' } $array->@*;
    return $array->@*;
}

# The disk's own node. While the access of a killed process is up, nodes of that are on top of it.
my sub own_node ($path, $name) {
    return $name if $name !~ m/\Apba-/;
    my $command = 'x-debug-query-block-graph';
    my ($graph) = hashes($command, [ask($path, $command)]);
    my %name_of = map { $_->{id} // '' => $_->{name} }
        grep { ($_->{type} // '') eq 'block-driver' } hashes($command, $graph->{nodes});
    my %below = map { ($name_of{ $_->{parent} // '' } // '') => $name_of{ $_->{child} // '' } }
        grep { ($_->{name} // '') eq 'file' } hashes($command, $graph->{edges});
    $name = delete($below{$name}) while defined($name) && $name =~ m/\Apba-/;
    return $name;
}

# The names of the disks that can be backed up: those with a medium that stays and can be written
# to.
sub disks_of ($path) {
    my @names;
    my $command = 'query-block';
    for my $disk (hashes($command, ask($path, $command))) {
        my ($medium) = hashes($command, [$disk->{inserted} // next]);
        next if $medium->{ro} || $disk->{removable};
        my $name = $disk->{device} // '';
        $name = own_node($path, $medium->{'node-name'} // next) // next if $name eq '';
        push(@names, $name) if $name !~ m/-fleecing\z/;
    }
    return @names;
}

1;
