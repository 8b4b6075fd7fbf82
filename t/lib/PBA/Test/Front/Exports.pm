package PBA::Test::Front::Exports;

# In Proxmox' QEMU, an export without a bitmap survives the teardown of its access, although nothing can be read
# from it any more. A stock QEMU does not delete a node that is in use. So the front removes the export, but
# shows it until the client removes it.

use v5.36;

sub new ($class, $qemu) { return bless { qemu => $qemu, dead => [], events => [] }, $class }

sub end_those_of ($self, @nodes) {
    my %mine = map { $_ => 1 } @nodes;
    my $exports = $self->{qemu}->call('query-block-exports');
    $self->_end($_) for grep { $mine{ $_->{'node-name'} } } @$exports;
    return;
}

sub _end ($self, $export) {
    my ($qemu, $id) = ($self->{qemu}, $export->{id});
    my $is_gone = sub ($event) {
        return $event->{event} eq 'BLOCK_EXPORT_DELETED' && $event->{data}{id} eq $id;
    };
    $qemu->hide_export($id, 1);
    $qemu->call_and_wait('block-export-del', { id => $id, mode => 'hard' }, $is_gone);
    $qemu->hide_export($id, 0);
    push(@{ $self->{dead} }, $export);
    return;
}

# Events that the front itself must send before the reply.
sub take_events ($self) { return splice(@{ $self->{events} }) }

# Removes all dead exports, or the one with this ID, and returns their number.
sub _bury ($self, $id) {
    my (@gone, @left);
    for my $export (@{ $self->{dead} }) {
        push(@{ !defined($id) || $export->{id} eq $id ? \@gone : \@left }, $export);
    }
    for my $export (@gone) {
        my %event = (event => 'BLOCK_EXPORT_DELETED', data => { id => $export->{id} });
        my %stamp = (seconds => time, microseconds => 0);
        push(@{ $self->{events} }, { %event, timestamp => \%stamp });
    }
    $self->{dead} = \@left;
    return scalar(@gone);
}

# ---- the commands ----

sub query_block_exports ($self, $arguments) {
    return [@{ $self->{qemu}->call('query-block-exports', $arguments) }, @{ $self->{dead} }];
}

sub block_export_add ($self, $arguments) {
    my $id = $arguments->{id} // '';
    if (grep { $_->{id} eq $id } @{ $self->{dead} }) {
        die { desc => "Block export id '$id' is already in use" };
    }

    # A stock QEMU before 8.0 returns wrong data for reads of a snapshot across clusters; Proxmox' QEMU does
    # not. The module recognizes such an export by this description.
    my $version = $self->{qemu}->call('query-version')->{qemu};
    my %told
        = $version->{major} < 10 ? (description => 'pba: read by clusters of 65536 bytes') : ();
    return $self->{qemu}->call('block-export-add', { %$arguments, %told });
}

sub block_export_del ($self, $arguments) {
    return {} if $self->_bury($arguments->{id} // '');
    return $self->{qemu}->call('block-export-del', $arguments);
}

sub nbd_server_stop ($self, $arguments) {
    my $value = $self->{qemu}->call('nbd-server-stop', $arguments);
    $self->_bury(undef);
    return $value;
}

1;
