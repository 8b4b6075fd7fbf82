package PBA::Test::Life::Raw;

# A provider of PBA::Test::Life that does not support IDs: it assumes that the bitmap is relative to the newest
# archive that it has of the device.

use v5.36;

use parent qw(PBA::Test::Life::Strike PBA::Test::RawProvider);

sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    my %modes;
    for my $device (keys $volumes->%*) {
        my $size = defined($self->{base}) ? -s "$self->{path}/$self->{base}/$device.raw" : undef;
        $modes{$device} = ($size // -1) == $volumes->{$device}{size} ? 'use' : 'new';
    }
    $self->_strike('asked');
    return \%modes;
}

sub content_of ($self, $archive, $device) {
    my ($number) = $archive =~ m/([0-9]+)\z/;
    return ('raw', "$self->{path}/$number/$device.raw");
}

1;
