package PVE::Storage::DirPlugin;

# The base class of many storage plugins, for use outside of Proxmox VE.

use v5.36;

use parent 'PVE::Storage::Plugin';

sub options ($class) { return { path => { fixed => 1 } } }

1;
