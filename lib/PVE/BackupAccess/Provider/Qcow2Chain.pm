package PVE::BackupAccess::Provider::Qcow2Chain;

use v5.36;

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(directory_exists);
use PVE::BackupAccess::Provider::Qcow2Chain::Archive;
use PVE::BackupAccess::Provider::Qcow2Chain::Guest;
use PVE::BackupAccess::Provider::Qcow2Chain::Mount qw(mount_warning);
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(numbers_in);
use PVE::BackupAccess::Provider::Qcow2Chain::Store qw(store_devices);
use PVE::BackupAccess::Provider::Qcow2Chain::Verify qw(digests_of problems_of unproven_of);

use parent qw(PVE::BackupAccess::Provider::Store::WithContainers);

my $Archive = 'PVE::BackupAccess::Provider::Qcow2Chain::Archive';

# The directory of each type of guest.
my %directories = (qemu => 'vm', lxc => 'ct');

my sub fail ($class, $message, %context) {
    PVE::BackupAccess::Error->throw($class, $message, %context);
}

sub new ($class, $storage_plugin, $scfg, $storeid, $log_function = undef) {
    my %settings = $class->_settings($storage_plugin, $scfg, $storeid, $log_function);
    return
        bless({ %settings, path => $class->can('_checked_path')->('path', $scfg->{path}) }, $class);
}

sub provider_name ($self) { return 'Qcow2Chain' }

sub compress ($self, $is_compressed) {
    $self->{compress} = $is_compressed;
    return;
}

# ---- what Provider::Store requires ----

sub _guest ($self, $place) {
    return PVE::BackupAccess::Provider::Qcow2Chain::Guest->new("$self->{path}/$place",
        $self->{wait});
}

# Whatever changes a store comes here first.
sub _clean ($self, $guest) {
    my $warning = $self->{'mount checked'}++ ? undef : mount_warning($self->{path});
    $self->{log}->('warn', $warning) if defined($warning);
    return $self->SUPER::_clean($guest);
}

sub _places_of_type ($self) { return \%directories }
sub _where ($self) { return $self->{path} }
sub _notes_name ($self) { return 'qcow2-chain' }

sub _vmids ($self) {
    return sort { $a <=> $b } numbers_in(map { "$self->{path}/$_" } values %directories);
}

sub _begin ($self, $task, %about) {
    return $Archive->begin($task->{guest}->dir, $task->{name}, %about);
}

sub _store_devices ($self, $task, $volumes, %how) {
    return store_devices($task, $volumes, %how, compress => $self->{compress});
}

sub _problems_of ($self, @what) { return problems_of(@what) }
sub _digests_of ($self, @what) { return digests_of(@what) }

# ---- backup ----

sub job_init ($self, $start_time) {
    fail('StateError', "the directory $self->{path} does not exist - is its file system mounted?")
        if !directory_exists($self->{path});
    return;
}

# ---- looking after the archives ----

sub unproven ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    return [unproven_of($self->_guest($place), $name)];
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Provider::Qcow2Chain - backups as chains of qcow2 images in a directory, containers as tar archives

=head1 SYNOPSIS

=for run store

    use PVE::BackupAccess::Provider::Qcow2Chain;

    my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $directory },
        'mystore', sub ($level, $message) { say "$level: $message" });

    for my $archive ($provider->list(100)->@*) {
        say $archive->{volname} if !$provider->verify($archive->{volname})->@*;
    }
    $provider->prune(100, 7);

=head1 DESCRIPTION

A provider of Proxmox VE's backup provider API that needs only a directory, C<qemu-img> and
C<qemu-nbd>. C<pve-backup-access> uses it. It also works as the provider of a storage plugin.

=head2 Layout of the directory

Each backup of a virtual machine is an archive:

    vm/100/20261122T064953Z/manifest.json
                            guest.conf, firewall.conf
                            drive-scsi0.qcow2, drive-scsi0.digests

A full backup of a device is an image of its own. An incremental backup is an image with the image of an earlier
archive as its backing file. File names in the images are relative, so the directory can be moved. QEMU's own tools can
read every archive.

The archive of a container is always a full backup of its whole tree. C<tar> alone can extract it:

    ct/101/20261122T064953Z/manifest.json
                            guest.conf, firewall.conf
                            root.tar.zst

It needs C<tar> and C<zstd>. It contains owners as the container sees them, access control lists, the extended
attributes C<user.*> and C<security.capability>, hard links, device nodes and holes. The manifest has the SHA-256 of
the tar before compression.

