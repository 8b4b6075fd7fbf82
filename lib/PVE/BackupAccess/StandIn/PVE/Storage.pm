package PVE::Storage;

# The parts of PVE::Storage that a storage plugin needs outside of Proxmox VE.

use v5.36;

use PVE::Storage::Plugin;

sub APIVER () { return 15 }
sub APIAGE () { return 6 }

# Marks the newest archives, as many as keep-last says, to be kept, and all others to be removed.
sub prune_mark_backup_group ($group, $keep) {
    my $left = $keep->{'keep-last'} || die "the stand-in knows keep-last only\n";
    for my $entry (sort { $b->{ctime} <=> $a->{ctime} } $group->@*) {
        next if ($entry->{mark} // '') eq 'protected';
        $entry->{mark} = $left-- > 0 ? 'keep' : 'remove';
    }
    return;
}

1;
