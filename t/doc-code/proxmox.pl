# A guest as on Proxmox VE, with the disk drive-scsi0. The block can use $qmp_socket; $access, which is not set
# up; store($offset, $data), which accepts data; and retry(). If it defines backup_vm, the fixture calls it as
# Proxmox VE does. The block must leave nothing behind except $access.

use v5.36;

use PBA::Test::DocCode qw(check_same run_perl start_guest);

my $mib = 1024 * 1024;

sub call_provider ($package, $backend) {
    my $backup_vm = $package->can('backup_vm') // return;
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    {
        no strict 'refs';
        *{"${package}::image"} = sub ($self, $device, $mode) { return "$dir/$device.raw" };
    }
    my %mode = (nbd => 'new', 'file-handle' => 'use');    # an increment needs an image
    for my $mechanism (qw(nbd file-handle)) {
        my $access = $backend->access;
        $access->setup($backend->devices($mode{$mechanism}));
        $backup_vm->(bless({}, $package), 100, '', $access->volumes($mechanism), {});
        $access->teardown(1);
        die "no image of the whole disk\n" if -s "$dir/drive-scsi0.raw" != 16 * $mib;
    }
    return;
}

return sub ($block) {
    state $backend = start_guest();
    my $outside = $backend->outside;
    $backend->guest->write('scsi0', 3 * $mib, 65536, 0x31);
    my $access = $backend->access;
    my $package = run_perl(
        $block,
        '$qmp_socket' => $backend->qmp_path,
        '$access' => $access,
        store => sub ($offset, $data) { die "no data\n" if $data eq '' },
        retry => sub { die "nothing was to be tried again\n" },
    );
    $access->teardown(1) if $access->_is_up;
    call_provider($package, $backend);
    check_same($outside, $backend->outside);
};
