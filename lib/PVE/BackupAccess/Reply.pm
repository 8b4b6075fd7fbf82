package PVE::BackupAccess::Reply;

# QMP queries, and checked parts of their replies.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(ask edges_of hashes is_refusal);

# Runs a command on the QMP socket, or by a code ref: qmp of the options, which may also have a timeout and a log. Returns
# its value, or dies.
sub ask ($options, $command, %arguments) {
    my ($qmp, $timeout) = ($options->{qmp}, $options->{timeout} // 60);
    utf8::decode($qmp) if !ref($qmp);    # the core takes it as text
    return PVE::BackupAccess::_ask($qmp, $timeout, $command, \%arguments, $options->{log});
}

# Whether this error of a command is QEMU's answer, and the connection can be used further.
sub is_refusal ($error) {
    return $error->class !~ m/\A(?:Connection|Timeout|Protocol|Incomplete)Error\z/;
}

# The hashes in an array that is a reply to the command, or a part of one.
sub hashes ($command, $array) {
    PVE::BackupAccess::Error->throw('ProtocolError',
        "qmp command '$command' failed - the reply is not an array of objects")
        if ref($array) ne 'ARRAY' || grep { ref ne 'HASH' } $array->@*;
    return $array->@*;
}

# The edges of the block graph, the reply to x-debug-query-block-graph: { name, parent, child }, the latter two as names of
# nodes. The parent is '' if it is no node, but a job or a block backend.
sub edges_of ($reply) {
    my $command = 'x-debug-query-block-graph';
    my ($graph) = hashes($command, [$reply]);
    my %node = map { ($_->{id} // '') => $_->{name} }
        grep { ($_->{type} // '') eq 'block-driver' } hashes($command, $graph->{nodes});
    return map {
        +{
            name => $_->{name} // '',
            parent => $node{ $_->{parent} // '' } // '',
            child => $node{ $_->{child} },
        }
        }
        grep { defined($node{ $_->{child} // '' }) } hashes($command, $graph->{edges});
}

1;
