package PVE::BackupAccess::Provider::Store::Devices;

# Copies devices' data from the guest into an archive. In addition to the methods of Store::Archive, the new archive has:
#
#   add_device($device, \%about, $parent)    with a parent, the device starts with the parent's data
#   open_to_write($device)    a Store::Server of the image to write to
#   cluster_size

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Program qw(temporary_file);
use PVE::BackupAccess::Provider::Store::Audit qw(audit is_due);
use PVE::BackupAccess::Provider::Store::Content qw(check_base check_stored);
use PVE::BackupAccess::Provider::Store::Workers qw(side_by_side);
use PVE::BackupAccess::Try qw(attempt reason);
use PVE::BackupAccess::Volume;

our @EXPORT_OK = qw(begin_devices check_compared for_devices mode_of store_device store_devices);

our $seconds_between_lines = 30;

my sub fail ($device, $message) {
    PVE::BackupAccess::Error->throw('StateError', "device $device: $message", device => $device);
}

# The answer of backup_vm_query_incremental for a device.
sub mode_of ($base, $device, $volume, $audit_every) {
    return 'new' if !$base;
    return 'use' if !exists($volume->{base});
    my %more = is_due($base, $device, $audit_every) ? (audit => 1) : ();
    my $identity = $base->device($device)->{identity};
    $more{identity} = $identity if defined($identity);
    return { 'bitmap-mode' => 'use', base => $base->id, %more };
}

