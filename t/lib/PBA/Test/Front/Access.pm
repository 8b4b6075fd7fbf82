package PBA::Test::Front::Access;

# Makes the access from a stock QEMU's commands. Proxmox VE makes a whole setup in QEMU's main loop. The front
# stops the guest instead, with the same result: one instant for all devices. Only this substitute for tests
# does that; the module never stops a guest.
#
# With iothreads, QEMU 10.0 may lose a request of the guest on stop and cont. In this case, the guest is not
# stopped: one blockdev-reopen switches all disks, and the clean parts of a bitmap can be read.
#
# Dies with { class, desc } for an error and with { fatal } for a call that kills a Proxmox QEMU.

use v5.36;

use JSON::PP ();

use PBA::Test::Front::Graph ();

my $granularity = 4 << 20;
my $background = 'backup-access-background-bitmap';
my $native_target = 'Proxmox';
my $reserved_target = 'Proxmox VE';

sub new ($class, %option) {
    return bless {
        %option,
        graph => PBA::Test::Front::Graph->new($option{qemu}),
        infos => [],
        stat => {},
        remembered => {},
    }, $class;
}

# ---- the commands ----

sub setup ($self, $arguments) {
    my $target = $arguments->{'target-id'};
    $self->_no_previous;
    $self->{graph}->refresh;
    my @wanted = $self->_wanted($arguments);
    my %seen;
    $self->{damage}->("device $_->{device} is listed twice")
        for grep { $seen{ $_->{device} }++ } @wanted;
    $self->{damage}->("target-id '$target' can never be torn down") if $target eq $reserved_target;

    my @devices = map { $self->{graph}->find_disk($_->{device}) } @wanted;
    $devices[$_]{mode} = $wanted[$_]{mode} for 0 .. $#devices;
    $self->_prepare_bitmaps(\@devices, $arguments);
    $self->{target} = $target;
    $self->_start_statistics(\@devices);
    $self->_begin_all(\@devices);
    $self->{devices} = \@devices;
    return [map { _access_info($_) } @devices];
}

sub teardown ($self, $arguments) {
    my ($target, $success) = @$arguments{qw(target-id success)};
    my $active = $self->{target} // return {};
    if ($active ne $target) {
        my $desc = "cannot teardown backup access - got target $target instead of $active";
        die { desc => $desc };
    }
    if ($target eq $reserved_target) {
        die { desc => 'cannot teardown backup access for PVE - use backup-cancel instead' };
    }
    die { fatal => 'teardown of a native backup' } if $self->{native};
    my $devices = $self->{devices} // return {};
    $self->_end_all($devices, $success);
    delete $self->{devices};
    $self->_end_statistics;
    return {};
}

sub backup ($self, $arguments) {
    $self->_no_previous;
    $self->{graph}->refresh;
    my @wanted = map { { device => $_ } } $self->_device_names($arguments->{devlist});
    my @disks = map { $self->{graph}->find_node($_->{device}) } @wanted;
    my $uuid = '2d8a4c0e-6f0f-4a8e-9d53-000000000001';
    @$self{qw(target native)} = ($native_target, 1);
    $_->{dirty} = $_->{size} for @disks;
    $self->_start_statistics(\@disks);
    @{ $self->{stat} }{qw(uuid backup-file)} = ($uuid, $arguments->{'backup-file'});
    return { UUID => $uuid };
}

# During an access, this only leaves a mark for later, as in Proxmox' QEMU.
sub backup_cancel ($self, $) {
    $self->{canceled} = 1;
    $self->_end_statistics if delete($self->{native});
    return {};
}

sub pretend_backup ($self, $arguments) {
    return $self->backup_cancel({}) if !$arguments->{active};
    $self->_no_previous;
    @$self{qw(target native)} = ($native_target, 1);
    $self->_start_statistics([]);
    return {};
}

sub query_backup ($self, $) {
    return { finishing => JSON::PP::false, %{ $self->{stat} } };
}

sub query_bitmap_info ($self, $) { return $self->{infos} }

sub query_support ($self, $) {
    my @yes = qw(backup-access-api backup-fleecing backup-max-workers pbs-dirty-bitmap
        pbs-dirty-bitmap-migration pbs-dirty-bitmap-savevm pbs-masterkey query-bitmap-info);
    return { 'pbs-library-version' => 'front', map { $_ => JSON::PP::true } @yes };
}

# ---- the requests to setup ----

sub _no_previous ($self) {
    return if !$self->{native} && !$self->{devices};
    die { desc => "previous backup for target '$self->{target}' not finished" };
}

