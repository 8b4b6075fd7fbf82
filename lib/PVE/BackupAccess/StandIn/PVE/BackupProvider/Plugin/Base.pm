package PVE::BackupProvider::Plugin::Base;

# The methods of Proxmox VE's backup provider API, for plugins outside of Proxmox VE. A plugin must
# have its own version of each method that is called.

use v5.36;

# The arguments of each method after the object or class. t/drift.t compares them with Proxmox VE's.
our %ARGUMENTS = (
    new => 'storage_plugin scfg storeid log_function',
    provider_name => '',
    job_init => 'start_time',
    job_cleanup => '',
    backup_init => 'vmid vmtype start_time',
    backup_cleanup => 'vmid vmtype success info',
    backup_get_mechanism => 'vmid vmtype',
    backup_handle_log_file => 'vmid filename',
    backup_vm_query_incremental => 'vmid volumes',
    backup_vm => 'vmid guest_config volumes info',
    backup_container_prepare => 'vmid info',
    backup_container => 'vmid guest_config exclude_patterns info',
    restore_get_mechanism => 'volname',
    archive_get_guest_config => 'volname',
    archive_get_firewall_config => 'volname',
    restore_vm_init => 'volname',
    restore_vm_cleanup => 'volname',
    restore_vm_volume_init => 'volname device_name info',
    restore_vm_volume_cleanup => 'volname device_name info',
    restore_container_init => 'volname info',
    restore_container_cleanup => 'volname info',
);

for my $method (keys(%ARGUMENTS)) {
    my $missing = sub ($self, @) {
        my $class = ref($self) || $self;
        die "the backup provider $class has no method $method\n";
    };
    no strict 'refs';
    *{$method} = $missing;
}

1;
