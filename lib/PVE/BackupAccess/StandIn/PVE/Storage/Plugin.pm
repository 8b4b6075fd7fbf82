package PVE::Storage::Plugin;

# The base class of storage plugins, for use outside of Proxmox VE: registration, a section of
# storage.cfg checked against the plugin's options, and the paths of archives. A plugin must have
# its own versions of all other methods.

use v5.36;

my %plugins;

sub register ($class) {
    $plugins{ $class->type } = $class;
    return;
}

# { ids => { storage id => { type, option => value } } } of a storage.cfg.
sub parse_config ($class, $filename, $raw) {
    my (%storages, $section);
    for my $line (split(m/\n/, $raw)) {
        next if $line =~ m/\A\s*(?:#|\z)/;
        if ($line =~ m/\A(\S+):\s+(\S+)\z/) {
            $section = $storages{$2} = { type => $1 };
            die "$filename: there is no storage type '$1'\n" if !$plugins{$1};
            next;
        }
        my ($option, $value) = $line =~ m/\A\s+(\S+)(?:\s+(.*))?\z/
            or die "$filename: odd line '$line'\n";
        die "type '$section->{type}' has no option '$option'\n"
            if !$plugins{ $section->{type} }->options->{$option};
        $section->{$option} = $value // 1;
    }
    $_->{content} = { map { $_ => 1 } split(m/,/, $_->{content} // '') } for values %storages;
    return { ids => \%storages };
}

sub parse_volname ($class, $volname) {
    my ($name) = $volname =~ m!\Abackup/(.+)\z!s or die "no archive '$volname'\n";
    return ('backup', $name);
}

sub get_subdir ($class, $scfg, $vtype) {
    die "storage definition has no path\n" if !$scfg->{path};
    return "$scfg->{path}/" . ($scfg->{'content-dirs'}{$vtype} // 'dump');
}

sub filesystem_path ($class, $scfg, $volname, @) {
    my ($vtype, $name, $vmid) = $class->parse_volname($volname);
    my $path = $class->get_subdir($scfg, $vtype) . "/$name";
    return wantarray ? ($path, $vmid, $vtype) : $path;
}

sub new_backup_provider ($class, @) {
    die "the storage plugin $class has no method new_backup_provider\n";
}

sub lookup ($class, $type) {
    return $plugins{$type} // die "there is no storage type '$type'\n";
}

1;
