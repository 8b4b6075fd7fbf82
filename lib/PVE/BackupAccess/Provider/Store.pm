package PVE::BackupAccess::Provider::Store;

# The backup provider API over archives with a manifest, wherever they are stored. A subclass implements provider_name,
# backup_get_mechanism, job_init, new, which blesses the result of _settings with fields of its own, and:
#
#   _guest($place)       returns a Store::Guest: the archives of the guest at a place in the store, such as vm/100
#   _places_of_type      { type of guest => the first part of its places }
#   _vmids               the numbers of all guests in the store
#   _where               the store's name for messages
#   _notes_name          the kind of store, as the first part of the name of its notes
#   _begin($task, %about)    begins an archive; about becomes a part of its manifest
#
# and, if an archive can depend on another one:
#
#   _store_devices($task, $volumes, %how)    stores the devices' data; see Store/Devices.pm. Returns what audits found
#   _problems_of($guest, $name, $seen), _digests_of($guest, $name, $device)    return the results of verify and digests

use v5.36;

use List::Util qw(max);
use POSIX ();
use Time::Local ();

use PVE::BackupAccess::Argument qw(bad_argument check_code check_filled_text check_positive);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(read_file);
use PVE::BackupAccess::Notes;
use PVE::BackupAccess::PluginBase;
use PVE::BackupAccess::Provider::Store::Devices qw(mode_of store_devices);
use PVE::BackupAccess::Provider::Store::Disks qw(device_meant);
use PVE::BackupAccess::Provider::Store::List qw(list_guest);
use PVE::BackupAccess::Provider::Store::Manifest qw($name_pattern);
use PVE::BackupAccess::Provider::Store::Prune qw(prune_guest retention_of);
use PVE::BackupAccess::Provider::Store::Restore;
use PVE::BackupAccess::Provider::Store::Verify qw(archive_to_compare problems_of);
use PVE::BackupAccess::Retention qw(check_keep);
use PVE::BackupAccess::Try qw(attempt reason);

use parent qw(PVE::BackupProvider::Plugin::Base);

my $Restore = 'PVE::BackupAccess::Provider::Store::Restore';

our $guest_config = 'guest.conf';
our $firewall_config = 'firewall.conf';

my $longest_step = 86_400;    # seconds by which a clock may be set back without a warning

my sub fail ($class, $message, %context) {
    PVE::BackupAccess::Error->throw($class, $message, %context);
}

