package PVE::BackupAccess::Provider::Qcow2Chain;

use v5.36;

use List::Util qw(max uniq);
use POSIX ();
use Time::Local ();

use PVE::BackupAccess::Argument qw(bad_argument check_code check_filled_text check_positive);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Notes;
use PVE::BackupAccess::PluginBase;
use PVE::BackupAccess::Provider::Qcow2Chain::Archive;
use PVE::BackupAccess::File qw(entries make_directory read_file replace_file);
use PVE::BackupAccess::Provider::Qcow2Chain::Container;
use PVE::BackupAccess::Provider::Qcow2Chain::Disks qw(device_meant);
use PVE::BackupAccess::Provider::Qcow2Chain::Guest;
use PVE::BackupAccess::Provider::Qcow2Chain::List qw(list_guest);
use PVE::BackupAccess::Provider::Qcow2Chain::Lock qw(drop_lock);
use PVE::BackupAccess::Provider::Qcow2Chain::Prune qw(prune_guest retention_of);
use PVE::BackupAccess::Provider::Qcow2Chain::Restore;
use PVE::BackupAccess::Provider::Qcow2Chain::Store qw(mode_of store_devices);
use PVE::BackupAccess::Provider::Qcow2Chain::Tree qw(mechanism_of);
use PVE::BackupAccess::Provider::Qcow2Chain::Verify qw(digests_of problems_of unproven_of);
use PVE::BackupAccess::Retention qw(check_keep);
use PVE::BackupAccess::Try qw(attempt reason);

use parent qw(PVE::BackupProvider::Plugin::Base);

my $Archive = 'PVE::BackupAccess::Provider::Qcow2Chain::Archive';
my $Container = 'PVE::BackupAccess::Provider::Qcow2Chain::Container';
my $Guest = 'PVE::BackupAccess::Provider::Qcow2Chain::Guest';
my $Restore = 'PVE::BackupAccess::Provider::Qcow2Chain::Restore';
my $Tree = 'PVE::BackupAccess::Provider::Qcow2Chain::Tree';

# Where archives of each type of guest are.
my %directories = (qemu => 'vm', lxc => 'ct');

my $guest_config = 'guest.conf';
my $firewall_config = 'firewall.conf';
my $log_file = 'backup.log';

my sub fail ($class, $message, %context) {
    PVE::BackupAccess::Error->throw($class, $message, %context);
}

