package PBA::Test::NoCeph;

# A cluster in memory: objects with values, images with snapshots. A shell script runs in place of each program.
#
#   my $ceph = PBA::Test::NoCeph->new(pool => 'backup', conf => '/none', log => sub { }, script => 'exit 1');

use v5.36;

use PVE::BackupAccess::Error;

use parent qw(PVE::BackupAccess::Provider::RBD::Ceph);

sub command ($self, @command) { return ('sh', '-c', $self->{script}) }
sub watchers ($self, $object) { return $self->{watchers}->@* }
sub values ($self, $object) { return { $self->{stored}->%* } }

# killed: the program is killed after it has stored the value.
sub set_value ($self, $object, $key, $value) {
    $self->{stored}{$key} = $value;
    PVE::BackupAccess::Error->throw('SystemError', 'rados was killed') if $self->{killed};
    return;
}

sub remove_value ($self, $object, $key) {
    delete($self->{stored}{$key});
    return;
}

sub images ($self) { return sort keys $self->{images}->%* }

sub snapshots ($self, $image) {
    return [map { +{ $_->%* } } $self->{images}{$image}->@*];
}

sub remove_snapshot ($self, @which) {
    push($self->{removed}->@*, join('@', @which));
    return;
}

sub remove_image ($self, $image) {
    push($self->{removed}->@*, $image);
    return;
}

sub remove_object ($self, $object) { return }

1;
