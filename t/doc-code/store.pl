# An empty directory for a provider's backups: $directory.

use v5.36;

use File::Temp ();

use PBA::Test::DocCode;

return sub ($block) {
    my $directory = File::Temp->newdir('pba-doc.XXXXXX', TMPDIR => 1);
    PBA::Test::DocCode::run_perl($block, '$directory' => "$directory");
};
