package PVE::BackupAccess::CLI::Monitor;

# Questions to a QEMU that are not the module's own: a connection for each, since a monitor serves
# one client at a time.

use v5.36;

use Exporter qw(import);
use IO::Socket::UNIX ();
use JSON::PP ();
use Socket qw(SOL_SOCKET SO_RCVTIMEO);

use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(ask disks_of);

my $timeout = 60;
my $json = JSON::PP->new->utf8->canonical;

my sub read_message ($socket, $path) {
    my $line = $socket->getline // die "$path: no answer from QEMU\n";
    return $json->decode($line);
}

my sub answer ($socket, $path, $message) {
    $socket->print($json->encode($message) . "\n") && $socket->flush
        or die "$path: cannot write - $!\n";
    while (1) {
        my $answer = read_message($socket, $path);
        PVE::BackupAccess::Error->throw($answer->{error}{class},
            "qmp command '$message->{execute}' failed - $answer->{error}{desc}")
            if $answer->{error};
        return $answer->{return} if exists($answer->{return});
    }
}

# Runs a command on the QMP socket; returns its value, or dies.
sub ask ($path, $command, %arguments) {
    my $socket = IO::Socket::UNIX->new(Peer => $path)
        or die "cannot connect to QMP socket $path - $!\n";
    setsockopt($socket, SOL_SOCKET, SO_RCVTIMEO, pack('l!l!', $timeout, 0))
        or die "$path: cannot set a time limit - $!\n";
    read_message($socket, $path);
    answer($socket, $path, { execute => 'qmp_capabilities' });
    return answer($socket, $path, { execute => $command, arguments => \%arguments });
}

# The disk's own node. While the access of a killed process is up, nodes of that are on top of it.
my sub own_node ($path, $name) {
    return $name if $name !~ m/\Apba-/;
    my ($nodes, $edges) = ask($path, 'x-debug-query-block-graph')->@{qw(nodes edges)};
    my %name_of = map { $_->{id} => $_->{name} } grep { $_->{type} eq 'block-driver' } $nodes->@*;
    my %below = map { ($name_of{ $_->{parent} } // '') => $name_of{ $_->{child} } }
        grep { $_->{name} eq 'file' } $edges->@*;
    $name = delete($below{$name}) while defined($name) && $name =~ m/\Apba-/;
    return $name;
}

# The names of the disks that can be backed up: those with a medium that stays and can be written
# to.
sub disks_of ($path) {
    my @names;
    for my $disk (ask($path, 'query-block')->@*) {
        my $medium = $disk->{inserted} or next;
        next if $medium->{ro} || $disk->{removable};
        my $name = $disk->{device};
        $name = own_node($path, $medium->{'node-name'} // next) // next if $name eq '';
        push(@names, $name) if $name !~ m/-fleecing\z/;
    }
    return @names;
}

1;
