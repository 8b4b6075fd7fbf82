package Demo::Provider;

# The provider Qcow2Chain, which also records what it was given to store.

use v5.36;

use parent 'PVE::BackupAccess::Provider::Qcow2Chain';

use PVE::BackupAccess::Volume;

# Adds to the hash $backup: stored => [{ device, size, bitmap-mode, bitmap-name, regions }].
sub note_in ($self, $backup) {
    $self->{notes} = $backup;
    return;
}

sub backup_vm ($self, $vmid, $guest_config, $volumes, $info) {
    for my $device (sort keys $volumes->%*) {
        my @regions = regions($device, $volumes->{$device});
        push(
            $self->{notes}{stored}->@*,
            { device => $device, $volumes->{$device}->%*, regions => \@regions }
        );
    }
    return $self->SUPER::backup_vm($vmid, $guest_config, $volumes, $info);
}

sub regions ($device, $volume) {
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    my @regions;
    while (my @region = $reader->next_dirty_region) {
        push(@regions, \@region);
    }
    $reader->close;
    return @regions;
}

1;