=head2 Archives are complete or do not exist

An archive is written under a temporary name, flushed, and renamed at the end of L</backup_vm> or
L</backup_container>. So when a bitmap is cleared, the data that it recorded is on disk. The manifest has the size, bitmap
mode and parent of each device, and the SHA-256 of itself and of every file except the images and the tar.

The content of an image is proven by digests of all blocks that were read from the guest, which are computed during the
backup (see L<PVE::BackupAccess::Volume/FILES OF DIGESTS>). A merge joins digests and computes none, so a damaged block
remains detectable. Before it moves the image, it stores the digests and the manifest of the result as
F<drive-scsi0.joined> and F<drive-scsi0.merged>, and then renames them. If it is killed between these steps, each archive can
still be read, also in a directory that is read-only. Archives of version 0.1 have no digests, and no archive builds on them, so the first backup after
them is a full one. A program of version 0.1 reports that the format of later archives is unknown, and does not touch
them. An archive of a newer version than this one is reported as such, does not count as damaged, and stays; nothing that it may
build on is removed, and backups are full meanwhile.

=head2 What an incremental backup builds on

An incremental backup only builds on the archive that the device's bitmap is relative to. A caller
that ties bitmaps to backups (L<PVE::BackupAccess::Task>) passes the ID of that archive. For a caller that does not, such
as Proxmox VE itself, the host keeps a note outside of the directory (C<state-dir> of L</new>) of the archive that it made
last for each storage ID. That archive must be the newest one in the directory.

The device gets a full backup, and the log says why, if the archive does not exist, is damaged, or lacks a file that it
depends on; if L</verify> found damage in one of these; if the device has another size; or if the chain has 100 archives.
Before a backup, damage is only detected if a file's size or time changed (the content is then read). L</verify> detects
all damage.

If the caller passes them, the manifest stores the identity of each disk and the name of its node
(L<PVE::BackupAccess::Task/run>). A disk is then found under any name: an increment may build on a device with another
name, and L</prune> counts both as one. An increment never builds on a device with the same name and another identity.
In archives without identities, disks are found by name. L</prune> takes a device of such an archive for the only disk that
has that name in other archives.

Blocks of 64 KiB that earlier archives already have are not stored again; this is decided by their digests. An increment
omits blocks that the guest wrote without changing them. If a bitmap was lost (or starts anew for another reason), the
whole device is read and compared with its newest archive. What differs is stored as an increment on top of that
archive, and the result is read back in full. So a lost bitmap costs reading, not space.

The device is instead stored in full with L</make_full>, if the chain is long enough, or if the newest
archive is of another guest or size or is known to be damaged. L</verify> leaves a note, F<drive-scsi0.damaged>, in the
directory of a damaged archive, and removes the note when the archive is intact again. If the backup detects, when
it reads the result back, that the newest archive is damaged, it dies with C<ContentError>, and the next backup is a full
one.

=head2 Several guests, storages and hosts

If two guests have had the same number in a directory, their archives are stored side by side. Neither builds on the
other's, and L</prune> counts them separately. One storage ID corresponds to one target-id of L<PVE::BackupAccess>. It is
safe to use directories in turn under one storage ID, to put a directory back to an earlier state, or to use a copy that is
older than the last backup: the next backup is a full one. Guests of a QEMU without C<-uuid> cannot be told apart: their
backups are right, but full, and L</prune> counts them together, so it may remove the only archive of one of them.

Each C<qemu-nbd> has a private directory for its socket, F<pba-server-...> in C<$TMPDIR> or F</tmp>. If a process is
killed, its directory remains until the same user starts the next C<qemu-nbd>.

=head1 ERRORS

All sizes are bytes. Methods die with a L<PVE::BackupAccess::Error>. What callbacks and signal handlers die with is passed
on unchanged. Every method that takes C<$volname> or C<$vmid> can die with

=over

=item C<ArgumentError> - an argument is wrong, such as a C<$volname> that is not the name of an archive

=item C<ArchiveError> - the archive does not exist, is damaged, or is of the other type of guest; a message about damage
names the file

=item C<StateError> - another process uses the archives of this guest (see L</wait_for_others>), or a method was called in
the wrong order

=item C<SystemError>, C<UnsupportedError> - a file cannot be read or written, or a program fails or is not installed; the archive
was made by a newer version

=back

=head1 METHODS OF THE API

