package PVE::BackupAccess::Provider::RBD::Store;

# The store's own object in a pool or namespace, with the values, by key:
#
#   guest vm/100    a guest's name, empty if it has none; ct/101 is a container
#   id              the store's unique ID

use v5.36;

use List::Util qw(uniq);

use PVE::BackupAccess::Provider::RBD::Lock;
use PVE::BackupAccess::Provider::Store::Manifest qw(new_id);

my $object = 'pba';
my $seconds = 60;    # to wait for another process that changes the object

sub new ($class, $ceph) { return bless({ ceph => $ceph }, $class) }

sub _values ($self) { return $self->{ceph}->values($object) // {} }

sub _set ($self, $key, $value) {
    $self->{ceph}->set_value($object, $key, $value);
    return;
}

# Runs the code while no other process changes the object.
sub _alone ($self, $code) {
    my $ceph = $self->{ceph};
    $ceph->make_object("$object.change");
    my $lock = PVE::BackupAccess::Provider::RBD::Lock->take($ceph, $object, 'change', $seconds);
    return $code->();
}

sub id ($self) {
    my $known = $self->_values->{id} // $self->_alone(
        sub () {
            my $id = $self->_values->{id} // new_id();
            $self->_set('id', $id);
            return $id;
        }
    );
    my ($id) = $known =~ m/\A([0-9a-f]+)\z/;
    return $id;
}

sub add_place ($self, $place) {
    $self->_set("guest $place", '') if !exists($self->_values->{"guest $place"});
    delete($self->{known});
    return;
}

# Asks once for all guests: a list asks for those of all its archives.
sub _known ($self) { return $self->{known} //= $self->_values }

sub has_place ($self, $place) { return exists($self->_known->{"guest $place"}) }

sub vmids ($self) {
    delete($self->{known});
    return
        sort { $a <=> $b }
        uniq(map { m!\Aguest (?:vm|ct)/([1-9][0-9]{0,8})\z! ? $1 : () } keys $self->_known->%*);
}

sub name_of ($self, $vmid) {
    my ($name) = ($self->_known->{"guest vm/$vmid"} // '') =~ m/\A([A-Za-z0-9_.-]+)\z/;
    return $name;
}

sub number_of ($self, $name) {
    my $values = $self->_values;
    my ($key) = grep { m!\Aguest vm/! && $values->{$_} eq $name } sort keys $values->%*;
    my ($vmid) = ($key // '') =~ m!/([1-9][0-9]{0,8})\z!;
    return $vmid;
}

# The same, but a new guest gets the lowest free number.
sub number_for ($self, $name) {
    return $self->number_of($name) // $self->_alone(
        sub () {
            my $known = $self->number_of($name);
            return $known if defined($known);
            my ($values, $vmid) = ($self->_values, 1);
            $vmid++ while exists($values->{"guest vm/$vmid"});
            $self->_set("guest vm/$vmid", $name);
            return $vmid;
        }
    );
}

1;
