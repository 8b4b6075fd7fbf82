package PBA::Test::Life::Strike;

# A class that is put before the provider among the parents of a class. It calls 'strike', if the provider has
# it, just before the data is stored and after all of it has been stored.

use v5.36;

use mro;

sub backup_vm ($self, @arguments) {
    $self->{strike}->('begin') if $self->{strike};
    $self->next::method(@arguments);
    $self->{strike}->('end') if $self->{strike};
    return;
}

1;
