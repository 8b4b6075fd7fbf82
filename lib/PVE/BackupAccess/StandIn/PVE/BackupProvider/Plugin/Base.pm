package PVE::BackupProvider::Plugin::Base;

# The methods of Proxmox VE's backup provider API, for plugins outside of Proxmox VE. A plugin has to
# have its own of each that is called.

use v5.36;

my @methods = qw(
    new provider_name job_init job_cleanup
    backup_init backup_cleanup backup_get_mechanism backup_handle_log_file
    backup_vm_query_incremental backup_vm backup_container_prepare backup_container
    restore_get_mechanism archive_get_guest_config archive_get_firewall_config
    restore_vm_init restore_vm_cleanup restore_vm_volume_init restore_vm_volume_cleanup
    restore_container_init restore_container_cleanup
);

for my $method (@methods) {
    my $missing = sub ($self, @) {
        my $class = ref($self) || $self;
        die "the backup provider $class has no method $method\n";
    };
    no strict 'refs';
    *{$method} = $missing;
}

1;
