package PBA::Test::Life::Example;

# A provider of PBA::Test::Life that supports IDs, but not identities: the example of doc/providers.md.

use v5.36;

use File::Path qw(remove_tree);
use FindBin;
use lib "$FindBin::Bin/../examples/lib";

use parent qw(PBA::Test::Life::Strike Example::RawImages);

sub content_of ($self, $archive, $device) {
    return ('raw', "$self->{dir}/$archive/$device.raw");
}

sub newest ($self) {
    my ($name) = reverse(sort(glob("$self->{dir}/100/*/id")));
    return $name ? $name =~ s{.*/(100/[0-9]+)/id\z}{$1}r : undef;
}

sub remove ($self, $archive) {
    remove_tree("$self->{dir}/$archive");
    return;
}

1;
