package PVE::BackupAccess::CLI::Restore;

# Restores an archive's disks as images, or to block devices.

use v5.36;

use Fcntl qw(O_CREAT O_EXCL O_WRONLY SEEK_END SEEK_SET);
use JSON::PP ();

use PVE::BackupAccess::CLI qw(usage_error);
use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::ArchivePath
    qw(archive_at chosen_devices file_of provider_for without_slash);
use PVE::BackupAccess::CLI::Output qw(say_error say_json say_out);
use PVE::BackupAccess::CLI::Progress;
use PVE::BackupAccess::File qw(file_exists fingerprint read_file);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Image::InUse qw(devices_over has_writer);
use PVE::BackupAccess::Provider::Store::Content
    qw(add_range by_blocks describe describe_unread joined);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw($cluster_size create_image);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Try qw(attempt attempt_any ensure);
use PVE::BackupAccess::Volume;

# { device => file } of the restore. Nothing is overwritten except a block device that the user has
# named.
my sub targets ($volumes, $target, $device, $format) {
    my @devices = chosen_devices($volumes, $device);
    my %files;
    if (-d $target) {
        $target = without_slash($target);
        %files = map { $_ => "$target/" . file_of($_, $format) } @devices;
    }
    elsif ($target =~ m!/\z!) {
        die "$target is not a directory - create it first\n";
    }
    elsif (@devices == 1) {
        %files = ($devices[0] => $target);
    }
    else {
        die
            "$target is not a directory, but the archive has several devices - create it, or choose one with"
            . ' --device: '
            . join(', ', @devices) . "\n";
    }
    for my $file (sort values %files) {
        die "$file already exists and is not overwritten - choose another target\n"
            if (-e $file || -l $file) && !-b $file;
        usage_error("--format qcow2 is for files, and $file is a block device")
            if -b $file && $format ne 'raw';
    }
    return \%files;
}

# Creates a file, and fails if another program has created one there. Like the archive, the file is
# readable by its owner only.
my sub open_new ($file) {
    sysopen(my $fh, $file, O_WRONLY | O_CREAT | O_EXCL, 0600) or die "cannot create $file: $!\n";
    return $fh;
}

# ---- new files: all of them get their names, or none ----

# Identifies a file, whatever its name.
my sub identity_of ($file) { return join(':', (stat($file))[0, 1]) }

# Removes the temporary file of a restore that was killed, but not that of one that still runs.
my sub remove_left_over ($part) {
    return if !-e $part && !-l $part;
    die "another restore writes to $part - wait for its end, or choose another target\n"
        if !-l $part && has_writer($part);
    unlink($part) or die "cannot remove $part: $!\n";
}

# The same for a killed restore to another format.
my sub remove_others ($job, $file) {
    my ($name) = $file =~ m/\A(.*)[.]\Q$job->{format}\E\z/s or return;
    for my $part (map { "$name.$_.part" } grep { $_ ne $job->{format} } $job->{formats}->@*) {
        unlink($part) if -e $part && !has_writer($part);
    }
}

# Returns a handle of the file, which has a temporary name until the restore is complete.
my sub begin_file ($job, $file) {
    my $part = "$file.part";
    remove_left_over($part);
    remove_others($job, $file) if defined($job->{directory});
    $job->{parts}{$file} = $part;    # before open_new, after which a signal may arrive
    my $fh = open_new($part);
    $job->{identities}{$file} = identity_of($fh);
    return $fh;
}

# Gives a file its name, unless a file with that name exists by now. Not all file systems support
# hard links.
my sub publish_file ($part, $file) {
    return unlink($part) if link($part, $file);
    die "another program has created $file in the meantime, and it is not overwritten\n"
        if file_exists($file);
    rename($part, $file) or die "cannot rename $part to $file: $!\n";
}

# Before the first of several files gets its name, a list of them is written. It is removed after the last
# one has got its name, so a restore whose list exists is not complete, and the next one into the same
# directory removes what it left. On file systems without leases, which would show that a list is in use, the list
# of a running restore may be removed.
my $list_name = 'restore.part';
my $json = JSON::PP->new->latin1;    # of bytes, which stay as they are

# Returns a handle that keeps other restores from removing the files.
my sub begin_list ($job, $list) {
    my %files = map { s{.*/}{}sr => fingerprint($job->{parts}{$_}) } keys $job->{parts}->%*;
    my $fh = open_new($list);
    $fh->autoflush;
    return $fh if print {$fh} $json->encode(\%files);
    my $problem = "$!";
    unlink($list);
    die "cannot write $list: $problem\n";
}

my sub remove_list ($list) { unlink($list) or die "cannot remove $list: $!\n" }

