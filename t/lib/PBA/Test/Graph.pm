package PBA::Test::Graph;

# QEMU's block graph in a form that can be compared. The names that QEMU generates (#block123) are different
# each time, so such nodes are named after their driver and the nodes below them.

use v5.36;

# $graph is from x-debug-query-block-graph, $named from query-named-block-nodes (for drivers and files). File
# names below $dir are shown without it. Returns { nodes => ["driver name", ...], edges => ["parent child-role
# child", ...] }, both sorted.
sub normalise ($graph, $named, $dir) {
    my %info = map { $_->{'node-name'} => $_ } @$named;
    my %node = map { $_->{id} => $_ } $graph->{nodes}->@*;
    my %below;
    push $below{ $_->{parent} }->@*, $_ for $graph->{edges}->@*;

    my %label;
    my $label = sub ($self, $id) {
        return $label{$id} //= _label(
            $node{$id},
            \%info,
            $dir,
            sub {
                return map { [$_->{name}, $self->($self, $_->{child})] } ($below{$id} // [])->@*;
            }
        );
    };
    my (@nodes, @edges);
    for my $id (sort { $a <=> $b } keys %node) {
        my $driver = ($info{ $node{$id}{name} // '' } // {})->{drv} // $node{$id}{type};
        push @nodes, "$driver " . $label->($label, $id);
    }
    for my $edge ($graph->{edges}->@*) {
        my @ends = map { $label->($label, $edge->{$_}) } qw(parent child);
        push @edges, "$ends[0] $edge->{name} $ends[1]";
    }
    return { nodes => [sort @nodes], edges => [sort @edges] };
}

sub _label ($node, $info, $dir, $children) {
    my $name = $node->{name} // '';
    return $name if $name ne '' && $name !~ /^#block\d+$/;

    my $known = $info->{$name};
    my $driver = $known ? $known->{drv} : $node->{type};
    my @below = sort map { "$_->[0]=$_->[1]" } $children->();
    @below = ($known->{file} =~ s{^\Q$dir\E/}{}r) if !@below && $known;
    return "#$driver(" . join(' ', @below) . ')';
}

1;
