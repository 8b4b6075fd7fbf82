package PVE::BackupAccess::Provider::Store::List;

# The entries of list: what a store says about a guest's archives.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Provider::Store::Content qw(is_damage);
use PVE::BackupAccess::Try qw(attempt reason);

our @EXPORT_OK = qw(known_damage list_guest);

# Returns { device => text }: the damage found in the archive, or in an archive it depends on. Must be called
# for a guest's archives from oldest to newest, with the results of the earlier calls in $damaged; there, the device '' stands for
# all devices of an archive that is missing or cannot be used. Only recorded damage is looked up; no data is read.
sub known_damage ($archive, $damaged) {
    my ($name, %text) = ($archive->name);
    for my $device ($archive->devices) {
        my ($parent, $there) = $archive->parent_of($device);
        my $in
            = $archive->is_known_damaged($device) ? $name
            : defined($parent) ? ($damaged->{$parent} // {})->{$there} // $damaged->{$parent}{''}
            : undef;
        next if !defined($in);
        $damaged->{$name}{$device} = $in;
        my $how
            = exists($damaged->{$in}{''})
            ? 'which is missing or cannot be used'
            : 'in which damage was found';
        $text{$device} = $in eq $name ? 'damage was found in it' : "it builds on $in, $how";
    }
    $text{container} = 'damage was found in it'
        if $archive->container && $archive->is_known_damaged('container');
    return \%text;
}

my sub damage_of ($archive, $damaged) {
    my $known = known_damage($archive, $damaged);
    return ($archive->manifest_problem // (), map { "$_: $known->{$_}" } sort keys $known->%*);
}

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
    return {
        container => { size => 0 + $container->{size}, 'image-size' => $archive->container_bytes }
    };
}

my %types = (vm => 'qemu', ct => 'lxc');

# The archives that this one builds on, but that do not exist.
my sub missing_parents ($archive, $is_there) {
    return grep { !$is_there->{$_} } map { ($archive->parent_of($_))[0] // () } $archive->devices;
}

# The archives of the guest at a place in the store, such as vm/100, the oldest first. time_of converts a name to a time.
sub list_guest ($guest, $place, $time_of) {
    my ($directory, $vmid) = split(m!/!, $place);
    my %about = (vmid => 0 + $vmid, type => $types{$directory});
    my (@list, %damaged);
    my @names = $guest->names;
    my %is_there = map { $_ => 1 } @names, map { $_->name } $guest->being_removed([]);
    for my $name (@names) {
        my $entry = { volname => "$place/$name", time => $time_of->($name), %about };
        $entry->{protected} = 1 if $guest->is_protected($name);
        my $archive;
        my $error = attempt { $archive = $guest->archive($name) };
        next if $error && !$guest->has($name);    # another process has just removed it
        $entry->{problem} = reason($error) if $error;
        $damaged{$_}{''} = $_
            for $archive ? missing_parents($archive, \%is_there) : is_damage($error) ? $name : ();
        $entry->@{qw(id size devices)} = ($archive->id, $archive->file_size, parts_of($archive))
            if $archive;
        my @damage = $archive ? damage_of($archive, \%damaged) : ();
        $entry->{damaged} = \@damage if @damage;
        $entry->{guest} = $archive->guest if $archive && defined($archive->guest);
        push(@list, $entry);
    }
    return @list;
}

1;
