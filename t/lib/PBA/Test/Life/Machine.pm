package PBA::Test::Life::Machine;

# The events of a PBA::Test::Life that its owner causes: changes of the machine and its disks.

use v5.36;

use File::Copy ();
use JSON::PP ();
use Time::HiRes ();

use PVE::BackupAccess;
use PVE::BackupAccess::Image;

my $step = 4 * 1024 * 1024;    # the unit of a resize: one bit of a bitmap of Proxmox' QEMU
my @ids = qw(disk0 disk1);
my @targets = qw(snapshot-access:test snapshot-access:second);

sub _restart ($self, @args) {
    $self->{fleecing} = $self->{dead} = 0;
    $self->{backend}->restart(@args);
    return;
}

# All guest data is in the images, but QEMU cannot store what it stores when it quits.
sub _crash ($self) {
    $self->_vm->kill9;
    $self->_restart;
    return;
}

# { content, files => { image => copy }, disks => which image is in which slot }
sub _take_disks ($self, $name) {
    my $vm = $self->_vm;
    my %saved = (content => { $self->{content}->%* });
    for my $id (@ids) {
        my $disk = $vm->disk($id);
        $saved{files}{ $disk->{file} } = "$disk->{file}.$name";
        $saved{disks}{$id} = { file => $disk->{file}, plugged => $disk->{plugged} };
        File::Copy::copy($disk->{file}, "$disk->{file}.$name") or die "copy: $!\n";
    }
    return \%saved;
}

sub _put_disks_back ($self, $saved) {
    for my $file (keys $saved->{files}->%*) {
        File::Copy::copy($saved->{files}{$file}, $file) or die "copy: $!\n";
    }
    $self->{content} = { $saved->{content}->%* };
    $self->_vm->disk($_)->@{qw(file plugged)} = $saved->{disks}{$_}->@{qw(file plugged)} for @ids;
    return;
}

sub _host_snapshot ($self) {
    $self->_vm->quit;
    $self->{host} = $self->_take_disks('host');
    return $self->_restart;
}

sub _host_rollback ($self) {
    return if !$self->{host};
    $self->_vm->quit;
    $self->_put_disks_back($self->{host});
    return $self->_restart;
}

sub _carry_bitmaps ($self, $is_on = 1) {
    my $state = $is_on ? JSON::PP::true : JSON::PP::false;
    my %with = (capability => 'dirty-bitmaps', state => $state);
    $self->_vm->qmp('migrate-set-capabilities', capabilities => [\%with]);
    return;
}

sub _has_lost_bitmap ($self) {
    return scalar(grep { $_->{inconsistent} } map { values $_->%* } values $self->_vm->bitmaps->%*);
}

# False if QEMU refuses. It may refuse while the access of a killed backup exists, and does so while there is a
# bitmap that it did not store before it was killed.
sub _wait_migrated ($self) {
    while (1) {
        my $now = $self->_vm->qmp('query-migrate');
        my $status = $now->{status} // 'none';
        return 1 if $status eq 'completed';
        my $why = $now->{'error-desc'} // '';
        return 0 if $status eq 'failed' && ($self->{dead} || $self->_has_lost_bitmap);
        die "migration failed: $why\n" if $status eq 'failed';
        Time::HiRes::sleep(0.02);
    }
}

# Saves the state of the machine to a file, including bitmaps; if QEMU refuses, the file stays unchanged. The
# machine is stopped afterwards.
sub _save_state ($self, $file) {
    $self->_carry_bitmaps;
    $self->_vm->qmp('migrate', uri => "exec:cat >$file.new");
    $self->_wait_migrated or return 0;
    rename("$file.new", $file) or die "rename: $!\n";
    return 1;
}

sub _start_from ($self, $file) {
    $self->_restart('-incoming', 'defer');
    $self->_carry_bitmaps;
    $self->_vm->qmp('migrate-incoming', uri => "exec:cat $file");
    $self->_wait_migrated;

    # QEMU 10.0 and later allow no writes to the disks of a guest that has not run since its migration.
    $self->_vm->qmp($_) for qw(cont stop);
    return;
}

sub _ram_snapshot ($self) {
    my $vm = $self->_vm;
    my $file = "$self->{store}/ram";
    $self->_save_state($file) or return;
    $self->{ram} = { $self->_take_disks('ram')->%*, state => $file };
    $vm->qmp('cont');
    $vm->qmp('stop');
    return;
}

sub _ram_rollback ($self) {
    my $ram = $self->{ram} // return;
    $self->_vm->kill9;
    $self->_put_disks_back($ram);
    return $self->_start_from($ram->{state});
}

sub _move ($self) {
    my $file = "$self->{store}/moving";
    $self->_save_state($file) or return 0;
    $self->_vm->quit;
    $self->_start_from($file);
    return 1;
}

