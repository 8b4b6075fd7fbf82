package PBA::Test::Life::Strike;

# A class that is put before the provider among the parents of a class. It calls 'strike', if the provider has
# it, when the provider has answered what it builds on, just before the data is stored, after all of it has been stored, and
# before the cleanup.

use v5.36;

use mro;

sub _strike ($self, $now) {
    $self->{strike}->($now) if $self->{strike};
    return;
}

sub backup_vm_query_incremental ($self, @arguments) {
    my $answer = $self->next::method(@arguments);
    $self->_strike('asked');
    return $answer;
}

sub backup_vm ($self, @arguments) {
    $self->_strike('begin');
    $self->next::method(@arguments);
    $self->_strike('end');
    return;
}

sub backup_cleanup ($self, @arguments) {
    $self->_strike('cleanup');
    return $self->next::method(@arguments);
}

1;
