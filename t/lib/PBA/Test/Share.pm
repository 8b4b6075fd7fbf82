package PBA::Test::Share;

# The part of a sweep that a plain run includes: one half on the machine's QEMU, the other half on a newer one
# (PBA_QEMU). PBA_FULL=1 includes everything on both.
#
#   for my $row (share(@rows)) { ... }

use v5.36;

use Exporter qw(import);

our @EXPORT_OK = qw(share);

sub share (@all) {
    return @all if $ENV{PBA_FULL};
    my $first = $ENV{PBA_QEMU} ? 1 : 0;
    return @all[grep { $_ % 2 == $first } 0 .. $#all];
}

1;
