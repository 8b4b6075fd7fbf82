package PBA::Test::OtherImg;

# Makes a command run another program in place of qemu-img: perl -MPBA::Test::OtherImg=/path/of/the/program

use v5.36;

use PVE::BackupAccess::Provider::Qcow2Chain::Image;

sub import ($class, $program) {
    $PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $program;
    return;
}

1;
