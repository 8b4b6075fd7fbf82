package PVE::BackupAccess::Provider::Store::WithContainers;

# A provider that also stores containers: the methods of the API for them. Its archives implement what Store/Archive.pm
# requires for containers.

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Container;
use PVE::BackupAccess::Provider::Store::Tree qw(mechanism_of);

use parent qw(PVE::BackupAccess::Provider::Store);

my $Container = 'PVE::BackupAccess::Provider::Store::Container';
my $Tree = 'PVE::BackupAccess::Provider::Store::Tree';

my sub fail ($class, $message) { PVE::BackupAccess::Error->throw($class, $message) }

sub backup_get_mechanism ($self, $vmid, $vmtype) {
    return { qemu => 'nbd', lxc => 'directory' }->{$vmtype};
}

# From here on the keeper holds the lock and releases it with the archive, because Proxmox VE prunes before it calls
# backup_cleanup.
sub backup_container_prepare ($self, $vmid, $info) {
    my $task = $self->_task($vmid);
    my ($guest, $archive) = ($task->{guest}, $self->_begin_archive($task, $info));
    $task->{container} = $Container->start(
        $archive,
        config => $PVE::BackupAccess::Provider::Store::guest_config,
        limit => $info->{'bandwidth-limit'},
        check => !$self->{'no-check'},
        publish => sub () { $guest->publish($archive) },
        discard => sub () { $guest->give_up($archive) },
        unlock => sub () { $guest->drop(delete($task->{lock})) },
    );
    $task->{'left lock'} = $guest->leave(delete($task->{lock}));
    return;
}

sub backup_container ($self, $vmid, $guest_config_text, $exclude_patterns, $info) {
    my $container = $self->_task($vmid)->{container} // fail('StateError',
        "guest $vmid: backup_container_prepare must be called before backup_container");
    $container->feed($guest_config_text, $exclude_patterns // [], $info, $self->{log});
    return;
}

sub backup_cleanup ($self, $vmid, $vmtype, $success, $info) {
    my $task = $self->{task} // return { stats => {} };
    if (my $container = $task->{container}) {
        $container->end($success);
        delete($task->{'left lock'});
        my $guest = $task->{guest} = $self->_guest($task->{place});
        $task->{published} = $guest->has($task->{name});

        # What remains of the archive is removed under the lock: another process' backup may hold it by now.
        delete($task->{archive});
        $self->_settle($guest) if !$task->{published};
    }
    return $self->SUPER::backup_cleanup($vmid, $vmtype, $success, $info);
}

# ---- restore ----

sub restore_get_mechanism ($self, $volname, @) {
    my $archive = $self->_archive($volname);
    return ('qemu-img', 'qemu') if !$archive->container;
    return (mechanism_of($archive), 'lxc');
}

sub restore_container_init ($self, $volname, @) {
    my ($place) = $self->_parse($volname);
    my $reading = $self->_guest($place)->read_lock;
    my $archive = $self->_archive($volname);
    fail('ArchiveError', "archive $volname is of a virtual machine, not of a container")
        if !$archive->container;
    my $tree = $Tree->new($archive);
    $self->{'container restores'}{$volname} = { tree => $tree, reading => $reading };
    return { $tree->mechanism eq 'tar' ? 'tar-path' : 'archive-directory' => $tree->path };
}

sub restore_container_cleanup ($self, $volname, @) {
    delete($self->{'container restores'}{$volname});
    return;
}

1;
