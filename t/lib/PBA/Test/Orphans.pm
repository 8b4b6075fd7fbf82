package PBA::Test::Orphans;

# Adopts processes whose parent has ended.

use v5.36;

use Exporter qw(import);

require 'syscall.ph';    ## no critic (RequireBarewordIncludes)

our @EXPORT_OK = qw(adopt_orphans);

my $PR_SET_CHILD_SUBREAPER = 36;    # linux/prctl.h

# From now on, orphaned descendants of this process become its children.
sub adopt_orphans () {
    syscall(SYS_prctl(), $PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0 or die "prctl: $!\n";
    return;
}

1;
