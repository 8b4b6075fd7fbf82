package PVE::BackupAccess::Provider::RBD::Server;

# qemu-nbd over one RBD image, or a snapshot of one.

use v5.36;

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(temporary_file);
use PVE::BackupAccess::Volume;
use PVE::BackupAccess::Wait qw(child_ends);

use parent qw(PVE::BackupAccess::Provider::Store::Server);

# { ceph, image, snapshot, undef for the image itself }
sub _image_arguments ($class, $image, %options) {
    my ($ceph, $name, $snapshot) = $image->@{qw(ceph image snapshot)};
    my %file = (
        pool => $ceph->pool,
        image => $name,
        conf => $ceph->conf,
        user => $ceph->user,
        defined($ceph->namespace) ? (namespace => $ceph->namespace) : (),
        defined($snapshot) ? (snapshot => $snapshot) : (),
    );
    my @file = map { "file.$_=" . $file{$_} =~ s/,/,,/gr } sort keys %file;
    return ('--image-opts', join(',', 'driver=raw', 'file.driver=rbd', @file));
}

sub _name_of ($class, $image) {
    return join('@', grep { defined } $image->@{qw(image snapshot)});
}

# reading: the lock that keeps the archive from being removed.
sub start ($class, $image, %options) {
    my $self = $class->SUPER::start($image, %options);
    $self->{reading} = $options{reading};
    return $self;
}

# Dies if the lock was lost: reads of a removed snapshot may return zeroes.
sub is_running ($self) {
    $self->{reading}->check_report if $self->{reading};
    return $self->SUPER::is_running;
}

sub size ($self) { return $self->{connection}->size }

# The first write of a client gives it the image's lock: here of what is already there. When another client breaks the lock, the
# cluster accepts nothing more from this one.
sub lock_image ($self, $size) {
    my @regions = ([0, 512]);
    my $same = temporary_file();
    my $data = $self->{connection}->pread($regions[0]->@*);
    PVE::BackupAccess::Error->throw('SystemError', "cannot write a temporary file - $!")
        if !truncate($same, $size) || (syswrite($same, $data) // 0) != length($data);
    my $volume = PVE::BackupAccess::Volume->open(
        'image',
        {
            size => $size,
            'bitmap-mode' => 'reuse',
            'file-handle' => $same,
            'next-dirty-region' => sub () { return (shift(@regions) // [])->@* },
        }
    );
    $volume->copy(to => $self->uri);
    $volume->close;
    return;
}

my $longest_end = 10;    # seconds, to close an image while the cluster does not answer

# If a client is killed, the cluster keeps it as a watcher of its image for half a minute. During that time, the cluster does
# not remove the image, and the creation of a snapshot waits. So qemu-nbd is given the time to close the image, also after
# reading. It ignores a signal that arrives before its main loop runs.
sub kill ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    delete($self->{connection});
    my $until = now() + $longest_end;
    while ($self->SUPER::is_running && now() < $until) {
        CORE::kill(TERM => $pid);
        child_ends($pid, 1);
    }
    return $self->SUPER::kill;
}

1;
