package PVE::BackupAccess::Provider::RBD::Server;

# qemu-nbd over one RBD image, or a snapshot of one.

use v5.36;

use PVE::BackupAccess::Wait qw(child_ends);

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

my $longest_end = 10;    # seconds, to close an image while the cluster does not answer

# If a client is killed, the cluster keeps it as a watcher of its image for half a minute. During that time, the cluster does
# not remove the image, and the creation of a snapshot waits. So qemu-nbd is given the time to close the image, also after
# reading.
sub kill ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    delete($self->{connection});
    CORE::kill(TERM => $pid) if $self->is_running;
    child_ends($pid, $longest_end);
    return $self->SUPER::kill;
}

1;
