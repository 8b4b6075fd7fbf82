package PVE::Storage::DirPlugin;

# What many storage plugins derive from, outside of Proxmox VE.

use v5.36;

use parent 'PVE::Storage::Plugin';

sub options ($class) { return { path => { fixed => 1 } } }

1;
