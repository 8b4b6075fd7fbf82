package PBA::Test::Life::Stores;

# The events of a PBA::Test::Life that change the store behind the back of what uses it.

use v5.36;

use PVE::BackupAccess::File qw(remove_tree);

sub _copy ($self, $from, $to) {
    remove_tree("$self->{store}/$to") if -e "$self->{store}/$to";
    system('cp', '-a', map { "$self->{store}/$_" } $from, $to) == 0 or die "cp: $?\n";
    return;
}

# From now on, backups go to a copy of the store.
sub _copy_store ($self) {
    my $from = $self->_current_store;
    return if !-d "$self->{store}/$from";
    my $name = 'copy' . ++$self->{copies};
    $self->_copy($from, $name);
    $self->{current} = $name;
    return;
}

sub _save_store ($self) {
    my $from = $self->_current_store;
    return if !-d "$self->{store}/$from";
    $self->_copy($from, 'saved');
    $self->{'saved store'} = 1;
    return;
}

sub _put_store_back ($self) {
    $self->_copy('saved', $self->_current_store) if $self->{'saved store'};
    return;
}

sub _remove_newest ($self) {
    my $provider = $self->_provider($self->_current_store);
    my $newest = $provider->newest // return;
    $provider->remove($newest);
    return;
}

1;
