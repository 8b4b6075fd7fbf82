# QEMU's block graph by the names of its nodes, and replies with another form.
#
# One QEMU is enough: none is started.

use v5.36;

use Test::More;

use PVE::BackupAccess::Reply qw(edges_of);

my %graph = (
    nodes => [
        { id => 1, type => 'block-backend', name => 'drive0' },
        { id => 2, type => 'block-driver', name => 'n0' },
        { id => 3, type => 'block-driver', name => '#block7' },
        { id => 4, type => 'block-job', name => 'mirror' },
    ],
    edges => [
        { parent => 1, child => 2, name => 'root' },
        { parent => 2, child => 3, name => 'file' },
        { parent => 4, child => 2, name => 'main node' },
    ],
);
is_deeply(
    [edges_of(\%graph)],
    [
        { parent => '', child => 'n0', name => 'root' },
        { parent => 'n0', child => '#block7', name => 'file' },
        { parent => '', child => 'n0', name => 'main node' },
    ],
    'nodes have names, others none'
);

my @node = $graph{nodes}[1];
my %odd = (
    'an edge to no node' => [{ nodes => \@node, edges => [{ parent => 2, child => 9 }, {}] }, []],
    'an edge without a name or a parent' => [
        { nodes => \@node, edges => [{ child => 2 }] },
        [{ parent => '', child => 'n0', name => '' }]
    ],
    'nodes without anything' => [{ nodes => [{}], edges => [{ parent => 2, child => 2 }] }, []],
);
is_deeply([edges_of($odd{$_}[0])], $odd{$_}[1], $_) for sort keys %odd;

my %wrong = (
    'a list' => [],
    'nothing' => undef,
    'no nodes' => { edges => [] },
    'no edges' => { nodes => [] },
    'an edge that is a number' => { nodes => [], edges => [1] },
);
for my $name (sort keys %wrong) {
    ok(!eval { edges_of($wrong{$name}); 1 }, "$name: refused");
    is(
        "$@",
        "qmp command 'x-debug-query-block-graph' failed - the reply is not an array of objects\n",
        "$name: the error names the command"
    );
}

done_testing;
