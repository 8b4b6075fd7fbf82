package PVE::BackupAccess::Provider::Store::List;

# The entries of list: what a store says about a guest's archives.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Try qw(attempt reason);

our @EXPORT_OK = qw(list_guest);

my sub parts_of ($archive) {
    my %parts;
    for my $device ($archive->devices) {
        my $about = $archive->device($device);
        $parts{$device} = {
            size => $about->{size},
            'bitmap-mode' => $about->{'bitmap-mode'},
            'image-size' => $archive->file_size($device),
            (map { $_ => $about->{$_} } grep { defined($about->{$_}) } qw(parent identity)),
        };
    }
    my $container = $archive->container // return \%parts;
    return { container =>
            { size => 0 + $container->{size}, 'image-size' => -s $archive->container_path } };
}

my %types = (vm => 'qemu', ct => 'lxc');

# The archives of the guest at a place in the store, such as vm/100, the oldest first. time_of converts a name to a time.
sub list_guest ($guest, $place, $time_of) {
    my ($directory, $vmid) = split(m!/!, $place);
    my %about = (vmid => 0 + $vmid, type => $types{$directory});
    my @list;
    for my $name ($guest->names) {
        my $entry = { volname => "$place/$name", time => $time_of->($name), %about };
        $entry->{protected} = 1 if $guest->is_protected($name);
        my $archive;
        my $error = attempt { $archive = $guest->archive($name) };
        $entry->{problem} = reason($error) if $error;
        $entry->@{qw(size devices)} = ($archive->file_size, parts_of($archive)) if $archive;
        $entry->{guest} = $archive->guest if $archive && defined($archive->guest);
        push(@list, $entry);
    }
    return @list;
}

1;
