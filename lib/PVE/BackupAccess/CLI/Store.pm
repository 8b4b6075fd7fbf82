package PVE::BackupAccess::CLI::Store;

# The argument DIRECTORY: a directory, or rbd:POOL[/NAMESPACE] in a Ceph cluster.

use v5.36;

use Cwd ();
use Exporter qw(import);

use PVE::BackupAccess::CLI qw(absolute untainted usage_error);
use PVE::BackupAccess::CLI::Output qw(say_error);
use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Provider::Qcow2Chain::Names ();

our @EXPORT_OK
    = qw(check_store is_rbd log_line provider_in store_id store_name_of store_number_for store_number_of store_numbers);

my $names = 'PVE::BackupAccess::Provider::Qcow2Chain::Names';

# The log function of a provider when no backup runs.
sub log_line ($level, $message) {
    say_error("$level: $message") if $level !~ m/\A(?:debug|info)\z/;
}

sub is_rbd ($store) { return $store =~ m/\Arbd:/ }

my sub rbd_settings ($opt, $store) {
    my ($pool, $namespace) = $store =~ m!\Arbd:([^/]+)(?:/([^/]+))?\z!
        or usage_error(
        "a store in a Ceph cluster is called rbd:POOL or rbd:POOL/NAMESPACE, not '$store'");
    return {
        pool => $pool,
        namespace => $namespace,
        defined($opt->{'ceph-conf'}) ? ('ceph-conf' => absolute($opt->{'ceph-conf'})) : (),
        'ceph-user' => $opt->{'ceph-user'},
        'no-check' => $opt->{'no-check'},
    };
}

# Dies unless the store exists. Returns it as an absolute path, or unchanged if it is in a cluster.
sub check_store ($opt, $store) {
    return $store if is_rbd($store);
    for my $option (grep { defined($opt->{$_}) } qw(ceph-conf ceph-user)) {
        usage_error("--$option needs rbd:POOL");
    }
    die "$store is not a directory - create it, or mount it, first\n" if !-d $store;
    return untainted(Cwd::realpath($store));
}

# The provider of a checked store. $name is the storage's name, which only matters for backups.
sub provider_in ($opt, $store, $name, $log) {
    if (is_rbd($store)) {
        usage_error('--compress cannot be used with rbd:POOL') if $opt->{compress};
        require PVE::BackupAccess::Provider::RBD;
        return PVE::BackupAccess::Provider::RBD->new(undef, rbd_settings($opt, $store), $name,
            $log);
    }
    my $provider
        = PVE::BackupAccess::Provider::Qcow2Chain->new(undef,
        { path => $store, 'no-check' => $opt->{'no-check'} },
        $name, $log);
    $provider->compress($opt->{compress});
    return $provider;
}

# ---- guests by name ----

my sub rbd_store ($opt, $store) {
    state %stores;
    return $stores{$store} //= provider_in($opt, $store, 'none', \&log_line)->store;
}

sub store_name_of ($opt, $store, $vmid) {
    return is_rbd($store)
        ? rbd_store($opt, $store)->name_of($vmid)
        : $names->can('name_of')->($store, $vmid);
}

sub store_number_of ($opt, $store, $name) {
    return is_rbd($store)
        ? rbd_store($opt, $store)->number_of($name)
        : $names->can('number_of')->($store, $name);
}

sub store_number_for ($opt, $store, $name) {
    return is_rbd($store)
        ? rbd_store($opt, $store)->number_for($name)
        : $names->can('number_for')->($store, $name);
}

# The numbers of all guests, with or without a name.
sub store_numbers ($opt, $store) {
    return rbd_store($opt, $store)->vmids if is_rbd($store);
    return $names->can('numbers_in')->("$store/vm", "$store/ct");
}

# The store's unique ID; undef for a directory.
sub store_id ($opt, $store) { return is_rbd($store) ? rbd_store($opt, $store)->id : undef }

1;
