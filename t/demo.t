# The demo boots a guest, backs it up in several ways, restores the backups, and compares them itself.

use v5.36;

use Test::More;

my $output = qx($^X -Mblib examples/demo.pl 2>&1);
is($?, 0, 'the demo ends well') or diag($output);
like($output, qr/demo: verified/, 'the demo has verified its restores');
done_testing;
