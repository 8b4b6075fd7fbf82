package PVE::BackupAccess::Provider::RBD;

use v5.36;

use PVE::BackupAccess::Argument qw(bad_argument);
use PVE::BackupAccess::Provider::RBD::Archive;
use PVE::BackupAccess::Provider::RBD::Ceph;
use PVE::BackupAccess::Provider::RBD::Guest;
use PVE::BackupAccess::Provider::RBD::Store;

use parent qw(PVE::BackupAccess::Provider::Store::WithContainers);

my sub checked_name ($what, $name) {
    my ($good) = ($name // '') =~ m!\A([^/\@:\s"'][^/\@:\s]*)\z!
        or bad_argument("'" . ($name // '') . "' is not a valid name of a $what");
    return $good;
}

sub new ($class, $storage_plugin, $scfg, $storeid, $log_function = undef) {
    my %settings = $class->_settings($storage_plugin, $scfg, $storeid, $log_function);
    my $namespace = $scfg->{namespace};
    my $ceph = PVE::BackupAccess::Provider::RBD::Ceph->new(
        pool => checked_name('pool', $scfg->{pool}),
        namespace => defined($namespace) ? checked_name('namespace', $namespace) : undef,
        user => checked_name('Ceph user', $scfg->{'ceph-user'} // 'admin'),
        log => $settings{log},
        conf => $class->can('_checked_path')
            ->('ceph-conf', $scfg->{'ceph-conf'} // '/etc/ceph/ceph.conf'),
    );
    my $store = PVE::BackupAccess::Provider::RBD::Store->new($ceph);
    return bless({ %settings, ceph => $ceph, store => $store }, $class);
}

sub provider_name ($self) { return 'RBD' }

# ---- what Provider::Store requires ----

sub _guest ($self, $place) {
    return PVE::BackupAccess::Provider::RBD::Guest->new($self->%{qw(ceph store wait)},
        place => $place);
}

sub _places_of_type ($self) { return { qemu => 'vm', lxc => 'ct' } }

# Each look for archives is a call of a program, and most numbers are those of a virtual machine only.
sub _places ($self, $vmid) {
    return ("vm/$vmid", $self->{store}->has_place("ct/$vmid") ? "ct/$vmid" : ());
}

sub _where ($self) { return 'rbd:' . $self->{ceph}->place }
sub _notes_name ($self) { return 'rbd' }
sub _vmids ($self) { return $self->{store}->vmids }

sub _begin ($self, $task, %about) {
    return PVE::BackupAccess::Provider::RBD::Archive->begin($task->{guest}, $task->{name}, %about);
}

# A restore ignores what a killed process left. The next backup or prune removes it.
sub _settle ($self, $guest) { return }

# ---- backup ----

# Fails early if the pool cannot be reached.
sub job_init ($self, $start_time) {
    $self->{store}->id;
    return;
}

# ---- more ----

sub rbd_uri ($self, $volname, $device) {
    my $archive = $self->_archive($volname);
    bad_argument("archive $volname has no device $device - it has " . join(', ', $archive->devices))
        if !$archive->device($device);
    return $archive->uri($device);
}

# The store's ID, and the guests that are known by name.
sub store ($self) { return $self->{store} }

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Provider::RBD - backups as snapshots of RBD images in a Ceph cluster, containers as tar archives in them

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

A backup provider of Proxmox VE. It keeps the archives in a pool of a Ceph cluster, or in a namespace of a pool. It needs the programs C<rbd> and C<rados> (Debian: C<ceph-common>) and QEMU's rbd driver (C<qemu-block-extra>).

Each device of a guest has an RBD image. A backup writes to it through C<qemu-nbd>: an increment writes what has changed, and a
full backup over an older one writes what differs. When all devices are stored and flushed, each image gets a snapshot with
the archive's name. The backup then reads the written data back through the snapshot and compares it with the digests of
what was read from the guest. The manifest is written last, and only then does the archive exist. A full backup with nothing
to build on gets new images. The removal of an image's last snapshot also removes the image.

A snapshot does not depend on any other, so C<prune> and C<remove> move no data, and Ceph's own tools can restore each archive
(L</rbd_uri>).

The pool contains:

=over

=item the images C<pba-vm-100-DEVICE-ARCHIVE>, named after the guest, the device and the first archive of the image

=item the images C<pba-ct-101-container-ARCHIVE>: the tree of a container as F<.tar.zst>, as in
L<PVE::BackupAccess::Provider::Qcow2Chain>. Each has one snapshot. C<tar> and C<zstd> are needed for these

=item the object C<pba.vm-100>: its omap has each manifest, with the configurations, as a value. One call sets a value
durably, processes cannot overwrite each other's values, and one call reads all of them. (With one object for each manifest, a
search would have to list the whole pool.) An erasure-coded pool has no omap: use it as the images' data pool (C<rbd default
data pool>)

=item the objects C<IMAGE@ARCHIVE.digests.N>: the digests of all blocks of a device, 32 bytes for each 64 KiB, in parts of
16 MiB; parts with only zeroes are left out. An omap value cannot be that large. Each archive has all digests, so it does not
depend on another one

=item the objects C<pba.vm-100.change>, C<.read> and C<.removal>: the locks. A process on any host that works on the archives
watches one of these objects. The watch ends with its client: at once if the process ends, after half a minute if the host fails
or does not respond. A backup that goes on after that first looks whether its watch is still there, and otherwise fails.
C<serve> and C<mount> end when the cluster tells them that their watch is gone, and a restore fails if its snapshot was removed

=item the object C<pba>: the list of guests, and the store's ID

=back

If a backup is killed, the images may differ from the last snapshots. The next backup first breaks the lock of the dead
writer, so that the cluster accepts nothing more from it. Then it compares each image with the snapshot that it builds on, by
means of their sizes and the object map, which needs no reading. If they differ, it rolls the image back (C<rbd snap
rollback>). This is correct whatever was written to the image, by this or another program, and the cluster only copies the
changed objects. A full backup that compares would instead read the whole disk of the guest.

Which backup a bitmap is relative to, disks with other names, audits, retention and bandwidth are as in
L<PVE::BackupAccess::Provider::Qcow2Chain>. But an increment can build on any archive, not only on the newest one: if the guest
was rolled back, the image is rolled back too.

All sizes are bytes. Methods die with a L<PVE::BackupAccess::Error>: C<ArchiveError> if an archive is missing or damaged,
C<StateError> while another process uses the same guest's archives, or if the lock was lost, C<SystemError> if C<rbd>,
C<rados> or C<qemu-nbd> fails, C<UnsupportedError> if C<rbd> or C<rados> is not installed, C<ArgumentError> for wrong
arguments, and C<ContentError> if what is read back is not what was read from the guest.

=head1 METHODS OF THE API

Unless noted here, arguments and results are those of C<PVE::BackupProvider::Plugin::Base>, and of
L<PVE::BackupAccess::Provider::Qcow2Chain/METHODS OF THE API>.

=for run compiles it needs a Ceph cluster

    use PVE::BackupAccess::Provider::RBD;

    my $provider = PVE::BackupAccess::Provider::RBD->new(undef, { pool => 'backup' }, 'mystore');
    say 'a backup by ', $provider->provider_name, ' and ', $provider->backup_get_mechanism(100, 'qemu');
    $provider->job_init(time);
    say $provider->backup_init(100, 'qemu', time)->{'archive-name'};
    $provider->backup_cleanup(100, 'qemu', 0, {});

=head2 new

    my $provider = PVE::BackupAccess::Provider::RBD->new($storage_plugin, $scfg, $storeid, $log_function);

Returns a provider. C<$scfg> is a hash with C<pool>, the pool's name; C<namespace>, which must exist (C<rbd namespace create>), or
undef for none; C<ceph-conf>, the absolute path of the cluster's configuration, by default F</etc/ceph/ceph.conf>; and C<ceph-user>,
the Ceph user without C<client.>, by default C<admin>. The configuration names the user's keyring. The user needs the profile C<rbd>
of the monitor, and that of the OSDs for the pool or namespace: F<doc/operating.md>.
C<no-check>, C<state-dir> and the other arguments are those of L<PVE::BackupAccess::Provider::Qcow2Chain/new>.

Errors: C<ArgumentError>.

=head2 provider_name

Returns C<RBD>. Takes no arguments.

=head2 job_init

Takes the start time. Reads the object C<pba>, or creates it for the first backup. Errors: C<SystemError> if the pool cannot be reached.

=head2 other methods of the API

C<backup_get_mechanism>, C<backup_init>, C<backup_vm_query_incremental>, C<backup_vm>, C<backup_container_prepare>, C<backup_container>,
C<backup_cleanup>, C<backup_handle_log_file>, C<restore_get_mechanism>, C<restore_vm_init>, C<restore_vm_volume_init>,
C<restore_vm_volume_cleanup>, C<restore_vm_cleanup>, C<restore_container_init>, C<restore_container_cleanup>,
C<archive_get_guest_config> and C<archive_get_firewall_config> are as in L<PVE::BackupAccess::Provider::Qcow2Chain>. C<archive-size> is the number of bytes that
the backup has written to its images, without zeroes. C<restore_vm_volume_cleanup> dies with C<ArchiveError> if the archive was
removed while it was restored. C<is_running> of a C<server> dies with C<StateError> if the lock was lost.

=head1 OTHER METHODS

C<on_progress>, C<device_called>, C<wait_for_others>, C<make_full>, C<jobs>, C<audit_every>, C<audit_findings>, C<server>, C<list>,
C<verify>, C<digests>, C<prune>, C<retention> and C<remove> are those of L<PVE::BackupAccess::Provider::Qcow2Chain>. In C<list>,
the C<image-size> of a device is the number of bytes that the backup has written for it, without zeroes. An archive is protected
while one of its snapshots is protected (C<rbd snap protect>).

=head2 rbd_uri

    my $uri = $provider->rbd_uri($volname, $device);
    system('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', $uri, 'drive-scsi0.raw');

Takes C<$volname> and a device. Returns the URI of the snapshot for QEMU's programs
(C<rbd:POOL/IMAGE@SNAPSHOT:conf=FILE>). It locks nothing: the caller must make sure that the archive is not removed while it is
read.

Errors: C<ArchiveError> if there is no such archive, C<ArgumentError> if it has no such device.

=head2 store

    my $id = $provider->store->id;

Takes no arguments. Returns an object that describes the store. Its method C<id> returns the store's unique ID. C<name_of($vmid)>,
C<number_of($name)> and C<number_for($name)> are for guests that are known by a name; C<number_for> gives a new guest the lowest
free number. Errors: C<SystemError>.

=cut