# Returns the path without taint: it comes from the administrator's configuration.
sub _checked_path ($name, $path) {
    check_filled_text($name, $path);
    my ($absolute) = $path =~ m!\A(/.*?)/*\z!s
        or bad_argument("$name must be an absolute path, not '$path'");
    return $absolute;
}

my sub checked_vmid ($vmid) {
    my ($number) = ($vmid // '') =~ m/\A([1-9][0-9]{0,8})\z/
        or bad_argument('vmid must be a number from 1 to 999999999');
    return $number;
}

sub _settings ($class, $storage_plugin, $scfg, $storeid, $log_function) {
    my $state_dir = $scfg->{'state-dir'};
    $state_dir = _checked_path('state-dir', $state_dir) if defined($state_dir);
    check_filled_text('storeid', $storeid);
    return (
        'storage-plugin' => $storage_plugin,
        storeid => $storeid,
        'state-dir' => $state_dir,
        'no-check' => $scfg->{'no-check'} ? 1 : 0,
        log => $log_function // sub ($level, $message) { warn "$message\n" if $level ne 'info' },
        restores => {},
        wait => 0,
        jobs => 2,
    );
}

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

sub jobs ($self, $count) {
    check_positive('count', $count);
    $self->{jobs} = $count;
    return;
}

sub audit_findings ($self) { return [($self->{findings} // [])->@*] }

# Splits 'vm/100/20261122T064953Z' into (vm/100, 20261122T064953Z). Proxmox VE prepends 'backup/'.
sub _parse ($self, $volname) {
    my ($place, $name)
        = ($volname // '') =~ m!\A(?:backup/)?((?:vm|ct)/[1-9][0-9]{0,8})/$name_pattern\z!
        or bad_argument("'"
            . ($volname // '')
            . "' is not the name of an archive, such as vm/100/20261122T064953Z");
    return ($place, $name);
}

sub _archive ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    my $guest = $self->_guest($place);
    fail('ArchiveError', "there is no archive $volname in " . $self->_where) if !$guest->has($name);
    return $guest->archive($name);
}

sub has ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    return $self->_guest($place)->has($name) ? 1 : 0;
}

# ---- backup ----

sub job_cleanup ($self) { return }

# Seconds since 1970 to a name and back. The order of names is that of times.
my sub name_of ($time) { return POSIX::strftime('%Y%m%dT%H%M%SZ', gmtime($time)) }

my sub time_of ($name) {
    my ($year, $month, @rest) = $name =~ m/\A(....)(..)(..)T(..)(..)(..)Z\z/;
    my ($day, $hour, $minute, $second) = @rest;

    # Not all months have a day 31, and a name in a store need not be of our making.
    my $first = Time::Local::timegm_modern($second, $minute, $hour, 1, $month - 1, $year);
    return $first + ($day - 1) * 86_400;
}

sub backup_init ($self, $vmid, $vmtype, $start_time) {
    $vmid = checked_vmid($vmid);
    my $directory = $self->_places_of_type->{$vmtype} // fail('UnsupportedError',
        "guest $vmid: guests of type '$vmtype' are not supported by this provider");
    my $place = "$directory/$vmid";
    my $guest = $self->_guest($place);
    $guest->make_place;
    my $lock = $guest->change_lock;
    $self->_clean($guest);

    # Names stay in the order of the backups even if the clock was set back.
    my ($newest) = reverse($guest->names);
    my $earliest = defined($newest) ? time_of($newest) + 1 : 0;
    my $name = name_of(max(int($start_time), $earliest));
    $self->_warn_of_clock($place, $newest) if $earliest - $start_time > $longest_step;
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

# Retention goes by names.
sub _warn_of_clock ($self, $place, $newest) {
    $self->{log}->(
        'warn',
        "archive $place/$newest is dated later than now, so the new archive is dated one second after it, and"
            . ' retention rules count both as of the same hour and day - check the clock, and remove archives with'
            . ' wrong dates'
    );
    return;
}

sub _clean ($self, $guest) {
    $self->{log}->('warn', $_) for $guest->clean;
    return;
}

sub _task ($self, $vmid) {
    my $task = $self->{task};
    fail('StateError', "guest $vmid: backup_init must be called before the other backup methods")
        if !$task || $task->{vmid} != $vmid;
    return $task;
}

# The archives, and those that are being removed. None if one of them cannot be read: it may already build on the archive that
# would be chosen, and only one may.
sub _archives_to_build_on ($self, $guest) {
    my @archives = $guest->readable(\my @unread);
    my @removed = $guest->being_removed(\@unread);
    return (\@archives, \@removed) if !@unread;
    $self->{log}->('warn', "all disks are backed up in full - $unread[0]");
    return ([], []);
}

sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    my $task = $self->_task($vmid);
    my $notes = $self->_notes($vmid);
    my ($archives, $removed) = $self->_archives_to_build_on($task->{guest});
    $task->@{qw(archives removed about)} = ($archives, $removed, $volumes);
    my %modes;
    for my $device (sort keys $volumes->%*) {
        my ($base, $about) = (undef, $volumes->{$device});
        my $find
            = sub { $base = $task->{guest}->base($archives, $removed, $notes, $device, $about) };
        my $error = $self->{'make full'} ? undef : attempt(\&$find);
        $self->{log}->('warn', "$device: full backup - " . reason($error)) if $error;
        $task->{bases}{$device} = $base;
        $modes{$device} = mode_of($base, $device, $about, $self->{'audit every'});
    }
    return \%modes;
}

# A caller that does not know IDs names targets and bitmaps after the storage. The note of the archive that this host
# made last for that storage is kept outside of the store, because another store may have taken its place.
sub _notes ($self, $vmid) {
    return PVE::BackupAccess::Notes->new($self->_notes_name . " $self->{storeid}",
        $vmid, dir => $self->{'state-dir'});
}

sub backup_vm ($self, $vmid, $guest_config_text, $volumes, $info) {
    my $task = $self->_task($vmid);
    my $archive = $self->_begin_archive($task, $info);
    $archive->add_file($guest_config, $guest_config_text);
    $self->{findings} = [$self->_store($task, $volumes, $info)];

    # The archive is made durable before it gets its name, and gets its name before the caller clears the bitmaps: what a
    # cleared bitmap recorded must be in an archive that survives a crash.
    $archive->seal;
    $task->{guest}->publish($archive, defined($info->{'backup-id'}) ? undef : $self->_notes($vmid));
    $task->{published} = 1;

    # Proxmox VE prunes before it calls backup_cleanup.
    $task->{guest}->drop(delete($task->{lock}));
    return;
}

sub _begin_archive ($self, $task, $info) {
    my $archive = $task->{archive} = $self->_begin(
        $task,
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

        # The caller has looked again since it asked, and another disk may have got the name.
        my $identity = $volumes->{$device}{identity};
        $task->{about}{$device}{identity} = $identity if defined($identity);
    }
    return $self->_store_devices(
        $task, \%checked,
        $self->%{qw(log progress)},
        jobs => $info->{jobs} // $self->{jobs},
        full => $self->{'make full'},
        guest => $info->{'guest-uuid'},
        check => !$self->{'no-check'},
        limit => $info->{'bandwidth-limit'},
    );
}

sub _store_devices ($self, @what) { return store_devices(@what) }

sub backup_cleanup ($self, $vmid, $vmtype, $success, $info) {
    my $task = delete($self->{task}) // return { stats => {} };
    my ($guest, $name, $archive) = $task->@{qw(guest name archive)};
    if (!$task->{published}) {
        $guest->give_up($archive) if $archive;
        $guest->drop($task->{lock});
        return { stats => {} };
    }

    # The bitmaps may already be relative to this archive. If they are not, they hold too many bits, which is harmless.
    $self->{log}->(
        'warn',
        "archive $task->{place}/$name is complete and is kept, although the backup failed after that"
    ) if !$success;
    $self->{last} = $guest->archive($name);
    return { stats => { 'archive-size' => $self->{last}->file_size } };
}

# The manifest does not list the log: an archive without it is complete.
sub backup_handle_log_file ($self, $vmid, $filename) {
    my $archive = delete($self->{last}) // return;
    $archive->keep_log(read_file($filename));
    return;
}

# ---- restore ----

sub restore_get_mechanism ($self, $volname, @) {
    $self->_archive($volname);
    return ('qemu-img', 'qemu');
}

# To show a backup's configuration, Proxmox VE passes the storage's name as another argument.
sub archive_get_guest_config ($self, $volname, @) {
    return $self->_archive($volname)->content($guest_config);
}

sub archive_get_firewall_config ($self, $volname, @) {
    return $self->_archive($volname)->content($firewall_config);
}

# Completes a removal that was killed, unless another process has the lock or the store is read-only. What is wrong with
# other archives does not keep this one from being read. If nothing was killed, a backup that begins now is not locked out.
sub _settle ($self, $guest) {
    my ($is_clean, $lock);
    my $error = attempt { $is_clean = !$guest->is_there || $guest->is_clean };
    attempt { $lock = $guest->try_change_lock } if !$error && !$is_clean;
    $error = attempt { $self->_clean($guest) } if $lock;
    $self->{log}->('warn', reason($error)) if $error;
    return;
}

sub restore_vm_init ($self, $volname, @) {
    my ($place) = $self->_parse($volname);
    $self->_settle($self->_guest($place));
    my $archive = $self->_archive($volname);
    fail('ArchiveError',
        "archive $volname is of a container, not of a virtual machine - restore it with pct, or extract it with tar from "
            . $archive->container_place)
        if $archive->container;

    # Proxmox VE runs programs with the sizes, also with -T. The manifest was checked.
    my sub untainted ($size) { return 0 + ($size =~ m/\A([0-9]+)\z/)[0] }
    return { map { $_ => { size => untainted($archive->device($_)->{size}) } } $archive->devices };
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

        # Proxmox VE's qemu-server accepts files and block devices, but no URI.
        'is-file' => defined($self->{'storage-plugin'}),
    );
    my ($damaged)
        = grep { $_->is_known_damaged($device) } $self->_guest($place)->chain($name, $device);
    $self->{log}->(
        'warn',
        "device $device: the last verification of archive "
            . $damaged->name
            . ' found damage in it - verify says what is damaged'
    ) if $damaged;
    return { 'qemu-img-path' => $restore->path };
}

sub server ($self, $volname, $device) { return $self->{restores}{$volname}{$device}->server }

sub restore_vm_volume_cleanup ($self, $volname, $device, $info) {
    my $restore = delete($self->{restores}{$volname}{$device}) // return;
    $restore->note_damage($info->{damaged});
    $restore->stop;
    $restore->check;
    return;
}

sub restore_vm_cleanup ($self, $volname, @) {
    my $restores = delete($self->{restores}{$volname}) // {};
    $_->stop for values $restores->%*;
    return;
}

# ---- looking after the archives ----

# A container and a virtual machine may have had the same number, one after the other.
sub _places ($self, $vmid) {
    return map { "$_/$vmid" } reverse sort values $self->_places_of_type->%*;
}

sub list ($self, $vmid = undef) {
    my @vmids = defined($vmid) ? checked_vmid($vmid) : $self->_vmids;
    return [map { list_guest($self->_guest($_), $_, \&time_of) } map { $self->_places($_) } @vmids];
}

sub verify ($self, $volname, $seen = {}) {
    my ($place, $name) = $self->_parse($volname);
    my $guest = $self->_guest($place);
    $self->_settle($guest);
    my $reading = $guest->read_lock;
    return [$self->_problems_of($guest, $name, $seen)];
}

sub _problems_of ($self, $guest, $name, $seen) { return problems_of($guest, $name) }

# The devices whose content no digests prove.
sub unproven ($self, $volname) { return [] }

sub digests ($self, $volname, $device) {
    my ($place, $name) = $self->_parse($volname);
    return [$self->_digests_of($self->_guest($place), $name, $device)];
}

# The archive is kept, because its file may be a copy, which it removes.
sub _digests_of ($self, @what) {
    my $archive = archive_to_compare(@what);
    push($self->{kept}->@*, $archive);
    return $archive->digests($what[-1]);
}

# Rules as { 'keep-last' => 7, ... }, or a number, which means keep-last.
my sub checked_rules ($keep) {
    if (ref($keep) ne 'HASH') {
        check_positive('keep', $keep);
        $keep = { 'keep-last' => $keep };
    }
    check_keep($keep);
    return $keep;
}

sub retention ($self, $vmid, $keep) {
    $vmid = checked_vmid($vmid);
    $keep = checked_rules($keep);
    return [map { $self->_retention($_, $keep) } $self->_places($vmid)];
}

sub _retention ($self, $place, $keep) {
    my @archives = retention_of($self->_guest($place), $keep, \&time_of);
    return map {
        {
            volname => "$place/$_->{name}",
            $_->%{qw(time mark problems)}, $_->{unsure} ? (unsure => 1) : ()
        }
    } @archives;
}

sub prune ($self, $vmid, $keep) {
    $vmid = checked_vmid($vmid);
    $keep = checked_rules($keep);
    return [map { $self->_prune($_, $keep) } $self->_places($vmid)];
}

sub _prune ($self, $place, $keep) {
    my $guest = $self->_guest($place);
    my $lock = $guest->is_there ? $guest->change_lock : return;
    $self->_clean($guest);
    return prune_guest($guest, $place, $self->{log}, $self->_retention($place, $keep));
}

sub remove ($self, $volname) {
    my ($place, $name) = $self->_parse($volname);
    my $guest = $self->_guest($place);
    fail('ArchiveError', "there is no archive $volname in " . $self->_where) if !$guest->is_there;
    my $lock = $guest->change_lock;
    $self->_clean($guest);
    fail('ArchiveError', "there is no archive $volname in " . $self->_where)
        if !grep { $_ eq $name } $guest->names;
    my $alone = $guest->removal_lock;
    $guest->remove($name);
    return;
}

1;