# As the storage class or another caller has it, without taint: it is the administrator's own.
my sub checked_path ($name, $path) {
    check_filled_text($name, $path);
    my ($absolute) = $path =~ m!\A(/.*?)/*\z!s
        or bad_argument("$name must be absolute, not '$path'");
    return $absolute;
}

my sub checked_vmid ($vmid) {
    my ($number) = ($vmid // '') =~ m/\A([1-9][0-9]{0,8})\z/
        or bad_argument('vmid must be a number from 1 to 999999999');
    return $number;
}

sub new ($class, $storage_plugin, $scfg, $storeid, $log_function = undef) {
    my $state_dir = $scfg->{'state-dir'};
    $state_dir = checked_path('state-dir', $state_dir) if defined($state_dir);
    check_filled_text('storeid', $storeid);
    return bless(
        {
            path => checked_path('path', $scfg->{path}),
            'storage-plugin' => $storage_plugin,
            storeid => $storeid,
            'state-dir' => $state_dir,
            'no-check' => $scfg->{'no-check'} ? 1 : 0,
            log => $log_function
                // sub ($level, $message) { warn "$message\n" if $level ne 'info' },
            restores => {},
            wait => 0,
            jobs => 2,
        },
        $class
    );
}

sub provider_name ($self) { return 'Qcow2Chain' }

sub on_progress ($self, $code) {
    check_code('on_progress', $code);
    $self->{progress} = $code;
    return;
}

sub wait_for_others ($self, $seconds) {
    bad_argument('seconds must be a whole number') if ($seconds // '') !~ m/\A[0-9]{1,9}\z/;
    $self->{wait} = $seconds;
    return;
}

sub make_full ($self, $is_full) {
    $self->{'make full'} = $is_full;
    return;
}

sub audit_every ($self, $count) {
    check_positive('count', $count) if $count;
    $self->{'audit every'} = $count;
    return;
}

sub compress ($self, $is_compressed) {
    $self->{compress} = $is_compressed;
    return;
}

sub jobs ($self, $count) {
    check_positive('count', $count);
    $self->{jobs} = $count;
    return;
}

sub audit_findings ($self) { return [($self->{findings} // [])->@*] }

# By its directory in the store, such as vm/100.
sub _guest ($self, $place) {
    return $Guest->new("$self->{path}/$place", $self->{wait});
}

# (vm/100, name) of 'vm/100/20261122T064953Z', which Proxmox VE puts a 'backup/' before.
sub _parse ($self, $volname) {
    my $pattern = $Archive->name_pattern;
    my ($place, $name)
        = ($volname // '') =~ m!\A(?:backup/)?((?:vm|ct)/[1-9][0-9]{0,8})/$pattern\z!
        or bad_argument("'"
            . ($volname // '')
            . "' is not the name of an archive, such as vm/100/20261122T064953Z");
    return ($place, $name);
}

sub _archive ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    my $guest = $self->_guest($place);
    fail('ArchiveError', "there is no archive $volname in $self->{path}")
        if !$Archive->exists($guest->dir, $name);
    return $guest->archive($name);
}

# ---- backup ----

sub job_init ($self, $start_time) {
    fail('StateError', "$self->{path} is not there - is it mounted?") if !-d $self->{path};
    return;
}

sub job_cleanup ($self) { return }

# Seconds since 1970 to a name and back; names sort as times do.
my sub name_of ($time) { return POSIX::strftime('%Y%m%dT%H%M%SZ', gmtime($time)) }

my sub time_of ($name) {
    my ($year, $month, @rest) = $name =~ m/\A(....)(..)(..)T(..)(..)(..)Z\z/;
    my ($day, $hour, $minute, $second) = @rest;
    return Time::Local::timegm_modern($second, $minute, $hour, $day, $month - 1, $year);
}

sub backup_init ($self, $vmid, $vmtype, $start_time) {
    $vmid = checked_vmid($vmid);
    my $directory = $directories{$vmtype}
        // fail('UnsupportedError', "guests of type '$vmtype' are not supported");
    my $place = "$directory/$vmid";
    my $guest = $self->_guest($place);
    make_directory($guest->dir);
    my $lock = $guest->change_lock;
    $self->_clean($guest);

    # The order of names is the order of backups, even if the clock was set back.
    my ($newest) = reverse($guest->names);
    my $name = name_of(max(int($start_time), defined($newest) ? time_of($newest) + 1 : 0));
    $self->{task} = {
        vmid => $vmid,
        place => $place,
        guest => $guest,
        lock => $lock,
        name => $name,
        time => int($start_time)
    };
    return { 'archive-name' => "$place/$name" };
}

sub _clean ($self, $guest) {
    $self->{log}->('warn', $_) for $guest->clean;
    return;
}

sub _task ($self, $vmid) {
    my $task = $self->{task};
    fail('StateError', "backup_init was not called for guest $vmid")
        if !$task || $task->{vmid} != $vmid;
    return $task;
}

sub backup_get_mechanism ($self, $vmid, $vmtype) {
    return { qemu => 'nbd', lxc => 'directory' }->{$vmtype};
}

sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    my $task = $self->_task($vmid);
    my $notes = $self->_notes($vmid);
    my $archives = $task->{archives} = [$task->{guest}->readable];
    $task->{about} = $volumes;
    my %modes;
    for my $device (sort keys $volumes->%*) {
        my ($base, $about) = (undef, $volumes->{$device});
        my $find = sub { $base = $task->{guest}->base($archives, $notes, $device, $about) };
        my $error = $self->{'make full'} ? undef : attempt(\&$find);
        $self->{log}->('warn', "$device: full backup - " . reason($error)) if $error;
        $task->{bases}{$device} = $base;
        $modes{$device} = mode_of($base, $device, $about, $self->{'audit every'});
    }
    return \%modes;
}

# A caller that knows of no ids has target and bitmap named by the storage. Which archive it made last
# for that storage is noted outside of the directory: another directory may be in its place by now.
sub _notes ($self, $vmid) {
    return PVE::BackupAccess::Notes->new("qcow2-chain $self->{storeid}",
        $vmid, dir => $self->{'state-dir'});
}

sub backup_vm ($self, $vmid, $guest_config_text, $volumes, $info) {
    my $task = $self->_task($vmid);
    my $archive = $self->_begin($task, $info);
    $archive->add_file($guest_config, $guest_config_text);
    $self->{findings} = [$self->_store($task, $volumes, $info)];

    # Durable before it gets its name, and named before the caller has the bitmaps begin anew: what they no longer
    # say must be in an archive that a crash cannot take away.
    $archive->seal;
    $task->{guest}->publish($archive, defined($info->{'backup-id'}) ? undef : $self->_notes($vmid));
    $task->{published} = 1;

    # Proxmox VE prunes before it calls backup_cleanup.
    drop_lock(delete($task->{lock}));
    return;
}

sub _begin ($self, $task, $info) {
    my $archive = $task->{archive} = $Archive->begin(
        $task->{guest}->dir, $task->{name},
        $task->%{qw(vmid time)},
        storage => $self->{storeid},
        defined($info->{'backup-id'}) ? (id => $info->{'backup-id'}) : (),
        defined($info->{'guest-uuid'}) ? (guest => $info->{'guest-uuid'}) : (),
    );
    my $firewall = $info->{'firewall-config'};
    $archive->add_file($firewall_config, $firewall) if defined($firewall);
    return $archive;
}

sub _store ($self, $task, $volumes, $info) {
    my %checked;
    for my $device (sort keys $volumes->%*) {
        my ($size) = ($volumes->{$device}{size} // '') =~ m/\A([0-9]{1,19})\z/
            or bad_argument("device $device: its volume has no size");
        $checked{$device} = { $volumes->{$device}->%*, size => 0 + $size };
    }
    return store_devices(
        $task, \%checked,
        $self->%{qw(log progress)},
        jobs => $info->{jobs} // $self->{jobs},
        full => $self->{'make full'},
        guest => $info->{'guest-uuid'},
        check => !$self->{'no-check'},
        limit => $info->{'bandwidth-limit'},
        compress => $self->{compress},
    );
}

sub backup_cleanup ($self, $vmid, $vmtype, $success, $info) {
    my $task = delete($self->{task}) // return { stats => {} };
    my ($guest, $name, $archive, $container) = $task->@{qw(guest name archive container)};
    if ($container) {
        $container->end($success);
        $task->{published} = $Archive->exists($guest->dir, $name);
    }
    if (!$task->{published}) {
        $container ? $self->_settle($guest) : $archive ? $guest->discard($archive->entry) : ();
        drop_lock($task->{lock});
        return { stats => {} };
    }

    # Bitmaps may have begun anew with it; if not, they have more than what changed since.
    $self->{log}->('warn', "$task->{place}/$name is complete and stays, whatever failed after it")
        if !$success;
    $self->{last} = $guest->archive($name);
    return { stats => { 'archive-size' => $self->{last}->file_size } };
}

# The log is not part of what has to be there.
sub backup_handle_log_file ($self, $vmid, $filename) {
    my $archive = delete($self->{last}) // return;
    replace_file($archive->dir . "/$log_file", read_file($filename));
    return;
}

# The keeper has the lock from here on: Proxmox VE prunes before it calls backup_cleanup.
sub backup_container_prepare ($self, $vmid, $info) {
    my $task = $self->_task($vmid);
    my ($guest, $archive) = ($task->{guest}, $self->_begin($task, $info));
    $task->{container} = $Container->start(
        $archive,
        config => $guest_config,
        limit => $info->{'bandwidth-limit'},
        check => !$self->{'no-check'},
        publish => sub () { $guest->publish($archive) },
        discard => sub () { $guest->discard($archive->entry) },
        unlock => sub () { drop_lock(delete($task->{lock})) },
    );
    delete($task->{lock});
    return;
}

sub backup_container ($self, $vmid, $guest_config_text, $exclude_patterns, $info) {
    my $container = $self->_task($vmid)->{container}
        // fail('StateError', "backup_container_prepare was not called for guest $vmid");
    $container->feed($guest_config_text, $exclude_patterns // [], $info, $self->{log});
    return;
}

# ---- restore ----

sub restore_get_mechanism ($self, $volname, @) {
    my $archive = $self->_archive($volname);
    return ('qemu-img', 'qemu') if !$archive->container;
    return (mechanism_of($archive), 'lxc');
}

# Where Proxmox VE shows a backup's configuration, it gives the storage's name as well.
sub archive_get_guest_config ($self, $volname, @) {
    return $self->_archive($volname)->content($guest_config);
}

sub archive_get_firewall_config ($self, $volname, @) {
    return $self->_archive($volname)->content($firewall_config);
}

# First ends a removal that was killed half way, unless another process has the lock or the directory is read-only.
sub _settle ($self, $guest) {
    my $lock;
    attempt { $lock = $guest->try_change_lock } if -d $guest->dir;
    $self->_clean($guest) if $lock;
    return;
}

sub restore_vm_init ($self, $volname, @) {
    my ($place) = $self->_parse($volname);
    $self->_settle($self->_guest($place));
    my $archive = $self->_archive($volname);
    fail('ArchiveError',
        "$volname is of a container: restore it with pct, or by tar from "
            . $archive->container_path)
        if $archive->container;
    return { map { $_ => { size => $archive->device($_)->{size} } } $archive->devices };
}

sub device_called ($self, $volname, $name) {
    my ($place) = $self->_parse($volname);
    return device_meant($self->_archive($volname), $name, $self->_guest($place));
}

sub restore_vm_volume_init ($self, $volname, $device, $info) {
    my ($place, $name) = $self->_parse($volname);
    my $restore = $self->{restores}{$volname}{$device} = $Restore->start(
        $self->_guest($place), $name, $device,
        volname => $volname,
        $info->%{'socket'},

        # Proxmox VE's qemu-server takes files and block devices, no URI.
        'is-file' => defined($self->{'storage-plugin'}),
    );
    return { 'qemu-img-path' => $restore->path };
}

sub server ($self, $volname, $device) { return $self->{restores}{$volname}{$device}->server }

sub restore_vm_volume_cleanup ($self, $volname, $device, $info) {
    my $restore = delete($self->{restores}{$volname}{$device});
    $restore->stop if $restore;
    return;
}

sub restore_vm_cleanup ($self, $volname, @) {
    my $restores = delete($self->{restores}{$volname}) // {};
    $_->stop for values $restores->%*;
    return;
}

sub restore_container_init ($self, $volname, @) {
    my ($place) = $self->_parse($volname);
    my $reading = $self->_guest($place)->read_lock;
    my $archive = $self->_archive($volname);
    fail('ArchiveError', "$volname is of a virtual machine") if !$archive->container;
    my $tree = $Tree->new($archive);
    $self->{'container restores'}{$volname} = { tree => $tree, reading => $reading };
    return { $tree->mechanism eq 'tar' ? 'tar-path' : 'archive-directory' => $tree->path };
}

sub restore_container_cleanup ($self, $volname, @) {
    delete($self->{'container restores'}{$volname});
    return;
}

# ---- looking after the archives ----

sub list ($self, $vmid = undef) {
    my @vmids = defined($vmid) ? checked_vmid($vmid) : $self->_vmids;
    return [map { list_guest($self->_guest($_), $_, \&time_of) } map { _places($_) } @vmids];
}

sub _vmids ($self) {
    my @entries = map { entries("$self->{path}/$_") } values %directories;
    return sort { $a <=> $b } uniq(map { m/\A([1-9][0-9]{0,8})\z/ ? $1 : () } @entries);
}

# A number may have been a container's and a virtual machine's, one after another.
sub _places ($vmid) { return ("vm/$vmid", "ct/$vmid") }

sub verify ($self, $volname, $seen = {}) {
    my ($place, $name) = $self->_parse($volname);
    my $guest = $self->_guest($place);
    $self->_settle($guest);
    my $reading = $guest->read_lock;
    return [problems_of($guest, $name, $seen)];
}

sub unproven ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    return [unproven_of($self->_guest($place), $name)];
}

sub digests ($self, $volname, $device) {
    my ($place, $name) = $self->_parse($volname);
    return [digests_of($self->_guest($place), $name, $device)];
}

# { 'keep-last' => 7, ... }, or the number of it alone.
my sub rules ($keep) {
    return $keep if ref($keep) eq 'HASH';
    check_positive('keep', $keep);
    return { 'keep-last' => $keep };
}

sub retention ($self, $vmid, $keep) {
    $vmid = checked_vmid($vmid);
    $keep = rules($keep);
    check_keep($keep);
    return [map { $self->_retention($_, $keep) } _places($vmid)];
}

sub _retention ($self, $place, $keep) {
    my @archives = retention_of($self->_guest($place), $keep, \&time_of);
    return map { { volname => "$place/$_->{name}", $_->%{qw(time mark problems)} } } @archives;
}

sub prune ($self, $vmid, $keep) {
    $vmid = checked_vmid($vmid);
    $keep = rules($keep);
    check_keep($keep);
    return [map { $self->_prune($_, $keep) } _places($vmid)];
}

sub _prune ($self, $place, $keep) {
    my $guest = $self->_guest($place);
    my $lock = -d $guest->dir ? $guest->change_lock : return;
    $self->_clean($guest);
    return prune_guest($guest, $place, $self->{log}, $self->_retention($place, $keep));
}

sub remove ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    my $guest = $self->_guest($place);
    fail('ArchiveError', "there is no archive $volname") if !-d $guest->dir;
    my $lock = $guest->change_lock;
    $self->_clean($guest);
    fail('ArchiveError', "there is no archive $volname in $self->{path}")
        if !grep { $_ eq $name } $guest->names;
    my $alone = $guest->removal_lock;
    $guest->remove($name);
    return;
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Provider::Qcow2Chain - backups as chains of qcow2 images in a directory, containers as tars

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

A provider of Proxmox VE's backup provider API that needs nothing but a directory, C<qemu-img> and
C<qemu-nbd>. It is what C<pve-backup-access> uses, and works as a storage plugin's provider.

Each backup of a guest is an archive:

    vm/100/20261122T064953Z/manifest.json
                            guest.conf, firewall.conf
                            drive-scsi0.qcow2, drive-scsi0.digests

A full backup of a device is an image of its own; an incremental one has the image of the archive
before as its backing file. The names in there are relative: the directory can be moved. Any archive
can be looked at with QEMU's own tools alone.

A container's archive is a full one, with all of its tree, and can be extracted by tar alone:

    ct/101/20261122T064953Z/manifest.json
                            guest.conf, firewall.conf
                            root.tar.zst

It needs C<tar> and C<zstd>, has owners as the container sees them, access control lists, the extended
attributes C<user.*> and C<security.capability>, hard links, device nodes and holes, and the manifest has the SHA-256 of
the tar before it was compressed.

An archive is complete or not there: it is written under another name, flushed, and renamed at the
end of L</backup_vm> or L</backup_container>; so what a bitmap no longer says is on disk when the bitmap is cleared. The manifest
has the size, bitmap mode and parent of each device, and the SHA-256 of each file but the images and the tar, and of itself.

What an image holds is proven by the digests of all blocks that were read from the guest for it, which were taken on the way
(see L<PVE::BackupAccess::Volume/FILES OF DIGESTS>). A merge joins digests and computes none, so that what is damaged
stays known as damaged. Archives of version 0.1 have none; nothing builds on them, so the first backup after
them is a full one. A program of version 0.1 says that the format of later archives is unknown, and leaves them.

An incremental backup goes on top of the archive that the device's bitmap is relative to, and no other. A caller
that ties bitmaps to backups (L<PVE::BackupAccess::Task>) says which one that is. For one that does not, Proxmox VE
itself, the host notes outside of the directory which archive it made last for each storage id (C<state-dir> of
L</new>), and that must be the directory's newest one. Where the archive is not there, is damaged, or lacks something
it builds on, or L</verify> found damage in one of them, where the device has another size, or where there are 100 archives in its chain, the device gets a full backup, and
the log says why. Damage is
seen here if it changed a file's size or time (then the content is read); L</verify> sees all.

Where the caller tells it, the manifest has the identity of each disk and the name of its node (L<PVE::BackupAccess::Task/run>).
So a disk is found whatever it was called: what an increment builds on, or is compared with, may be a device of another name, and
L</prune> counts them as one. A device of the same name and another identity is never built on. An archive without
identities has disks by their names; L</prune> takes a device of such an archive for the only disk that other archives know by
that name.

What the archives before have already is not stored again, block by block of 64 KiB, by the digests: an increment
leaves out what the guest has written without a change. Where a bitmap was lost (or begins anew for another reason)
all of the device is read, and compared with the newest archive of it; what differs is stored on top of that,
as an increment is, and the whole is read back. So a lost bitmap costs reading, not storing. It is a full backup
with L</make_full>, where the chain is long enough, and where the newest archive is of another guest, of another size, or
damaged as far as is known: L</verify> leaves a note, F<drive-scsi0.damaged>, in the directory of an
archive that is, and takes it away when the archive is found whole. If the reading back finds that the newest archive
is damaged, the backup dies with C<ContentError>, and the next one is a full one.

Two guests that have had one number in a directory have their archives side by side: neither builds on the other's, and
L</prune> counts each one's for itself. One storage id stands for one
target-id of L<PVE::BackupAccess>. Directories that are used in turn under one storage id, a directory that was put
back to an earlier state, or a copy that is older than the last backup are safe to use: the next backup is a full one.

Each C<qemu-nbd> has a private directory for its socket, F<pba-server-...> in C<$TMPDIR> or F</tmp>. Of a
process that was killed it stays there, until the next C<qemu-nbd> is started by the same user.

All sizes are bytes. Methods die with a L<PVE::BackupAccess::Error>: C<ArchiveError> where an archive
is missing or damaged, C<StateError> while another process works on the same guest's archives.

=head1 METHODS OF THE API

Arguments and results are those of C<PVE::BackupProvider::Plugin::Base>.

=head2 new

    my $provider = PVE::BackupAccess::Provider::Qcow2Chain->new($storage_plugin, $scfg, $storeid, $log_function);

C<< $scfg->{path} >> is the directory, which must be there, and absolute. C<$storage_plugin> may be
undef, and so may C<$log_function>: warnings and errors then go to C<warn>. C<$storeid> is any name. With a true
C<< $scfg->{'no-check'} >>, L</backup_vm> does not read back what it wrote.

C<< $scfg->{'state-dir'} >>, absolute, is where it notes for callers that know of no ids of backups (Proxmox VE
itself) which archive it made last for C<$storeid>: by default where L<PVE::BackupAccess::Task/state-dir> is. So a
directory that took another one's place, such as a rotated disk or a copy, begins with a full backup. Nodes between which
guests migrate need one that they share, as C</etc/pve/priv> is.

=head2 provider_name

C<Qcow2Chain>.

=head2 job_init

=head2 job_cleanup

=head2 backup_init

Locks the guest's directory until the archive is there, or until L</backup_cleanup>, takes away what a
killed backup left, and names the archive: C<vm/100/20261122T064953Z>, for a container C<ct/100/20261122T064953Z>, by the
start time in UTC, or later than the last one there is.

=head2 backup_get_mechanism

C<nbd> for virtual machines, C<directory> for containers, undef for all else.

=head2 backup_vm_query_incremental

C<use> for a device that can be incremental, C<new> for all others.

=head2 backup_vm

When it returns, the archive is complete and durable, and its images have been read back and compared with what was read
from the guest. That proves the programs that wrote, not the disk below the page cache. When it dies, there is no archive.

=head2 backup_cleanup

Removes what is not complete. An archive that L</backup_vm> has completed stays, also without success: what failed
came later, such as a prune, and bitmaps may be relative to it already. C<archive-size> is what its own files take.

=head2 backup_handle_log_file

Puts the log into the archive as F<backup.log>; the manifest does not have it.

=head2 backup_container_prepare

Starts a process that has the archive and the lock. So L</backup_container> may be called by a user who may not
write to the directory.

=head2 backup_container

Has C<tar> write the C<sources> to that process, which compresses them. When it returns, the archive is
complete and durable, and has been read back and compared with what was read, unless C<no-check> is set. When it dies, or
is killed, or C<tar> ends with anything but 0, there is no archive.

The patterns are C<tar>'s: one that begins with a slash is relative to the container's root, any other matches in each
directory. C<*> matches slashes as well, C</**/> also matches a single slash, and a slash at the end leaves out what is in directories of
that name. With a C<backup-user-id> other than 0, F<lost+found> is left out: the file system's own, which
the container's root cannot read.

=head2 restore_get_mechanism

=head2 archive_get_guest_config

=head2 archive_get_firewall_config

=head2 restore_vm_init

=head2 restore_vm_volume_init

C<qemu-img-path> is what C<qemu-img convert -f raw> reads the device's content from: with a
C<$storage_plugin> a file, since Proxmox VE takes nothing else here (it is served by FUSE), without one an NBD URI.
It is there until L</restore_vm_volume_cleanup>, L</restore_vm_cleanup>, or the end of this process. A C<socket> in the
last argument is the path of the NBD socket; by default it is in a private directory.

=head2 restore_vm_volume_cleanup

=head2 restore_vm_cleanup

=head2 restore_container_init

C<tar-path> is the archive's tar. pve-container takes no tar of another storage that has less than 10 members or no F<sbin> in its
root, such as the container of a single program: of one of those C<archive-directory> is a directory in F</var/tmp> (or
C<$TMPDIR>) with the extracted tree, until L</restore_container_cleanup> or the end of this process. L</restore_get_mechanism> says which.
What a killed process left of it goes when the next one is made.

=head2 restore_container_cleanup

=head1 OTHER METHODS

=head2 server

    my $pid = $provider->server($volname, $device)->pid;

The C<qemu-nbd> that L</restore_vm_volume_init> has started for a device: an object with C<pid>, C<socket>, C<uri> and
C<is_running>.

=head2 on_progress

    $provider->on_progress(sub ($device, $done, $all) { ... });

Is called while L</backup_vm> stores a device, a few times a second, with bytes stored and all bytes to
store. Without it there is a line in the log every half a minute.

=head2 device_called

    my $device = $provider->device_called($volname, $name);

What the archive calls the disk of that name: the name itself, or, where a backup has stored more of its names (its node,
the guest's device, the drive), the only device that had it. Dies with C<ArgumentError> if there is none.

=head2 wait_for_others

    $provider->wait_for_others(600);

How many seconds methods wait for another process that works on the same guest's archives, 0 at first. Backups, L</prune>
and L</remove> wait for each other; restores and L</verify> go on beside each other and beside a backup, but not while
an archive is taken away. After that a method dies with class C<StateError>.

=head2 make_full

    $provider->make_full(1);

Whether the backups that follow are full ones, whatever could be built on.

=head2 compress

    $provider->compress(1);

Whether the backups that follow are compressed, by zstd: cluster by cluster, by QEMU's own filter. Any archive may be, on top
of any other. What is merged into an older archive is not compressed there, nor is a device whose size is no multiple of 64 KiB. It costs more processor time than all of the copy
(F<doc/performance.md> has the figures), so it is off at first.

=head2 jobs

    $provider->jobs(2);

How many devices of a guest L</backup_vm> stores side by side, each by a process of its own, unless the caller tells
(C<jobs> of L<PVE::BackupAccess::Task/new>); 2 at first. They keep the
bandwidth limit together. The first
failure ends them all, and none is left when C<backup_vm> dies.

=head2 audit_every

    $provider->audit_every(30);

Has one in 30 backups of a device audit its bitmap, with 1 each of them, with 0 none (the default): it reads all of
the device, compares what the bitmap calls clean with the backups before, and stores what differs. What had changed and
was called clean is logged as an error, and is in L</audit_findings>; the archive has it as it is, and the bitmap begins
anew. A full read for another reason counts as an audit. It needs a caller that ties bitmaps to backups.

=head2 audit_findings

    my $findings = $provider->audit_findings;

What the last L</backup_vm> found wrong with bitmaps, none if all were right: an array ref of hashes with C<device>,
C<bytes>, C<ranges> (the first 1,000, as C<[$offset, $length]>), C<suspects>, the names of the archives that were made
by that bitmap since the device was read in full, and C<text>, which says it all.

=head2 list

    my $archives = $provider->list;
    my $archives = $provider->list($vmid);

Returns an array ref of hashes, the oldest archive of a guest first: C<volname>, C<vmid>, C<type> (C<qemu> or C<lxc>), C<time> (seconds
since 1970), C<size> (of its own files) and C<devices>: for each device C<size>, C<bitmap-mode>,
C<image-size>, C<identity> if it is known, and C<parent> if it is incremental. A container has one that is called C<container>, with C<size> and
C<image-size>. Of an archive whose manifest cannot be read there is
C<problem>, a text, instead of the last two.

=head2 verify

    my $problems = $provider->verify($volname);
    my $problems = $provider->verify($volname, \%seen);

Reads all of an archive, and of those it builds on: manifests, SHA-256 of each file, C<qemu-img check>,
backing files, and the content of each image, which must fit its digests. Returns an array ref of texts that say what is
wrong, empty if nothing is; damage of content names device and offsets. What of an image a later archive has
overwritten is no damage of that one. C<%seen>, empty at first, keeps what was found in
an image for further calls, so that each is read once, however many archives build on it.

=head2 unproven

    my $devices = $provider->unproven($volname);

The devices whose content nothing proves, since their chain is of version 0.1, as an array ref.

=head2 digests

    my $files = $provider->digests($volname, $device);
    my $statistics = $volume->copy(to => $target, $files->@* ? (expected => $files) : ());

The files of digests that a restored device must fit, as C<expected> of L<PVE::BackupAccess::Volume/copy> takes them; an
empty array ref for a chain of version 0.1. Dies if one of them is damaged.

=head2 prune

    my $removed = $provider->prune($vmid, { 'keep-last' => 3, 'keep-daily' => 7, 'keep-weekly' => 4 });

Removes those archives of a guest that no rule keeps; of a virtual machine and a container that had the same number each for itself. The rules are those of Proxmox VE (C<prune-backups>):
C<keep-last>, C<keep-hourly>, C<keep-daily>, C<keep-weekly>, C<keep-monthly>, C<keep-yearly>, each with a number, taken in
this order; a period (in local time) of which an earlier rule keeps an archive does not count for a later one. A number
in the hash ref's place is C<keep-last>. Each device's archives are counted for themselves, so that a
backup of one disk pushes out none of another's. Not counted are protected archives (those with a file
C<protected> in their directory), which stay, and those that cannot be restored; one of these goes when whole
ones that are newer replace it, and else stays, with a warning. What newer ones need of one becomes theirs.

Returns an array ref of the names of those removed. What can be removed is, whatever becomes of the rest; if one
could not be removed it dies at the end (C<ArchiveError>), and says which and why. C<ArgumentError> for rules that
keep nothing or that do not exist, C<StateError> while another backup or prune has the guest's archives.

=head2 retention

    my $archives = $provider->retention($vmid, { 'keep-last' => 3 });

What L</prune> would do, and changes nothing: an array ref of hashes, the oldest archive first, with C<volname>,
C<time> (seconds since 1970), C<mark> (C<keep>, C<remove>, C<protected>, or C<broken> for one that cannot be restored
and stays) and C<problems>, an array ref of texts that say why it cannot be restored, as far as it is known
without reading its images.

=head2 remove

    $provider->remove($volname);

Removes one archive, wherever it is in its chain. What the next one needs of it is kept: the next one's
changes are merged into its image and read back, and only then does that take the place of the next one's. Nothing is begun
where there may not be space enough for what only the next one has. A block that is damaged stays known as damaged. It can
be killed at any moment; the next backup or removal ends it. While the archive or the next one is being restored, it dies.

=cut
