package PVE::BackupAccess::PluginBase;

# Lets plugins that derive from PVE::BackupProvider::Plugin::Base be loaded where Proxmox VE's
# libpve-storage-perl is not installed. The stand-in's directory is the last one that is searched, so
# that the real class always wins.

use v5.36;

my $directory = __FILE__ =~ s!PluginBase\.pm\z!StandIn!r;

push(@INC, $directory) if !grep { $_ eq $directory } @INC;

1;
