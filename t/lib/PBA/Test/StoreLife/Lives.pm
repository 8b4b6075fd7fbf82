package PBA::Test::StoreLife::Lives;

# Runs lives of PBA::Test::StoreLife, or of a subclass, as tests.

use v5.36;

use Exporter qw(import);
use List::Util qw(min);
use Test::More;

our @EXPORT_OK = qw(run_lives);

my $length = 100;    # steps of a life

# Runs as many steps, in lives of up to 100, as tests: each life with these options and the next seed. Ends with a life that
# finds a problem.
sub run_lives ($class, $steps, %options) {
    my %count;
    for (my $done = 0; $done < $steps; $done += $length) {
        my $life = $class->new(%options);
        my $problem;
        for (1 .. min($length, $steps - $done)) {
            $problem = $life->step // next;
            last;
        }
        is($problem, undef, "the life of seed $options{seed}") or diag($life->log);
        $count{$_} += $life->count->{$_} for keys $life->count->%*;
        last if defined($problem);
        system("rm -rf $options{dir}/* $options{scratch}/*");
        $options{seed}++;
    }
    note("$_: $count{$_}") for sort keys %count;
    return;
}

1;
