package PVE::BackupAccess::Provider::RBD::Server;

# qemu-nbd over one RBD image, or a snapshot of one.

use v5.36;

use parent qw(PVE::BackupAccess::Provider::Store::Server);

# { ceph, image, snapshot, undef for the image itself }
sub _image_arguments ($class, $image, %options) {
    my ($ceph, $name, $snapshot) = $image->@{qw(ceph image snapshot)};
    my %file = (
        pool => $ceph->pool,
        image => $name,
        conf => $ceph->conf,
        defined($ceph->namespace) ? (namespace => $ceph->namespace) : (),
        defined($snapshot) ? (snapshot => $snapshot) : (),
    );
    my @file = map { "file.$_=" . $file{$_} =~ s/,/,,/gr } sort keys %file;
    return ('--image-opts', join(',', 'driver=raw', 'file.driver=rbd', @file));
}

sub _name_of ($class, $image) {
    return join('@', grep { defined } $image->@{qw(image snapshot)});
}

1;
