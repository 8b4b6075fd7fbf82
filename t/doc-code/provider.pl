# The backup_vm of a provider, called as Proxmox VE does: a full backup and two increments, with a failing one
# in between. The result must equal the disk at the setup, whatever the guest has written since. The argument is
# the mechanism. $self->{dir} is for an image; begin, store and commit are a provider's own storage.

package PBA::Test::DocCode::Provider;

use v5.36;

use File::Temp ();

use PBA::Test::Backend;
use PBA::Test::DocCode;

my $mib = 1024 * 1024;
my $size = 32 * $mib;

# The granularity of the bitmaps of a Proxmox QEMU.
my $granularity = 4 * $mib;

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# Pieces go to the image of the next state.
my %store = (
    begin => sub ($self, $vmid, $device, $bytes, $mode) {
        my $image = $self->{image} = "$self->{dir}/vm-$vmid-$device.raw";
        unlink("$image.new") if $mode ne 'reuse';
        system('cp', $image, "$image.new") == 0 or die "cannot copy $image\n" if $mode eq 'reuse';
        open($self->{fh}, '+>>:raw', "$image.new") or die "$image.new: $!\n";
        truncate($self->{fh}, $bytes) or die "$image.new: $!\n";
        open($self->{fh}, '+<:raw', "$image.new") or die "$image.new: $!\n";
    },
    store => sub ($self, $offset, $data) {
        sysseek($self->{fh}, $offset, 0) // die "seek: $!\n";
        syswrite($self->{fh}, $data) == length($data) or die "write: $!\n";
    },
    commit => sub ($self, $vmid) {
        rename("$self->{image}.new", $self->{image}) or die "rename: $!\n";
    },
);

# The guest's writes, which the fixture records.
sub guest_writes ($backend, $disk, $offset, $length, $byte) {
    $backend->guest->write('scsi0', $offset, $length, $byte);
    substr($$disk, $offset, $length) = chr($byte) x $length;
    return;
}

sub backup ($backend, $code, $self, $mechanism, $disk, $fails = 0) {
    my $access = $backend->access('target-id' => "provider-$mechanism");
    $access->setup($backend->devices('use'));
    my $frozen = $$disk;
    guest_writes($backend, $disk, 5 * $mib, 2 * $mib, 0x60 + $self->{count}++);
    my $volumes = $access->volumes($mechanism);
    $code->($self, 100, '', $volumes, {});
    $access->teardown($fails ? 0 : 1);
    return if $fails;
    die "the image is not the disk at the setup\n"
        if content("$self->{dir}/vm-100-drive-scsi0.raw") ne $frozen;
    return;
}

return sub ($block) {
    my $mechanism = $block->{argument};
    state $backend = PBA::Test::Backend->start(
        name => 'pve',
        disks => [{ id => 'scsi0', size => $size, shape => 'drive' }],
    );
    my $outside = $backend->outside;
    my $package = PBA::Test::DocCode::run_perl($block, %store);
    my $code = $package->can('backup_vm') // die "it has no backup_vm\n";
    my $dir = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    my $self = bless({ dir => "$dir", count => 0 }, $package);
    state $disk = "\0" x $size;    # the guest's writes
    open(my $silence, '>', \my $output) or die;
    my $before = select($silence);

    for my $step (0 .. 3) {
        guest_writes($backend, \$disk, 2 * $step * $granularity, 200 * 1024, 0x41 + $step);
        backup($backend, $code, $self, $mechanism, \$disk, $step == 2);
    }
    select($before);
    PBA::Test::DocCode::check_same($outside, $backend->outside);
};