Arguments and results are those of C<PVE::BackupProvider::Plugin::Base>. A L<PVE::BackupAccess::Task> calls the backup
methods in this order:

=for run store

    use PVE::BackupAccess::Provider::Qcow2Chain;

    my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $directory }, 'mystore');
    say 'a backup by ', $provider->provider_name;
    $provider->job_init(time);
    say $provider->backup_init(100, 'qemu', time)->{'archive-name'};
    say $provider->backup_get_mechanism(100, 'qemu');
    my $modes = $provider->backup_vm_query_incremental(100, { 'drive-scsi0' => { size => 4 << 20 } });
    say "drive-scsi0: $modes->{'drive-scsi0'}";

    # set up the access; then $provider->backup_vm(100, $guest_config, $volumes, {});
    $provider->backup_cleanup(100, 'qemu', 0, {});
    $provider->job_cleanup;

and a restore calls:

=for run archive

    my ($mechanism, $type) = $provider->restore_get_mechanism($volname);
    my $config = $provider->archive_get_guest_config($volname);
    my $firewall_config = $provider->archive_get_firewall_config($volname);
    my $volumes = $provider->restore_vm_init($volname);
    for my $device (sort keys $volumes->%*) {
        my $source = $provider->restore_vm_volume_init($volname, $device, {});
        system('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', $source->{'qemu-img-path'}, "$dir/$device.raw") == 0
            or die "qemu-img failed\n";
        $provider->restore_vm_volume_cleanup($volname, $device, {});
    }
    $provider->restore_vm_cleanup($volname);

The backup and the restore of a container call:

=for run store

    use PVE::BackupAccess::Provider::Qcow2Chain;

    my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $directory }, 'mystore');
    my %info = (directory => '/usr/share/doc/tar', sources => ['./'], 'backup-user-id' => $>);
    $provider->job_init(time);
    my $volname = $provider->backup_init(101, 'lxc', time)->{'archive-name'};
    $provider->backup_container_prepare(101, \%info);
    $provider->backup_container(101, "hostname: web2\n", ['/copyright'], \%info);
    $provider->backup_cleanup(101, 'lxc', 1, {});
    $provider->backup_handle_log_file(101, '/var/log/dpkg.log');
    $provider->job_cleanup;

    my $source = $provider->restore_container_init($volname, 'mystore', {});
    say $source->{'tar-path'} // $source->{'archive-directory'};
    $provider->restore_container_cleanup($volname, 'mystore', {});

=head2 new

    my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new($storage_plugin, $scfg, $storeid, $log_function);

Returns a provider. The arguments are:

=over

=item C<$storage_plugin> - the storage plugin, or undef

=item C<$scfg> - a hash with C<path>, the absolute path of the directory, which must exist before the first backup. With a
true C<no-check>, L</backup_vm> does not read back what it wrote. C<state-dir>, an absolute path, is where the provider
keeps its notes for callers that do not know IDs of backups (Proxmox VE itself); the default is that of
L<PVE::BackupAccess::Task/state-dir>. Because of these notes, the first backup to a directory that replaced another one,
such as a rotated disk or a copy, is a full one. Nodes between which guests migrate need a C<state-dir> that they share,
such as C</etc/pve/priv>.

=item C<$storeid> - any name

=item C<$log_function> - a code ref that is called with a level and a message, or undef; warnings and errors then go to
C<warn>

=back

Errors: C<ArgumentError>.

=head2 provider_name

Returns C<Qcow2Chain>. Takes no arguments.

=head2 job_init

Takes the start time. Errors: C<StateError> if the directory does not exist, for example because it is not mounted.

=head2 job_cleanup

Does nothing. Takes no arguments.

=head2 backup_init

Takes the guest's number, C<qemu> or C<lxc>, and the start time. Locks the guest's directory until the archive is complete
or L</backup_cleanup> is called, removes what a killed backup left behind, and returns C<archive-name>:
C<vm/100/20261122T064953Z>, for a container C<ct/100/20261122T064953Z>. The name is the start time in UTC, or later than
the last existing archive.

Errors: C<UnsupportedError> for any other type of guest; C<StateError> while another process uses the archives.

=head2 backup_get_mechanism

Takes the guest's number and type. Returns C<nbd> for virtual machines, C<directory> for containers, undef for everything
else.

=head2 backup_vm_query_incremental

Takes the guest's number and a hash of devices. Returns a hash with C<use> for each device that can be backed up
incrementally, and C<new> for all others. For a caller that passes IDs of backups, a value is a hash, as described in
L<PVE::BackupAccess::Task/run>.

