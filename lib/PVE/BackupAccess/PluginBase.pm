package PVE::BackupAccess::PluginBase;

# Supplies a substitute for PVE::BackupProvider::Plugin::Base if Proxmox VE's libpve-storage-perl is
# not installed, so that plugins that derive from it can be loaded. Its directory is the last one in
# the search path, so an installed class takes precedence.

use v5.36;

my $directory = __FILE__ =~ s!PluginBase\.pm\z!StandIn!r;

push(@INC, $directory) if !grep { $_ eq $directory } @INC;

1;
