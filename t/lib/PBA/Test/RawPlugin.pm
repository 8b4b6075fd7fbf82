package PBA::Test::RawPlugin;

# A storage plugin, with a provider in the same file, to which it gives additional data of its own.

use v5.36;

use PVE::Storage;
use parent 'PVE::Storage::DirPlugin';

use PBA::Test::RawProvider;

BEGIN { @PBA::Test::ProviderOfPlugin::ISA = ('PBA::Test::RawProvider') }

sub api ($class) { return PVE::Storage::APIVER }

sub new_backup_provider ($class, $scfg, $storeid, $log) {
    return bless({}, 'PBA::Test::Nobody') if $scfg->{'another one'};
    die "$storeid is no storage of this plugin\n" if $storeid ne 'try-provider';
    return PBA::Test::ProviderOfPlugin->new($class, { mechanism => 'file-handle', $scfg->%* },
        $storeid, $log);
}

1;