Errors: C<StateError> if L</backup_init> was not called.

=head2 backup_vm

Takes the guest's number, its configuration, the volumes, and a hash with C<bandwidth-limit>, C<firewall-config>,
C<backup-id>, C<guest-uuid> and C<jobs>. When it returns, the archive is complete and durable. What was written has been
read back during the copy and compared with what was read from the guest, and the tables of the closed images have all of it.
This proves the programs that wrote, not the disk below the page cache. When it dies, there is no archive.

Errors: C<ContentError> if the comparison fails; those of L<PVE::BackupAccess::Volume/copy>.

=head2 backup_cleanup

Takes the guest's number and type, whether the backup succeeded, and a hash. Removes an incomplete archive. An archive that
L</backup_vm> has completed is kept even if the backup did not succeed: the error came later, for example from a prune, and
bitmaps may already be relative to the archive. Returns C<stats> with C<archive-size>, the size of the archive's own files.

=head2 backup_handle_log_file

Takes the guest's number and the path of the log. Copies the log to the archive as F<backup.log>. The manifest does not
list it.

=head2 backup_container_prepare

Takes the guest's number and a hash. Starts a process that holds the archive and the lock. So a user who cannot
write to the directory can call L</backup_container>.

=head2 backup_container

Takes the guest's number, its configuration, an array ref of patterns to exclude, and a hash. Runs C<tar>, which writes the
C<sources> to that process, which compresses them. When it returns, the archive is complete and durable, and has been read
back and compared with what was read, unless C<no-check> is set. When it dies or is killed, or C<tar> ends with a status
other than 0, there is no archive.

The patterns are those of C<tar>: a pattern that begins with a slash is relative to the container's root, any other matches
in each directory. C<*> also matches slashes, C</**/> also matches a single slash, and a slash at the end excludes the
content of directories with that name. With a C<backup-user-id> other than 0, F<lost+found> is excluded: it belongs to the
file system, and the container's root cannot read it.

Errors: C<SystemError> if C<tar> or C<zstd> fails; C<ContentError> if the comparison fails; C<StateError> if the process
that stores the archive has ended.

=head2 restore_get_mechanism

Takes C<$volname>. Returns C<qemu-img> and C<qemu>, or for a container C<tar> or C<directory> and C<lxc>.

=head2 archive_get_guest_config

Takes C<$volname>. Returns the guest's configuration.

=head2 archive_get_firewall_config

Takes C<$volname>. Returns the firewall configuration, or undef.

=head2 restore_vm_init

Takes C<$volname>. Returns a hash with the C<size> of each device.

=head2 restore_vm_volume_init

Takes C<$volname>, the device and a hash. Returns C<qemu-img-path>, which C<qemu-img convert -f raw> can read the
device's content from. With a C<$storage_plugin>, it is a file that is served over FUSE, because Proxmox VE accepts nothing
else here; without one, it is an NBD URI. It exists until L</restore_vm_volume_cleanup>, L</restore_vm_cleanup>, or the end
of this process. C<socket> in the hash is the path of the NBD socket; by default the socket is in a private directory. Nothing
is compared with the digests here (see L</digests>). If the last verification found damage, a warning is logged.

Errors: C<ArchiveError> if there is no such device; C<UnsupportedError> if a file is needed and there is no F</dev/fuse>.

=head2 restore_vm_volume_cleanup

Takes C<$volname>, the device and a hash. Ends what L</restore_vm_volume_init> started. C<damaged> in the hash is an array
ref of the ranges, as C<[$offset, $length]>, that do not match the digests. They are noted, like damage that L</verify> finds.

=head2 restore_vm_cleanup

Takes C<$volname>. Does the same for all devices.

=head2 restore_container_init

Takes C<$volname>. Ignores other arguments; Proxmox VE passes the storage's name and a hash. Returns C<tar-path>, the
archive's tar. pve-container does not accept a tar of another storage that has less than 10 members or no F<sbin> in its
root, such as that of a container with a single program. For such an archive, the method returns C<archive-directory>, a
directory in F</var/tmp> (or C<$TMPDIR>) with the extracted tree. The directory exists until L</restore_container_cleanup>
or the end of this process. If a process is killed, the next call removes its directory. L</restore_get_mechanism> tells
which of the two is returned.

Errors: C<ArchiveError> if the archive is of a virtual machine; C<SystemError> if the tree cannot be extracted.

=head2 restore_container_cleanup

