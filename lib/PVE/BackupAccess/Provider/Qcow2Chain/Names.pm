package PVE::BackupAccess::Provider::Qcow2Chain::Names;

# Supports guests that are known by name. The directories of archives have numbers as names, and a file in each
# contains the guest's name.

use v5.36;

use Exporter qw(import);
use Fcntl qw(O_CREAT O_RDWR);
use List::Util qw(uniq);

use PVE::BackupAccess::Argument qw(bad_argument);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(entries file_exists make_directory read_if_there replace_file);
use PVE::BackupAccess::Try qw(attempt rethrow);
use PVE::BackupAccess::Wait qw(wait_for_lock);

our @EXPORT_OK = qw(check_name name_of number_for number_of numbers_in);

my sub fail ($message) { PVE::BackupAccess::Error->throw('SystemError', $message) }

# Accepts the names of libvirt and of Proxmox VE, but nothing that could be taken for a number or a path.
sub check_name ($name) {
    my ($checked) = $name =~ m/\A([A-Za-z0-9_][A-Za-z0-9_.-]{0,127})\z/
        or bad_argument(
              "'$name' is not a valid name of a guest - a name has up to 128 letters, digits,"
            . q( '_', '-' and '.', and does not begin with '-' or '.'));
    bad_argument("'$name' is a number, not a guest's name") if $checked =~ m/\A[0-9]+\z/;
    return $checked;
}

# The numbers of guests that have a directory in one of these. A plain file may have any name.
sub numbers_in (@directories) {
    return uniq(
        map {
            my $directory = $_;
            map { m/\A([1-9][0-9]{0,8})\z/ && !-f "$directory/$_" ? $1 : () } entries($directory);
        } @directories
    );
}

# The name of the guest with that number, undef if it has none.
sub name_of ($store, $vmid) {
    my $content = read_if_there("$store/vm/$vmid/name") // return undef;
    my ($name) = $content =~ m/\A([A-Za-z0-9_.-]+)\n\z/;
    return $name;
}

# The number of the guest with that name, undef if there is none. Dies if that is unknown, because a name cannot be read.
sub number_of ($store, $name) {
    my $unread;
    for my $vmid (numbers_in("$store/vm")) {
        my $known;
        my $error = attempt { $known = name_of($store, $vmid) };
        return $vmid if ($known // '') eq $name;
        $unread //= $error;
    }
    rethrow($unread) if $unread;
    return undef;
}

# The same, but a new guest gets the lowest free number. The lock keeps two processes from taking the same number.
sub number_for ($store, $name) {
    make_directory("$store/vm");
    my $path = "$store/vm/.lock";
    sysopen(my $lock, $path, O_RDWR | O_CREAT, 0600) or fail("cannot open $path - $!");
    wait_for_lock($lock, $path);
    my $known = number_of($store, $name);
    return $known if defined($known);
    my $vmid = 1;
    $vmid++ while file_exists("$store/vm/$vmid") || file_exists("$store/ct/$vmid");
    make_directory("$store/vm/$vmid");
    replace_file("$store/vm/$vmid/name", "$name\n");
    return $vmid;
}

1;
