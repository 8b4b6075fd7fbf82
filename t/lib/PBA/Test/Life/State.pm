package PBA::Test::Life::State;

# The state of a PBA::Test::Life as a text, which is equal for states that a backup cannot distinguish, or only by
# an ID: which archive each bitmap is relative to, what is in which slot, and what a rollback would bring back.

use v5.36;

use JSON::PP ();

use PVE::BackupAccess;

my @saves = qw(ram host vm_state);

# The archives of a store, the oldest first, as their manifests describe them.
sub _manifests ($self, $store) {
    my @manifests;
    for my $file (sort glob("$self->{store}/$store/vm/100/*/manifest.json")) {
        my $text = PBA::Test::Life::content($file);
        my $manifest = eval { JSON::PP::decode_json($text) } // next;
        push(@manifests, $manifest);
    }
    return @manifests;
}

# { ID => newest, older, or used if another archive builds on it }
sub _places ($self, $store) {
    my @manifests = $self->_manifests($store);
    my %places = map { ($_->{id} // '') => 'older' } @manifests;
    $places{ $manifests[-1]{id} // '' } = 'newest' if @manifests;
    for my $device (map { values $_->{devices}->%* } @manifests) {
        $places{ $device->{'parent-id'} } = 'used' if defined($device->{'parent-id'});
    }
    return \%places;
}

sub _bitmap ($self, $places, $bitmap) {
    my ($base, $target) = $bitmap->@{qw(base target-id)};
    my $is_second = ($target // '') =~ m/:second\z/;
    my $place
        = defined($base)
        ? $places->{ $is_second ? 'second' : 'first' }{$base} // 'gone'
        : '-';
    my @flags = grep { $bitmap->{$_} } qw(background recording persistent inconsistent);
    return join(' ', $bitmap->{node} // '', $is_second ? 'second' : 'first', $place, @flags);
}

# Whether there is a saved state, and whether a backup was made since.
sub _saved ($self, $name) {
    my $saved = $self->{$name} // return 'none';
    my $backups = $self->{counts}{full} + $self->{counts}{incremental};
    my $seen = $self->{saved}{$name} //= { what => '' };
    $self->{saved}{$name} = $seen = { what => "$saved", backups => $backups }
        if $seen->{what} ne "$saved";
    return $seen->{backups} == $backups ? 'now' : 'before';
}

# Whether the disks have the sizes that the newest archive has.
sub _is_resized ($self) {
    my @manifests = $self->_manifests($self->_current_store);
    return 0 if !@manifests;
    my @now = sort { $a <=> $b } map { length } values $self->{content}->%*;
    my @then = sort { $a <=> $b } map { $_->{size} } values $manifests[-1]{devices}->%*;
    return "@now" eq "@then" ? 0 : 1;
}

sub state ($self) {
    my $status = PVE::BackupAccess->status(qmp => $self->{backend}->qmp_path);
    my %places = (
        first => $self->_places($self->_current_store),
        second => $self->_places('second'),
    );
    my @bitmaps = sort map { $self->_bitmap(\%places, $_) } $status->{bitmaps}->@*;
    my @slots = map { $self->_file_in($_) =~ s{.*/}{}r } qw(disk0 disk1);
    return join('; ',
        @bitmaps, "@slots", $self->{naming},
        $status->{access} ? 'dead' : (),
        $self->_is_resized ? 'resized' : (),
        map { "$_ " . $self->_saved($_) } @saves,
    );
}

1;