Takes C<$volname>. Ignores other arguments. Removes what L</restore_container_init> created.

=head1 OTHER METHODS

=head2 server

=for run archive

    $provider->restore_vm_volume_init($volname, $device, {});
    my $server = $provider->server($volname, $device);
    say $server->uri, ' is served by process ', $server->pid;
    $provider->restore_vm_cleanup($volname);

Takes C<$volname> and a device. Returns the C<qemu-nbd> that L</restore_vm_volume_init> has started for the device: an
object with the methods C<pid>, C<socket>, C<uri> and C<is_running>.

=head2 on_progress

=for run archive

    $provider->on_progress(sub ($device, $done, $total) { say "$device: $done of $total bytes" });

Takes a code ref. While L</backup_vm> stores a device, the code ref is called a few times a second, with the device, the
bytes stored and the bytes to store. Without one, a line is logged every 30 seconds.

Errors: C<ArgumentError>.

=head2 device_called

=for run archive

    my $name = $provider->device_called($volname, 'drive-scsi0');

Takes C<$volname> and a name of a disk. Returns the name that the archive has for this disk: the same name, or, if a backup
has stored other names of the disk (its node, the guest device, the drive), the only device that had this name.

Errors: C<ArgumentError> if there is none.

=head2 wait_for_others

=for run archive

    $provider->wait_for_others(600);

Takes a number of seconds, 0 by default: how long methods wait for another process that uses the archives of the same guest.
Backups, L</prune> and L</remove> exclude each other. Restores and L</verify> run in parallel with each other and with a
backup, but not while an archive is being removed. After this time, a method dies with C<StateError>.

Errors: C<ArgumentError>.

=head2 make_full

=for run archive

    $provider->make_full(1);

Takes 1 or 0 (the default). With 1, the following backups are full ones, even if an increment would be possible.

=head2 compress

=for run archive

    $provider->compress(1);

Takes 1 or 0 (the default). With 1, the following backups are compressed with zstd, cluster by cluster, by QEMU's own
filter. Compressed and uncompressed archives can build on each other. Data that is merged into another archive is not
compressed there. A device whose size is not a multiple of 64 KiB is not compressed. Compression takes more processor time
than the copy itself (F<doc/performance.md> has the figures).

=head2 jobs

=for run archive

    $provider->jobs(4);

Takes the number of devices of a guest that L</backup_vm> stores in parallel, each in a process of its own. The default is
2. The caller's C<jobs> (L<PVE::BackupAccess::Task/new>) takes precedence. The processes share the bandwidth limit. The
first failure ends all of them, and none remains when C<backup_vm> dies.

Errors: C<ArgumentError>.

=head2 audit_every

=for run archive

    $provider->audit_every(30);

Takes a number, 0 by default. With 30, one in 30 backups of a device audits its bitmap; with 1 every backup does, with 0
none. An audit reads the whole device, compares the parts that the bitmap calls clean with the earlier backups, and stores
what differs. Each difference is logged as an error and returned by L</audit_findings>. The archive holds the right data,
and a new bitmap is started. A full read for another reason counts as an audit. Audits need a caller that ties bitmaps to
backups.

Errors: C<ArgumentError>.

=head2 audit_findings

=for run archive

    say $_->{text} for $provider->audit_findings->@*;

Takes no arguments. Returns what the last L</backup_vm> found wrong with bitmaps: an array ref of hashes with C<device>,
C<bytes>, C<ranges> (the first 1,000, as C<[$offset, $length]>), C<suspects>, the names of the archives that were made
with that bitmap since the device was last read in full, and C<text>, a message with all of this. The array is empty if
all bitmaps were right.

=head2 list

=for run archive

    for my $archive ($provider->list(100)->@*) {
        say "$archive->{volname}: $archive->{size} bytes";
    }

Takes the guest's number, or nothing for all guests. Returns an array ref of hashes, the oldest archive of a guest first:
C<volname>, C<vmid>, C<type> (C<qemu> or C<lxc>), C<time> (seconds since 1970), C<id>, C<size> (of its own files) and C<devices>.
C<devices> has for each device C<size>, C<bitmap-mode>, C<image-size>, C<identity> if it is known, and C<parent> if the
backup is incremental. A container has one device, C<container>, with C<size> and C<image-size>. If the manifest cannot be
read, the hash has C<problem>, a text, instead of C<id>, C<size> and C<devices>. If damage of the archive, or of one that it
builds on, is known, C<damaged> is an array ref of texts. Nothing but the manifests is read.