# Returns { device, mode } for each device; in the early form, the mode is 'name' or 'none'.
sub _wanted ($self, $arguments) {
    if ($self->{form} eq 'devlist') {
        my $mode = defined($arguments->{'bitmap-name'}) ? 'name' : 'none';
        return map { { device => $_, mode => $mode } } $self->_device_names($arguments->{devlist});
    }
    my @devices = @{ $arguments->{devices} };
    die { fatal => 'empty list of devices' } if !@devices;
    return map { { device => $_->{device}, mode => $_->{'bitmap-mode'} // 'none' } } @devices;
}

sub _device_names ($self, $list) {
    my @names = grep { $_ ne '' } split(/[,;:]/, $list // '');
    @names = $self->{graph}->writable_disks if !@names;
    die { desc => 'empty device list' } if !@names;
    return @names;
}

# ---- bitmaps before the instant ----

sub _prepare_bitmaps ($self, $devices, $arguments) {
    my $target = $arguments->{'target-id'};
    $self->{infos} = [];
    for my $device (@$devices) {
        my $name = $self->{form} eq 'devlist' ? $arguments->{'bitmap-name'} : $target;
        $device->{dirty} = $device->{size};
        if ($self->{form} eq 'devlist') {
            $self->_prepare_by_name($device, $target, $name);
        }
        else {
            $self->_prepare_by_mode($device, $name);
        }
        $device->{bitmap} = $device->{mode} eq 'none' ? undef : $name;
        push(@{ $self->{infos} }, _bitmap_info($device));
    }
    return;
}

sub _prepare_by_mode ($self, $device, $name) {
    my ($mode, $old) = ($device->{mode}, $self->_bitmap($device, $name));
    if ($mode eq 'use' && $old) {
        $device->{action} = 'used';
        $device->{dirty} = _min($old->{count}, $device->{size});
        return;
    }
    $self->_remove_bitmap($device, $name) if $old;
    if ($mode eq 'none') {
        $device->{action} = $old ? 'not-used-removed' : 'not-used';
        return;
    }
    $self->_add_full_bitmap($device, $name);
    $device->{action} = $mode eq 'new' ? 'new' : 'missing-recreated';
    return;
}

# The early form remembers one name per target. It looks the name up again for each device, after the previous
# device has changed it, as the real command did.
sub _prepare_by_name ($self, $device, $target, $name) {
    my $remembered = $self->{remembered}{$target};
    my $same = defined($name) && defined($remembered) && $name eq $remembered;
    $device->{action} = 'not-used';
    if (defined($remembered) && !$same && $self->_bitmap($device, $remembered)) {
        $self->_remove_bitmap($device, $remembered);
        delete $self->{remembered}{$target};
        $device->{action} = 'not-used-removed';
    }
    return if !defined($name);
    if (my $old = $self->_bitmap($device, $name)) {
        $device->{action} = 'used';
        $device->{dirty} = _min($old->{count}, $device->{size});
    }
    else {
        $self->_add_full_bitmap($device, $name);
        $device->{action} = 'new';
    }
    $self->{remembered}{$target} = $name;
    return;
}

sub _min ($x, $y) { return $x < $y ? $x : $y }

# QMP accepts no bitmap with an empty name, but Proxmox' command does.
sub _real_name ($name) { return $name eq '' ? 'front-empty-name' : $name }

sub _bitmap ($self, $device, $name) {
    return $self->{graph}->bitmap($device->{node}, _real_name($name));
}

sub _remove_bitmap ($self, $device, $name) {
    my %bitmap = (node => $device->{node}, name => _real_name($name));
    $self->{qemu}->call('block-dirty-bitmap-remove', \%bitmap);
    return;
}

sub _add_full_bitmap ($self, $device, $name) {
    my %bitmap = (node => $device->{node}, name => _real_name($name));
    my $qemu = $self->{qemu};
    $qemu->call('block-dirty-bitmap-add', { %bitmap, granularity => $granularity });
    my $ok = eval {
        $self->_merge_full($device, $bitmap{name});
        1;
    };
    return if $ok;
    my $error = $@;
    eval { $qemu->call('block-dirty-bitmap-remove', \%bitmap) };
    die $error;
}

# QMP cannot set bits. A backup job with bitmap-mode=always that fails at its first write leaves all bits of its
# bitmap set; that bitmap is then merged into ours.
sub _merge_full ($self, $device, $name) {
    my ($qemu, $full, $size) = ($self->{qemu}, 'front-full', $device->{size});
    my %null = (driver => 'null-co', size => $size);
    my %sink = (driver => 'blkdebug', 'node-name' => 'front-sink', image => \%null);
    my @errors = map { { event => 'none', iotype => $_, errno => 5 } } qw(write write-zeroes);
    my %source = (node => $full, name => 'full');
    $qemu->call('blockdev-add', { %null, 'node-name' => $full });
    $qemu->call('blockdev-add', { %sink, 'inject-error' => \@errors });
    $qemu->call('block-dirty-bitmap-add', { %source, granularity => $granularity });
    my %job = ('job-id' => 'front-job', device => $full, target => 'front-sink', sync => 'full');
    my %sync = (bitmap => 'full', 'bitmap-mode' => 'always');
    $qemu->call_and_wait('blockdev-backup', { %job, %sync }, \&_is_job_gone);
    my %merge = (node => $device->{node}, target => $name, bitmaps => [\%source]);
    $qemu->call('block-dirty-bitmap-merge', \%merge);
    $qemu->call('blockdev-del', { 'node-name' => $_ }) for 'front-sink', $full;
    return;
}

sub _is_job_gone ($event) {
    return 0 if $event->{event} ne 'JOB_STATUS_CHANGE';
    return $event->{data}{id} eq 'front-job' && $event->{data}{status} eq 'null';
}

# ---- the instant ----

# If a device fails, the nodes of the previous devices stay, as in Proxmox' QEMU.
sub _begin_all ($self, $devices) {
    my $running = $self->{graph}->has_iothreads;
    return if eval {
        $running ? $self->_begin_running($devices) : $self->_begin_paused($devices);
        1;
    };
    my $error = $@;
    for my $device (@$devices) {
        $self->_finish_bitmap($device, 0) if $device->{background};
    }
    $self->{damage}->("setup failed after some of its work: $error->{desc}")
        if ref($error) eq 'HASH' && defined($error->{desc}) && $devices->[0]{cbw};
    die $error;
}

sub _begin_paused ($self, $devices) {
    my $qemu = $self->{qemu};
    my $running = $qemu->call('query-status')->{running};
    $qemu->hide_pauses(1);
    $qemu->call('stop') if $running;
    my $ok = eval {
        $self->_begin($_) for @$devices;
        1;
    };
    my $error = $@;
    $qemu->call('cont') if $running;
    $qemu->hide_pauses(0);
    die $error if !$ok;
    return;
}

sub _begin ($self, $device) {
    $self->_add_background($device);
    $self->_freeze($device);
    $self->_add_filter($device, $device->{bitmap});
    $self->{graph}->point_to($device, $device->{cbw});
    $self->_add_snapshot_access($device);
    return;
}

# Writes between the switch and the freeze are recorded in both bitmaps: bits may be too many, never too few.
# The filters get no bitmap, because theirs would be from before the switch.
sub _begin_running ($self, $devices) {
    my @ready;
    my $ok = eval {
        for my $device (@$devices) {
            $self->_add_background($device);
            $self->_add_filter($device, undef);
            $self->{graph}->add_pivot($device);
            push(@ready, $device);
        }
        1;
    };
    my $error = $@;
    $self->{graph}->switch(map { [$_, $_->{cbw}] } @ready) if @ready;
    for my $device (@ready) {
        $self->_freeze($device);
        $self->_add_snapshot_access($device);
    }
    die $error if !$ok;
    return;
}

sub _bitmap_of ($device) {
    return { node => $device->{node}, name => _real_name($device->{bitmap}) };
}

sub _add_background ($self, $device) {
    return if !defined($device->{bitmap});
    my %bitmap = (node => $device->{node}, name => $background, granularity => $granularity);
    _named(
        "$device->{device} - creating background bitmap for backup access failed",
        sub { $self->{qemu}->call('block-dirty-bitmap-add', \%bitmap) }
    );
    $device->{background} = 1;
    return;
}

sub _freeze ($self, $device) {
    return if !defined($device->{bitmap});
    $self->{qemu}->call('block-dirty-bitmap-disable', _bitmap_of($device));
    return;
}

sub _add_filter ($self, $device, $bitmap) {
    my %filter = (
        driver => 'copy-before-write',
        'node-name' => 'front-cbw-' . ++$self->{count},
        file => $device->{node},
        target => $device->{fleecing},
        'on-cbw-error' => 'break-snapshot',
        'cbw-timeout' => 45,
        discard => 'unmap',
        defined($bitmap) ? (bitmap => _bitmap_of($device)) : (),
    );
    my $failed = 'setting up snapshot access failed: appending cbw node for fleecing failed';
    _named(
        "$device->{device} - $failed: Could not create node",
        sub { $self->{qemu}->call('blockdev-add', \%filter) }
    );
    $device->{cbw} = $filter{'node-name'};
    return;
}

sub _add_snapshot_access ($self, $device) {
    my $name = $device->{cbw} =~ s/cbw/snap/r;
    my %node = (driver => 'snapshot-access', file => $device->{cbw}, discard => 'unmap');
    _named("$device->{device} - setting up snapshot access failed",
        sub { $self->{qemu}->call('blockdev-add', { %node, 'node-name' => $name }) });
    $device->{snap} = $name;
    return;
}

sub _named ($what, $code) {
    return if eval { $code->(); 1 };
    my $error = $@;
    die $error if ref($error) ne 'HASH' || !exists($error->{desc});
    die { desc => "$what: $error->{desc}" };
}

sub _access_info ($device) {
    my %info = (device => $device->{device}, 'node-name' => $device->{snap});
    $info{size} = $device->{size};
    return \%info if !defined($device->{bitmap});
    $info{'bitmap-node-name'} = $device->{node};
    $info{'bitmap-name'} = $device->{bitmap};
    $info{'bitmap-action'} = $device->{action};
    return \%info;
}

# ---- teardown ----

sub _end_all ($self, $devices, $success) {
    $self->{graph}->refresh;
    $self->_die_if_deadly($_) for @$devices;
    $self->{exports}->end_those_of(map { $_->{snap} } @$devices);
    for my $device (@$devices) {
        $self->{qemu}->call('blockdev-del', { 'node-name' => $device->{snap} });
        $self->{graph}->take_out($device);
        $self->{qemu}->call('blockdev-del', { 'node-name' => $device->{cbw} });
        $self->_finish_bitmap($device, $success) if $device->{background};
    }
    return;
}

sub _die_if_deadly ($self, $device) {
    my $name = $device->{device};
    die { fatal => "the block node of $name is gone" } if !$self->{graph}->is_there($device);
    return if !defined($device->{bitmap});
    my $bitmap = $self->_bitmap($device, $device->{bitmap});
    die { fatal => "the bitmap of $name is gone" } if !$bitmap;
    die { fatal => "an NBD export still carries the bitmap of $name" } if $bitmap->{busy};
    die { fatal => "the background bitmap of $name is gone" }
        if $device->{background} && !$self->_bitmap($device, $background);
    return;
}

# One transaction for all; if it fails, the bitmap is removed, because no bitmap is better than one that lacks
# bits.
sub _finish_bitmap ($self, $device, $success) {
    my %bitmap = %{ _bitmap_of($device) };
    my %merge = (node => $bitmap{node}, target => $bitmap{name}, bitmaps => [$background]);
    my %remove = (node => $bitmap{node}, name => $background);
    my @actions = (
        { type => 'block-dirty-bitmap-enable', data => \%bitmap },
        $success ? { type => 'block-dirty-bitmap-clear', data => \%bitmap } : (),
        { type => 'block-dirty-bitmap-merge', data => \%merge },
        { type => 'block-dirty-bitmap-remove', data => \%remove },
    );
    my $qemu = $self->{qemu};
    return if eval { $qemu->call('transaction', { actions => \@actions }); 1 };
    my $error = $@;
    die $error if exists($error->{gone});
    eval { $qemu->call('block-dirty-bitmap-remove', $_); 1 } for \%bitmap, \%remove;
    return;
}

# ---- the replies to query-backup and query-pbs-bitmap-info ----

sub _bitmap_info ($device) {
    my %info = (drive => $device->{device}, action => $device->{action});
    return { %info, size => $device->{size}, dirty => $device->{dirty} };
}

sub _start_statistics ($self, $devices) {
    my ($total, $dirty) = (0, 0);
    for my $device (@$devices) {
        $total += $device->{size};
        $dirty += $device->{dirty};
    }
    $self->{canceled} = 0;
    $self->{stat} = {
        status => 'active',
        total => $total,
        dirty => $dirty,
        reused => $total - $dirty,
        transferred => 0,
        'zero-bytes' => 0,
        uuid => '',
        'start-time' => time,
    };
    return;
}

sub _end_statistics ($self) {
    my $stat = $self->{stat};
    $stat->{'end-time'} = time;
    $stat->{status} = $self->{canceled} ? 'error' : 'done';
    $stat->{errmsg} = 'backup canceled' if $self->{canceled};
    return;
}

1;