# The archive that the device's bitmap is relative to, and those it builds on.
my sub chain_of_bitmap ($task, $device, $volume) {
    my $base = $task->{bases}{$device};
    fail($device, 'the backup is incremental, but there is no archive that it could build on')
        if !$base || ($volume->{base} // $base->id) ne $base->id;
    my $size = $base->device($device)->{size};
    fail($device, "its size is $volume->{size} bytes, not $size as in the last archive")
        if $volume->{size} != $size;
    return $task->{guest}->chain($base->name, $device, $base->own($device));
}

# If a bitmap was lost, the whole device is read, but only differences to this chain are stored.
my sub comparable ($task, $device, $volume, $how) {
    my @chain;
    my $error = attempt {
        my %about = (($task->{about}{$device} // {})->%*, size => $volume->{size});
        my @which = ($task->@{qw(archives removed)}, $device);
        @chain = $task->{guest}->comparable(@which, \%about, $how->{guest});
    };
    $how->{log}->('info', "$device: nothing to compare with - " . reason($error)) if $error;
    return $error ? () : @chain;
}

# The archives that the device's data builds on, the newest first; none for a full backup.
my sub chain_for ($task, $device, $volume, $how) {
    my $mode = $volume->{'bitmap-mode'};
    return chain_of_bitmap($task, $device, $volume) if $mode eq 'reuse';
    return $mode eq 'new' && !$how->{full} ? comparable($task, $device, $volume, $how) : ();
}

# The result of an audit. The bitmap must be compared with the archive that it is relative to.
my sub audited ($task, $device, $volume, $chain, $log) {
    my $base = $task->{bases}{$device};
    if (!$chain->@* || !$base || $chain->[0]->id ne $base->id) {
        $log->(
            'warn',
            "$device: its bitmap is not audited, because its archive cannot be used as a base"
        );
        return undef;
    }
    my $finding = audit($task->{archive}, $device, $volume, $chain->@*);
    $log->($finding ? ('err', $finding->{text}) : ('info', "$device: its bitmap was right"));
    return $finding;
}

my sub stored ($statistics, $base) {
    my ($written, $zero, $unchanged) = $statistics->@{qw(bytes-written bytes-zero bytes-unchanged)};
    my $more = defined($base) || !$unchanged ? '' : ', ' . bytes($unchanged) . ' are unchanged';
    return sprintf(
        '%s%s%s in %.1f s (%s of it zero%s)',
        defined($base) ? 'read in full, stored ' : 'stored ',
        bytes($written + $zero),
        defined($base) ? " that differ from $base" : '',
        $statistics->{seconds},
        bytes($zero), $more
    );
}

# Returns the copy's statistics. When this returns, all data is in the image's store.
my sub copy_data ($archive, $device, $volume, $chain, $options) {
    my $server = $archive->open_to_write($device);
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    my $statistics = $reader->copy(
        to => $server->uri,
        digests => $archive->digests($device),
        $chain->@* ? (unchanged => [map { $_->digests($device) } $chain->@*]) : (),
        'cluster-size' => $archive->cluster_size,
        $options->%*,
    );
    $reader->close;
    $server->stop;
    return $statistics;
}

# A new bitmap has all bits set, and without a bitmap everything is read. What was not read would be zeroes in a full archive.
my sub check_whole ($device, $volume, $statistics) {
    my ($size, $read) = ($volume->{size}, $statistics->{'bytes-read'});
    PVE::BackupAccess::Error->throw(
        'IncompleteError',
        "device $device: only $read of $size bytes were read, although this is not an increment",
        device => $device
    ) if $volume->{'bitmap-mode'} ne 'reuse' && $read != $size;
    return;
}

# Begins a device of the task's archive. how: log, a code ref; full, whether the backup must be full; guest, the guest's
# UUID; about, more entries for the manifest. Returns the argument of store_device.
my sub begin_device ($task, $device, $volume, %how) {
    my $mode = $volume->{'bitmap-mode'};
    my @chain = chain_for($task, $device, $volume, \%how);
    my $base = @chain ? $chain[0]->name : undef;
    my $is_compared = defined($base) && $mode ne 'reuse';
    my $kind
        = $is_compared ? "what differs from $base"
        : defined($base) ? "an increment on $base"
        : 'a full image';
    $how{log}->('info', "$device: storing $kind");
    my $increments = $mode eq 'reuse' ? ($chain[0]->device($device)->{increments} // 0) + 1 : 0;
    my %about = (
        size => $volume->{size},
        'bitmap-mode' => $mode,
        increments => $increments,
        $how{about} ? $how{about}->($volume)->%* : ()
    );

    # The disk's identity, and its current other name.
    my $disk = $task->{about}{$device} // {};
    $about{$_} = $disk->{$_} for grep { defined($disk->{$_}) } qw(identity node);

    $task->{archive}->add_device($device, \%about, $chain[0]);
    return {
        task => $task,
        device => $device,
        volume => $volume,
        chain => \@chain,
        'compared with' => $is_compared ? $base : undef,
    };
}

# Begins all devices of a backup. Returns { device => argument of store_device and check_device }.
sub begin_devices ($task, $volumes, %how) {
    return { map { $_ => begin_device($task, $_, $volumes->{$_}, %how) } sort keys $volumes->%* };
}

# Stores the data of one device. how: log; copy, more options of the copy; check, whether to read back what is stored.
# Returns { statistics, finding }; finding is the result of an audit.
sub store_device ($job, %how) {
    my ($task, $device, $volume, $chain) = $job->@{qw(task device volume chain)};
    my ($archive, $base) = ($task->{archive}, $job->{'compared with'});

    # The caller's handler may wait for every child, or ignore all children.
    local $SIG{CHLD} = 'DEFAULT';
    my $statistics = copy_data($archive, $device, $volume, $chain,
        { $how{copy}->%*, check => $how{check} ? 1 : 0 });
    check_whole($device, $volume, $statistics);
    $how{log}->('info', "$device: " . stored($statistics, $base));
    my $finding
        = defined($volume->{'audit-bitmap'})
        ? audited($task, $device, $volume, $chain, $how{log})
        : undef;
    return { statistics => $statistics, finding => $finding };
}

# If the device was compared with earlier archives, reads the whole disk through the new one.
sub check_compared ($job, $log) {
    check_base($job->{task}{archive}, $job->{device}, $log, $job->{chain}->@*)
        if defined($job->{'compared with'});
    return;
}

# Also reads the new data, for an archive that was not read back while it was stored.
my sub check_device ($job, $log) {
    check_stored($job->{task}{archive}, $job->{device}, $log);
    check_compared($job, $log);
    return;
}

# Progress as log lines, for a caller without a progress function.
my sub progress_lines ($log) {
    my $begin = now();
    my %told;
    return sub ($device, $done, $all) {
        return if now() - ($told{$device} // $begin) < $seconds_between_lines;
        $told{$device} = now();
        $log->('info', "$device: " . bytes($done) . ' of ' . bytes($all));
    };
}

# Memory that forked processes share.
my sub shared_file ($bytes) {
    my $file = temporary_file();
    truncate($file, $bytes) or fail('all', "cannot make a file - $!");
    return $file;
}

my sub alone ($work, $jobs, $copy, %how) {
    my %found;
    for my $device (sort keys $jobs->%*) {
        my $progress = sub (@state) { $how{progress}->($device, @state) };
        $found{$device}
            = $work->($jobs->{$device}, $how{log}, { $copy->%*, progress => $progress });
    }
    return \%found;
}

# Calls $work->($job, $log, \%copy) for each device's job, for up to $how{jobs} devices in parallel, each in its own
# process. how: log; jobs; limit, bytes per second for all devices together; progress, a code ref ($device, $done, $all),
# or undef. Returns { device => result }.
sub for_devices ($work, $jobs, %how) {
    my @devices = sort keys $jobs->%*;
    $how{progress} //= progress_lines($how{log});
    my %copy = $how{limit} ? ('bandwidth-limit' => $how{limit}) : ();
    return alone($work, $jobs, \%copy, %how) if $how{jobs} == 1 || @devices == 1;
    $copy{'shared-limit'} = shared_file(8) if $how{limit};
    return side_by_side(
        $how{jobs},
        \@devices,
        sub ($device, $tell) {
            my $log = sub (@line) { $tell->({ log => \@line }) };
            my $progress = sub (@state) { $tell->({ progress => \@state }) };
            return $work->($jobs->{$device}, $log, { %copy, progress => $progress });
        },
        sub ($device, $message) {
            $how{log}->($message->{log}->@*) if $message->{log};
            $how{progress}->($device, $message->{progress}->@*) if $message->{progress};
        },
    );
}

# Stores the devices of an archive that has all their data. The check comes after freeze: what it reads does not change any more.
# Returns what audits found. how: that of begin_device and for_devices; check, whether to read back what is stored.
sub store_devices ($task, $volumes, %how) {
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

1;
