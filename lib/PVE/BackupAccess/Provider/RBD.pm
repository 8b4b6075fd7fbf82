package PVE::BackupAccess::Provider::RBD;

use v5.36;

use PVE::BackupAccess::Argument qw(bad_argument);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::RBD::Archive;
use PVE::BackupAccess::Provider::RBD::Ceph;
use PVE::BackupAccess::Provider::RBD::Guest;
use PVE::BackupAccess::Provider::RBD::Store;
use PVE::BackupAccess::Provider::Store::Content qw(damage describe);
use PVE::BackupAccess::Provider::Store::Devices
    qw(begin_devices check_device for_devices store_device);
use PVE::BackupAccess::Try qw(attempt reason);

use parent qw(PVE::BackupAccess::Provider::Store);

my sub checked_name ($what, $name) {
    my ($good) = ($name // '') =~ m!\A([^/\@:\s"'][^/\@:\s]*)\z!
        or bad_argument("$what must be the name of a $what, not '" . ($name // '') . q('));
    return $good;
}

sub new ($class, $storage_plugin, $scfg, $storeid, $log_function = undef) {
    my %settings = $class->_settings($storage_plugin, $scfg, $storeid, $log_function);
    my $namespace = $scfg->{namespace};
    my $ceph = PVE::BackupAccess::Provider::RBD::Ceph->new(
        pool => checked_name('pool', $scfg->{pool}),
        namespace => defined($namespace) ? checked_name('namespace', $namespace) : undef,
        conf => $class->can('_checked_path')
            ->('ceph-conf', $scfg->{'ceph-conf'} // '/etc/ceph/ceph.conf'),
    );
    my $store = PVE::BackupAccess::Provider::RBD::Store->new($ceph);
    return bless({ %settings, ceph => $ceph, store => $store }, $class);
}

sub provider_name ($self) { return 'RBD' }

# ---- what Store wants to know ----

sub _guest ($self, $place) {
    return PVE::BackupAccess::Provider::RBD::Guest->new($self->%{qw(ceph store wait)},
        place => $place);
}

sub _places_of_type ($self) { return { qemu => 'vm' } }
sub _where ($self) { return 'rbd:' . $self->{ceph}->place }
sub _notes_name ($self) { return 'rbd' }
sub _vmids ($self) { return $self->{store}->vmids }

sub _begin ($self, $task, %about) {
    return PVE::BackupAccess::Provider::RBD::Archive->begin($task->{guest}, $task->{name}, %about);
}

# Snapshots are made when all disks are stored and flushed, and the check reads the snapshots. So it finds what another
# program wrote to an image before, and what one writes later is not in the backup.
sub _store_devices ($self, $task, $volumes, %how) {
    my ($archive, $jobs) = ($task->{archive}, begin_devices($task, $volumes, %how));
    $archive->prepare;
    my $stored
        = for_devices(
        sub ($job, $log, $copy) { return store_device($job, log => $log, copy => $copy) },
        $jobs, %how);
    $archive->freeze;
    my $check = sub ($job, $log, $copy) {
        check_device($job, $log) if $how{check};
        return $archive->put_digests($job->{device});
    };
    my $digests = for_devices($check, $jobs, %how);
    for my $device ($archive->devices) {
        my $written = $stored->{$device}{statistics}{'bytes-written'};
        $archive->note_device($device, $digests->{$device}, $written);
    }
    return map { $stored->{$_}{finding} // () } $archive->devices;
}

# What a killed process left does not disturb a restore: the next backup or prune removes it.
sub _settle ($self, $guest) { return }

# As texts, none if the archive is whole. What was found is noted, so that nothing is built on what is damaged.
sub _problems_of ($self, $guest, $name, $seen) {
    my $archive;
    my $error = attempt { $archive = $guest->archive($name) };
    return reason($error) if $error;
    return map { $self->_device_problems($guest, $archive, $_) } $archive->devices;
}

sub _device_problems ($self, $guest, $archive, $device) {
    my @damage;
    my $problem = $guest->device_problem($archive->name, $device)
        // $archive->digests_problem($device);
    if (!defined($problem)) {
        my $error = attempt { @damage = damage($archive, $device) };
        $problem = $error ? reason($error) : @damage ? describe(@damage) : undef;
    }
    attempt { $archive->note_damage($device, defined($problem) ? 1 : 0) };
    return defined($problem) ? "$device: $problem" : ();
}

sub _digests_of ($self, $guest, $name, $device) {
    my ($archive) = $guest->chain($name, $device);
    my $problem = $archive->digests_problem($device);
    PVE::BackupAccess::Error->throw(
        'ArchiveError',
        "device $device: what is restored cannot be verified - $problem",
        device => $device
    ) if defined($problem);

    # The file goes with the archive.
    push($self->{kept}->@*, $archive);
    return $archive->digests($device);
}

# ---- backup ----

# Looks whether the pool can be reached.
sub job_init ($self, $start_time) {
    $self->{store}->id;
    return;
}

sub backup_get_mechanism ($self, $vmid, $vmtype) {
    return $vmtype eq 'qemu' ? 'nbd' : undef;
}

# ---- more ----

sub rbd_uri ($self, $volname, $device) {
    my $archive = $self->_archive($volname);
    bad_argument("the archive has no device $device") if !$archive->device($device);
    return $archive->uri($device);
}

# What tells this store from all others, and the guests that are known by name.
sub store ($self) { return $self->{store} }

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Provider::RBD - backups as snapshots of RBD images in a Ceph cluster

=head1 SYNOPSIS

=for run compiles it needs a Ceph cluster

    use PVE::BackupAccess::Provider::RBD;

    my $provider = PVE::BackupAccess::Provider::RBD->new(undef,
        { pool => 'backup', namespace => 'nightly', 'ceph-conf' => '/etc/ceph/ceph.conf' },
        'mystore', sub ($level, $message) { say "$level: $message" });

    for my $archive ($provider->list(100)->@*) {
        say $archive->{volname} if !$provider->verify($archive->{volname})->@*;
    }
    $provider->prune(100, 7);

=head1 DESCRIPTION

A backup provider of Proxmox VE for virtual machines, whose archives are in a pool of a Ceph cluster, or in a namespace of
one. It needs the programs C<rbd> and C<rados> (Debian: C<ceph-common>) and QEMU's rbd driver (C<qemu-block-extra>).

Each device of a guest has an RBD image. A backup writes to it through C<qemu-nbd>: an increment writes what has changed, a
full backup over an older one writes what differs. When all devices are stored and flushed, each image gets a snapshot
with the archive's name. What was written is then read back through the snapshot and compared with the digests of what was read
from the guest. The manifest comes last, and with it the archive is there. A full backup with nothing to build on gets new
images. An image goes with its last snapshot.

A snapshot needs no other one, so C<prune> and C<remove> move no data, and each archive can be restored by Ceph's own tools as
well (L</rbd_uri>).

Where things are:

=over

=item the images C<pba-vm-100-DEVICE-ARCHIVE>, named by guest, device and the archive that began them

=item the object C<pba.vm-100>: its omap has each manifest, with the configurations, as a value. One call sets a value
durably, no two processes overwrite each other's, and one call reads them all; an object for each would have to be found by a
list of the whole pool. An EC pool has no omap: let it be the images' data pool (C<rbd default data pool>)

=item the objects C<IMAGE@ARCHIVE.digests.N>: the digests of all blocks of a device, 32 bytes for 64 KiB, in parts of 16 MiB,
zeroes left out. An omap value cannot be that large. Each archive has all of them, so that it needs no other one

=item the objects C<pba.vm-100.change>, C<.read> and C<.removal>: a process that works on the archives watches one of them, on any
host. The cluster forgets a watch with its client, at once if the process ended and after half a minute if the host did

=item the object C<pba>: the guests that there are, and the store's id

=back

A backup can be killed at any moment. The images then differ from the last snapshots. The next backup first breaks the lock of the
dead writer, so that the cluster takes nothing from it any more. Then it compares the image with the snapshot that it builds on, by
the map of objects, which takes no reading, and rolls it back (C<rbd snap rollback>) if they differ. That is right
whatever was written, also by others, and costs a copy in the cluster of the changed objects alone. A full copy that compares would
read all of the guest's disk.

Which backup a bitmap is relative to, disks with other names, audits, retention and bandwidth are as in
L<PVE::BackupAccess::Provider::Qcow2Chain>. But an increment can build on any archive, not only the newest one: after the guest
was rolled back, the image is, too. Containers are not supported.

All sizes are bytes. Methods die with a L<PVE::BackupAccess::Error>: C<ArchiveError> if an archive is missing or damaged,
C<StateError> while another process uses the same guest's archives, C<SystemError> if C<rbd>, C<rados> or C<qemu-nbd> fails,
C<UnsupportedError> if C<rbd> or C<rados> is not installed, C<ArgumentError> for wrong arguments, and C<ContentError> if what is read back is not
what was read from the guest.

=head1 METHODS OF THE API

Arguments and results are those of C<PVE::BackupProvider::Plugin::Base>, and of
L<PVE::BackupAccess::Provider::Qcow2Chain/METHODS OF THE API> where nothing else is said here.

=head2 new

    my $provider = PVE::BackupAccess::Provider::RBD->new($storage_plugin, $scfg, $storeid, $log_function);

Returns a provider. C<$scfg> is a hash with C<pool>, the pool's name; C<namespace>, which must exist (C<rbd namespace create>), or
undef for none; and C<ceph-conf>, the absolute path of the cluster's configuration, by default F</etc/ceph/ceph.conf>. The user is the one
that the configuration and C<rbd> have by default, C<client.admin>; it needs the profile C<rbd> for the pool.
C<no-check> and C<state-dir> are those of L<PVE::BackupAccess::Provider::Qcow2Chain/new>, as the other arguments are.

Errors: C<ArgumentError>.

=head2 provider_name

C<RBD>.

=head2 job_init

Reads the object C<pba>, and makes it for the first backup. Errors: C<SystemError> if the pool cannot be reached.

=head2 backup_get_mechanism

C<nbd> for virtual machines, undef for all else.

=head2 the others

C<backup_init>, C<backup_vm_query_incremental>, C<backup_vm>, C<backup_cleanup>, C<backup_handle_log_file>, C<restore_vm_init>,
C<restore_vm_volume_init>, C<restore_vm_volume_cleanup>, C<restore_vm_cleanup>, C<archive_get_guest_config> and
C<archive_get_firewall_config> are as in L<PVE::BackupAccess::Provider::Qcow2Chain>. C<archive-size> is what the backup has
written to its images, zeroes not counted.

=head1 OTHER METHODS

C<on_progress>, C<device_called>, C<wait_for_others>, C<make_full>, C<jobs>, C<audit_every>, C<audit_findings>, C<server>, C<list>,
C<verify>, C<digests>, C<prune>, C<retention> and C<remove> are those of L<PVE::BackupAccess::Provider::Qcow2Chain>. In C<list> the
C<image-size> of a device is what the backup has written for it, zeroes not counted. An archive is protected while one of its snapshots is
(C<rbd snap protect>).

=head2 rbd_uri

    my $uri = $provider->rbd_uri($volname, $device);
    system('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', $uri, 'drive-scsi0.raw');

Takes the archive's name and a device's, and returns the snapshot as an URI that QEMU's programs read
(C<rbd:POOL/IMAGE@SNAPSHOT:conf=FILE>). It locks nothing: the caller must make sure that the archive is not removed while it is read.

Errors: C<ArchiveError> if there is no such archive, C<ArgumentError> if it has no such device.

=head2 store

    my $id = $provider->store->id;

Returns what the store has of all guests: an object with C<id>, a text that no other store has, and C<name_of($vmid)>,
C<number_of($name)> and C<number_for($name)>, for guests that are known by a name; the last one gives a new guest the least number
that is free. Errors: C<SystemError>.

=cut
