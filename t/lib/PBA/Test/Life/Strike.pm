package PBA::Test::Life::Strike;

# Before a provider among the parents of a class: tells 'strike', if the provider is given one, when the data
# are about to be stored and when all of them are.

use v5.36;

use mro;

sub backup_vm ($self, @arguments) {
    $self->{strike}->('begin') if $self->{strike};
    $self->next::method(@arguments);
    $self->{strike}->('end') if $self->{strike};
    return;
}

1;
