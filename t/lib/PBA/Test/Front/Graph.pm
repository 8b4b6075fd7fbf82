package PBA::Test::Front::Graph;

# The block graph of the stock QEMU: finds the disk with a name, and inserts nodes.

use v5.36;

use JSON::PP ();

sub new ($class, $qemu) { return bless { qemu => $qemu }, $class }

# The other methods use the state from this call; only bitmap() queries again.
sub refresh ($self) {
    my $qemu = $self->{qemu};
    $self->{block} = $qemu->call('query-block');
    my $nodes = $qemu->call('query-named-block-nodes', { flat => JSON::PP::true });
    $self->{nodes} = { map { $_->{'node-name'} => $_ } @$nodes };

    # Only the newest QEMU reports a node's children in a better supported way.
    my $graph = $qemu->call('x-debug-query-block-graph');
    my %names = map { $_->{id} => $_->{name} } @{ $graph->{nodes} };
    $self->{children} = {};
    for my $edge (@{ $graph->{edges} }) {
        my ($parent, $child) = @names{ @$edge{qw(parent child)} };
        $self->{children}{$parent}{ $edge->{name} } = $child;
    }
    return;
}

# What $name refers to: a block backend, or else a node. { device, top, size, backend }.
sub find_node ($self, $name) {
    my ($entry) = grep { $_->{device} ne '' && $_->{device} eq $name } @{ $self->{block} };
    if ($entry && !$entry->{inserted}) {
        die { fatal => "device $name has no medium" };
    }
    my $top = $entry ? $entry->{inserted}{'node-name'} : $name;
    my $node = $self->{nodes}{$top};
    die { class => 'DeviceNotFound', desc => "Device '$name' not found" } if !$node;
    my $size = $node->{image}{'virtual-size'};
    return { device => $name, top => $top, size => $size, backend => $entry ? 1 : 0 };
}

# The same with the nodes that an access to it needs: { node, fleecing, throttle, qdev }.
sub find_disk ($self, $name) {
    my $disk = $self->find_node($name);
    my $fleecing = $self->find_node("$name-fleecing");
    my ($have, $want) = map { int($_->{size} / 512) } $fleecing, $disk;
    if ($have != $want) {
        my $desc = "Size mismatch for '$name-fleecing' - sector count $have != $want";
        die { desc => $desc };
    }
    my $top = $disk->{top};
    my @used = grep { $_->{inserted} } @{ $self->{block} };
    my ($user) = grep { $_->{inserted}{'node-name'} eq $top } @used;
    $disk->{qdev} = $user->{qdev} if $user;
    $disk->{fleecing} = $fleecing->{top};
    $disk->{throttle} = $self->{nodes}{$top}{drv} eq 'throttle' ? 1 : 0;
    $disk->{node} = $disk->{throttle} ? $self->{children}{$top}{file} : $top;
    return $disk;
}

sub writable_disks ($self) {
    my @used = grep { $_->{inserted} && !$_->{inserted}{ro} } @{ $self->{block} };
    my @names = map { $_->{device} ne '' ? $_->{device} : $_->{inserted}{'node-name'} } @used;
    return grep { !/-fleecing\z/ } @names;
}

# A node that is the backing file of another node does not disappear with its device.
sub is_there ($self, $disk) {
    return 1 if grep { ($_->{backing} // '') eq $disk->{top} } values(%{ $self->{children} });
    return exists($self->{nodes}{ $disk->{top} }) if !$disk->{backend};
    return grep { $_->{device} eq $disk->{device} } @{ $self->{block} };
}

sub bitmap ($self, $node, $name) {
    my $nodes = $self->{qemu}->call('query-named-block-nodes', { flat => JSON::PP::true });
    my ($found) = grep { $_->{'node-name'} eq $node } @$nodes;
    return undef if !$found;
    my ($bitmap) = grep { ($_->{name} // '') eq $name } @{ $found->{'dirty-bitmaps'} // [] };
    return $bitmap;
}

sub has_iothreads ($self) { return scalar(@{ $self->{qemu}->call('query-iothreads') }) }

# Makes the user of the disk, a throttle filter or the guest's device, use $node.
sub point_to ($self, $disk, $node) {
    return $self->switch([$disk, $node]) if $disk->{throttle} || $disk->{pivot};
    return $self->_set_drive($disk, $node);
}

# Inserts a node below the guest's device, whose child can be changed together with those of other disks. A
# throttle filter already is such a node.
sub add_pivot ($self, $disk) {
    return if $disk->{throttle};
    my $name = $disk->{cbw} =~ s/cbw/raw/r;
    my %pivot = (driver => 'raw', 'node-name' => $name, file => $disk->{node}, discard => 'unmap');
    $self->{qemu}->call('blockdev-add', \%pivot);
    $self->_set_drive($disk, $name);
    $disk->{pivot} = $name;
    return;
}

# [$disk, $node], ...: makes all of these disks use those nodes at the same time.
sub switch ($self, @pairs) {
    my @options = map { $self->_reopen_options(@$_) } @pairs;
    $self->{qemu}->call('blockdev-reopen', { options => \@options });
    return;
}

# Makes the user of the disk use the disk again.
sub take_out ($self, $disk) {
    $self->point_to($disk, $disk->{node});
    my $pivot = delete($disk->{pivot}) // return;
    $self->_set_drive($disk, $disk->{node});
    $self->{qemu}->call('blockdev-del', { 'node-name' => $pivot });
    return;
}

# Does nothing if the device was unplugged. QEMU aborts if the device is set to the node that it already uses.
sub _set_drive ($self, $disk, $node) {
    my $id = $disk->{qdev} // return;
    my $block = $self->{qemu}->call('query-block');
    my ($user) = grep { ($_->{qdev} // '') eq $id } @$block;
    return if !$user || !$user->{inserted} || $user->{inserted}{'node-name'} eq $node;
    my $path = $id =~ m{\A/} ? $id : "/machine/peripheral/$id";
    $self->{qemu}->call('qom-set', { path => $path, property => 'drive', value => $node });
    return;
}

# Options that are not given are reset to their defaults. QEMU does not report whether a throttle filter passes
# discards on; if it does, the node below still decides.
sub _reopen_options ($self, $disk, $node) {
    my %to = (file => $node, discard => 'unmap');
    return { driver => 'raw', 'node-name' => $disk->{pivot}, %to } if $disk->{pivot};
    my $now = $self->{nodes}{ $disk->{top} };
    my ($group) = $now->{file} =~ /"throttle-group": "([^"]*)"/;
    my %cache = map { $_ => $now->{cache}{$_} } qw(direct no-flush);
    return {
        driver => 'throttle',
        'node-name' => $disk->{top},
        'throttle-group' => $group,
        'read-only' => $now->{ro},
        'detect-zeroes' => $now->{detect_zeroes},
        cache => \%cache,
        %to,
    };
}

1;