# On the other node, the guest is backed up to that node's own directory of the same storage, or to the same directory.
# Notes belong to the directory.
sub _migrate_and_back ($self, %there) {
    $self->_move or return;
    $self->_write;
    local $self->{node} = $there{node} // $self->{node};
    $self->_backup(store => $there{store});
    $self->_move if !$self->{problem};
    return;
}

# { device => [the identities that the archives have of it, the newest first] }
sub _known_identities ($self, $provider) {
    my %known;
    return \%known if !$provider->can('list');
    for my $archive (grep { ($_->{guest} // '') eq $self->{uuid} } reverse $provider->list(100)->@*)
    {
        my $devices = $archive->{devices};
        push($known{$_}->@*, $devices->{$_}{identity} // ()) for keys $devices->%*;
    }
    return \%known;
}

# The guest is off, and its images are backed up.
sub _back_up_images ($self) {
    return if $self->{backend}->name ne 'upstream';
    $self->_vm->quit;
    my @disks = map {
        { device => $self->_name($_), file => $self->_file_of_name($_, 0), format => 'qcow2' }
    } @ids;
    my $images = PVE::BackupAccess::Image->start(disks => \@disks, uuid => $self->{uuid});
    $images->_identify($self->_known_identities($self->_provider($self->_current_store)));
    $self->_backup(images => $images);
    $images->stop;
    return $self->_restart;
}

# From now on, bitmaps survive a restart, or do so no more.
sub _change_persistence ($self) {
    $self->{persistent} = $self->{persistent} ? 0 : 1 if $self->{backend}->name eq 'upstream';
    return;
}

sub _savevm ($self) {
    $self->_recover;

    # QEMU (7.2, Proxmox' 11.0) hangs in a savevm that is to include bitmaps, whoever created them.
    $self->_carry_bitmaps(0);
    my $said = $self->_vm->hmp('savevm saved');
    $self->{vm_state} = { $self->{content}->%* } if $said eq '';
    return;
}

# QEMU refuses this while a disk has a bitmap.
sub _loadvm ($self) {
    my $saved = $self->{vm_state} // return;
    $self->_recover;
    my %options = (qmp => $self->{backend}->qmp_path);
    PVE::BackupAccess->forget(%options, 'target-id' => $_) for @targets;
    $self->_carry_bitmaps(0);    # as when it was saved

    # QEMU loads the disks first; QEMU 10.0 cannot load the rest after a migration that failed.
    my $said = $self->_vm->hmp('loadvm saved');
    return if $said ne '' && $said !~ m/ while loading VM state/;
    $self->{content} = { $saved->%* };
    $self->_vm->hmp('delvm saved');
    delete($self->{vm_state});
    return;
}

# Swaps the disks by hotplug, or, if the disks have names in the configuration, by swapping their files.
sub _swap ($self) {
    $self->_recover;
    my $vm = $self->_vm;
    my @disks = map { $vm->disk($_) } @ids;
    if ($self->{naming} eq 'qdev') {
        my @nodes = map { $_->{plugged} // $_->{id} } @disks;
        $vm->unplug($_) for @ids;
        $vm->plug($ids[0], $nodes[1]);
        $vm->plug($ids[1], $nodes[0]);
        return;
    }
    $vm->quit;
    ($disks[0]{file}, $disks[1]{file}) = ($disks[1]{file}, $disks[0]{file});
    return $self->_restart;
}

# Each disk stays in its slot and gets the node name of the other one, as libvirt does when it renumbers nodes.
sub _renumber ($self) {
    return if $self->{naming} eq 'drive';
    $self->_recover;
    my $vm = $self->_vm;
    my @disks = map { $vm->disk($_) } @ids;
    my %other = ($ids[0] => $ids[1], $ids[1] => $ids[0]);
    $vm->quit;
    ($disks[0]{file}, $disks[1]{file}) = ($disks[1]{file}, $disks[0]{file});
    $_->{plugged} = $other{ $_->{plugged} // $_->{id} } for @disks;
    return $self->_restart;
}

sub _replug ($self) {
    $self->_recover;
    my $vm = $self->_vm;
    $vm->unplug('disk0');
    $vm->plug('disk0', $vm->disk('disk0')->{plugged} // 'disk0');
    return;
}

# False if QEMU refuses.
sub _resize ($self, $by) {
    $self->_recover;
    my $vm = $self->_vm;
    my $file = $vm->disk('disk0')->{file};
    my $new = length($self->{content}{$file}) + $by;
    return 0 if $new < 2 * $step || $new > 6 * $step;
    my %disk = $self->{naming} eq 'drive' ? (device => 'drive-disk0') : ('node-name' => 'disk0');
    my $reply = $vm->qmp_try('block_resize', %disk, size => $new);
    return 0 if $reply->{error};
    my $content = $self->{content}{$file};
    $self->{content}{$file}
        = $by < 0 ? substr($content, 0, $new) : $content . "\0" x ($new - length($content));
    return 1;
}

1;