# Removes the files to which a killed restore has given names, unless they were changed since. Another user's list is not
# trusted.
my sub undo_killed ($directory) {
    my $list = "$directory/$list_name";
    my @about = lstat($list) or return;
    return if !-f _ || $about[4] != $>;
    die "another restore to $directory is about to be completed - wait for its end\n"
        if has_writer($list);
    my $files = {};
    attempt_any {
        $files = $json->decode(read_file($list))
    };    # it may have been killed as it wrote this
    for my $name (grep { !m!/! } keys $files->%*) {
        my $file = "$directory/$name";
        my $is = -l $file || !-f $file ? {} : fingerprint($file);
        unlink($file) if !grep { ($is->{$_} // '') ne $files->{$name}{$_} } qw(size mtime);
    }
    remove_list($list);
}

# On file systems without leases, which would show that a file is in use, another restore may have
# replaced the temporary file.
my sub publish_files ($job) {
    my @published;
    my $list = keys $job->{parts}->%* > 1 ? "$job->{directory}/$list_name" : undef;
    my $publish = sub {
        my $in_use = defined($list) ? begin_list($job, $list) : undef;
        for my $file (sort keys $job->{parts}->%*) {
            my $part = $job->{parts}{$file};
            die "another restore has replaced $part - restore again, to another target\n"
                if identity_of($part) ne $job->{identities}{$file};
            push(@published, $file);    # before publish_file, after which a signal may arrive
            publish_file($part, $file);
            delete($job->{parts}{$file});
        }
        remove_list($list) if defined($list);
    };
    my $end = sub ($died) {
        return if !$died;
        unlink(grep { -e && identity_of($_) eq $job->{identities}{$_} } @published);
        unlink($list) if @published && defined($list);
    };
    ensure($publish, $end);
}

my sub discard_file ($job, $file) {
    my $part = delete($job->{parts}{$file}) // return;
    my $mine = $job->{identities}{$file};
    unlink($part) if -e $part && (!defined($mine) || identity_of($part) eq $mine);
}

# ---- formats: copying data into a file ----

my sub fill_raw ($job, $file, $size, $copy) { $copy->(begin_file($job, $file)) }

my sub fill_qcow2 ($job, $file, $size, $copy) {
    close(begin_file($job, $file));
    my $part = $job->{parts}{$file};
    my ($bytes) = $size =~ m/\A([0-9]+)\z/;    # untaints: the manifest was checked
    create_image($part, $bytes);
    my $server = PVE::BackupAccess::Provider::Qcow2Chain::Server->start($part, writable => 1);
    $copy->($server->uri, 'cluster-size' => $cluster_size);
    $server->stop;
}

my %fill = (raw => \&fill_raw, qcow2 => \&fill_qcow2);

# Writing to a device that is mounted or used by a guest would destroy its data. With O_EXCL (open(2)),
# the kernel refuses to open a mounted device, but not one that a QEMU has open, or a loop device is over.
# That is checked after the open, when the device can no longer be mounted.
my sub fill_device ($job, $file, $size, $copy) {
    my $is_open = sysopen(my $fh, $file, O_WRONLY | O_EXCL);
    my $problem = "$!" . ($!{EBUSY} ? ' - it is mounted, or another program uses it' : '');
    my @over = devices_over($file);
    $problem .= ' - it is used by the device ' . join(', ', @over) if @over;
    die "cannot write to $file: $problem\n" if !$is_open;
    die "cannot write to $file: it is used by the device "
        . join(', ', @over)
        . " - detach that, or choose another target\n"
        if @over;
    die
        "cannot write to $file: a process, such as a running QEMU, has it, a part of it or the whole disk"
        . " open for writing - end that process, or choose another target\n"
        if has_writer($file);
    my $room = sysseek($fh, 0, SEEK_END) // die "cannot find the size of $file: $!\n";
    die "cannot write to $file: it has $room bytes, and the disk has $size\n"
        if $room < $size;
    sysseek($fh, 0, SEEK_SET) // die "cannot write to $file: $!\n";
    $copy->($fh);
}

# ---- a restore ----

# The digests that the data must match. If they are not available, the device is restored without
# verification, with a warning.
my sub expected ($job, $device) {
    return if $job->{'no-verify'};
    my $digests = [];
    my $error = attempt { $digests = $job->{provider}->digests($job->{volname}, $device) };
    push($job->{problems}->@*, "$error") if $error;
    $job->{progress}->warn(
        "$device: the archive has no digests of this disk, so what is restored is not verified")
        if !$error && !$digests->@*;
    return $digests->@* ? (expected => $digests) : ();
}

my sub copy ($job, $device, $size, $file) {
    my ($provider, $volname, $progress) = $job->@{qw(provider volname progress)};
    my (@damage, @unread);
    my $copy = sub ($to, @options) {

        # First: from here on, no prune replaces the files of digests.
        my $info = $provider->restore_vm_volume_init($volname, $device, {});
        my %expected = expected($job, $device);
        my $volume = PVE::BackupAccess::Volume->open($device,
            { 'nbd-path' => $info->{'qemu-img-path'}, size => $size });
        my $tell = sub ($done, $total) { $progress->update($device, $done, $total) };
        my $read = sub (%how) {
            @damage = ();
            $volume->copy(
                to => $to,
                progress => $tell,
                @options,
                %expected,
                %expected ? (damaged => sub (@range) { add_range(\@damage, @range) }) : (),
                unreadable => sub (@range) { add_range(\@unread, @range) },
                %how
            );
        };
        by_blocks(\@unread, $read);
        $volume->close;
    };
    my $fill = -b $file ? \&fill_device : $fill{ $job->{format} };
    my $end = sub (@) {
        $progress->end;
        $provider->restore_vm_volume_cleanup($volname, $device, { damaged => [joined(@damage)] });
    };
    ensure(sub { $fill->($job, $file, $size, $copy) }, $end);
    return ([joined(@damage)], [joined(@unread)]);
}

# Restores everything that can be restored. If nothing of a device can be restored, its file is
# omitted.
my sub restore_all ($job, $volumes, $files) {
    my $volname = text($job->{volname});
    for my $device (sort keys $files->%*) {
        my ($size, $file) = ($volumes->{$device}{size}, $files->{$device});
        $job->{progress}->tell("$device: restoring " . bytes($size) . ' to ' . text($file));
        my ($damage, $unread) = ([], []);
        my $error = attempt { ($damage, $unread) = copy($job, $device, $size, $file) };
        my @found = (
            $damage->@* ? "archive $volname is damaged: " . describe($damage->@*) : (),
            $unread->@* ? "of archive $volname, " . describe_unread($unread->@*) : (),
        );
        push(
            $job->{problems}->@*,
            $error ? "$error" : (),
            map {
                "$device: $_; the rest is restored - to get these bytes, restore again, or another archive"
            } @found
        );
        $job->{damaged}{$device} = [joined($damage->@*, $unread->@*)] if @found;
        next if !$error;
        discard_file($job, $file);
        delete($files->{$device});
    }
}

# Writes the guest's configuration next to the disks, if the archive has one and the target is a
# directory.
my sub restore_config ($job, $target) {
    my $config = $job->{provider}->archive_get_guest_config($job->{volname});
    return if !-d $target || ($config // '') eq '';
    my $file = "$target/guest.conf";
    die "$file already exists and is not overwritten - choose another target\n" if -e $file;
    my $fh = begin_file($job, $file);
    print {$fh} $config and close($fh) or die "cannot write $file: $!\n";
    return $file;
}

my sub show ($opt, $files, $config, $damaged) {
    return if $opt->{quiet} && !$opt->{json};
    return say_out(map { $files->{$_} } sort keys $files->%*) if !$opt->{json};
    say_json(
        {
            devices => { map { $_ => text($files->{$_}) } keys $files->%* },
            'guest-config' => defined($config) ? text($config) : undef,
            damaged => $damaged,
        }
    );
}

sub run ($opt, $path, $target) {
    my $format = $opt->{format} // 'raw';
    usage_error("--format must be raw or qcow2, not '$format'") if !$fill{$format};
    my ($directory, $volname) = archive_at($opt, $path);
    my $provider = provider_for($directory, $opt);
    my $volumes = $provider->restore_vm_init($volname);
    my $device
        = defined($opt->{device})
        ? $provider->device_called($volname, text($opt->{device}))
        : undef;
    undo_killed(without_slash($target)) if -d $target;
    my $files = targets($volumes, $target, $device, $format);
    my $job = {
        provider => $provider,
        volname => $volname,
        format => $format,
        formats => [keys %fill],
        directory => -d $target ? without_slash($target) : undef,
        progress => PVE::BackupAccess::CLI::Progress->new($opt->{quiet}),
        'no-verify' => $opt->{'no-verify'},
        parts => {},
        problems => [],
        damaged => {},
    };
    my $config;
    my $restore = sub {
        my $error
            = defined($device) ? undef : attempt { $config = restore_config($job, $target) };
        push($job->{problems}->@*, "$error") if $error;
        restore_all($job, $volumes, $files);
        publish_files($job);
    };
    ensure($restore, sub (@) { discard_file($job, $_) for keys $job->{parts}->%* });
    $provider->restore_vm_cleanup($volname);
    show($opt, $files, $config, $job->{damaged});
    say_error("pve-backup-access restore: $_") for $job->{problems}->@*;
    return $job->{problems}->@* ? 1 : 0;
}

1;
