package PVE::BackupAccess::Provider::Qcow2Chain::Server;

# qemu-nbd over one qcow2 image.

use v5.36;

use parent qw(PVE::BackupAccess::Provider::Store::Server);

# Exports the image, or with compress => 1 QEMU's filter above it, which compresses each written cluster.
sub _image_arguments ($class, $file, %options) {
    return ('--format=qcow2', $file) if !$options{compress};
    my $name = $file =~ s/,/,,/gr;
    return ('--image-opts',
        "driver=compress,file.driver=qcow2,file.discard=unmap,file.file.filename=$name");
}

1;
