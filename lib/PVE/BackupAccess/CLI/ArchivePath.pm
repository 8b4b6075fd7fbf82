package PVE::BackupAccess::CLI::ArchivePath;

# Finds the archive that a path means: DIRECTORY/vm/100/20261122T064953Z, or the latest one of a
# guest, by number or name: DIRECTORY/100 or DIRECTORY/web1, optionally with /latest. In a Ceph
# cluster, rbd:POOL[/NAMESPACE] takes the place of DIRECTORY, and a guest is vm/100 or vm/web1.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::CLI::Store qw(check_store is_rbd log_line provider_in store_number_of);

our @EXPORT_OK
    = qw(archive_at chosen_devices file_of find_archive provider_for refuse_guest without_slash);

# A directory without the slash at its end.
sub without_slash ($path) { return $path =~ s!(?<=.)/+\z!!r }

my sub is_store ($directory) { return -d "$directory/vm" || -d "$directory/ct" }

# (directory, guest) of a path to a guest.
my sub split_guest ($path) {
    my ($directory, $guest) = without_slash($path) =~ m!\A(?:(.*)/)?([^/]+)\z!s or return;
    $directory //= '.';
    $directory = '/' if $directory eq '';
    $directory =~ s!(?:\A|/)(?:vm|ct)\z!! if $guest =~ m/\A[0-9]+\z/ && !is_store($directory);
    return ($directory eq '' ? '.' : $directory, $guest);
}

# The guest's number. It may be given by name; undef if no guest has it.
my sub number_in ($opt, $store, $guest) {
    return $guest =~ m/\A[1-9][0-9]{0,8}\z/ ? $guest : store_number_of($opt, $store, $guest);
}

# (directory, guest as named in the path, number of the guest) of the path of an existing guest.
my sub guest_at ($opt, $path) {
    my ($directory, $guest) = split_guest($path);
    return if !defined($guest) || !is_store($directory);
    my $vmid = number_in($opt, $directory, $guest);
    return if !defined($vmid) || !grep { -d "$directory/$_/$vmid" } qw(vm ct);
    return ($directory, $guest, $vmid);
}

# The same for a Ceph cluster, where the path has vm/ or ct/ before the guest: without it, the name might be a namespace's.
my sub rbd_guest_at ($opt, $path) {
    my ($store, $guest) = $path =~ m!\A(.*)/(?:vm|ct)/([^/]+)/*\z!s or return;
    my $vmid = number_in($opt, $store, $guest);
    return defined($vmid) ? ($store, $guest, $vmid) : ();
}

# Dies if the path that should be a store is that of a guest in a store. It may be a directory, too.
sub refuse_guest ($opt, $path) {
    return if is_rbd($path) || is_store($path);
    my ($store, $guest, $vmid) = guest_at($opt, $path) or return;
    my $option = $guest eq $vmid ? '--vmid' : '--guest';
    die "$path is a guest - give the directory: $store $option $guest\n";
}

# The error for a path in a store at which there is no guest; undef if the path is not in a store.
my sub missing_guest ($path) {
    my ($directory, $guest) = split_guest($path);
    return undef if is_rbd($path) || !defined($guest) || !is_store($directory);
    return "there is no guest '$guest' in $directory - 'list' shows its guests\n";
}

# The provider of an existing directory or pool. The storage's name only matters for backups.
sub provider_for ($directory, $opt = {}) {
    refuse_guest($opt, $directory);
    die missing_guest($directory)
        // "$directory is not a directory - check the path, and that it is mounted\n"
        if !is_rbd($directory) && !-d $directory;
    my $provider = provider_in($opt, check_store($opt, $directory), 'none', \&log_line);
    $provider->wait_for_others($opt->{wait} // 0);
    return $provider;
}

my sub latest_of ($opt, $directory, $vmid, $guest) {
    my ($latest)
        = sort { $b->{time} <=> $a->{time} } provider_for($directory, $opt)->list($vmid)->@*;
    die "guest $guest has no archive in $directory\n" if !$latest;
    return ($directory, $latest->{volname});
}

# (directory, name) of the latest archive of the guest at that path; nothing if there is no such guest.
my sub find_latest ($opt, $path) {
    my $find = is_rbd($path) ? \&rbd_guest_at : \&guest_at;
    my ($directory, $guest, $vmid) = $find->($opt, $path) or return;
    return latest_of($opt, $directory, $vmid, $guest);
}

# (directory, name) of the archive at that path; nothing if an archive cannot have this path.
sub find_archive ($opt, $path) {
    my $given = $path;
    my $is_latest = $path =~ s!/latest/*\z!!;
    my ($directory, $volname) = $path =~ m!\A(?:(.*)/)?((?:vm|ct)/[0-9]+/[^/]+)/*\z!s;
    if ($is_latest || !defined($volname)) {
        my @found = find_latest($opt, $path);
        @found = find_latest($opt, $given) if $is_latest && !@found;    # a guest called 'latest'
        return @found;
    }
    return (defined($directory) ? $directory eq '' ? '/' : $directory : '.', $volname);
}

# Says why a path does not name an archive.
my sub problem_of ($path) {
    return missing_guest($path =~ s!/latest/*\z!!r)
        // "$path is not an archive - give DIRECTORY/vm/100/20261122T064953Z, or DIRECTORY/100"
        . " for the latest archive of guest 100\n";
}

# The same as find_archive, but dies instead of returning nothing.
sub archive_at ($opt, $path) {
    my ($directory, $volname) = find_archive($opt, $path) or die problem_of($path);
    return ($directory, $volname);
}

# The archive's devices, or the requested one.
sub chosen_devices ($volumes, $device) {
    my @devices = sort keys $volumes->%*;
    return @devices if !defined($device);
    die "the archive has no device $device - it has " . join(', ', @devices) . "\n"
        if !$volumes->{$device};
    return ($device);
}

# The name of a device's file.
sub file_of ($device, $suffix) {
    utf8::encode($device);
    return $device =~ s!/!%2F!gr . ".$suffix";
}

1;
