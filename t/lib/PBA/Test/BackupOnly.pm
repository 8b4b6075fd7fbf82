package PBA::Test::BackupOnly;

# A provider whose archives are restored by other means than its own methods.

use v5.36;

use parent -norequire, 'PBA::Test::RawProvider';

use PBA::Test::RawProvider;
use PVE::BackupAccess::CLI::TryProvider::Watch qw(@restore_methods);

for my $method (@restore_methods) {
    no strict 'refs';
    *{$method} = PVE::BackupProvider::Plugin::Base->can($method);
}

1;