Errors: C<ArgumentError>.

=head2 has

=for run archive

    say "$volname is there" if $provider->has($volname);

Takes C<$volname>. Returns whether there is such an archive.

Errors: C<ArgumentError>.

=head2 verify

=for run archive

    my %seen;
    for my $archive ($provider->list(100)->@*) {
        my $problems = $provider->verify($archive->{volname}, \%seen);
        say "$archive->{volname}: $_" for $problems->@*;
    }

Takes C<$volname> and optionally a hash ref. Reads the archive and everything that it depends on: the manifests, the SHA-256
of each file, the metadata of each image (C<qemu-img check>), the backing files, and the content of each image, which must
match its digests. Returns an array ref of texts that describe the damage; the array is empty if there is none. Damage of
content is described by device and offsets. Damage of a block that a later archive has overwritten does not affect the
later archive. C<%seen>, empty at first, caches the result for each image, so that further calls read each image only
once.

Errors: C<ArgumentError>, C<StateError>; C<SystemError> if no damage was found, but something could not be read: a program does
not run, no descriptor is left, a server does not answer. This is not noted as damage.

=head2 unproven

=for run archive

    say "$_: no digests" for $provider->unproven($volname)->@*;

Takes C<$volname>. Returns an array ref of the devices whose content cannot be proven, because their chain was made by
version 0.1.

=head2 digests

=for run archive

    my $files = $provider->digests($volname, $device);

Takes C<$volname> and a device. Returns an array ref of the files of digests that the restored device must match, for the
option C<expected> of L<PVE::BackupAccess::Volume/copy> and L<PVE::BackupAccess::Volume/check>. The array is empty for a
chain of version 0.1.

Errors: C<ArchiveError> if one of the files is damaged.

=head2 prune

=for run archive

    my $removed = $provider->prune(100, { 'keep-last' => 3, 'keep-daily' => 7, 'keep-weekly' => 4 });
    say for $removed->@*;

Takes the guest's number and a hash ref of rules. Removes those archives of the guest that no rule keeps. If a virtual
machine and a container had the same number, they are pruned separately. The rules are those of Proxmox VE
(C<prune-backups>): C<keep-last>, C<keep-hourly>, C<keep-daily>, C<keep-weekly>, C<keep-monthly>, C<keep-yearly>, each with
a number. They apply in this order. A rule does not count a period (in local time) from which an earlier rule keeps an
archive. A number instead of the hash ref means C<keep-last>.

The archives of each device are counted separately, so a backup of one disk never causes the removal of another disk's
archive. Protected archives (with a file C<protected> in their directory) are kept and not counted. Damaged archives
are not counted: they are removed once newer intact archives replace them, and kept with a warning until then.
Data that a kept archive needs from a removed one is merged into the kept one.

Returns an array ref of the names of the removed archives.

Errors: C<ArgumentError> if a rule does not exist or the rules keep nothing; C<StateError> while another backup or prune
uses the guest's archives; C<ArchiveError>, at the end, if an archive could not be removed; the message says which and why.
All others are removed nevertheless.

=head2 retention

=for run archive

    for my $archive ($provider->retention(100, { 'keep-last' => 3 })->@*) {
        say "$archive->{volname}: $archive->{mark}";
    }

Takes the same arguments as L</prune>. Removes nothing, and returns what L</prune> would do: an array ref of hashes, the
oldest archive first, with C<volname>, C<time> (seconds since 1970), C<mark> (C<keep>, C<remove>, C<protected>, or C<broken>
for an archive that is kept although it is damaged), and C<problems>, an array ref of texts that say what is
damaged, as far as this is known without reading its images, and C<unsure> if it could not be determined whether the archive
is damaged, for example because C<qemu-img> was killed, or a newer version made the archive. Such an archive is not counted, and is not removed.

Errors: C<ArgumentError>.

=head2 remove

=for run archive

    $provider->remove($volname);

Takes C<$volname>. Removes one archive, wherever it is in its chain. Data that the next archive needs is kept: the next
archive's changes are merged into this archive's image, the result is read back, and only then does it replace the next
archive's image. The removal does not start if the space may not suffice for what only the next archive has. A damaged block
remains detectable. The process can be killed at any time; the next backup or removal completes the removal.

Errors: C<ArchiveError> if the archive does not exist or there is not enough space; C<StateError> while another process
uses the guest's archives, for example while this archive or the next one is being restored.

=cut
