package PBA::Test::Life::Blind;

# A provider of PBA::Test::Life that supports IDs, but identifies a disk only by its name, also in its
# manifests.

use v5.36;

use parent 'PBA::Test::Life::Chain';

sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    my %known = map { $_ => { $volumes->{$_}->%{qw(size base)} } } keys $volumes->%*;
    return $self->SUPER::backup_vm_query_incremental($vmid, \%known);
}

1;
