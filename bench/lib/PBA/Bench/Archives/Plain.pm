package PBA::Bench::Archives::Plain;

# PBA::Bench::Archives by a copy without digests and checks: an image for each backup, on top of the last one.

use v5.36;

use File::Basename qw(basename dirname);

use PVE::BackupAccess;
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(create_image);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;

use parent -norequire, qw(PBA::Bench::Archives);

sub _image ($self, $number) { return "$self->{dir}/$number.qcow2" }

sub backup ($self) {
    my $base = $self->{number} > 1 ? $self->_image($self->{number} - 1) : undef;
    my $image = $self->_image($self->{number});
    my $access = PVE::BackupAccess->new(
        qmp => $self->{vm}->qmp_path,
        'target-id' => basename($self->{dir}),
        map { $_ => dirname($self->{dir}) } qw(run-dir fleecing-dir),
    );
    $access->setup([{ device => 'disk0', 'bitmap-mode' => defined($base) ? 'use' : 'new' }]);
    create_image($image, -s $self->{file}, $base);
    my $server = PVE::BackupAccess::Provider::Qcow2Chain::Server->start($image, writable => 1);
    my $volume = $access->volume('disk0');
    $volume->copy(to => $server->uri);
    $volume->close;
    $server->stop;
    $access->teardown(1);
    return;
}

1;
