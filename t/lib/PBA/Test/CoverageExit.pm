package PBA::Test::CoverageExit;

# For t/coverage.pl only: a child of a test that ends by POSIX::_exit also writes its counts. Peers do not,
# because they run no code that is counted, and writing takes time.

use v5.36;

use DynaLoader ();
use POSIX ();

sub _write_counters () {
    Devel::Cover::report();
    for my $library (@DynaLoader::dl_librefs) {
        my $symbol = DynaLoader::dl_find_symbol($library, 'pba_coverage_dump', 1) // next;
        DynaLoader::dl_install_xsub('PBA::Test::CoverageExit::dump', $symbol)->();
    }
    return;
}

my $exit = \&POSIX::_exit;
my %is_client = map { $_ => 1 } qw(main PBA::Test::Client);

{
    no warnings 'redefine';
    *POSIX::_exit = sub ($status) {
        _write_counters() if $is_client{ scalar caller };
        $exit->($status);
    };
}

1;
