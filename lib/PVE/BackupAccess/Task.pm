package PVE::BackupAccess::Task;

use v5.36;

use File::Temp ();
use List::Util qw(min);
use Scalar::Util qw(blessed weaken);

use PVE::BackupAccess;
use PVE::BackupAccess::Argument
    qw(bad_argument check_bytes check_code check_filled_text check_positive given_options is_backup_id);
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Notes;
use PVE::BackupAccess::PluginBase;
use PVE::BackupAccess::Try qw(attempt attempt_any deaths_of deaths_of_all is_own rethrow worst_of);

my $look_every = 10;    # seconds between two looks at the fleecing images
my $look_limit = 5;     # seconds for a QMP command of such a look

my sub check_provider ($name, $value) {
    bad_argument("$name must be an object") if !blessed($value);
}

my sub check_devices ($name, $value) {
    bad_argument("$name must be an array ref of device names")
        if ref($value) ne 'ARRAY' || !$value->@*;
    check_filled_text("a device of $name", $_) for $value->@*;
}

# A configuration is raw data that the provider gets unchanged.
my sub check_data ($name, $value) {
    bad_argument("$name must be a string") if ref($value);
}

# Options that PVE::BackupAccess->new takes and checks.
my @places = qw(run-dir fleecing-dir qemu-user qemu-group qemu-run-dir qemu-fleecing-dir);
my @access_options
    = (@places, qw(qmp target-id fleecing persistent allow-shared timeout bitmap-name));

my %options = (
    (
        map {
            $_ => sub { }
        } @access_options
    ),
    vmid => \&check_positive,
    provider => \&check_provider,
    devices => \&check_devices,
    'guest-config' => \&check_data,
    'firewall-config' => \&check_data,
    'bandwidth-limit' => \&check_bytes,
    jobs => \&check_positive,
    freeze => \&check_code,
    thaw => \&check_code,
    log => \&check_code,
    'load-note' => \&check_code,
    'store-note' => \&check_code,
    'state-dir' => \&check_filled_text,
);

sub new ($class, @options) {
    my $self = given_options('new', \@options, \%options, qw(vmid provider devices guest-config));
    bless($self, $class);
    my %access = map { $_ => $self->{$_} } grep { exists($self->{$_}) } @access_options;
    weaken(my $task = $self);
    $self->{access} = PVE::BackupAccess->new(%access, log => sub { $task->log(@_) if $task });
    $self->{pid} = $$;
    bad_argument('load-note and store-note must be given together')
        if !$self->{'load-note'} != !$self->{'store-note'};
    return $self;
}

sub log ($self, $level, $message) {
    chomp($message);
    if (my $file = $self->{'log file'}) {
        utf8::decode(my $text = $message);    # names of files are bytes
        say {$file} uc($level), ": $text";
    }
    return $self->{log}->($level, $message) if $self->{log};
    warn "$message\n" if $level ne 'info' && $level ne 'debug';
    return;
}

# ---- one guest ----

sub run ($self) {
    $self->_check_process;
    my $result = {};
    return $self->_outcome(
        $result,
        deaths_of(
            sub {
                $self->_back_up($result, sub { });
            }
        )
    );
}

# Ends a call. A stop signal that arrived after the backup was committed is not a failure of the backup: its exception is
# thrown when the caller has the result. So this must be the last statement of the call.
sub _outcome ($self, $result, @deaths) {
    my $late = delete($self->{late});
    $self->_die_of(@deaths, defined($late) ? [$late, 1] : ()) if @deaths;
    return defined($late) ? PVE::BackupAccess::_return_with_later($result, $late) : $result;
}

# $finish is called before the teardown, and if it dies, the backup has failed: the bitmap must keep what the provider
# could not store.
sub _back_up ($self, $result, $finish) {
    my $began = now();
    $result->{devices} = {};
    delete($self->@{ 'warned of fleecing', 'is noted' });
    my $done;
    my @deaths = deaths_of_all(
        sub {
            $self->_hand_over($result);
            $finish->();
            $done = 1;
        },
        sub { $self->_warn_of_fleecing if !$done && $self->{access}->_is_up },
        sub { $self->_tear_down($done, $result) },
    );
    $self->_die_of(@deaths);
    $result->{seconds} = now() - $began;
    return;
}

# Dies with the worst of these exceptions and logs the others.
sub _die_of ($self, @deaths) {
    my $worst = worst_of(@deaths) // return;
    $self->log('warn', "after that - $_->[0]") for grep { $_ != $worst } @deaths;
    rethrow($worst->[0]);
}

sub _hand_over ($self, $result) {
    my ($access, $provider) = $self->@{qw(access provider)};
    my $mechanism = $self->_mechanism;
    my $seen = $self->{seen} = $access->_sizes_and_bases($self->{devices}->@*);
    my $requests = $self->_requests($seen);
    my $infos = $self->_set_up($requests);
    $result->{id} = PVE::BackupAccess->new_id;
    for my $info ($infos->@*) {
        my $device = $info->{device};
        $self->_check_size($info, $seen->{$device}{size});
        $result->{devices}{$device}
            = $self->_describe($info, $requests->{$device}{'bitmap-mode'}, $seen->{$device});
    }
    $self->log('info', 'adding NBD exports for ' . join(', ', $self->{devices}->@*));
    my $volumes = $self->_watched($access->volumes($mechanism));
    $self->_log_fleecing($access->_warnings);
    my %optional = ('backup-id' => $result->{id}, 'guest-uuid' => $access->_guest);
    $optional{$_} = $self->{$_} for grep { $self->{$_} } qw(bandwidth-limit jobs);
    $optional{'firewall-config'} = $self->{'firewall-config'} if exists($self->{'firewall-config'});
    $self->_note($result);
    $provider->backup_vm($self->{vmid}, $self->{'guest-config'}, $volumes, \%optional);
    $self->_check_process;
    return;
}

# Warns once, and early, that the file system of a fleecing image is nearly full. A failure of this check is ignored.
sub _warn_of_fleecing ($self) {
    return if $self->{'warned of fleecing'};
    my %options = map { $_ => $self->{$_} }
        grep { exists($self->{$_}) } 'qmp', @places;
    my $timeout = min($look_limit, $self->{timeout} // $look_limit);
    my $status;
    my $error = attempt { $status = $self->{access}->_look(%options, timeout => $timeout) };

    # Also if the look failed, for example because another program has the monitor: the next one is due later.
    $self->{'looked at fleecing'} = now();
    $self->_log_fleecing($status->{warnings}->@*) if !$error;
    return;
}

sub _log_fleecing ($self, @warnings) {
    $self->{'looked at fleecing'} = now();
    $self->log('warn', $_) for @warnings;
    $self->{'warned of fleecing'} = 1 if @warnings;
    return;
}

# A provider with the mechanism file-handle asks for regions during the whole backup, so these calls look at the fleecing
# images.
sub _watched ($self, $volumes) {
    weaken(my $task = $self);
    for my $volume (grep { $_->{'next-dirty-region'} } values $volumes->%*) {
        my $next = $volume->{'next-dirty-region'};
        $volume->{'next-dirty-region'} = sub {
            $task->_warn_of_fleecing
                if $task
                && $$ == $task->{pid}
                && now() - $task->{'looked at fleecing'} >= $look_every;
            return $next->();
        };
    }
    return $volumes;
}

# A child that the provider forked returns to this code if it neither exits nor runs another program.
sub _check_process ($self) {
    PVE::BackupAccess::Error->throw('StateError',
        'the task belongs to another process - a forked child must exit, not return')
        if $$ != $self->{pid};
    return;
}

sub _mechanism ($self) {
    my $mechanism = $self->{provider}->backup_get_mechanism($self->{vmid}, 'qemu');
    bad_argument('backup_get_mechanism of the backup provider returned no mechanism for VMs')
        if !defined($mechanism);
    bad_argument(
              "mechanism '$mechanism' of the backup provider is not one for VMs - must be one of"
            . ' nbd, file-handle')
        if $mechanism !~ m/\A(?:nbd|file-handle)\z/;
    $self->log('info', "backup mechanism: $mechanism");
    return $mechanism;
}

# The notes of this guest and target. Their name has no UUID: a provider keeps the archives of all guests that have had this
# number together, and its newest data may be of another one.
sub _notes ($self) {
    my %options = (load => 'load-note', store => 'store-note', dir => 'state-dir');
    $_ = $self->{$_} for values %options;
    return $self->{notes} //= PVE::BackupAccess::Notes->new($self->@{qw(target-id vmid)}, %options);
}

# Notes this backup before the provider may have data of it. If it fails, the newest data may be of this backup or of the last
# one, and bitmaps with the ID of this one fit both. If it is killed, the bitmaps do not get this ID, and the next one is full.
sub _note ($self, $result) {
    my $devices = $result->{devices};
    my %none = map { $_ => undef } keys $devices->%*;
    my %note = map { $_ => { id => $result->{id}, identity => $self->{seen}{$_}{identity} } }
        grep { ($devices->{$_}{'bitmap-mode'} // 'none') ne 'none' } keys $devices->%*;
    my $notes = $self->_notes;

    # While the provider was asked, another backup may have been made, and the guest rolled back: then the bitmap fits the note
    # that was loaded before, but not the provider's newest data. Other backups store no notes while this one has the access.
    $notes->check_same($self->{noted}, grep { $devices->{$_}{'bitmap-mode'} eq 'reuse' } keys %none)
        if $self->{'goes by note'};
    my $error = attempt_any { $notes->note({ %none, %note }) };
    $self->{'is noted'} = !$error;
    return if !$error;

    # The old note must not stay.
    $notes->note(\%none);
    $self->log('warn',
              "cannot note the ID of this backup, so the next one is full"
            . " unless the provider stores IDs - $error");
    return;
}

# The provider's answer for a device as a hash: the mode, and, if the provider returned them, the ID of the archive that it
# would build on, and the identity by which it found the disk there.
my sub read_answer ($answer) {
    return { 'bitmap-mode' => $answer // 'none' } if ref($answer) ne 'HASH';
    my %request = map { $_ => $answer->{$_} }
        grep { defined($answer->{$_}) } qw(bitmap-mode base identity);
    $request{'bitmap-mode'} //= '';
    $request{audit} = $answer->{audit} ? 1 : 0;
    return \%request;
}

# The ID of the backup that the bitmap must be relative to, as answered by a provider that knows IDs. If there is none, the
# note does not count: the provider's newest archive may be of a program without IDs.
sub _given_base ($self, $request) {
    my ($device, $given, $found_by) = $request->@{qw(device base identity)};
    return undef if !defined($given);
    my $odd
        = !is_backup_id($given) ? "base '$given' of the backup provider is not the ID of a backup"
        : ref($found_by)
        || ($found_by // 'none') eq '' ? "identity of the backup provider is not a text"
        : return $given;
    $self->log('warn', "$device: $odd");
    delete($request->{identity});
    return undef;
}

# The same from the note, if the provider's newest data under this name is of this disk.
sub _noted_base ($self, $device, $identity) {
    my $note = $self->{noted}{$device} // return undef;
    my $of = $note->{identity};
    return $note->{id} if !defined($of) || $of eq $identity;
    $self->log('info',
        "$device: the last backup had another disk under this name: $of, not $identity");
    return undef;
}

# Asks the provider for the modes, and returns setup's requests by device. seen: QEMU's information about the devices.
sub _requests ($self, $seen) {
    my %volumes;
    for my $device (keys $seen->%*) {
        my $about = $seen->{$device};
        $volumes{$device} = { $about->%{qw(size base identity)} };
        for my $key (grep { defined($about->{$_}) } qw(node alias-base)) {
            $volumes{$device}{$key} = $about->{$key};
        }
    }
    $self->{noted} = $self->_notes->ids;
    my $answer = $self->{provider}->backup_vm_query_incremental($self->{vmid}, \%volumes);
    bad_argument(
        "backup_vm_query_incremental of the backup provider returned '$answer', not a hash")
        if defined($answer) && ref($answer) ne 'HASH';

    my %requests;
    delete($self->{'goes by note'});
    for my $device (sort keys $seen->%*) {
        my $request = $requests{$device} = read_answer($answer->{$device});
        my $mode = $request->{'bitmap-mode'};
        bad_argument(
            "device $device: bitmap mode '$mode' of the backup provider is unknown - must"
                . ' be one of none, new, use',
            device => $device
        ) if $mode !~ m/\A(?:none|new|use)\z/;
        $request->{device} = $device;
        $request->{base}
            = $mode ne 'use' ? undef
            : ref($answer->{$device}) ? $self->_given_base($request)
            : $self->_noted_base($device, $seen->{$device}{identity});
        $self->{'goes by note'} = 1 if $mode eq 'use' && !ref($answer->{$device});
    }
    for my $device (sort grep { !exists($seen->{$_}) } keys(($answer // {})->%*)) {
        $self->log('warn',
                  "ignoring the backup provider's bitmap mode for $device, which is not a device"
                . ' of this backup');
    }
    return \%requests;
}

sub _set_up ($self, $requests) {
    my @devices = map { $requests->{$_} } $self->{devices}->@*;
    $self->log('info', 'setting up backup access');
    my %hooks = map {
        $_ => $self->{$_} // sub { }
    } qw(freeze thaw);
    my $has_hooks = $self->{freeze} || $self->{thaw};
    return $self->{access}->setup(\@devices, $has_hooks ? %hooks : ());
}

# Tears down the access. An error here is not a failure of the backup: the archive is complete, and the bitmap may already
# be cleared. If the backup were reported as failed, the provider would remove the archive, and the next one would lack its
# data. Other exceptions, such as that of a signal handler, are passed on.
sub _tear_down ($self, $success, $result) {
    my $access = $self->{access};
    return if !$access->_is_up;
    $self->log('info', 'tearing down backup access');

    # Bitmaps of a provider that knows IDs stay relative to its last archive if the backup fails.
    my $id = $success || ($self->{'is noted'} && $self->{'goes by note'}) ? $result->{id} : undef;
    my @deaths = deaths_of_all(
        sub {
            $access->_end($success, $id);
            $self->{late} //= PVE::BackupAccess::_take_later();    # before it is thrown by itself
        },
        sub ($failed) { $access->_end(0, $id) if $failed && $access->_is_up },
    ) or return;
    $self->log('warn', "teardown failed - $_->[0]") for @deaths;
    $result->{'teardown-error'} = "$deaths[0][0]";
    $self->_die_of(grep { $_->[1] || !is_own($_->[0]) } @deaths);
    return;
}

# ---- devices ----

# The provider answered for the size that it was told. A bitmap would show a part that was added since as clean.
sub _check_size ($self, $info, $told) {
    my ($device, $size) = $info->@{qw(device size)};
    PVE::BackupAccess::Error->throw(
        'StateError',
        "device $device was resized from $told to $size bytes while the backup began - try again",
        device => $device
    ) if $size != $told;
    return;
}

my %fallback_reason = (
    'missing-recreated' => 'there is no bitmap of an earlier backup',
    'invalid' => 'the bitmap of the earlier backup is invalid',
    'new' => 'a new bitmap had to be made',
);

# Why a device is read in full although the provider asked for mode use, or would have if it had got a base.
my sub fallback ($info, $requested, $seen) {
    return $info->{reason} // $fallback_reason{ $info->{'bitmap-action'} } if $requested eq 'use';
    return defined($seen->{base}) ? undef : $seen->{reason}
        // $fallback_reason{'missing-recreated'};
}

# A device's part of the result, and its log lines.
sub _describe ($self, $info, $requested, $seen) {
    my $device = $info->{device};
    my $told = $info->{'bitmap-action'} // 'not-used';
    my ($action, $dirty, $text) = $self->{access}->bitmap_state($info)->@{qw(action dirty text)};
    $self->log('info', "$device: dirty-bitmap status: $text");

    my $mode = PVE::BackupAccess::bitmap_status($action);
    my $is_meant = defined($info->{'audit-bitmap'}) || $device =~ m/\Adrive-tpmstate\d+-backup\z/;
    my $fallback = $mode eq 'new' && !$is_meant ? fallback($info, $requested, $seen) : undef;
    $self->log('info', "$device: full read: $fallback") if defined($fallback);
    return {
        size => $info->{size},
        'bitmap-mode' => $mode,
        'bitmap-action' => $told,
        dirty => $dirty,
        fallback => $fallback,
    };
}

# ---- a job with one guest; VZDump's jobs have several ----

sub run_job ($self) {
    $self->_check_process;
    my $result = {};
    return $self->_outcome($result, deaths_of(sub { $self->_job($result) }));
}

sub _job ($self, $result) {
    my $provider = $self->{provider};
    local $self->{'log file'} = File::Temp->new(
        TEMPLATE => 'pve-backup-access.XXXXXX',
        TMPDIR => 1
    );
    binmode($self->{'log file'}, ':encoding(UTF-8)');
    $self->{'log file'}->autoflush;

    my $start_time = time();    ## wall clock: names the archive
    $self->_steps(
        sub {
            $provider->job_init($start_time);
            $self->_guest_of_job($result);
        },
        sub { $provider->job_cleanup },
    );
    return;
}

# If the backup fails, the provider is told, the log file is passed on, and then the error. An error after the archive is
# complete is not a failure of the backup.
sub _guest_of_job ($self, $result) {
    my ($provider, $vmid) = $self->@{qw(provider vmid)};
    $self->_steps(
        sub {
            my ($death) = deaths_of(sub { $self->_init_and_back_up($result) }) or return;
            my $error = $death->[0];
            rethrow($error) if $result->{complete} || $$ != $self->{pid};
            $self->log('err', "the backup failed - $error");
            $self->_steps(
                sub { rethrow($error) },
                sub { $provider->backup_cleanup($vmid, 'qemu', 0, { error => "$error" }) },
            );
        },
        sub { $provider->backup_handle_log_file($vmid, $self->{'log file'}->filename) },
    );
    delete($result->{complete});
    return;
}

sub _init_and_back_up ($self, $result) {
    my ($provider, $vmid) = $self->@{qw(provider vmid)};
    $result->{'archive-name'} = $self->_init_archive;
    my $finish = sub {
        my $answer = $provider->backup_cleanup($vmid, 'qemu', 1, {});
        $result->{complete} = 1;
        my $statistics = ref($answer) eq 'HASH' ? $answer->{stats} : undef;
        $result->{'archive-size'} = $statistics->{'archive-size'} if ref($statistics) eq 'HASH';
    };
    $self->_back_up($result, $finish);
    $self->log('info', sprintf('finished the backup (%.1f s)', $result->{seconds}));
    return;
}

# Proxmox VE's rule for names of archives.
sub _is_archive_name ($name) { return ($name // '') =~ m!\A[a-zA-Z0-9\-.+=_/:]+\z! }

sub _init_archive ($self) {
    my $start_time = time();    ## wall clock: names the archive
    my $answer = $self->{provider}->backup_init($self->{vmid}, 'qemu', $start_time);
    my $name = ref($answer) eq 'HASH' ? $answer->{'archive-name'} : undef;
    bad_argument('backup_init of the backup provider returned no hash with an archive-name')
        if !defined($name) || $name eq '';
    bad_argument(
        "archive-name '$name' of the backup provider has characters other than a-z, A-Z, 0-9 and"
            . ' - . + = _ / :')
        if !_is_archive_name($name);
    $self->log('info', "archive: $name");
    return $name;
}

# Runs all steps, even if an earlier one died. In a child that a provider forked, only the first step runs.
sub _steps ($self, $first, @more) {
    my @only_here = map {
        my $step = $_;
        sub { $step->() if $$ == $self->{pid} }
    } @more;
    $self->_die_of(deaths_of($first, @only_here));
    return;
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Task - back up one guest with a backup provider

=head1 SYNOPSIS

=for run task

    use PVE::BackupAccess::Task;

    my $task = PVE::BackupAccess::Task->new(
        vmid => 100,
        provider => $provider,
        qmp => $qmp_socket,
        'target-id' => 'snapshot-access:mystore',
        devices => ['drive-scsi0'],
        'guest-config' => $guest_config,
    );
    my $result = $task->run_job;    # a job of its own; use $task->run inside a job of VZDump
    say "$_: $result->{devices}{$_}{dirty} bytes" for sort keys $result->{devices}->%*;

=head1 DESCRIPTION

A task does for one running guest what VZDump does with a provider of Proxmox VE's backup provider API. It asks the
provider for its mechanism, sets up the access, passes the volumes to the provider, and tears down the access according
to the outcome.

The provider is any object with the methods of that API. Plugins that derive from
C<PVE::BackupProvider::Plugin::Base> need nothing else: if that class is not installed, this module supplies a substitute
with the same name. Load this module before the plugin. An installed class always takes precedence.

=head1 ERRORS

The methods die with a L<PVE::BackupAccess::Error>, or with what the provider, a hook, a callback or a signal
handler dies with, unchanged.

=head1 CLASS METHODS

=head2 new

=for run task

    my $task = PVE::BackupAccess::Task->new(
        vmid => 100,
        provider => $provider,
        qmp => $qmp_socket,
        'target-id' => 'snapshot-access:mystore',
        devices => ['drive-scsi0'],
        'guest-config' => $guest_config,
        'bandwidth-limit' => 50 << 20,
        log => sub ($level, $message) { warn "$level: $message\n" },
    );

Checks the options and returns a task. Sends nothing to QEMU. An option that is undef counts as not given. Takes C<qmp>,
C<target-id>, C<run-dir>, C<fleecing-dir>, C<qemu-user>, C<qemu-group>, C<qemu-run-dir>, C<qemu-fleecing-dir>,
C<fleecing>, C<persistent>, C<allow-shared>, C<timeout> and C<bitmap-name>, as L<PVE::BackupAccess/new> does, and

=over

=item vmid

Required. The number of the guest, for the provider.

=item provider

Required. The provider object.

=item devices

Required. An array ref of the devices, by QEMU's names.

=item guest-config

Required. The guest's configuration, a text that the provider stores unchanged.

=item firewall-config

The guest's firewall configuration, if it has one.

=item bandwidth-limit

Bytes per second that the provider is asked not to exceed; 0 is no limit.

=item jobs

The number of devices that the provider is asked to store in parallel.

=item freeze, thaw

Code refs that are called immediately before and after the snapshot. C<thaw> is called even if C<freeze> or the
snapshot failed. If one of them dies, the backup fails. A hook that must not fail the backup catches its own errors, as
those of L<PVE::BackupAccess::GuestAgent/hooks> do.

=item load-note, store-note

    'load-note' => sub ($key) { return $text },
    'store-note' => sub ($key, $text) { ... },

Code refs that load and store the note that L</run> describes: one text per target and number of a guest, undef if there is
none. C<$key> is 64 hexadecimal digits, a digest of C<target-id> and C<vmid>. C<$text> is JSON in UTF-8, about 100 bytes per
device, C<{}> if nothing is noted. A note may be removed with its guest. Give both or neither. By default, the note is a
file on this host. All hosts and programs that back up a guest into one storage must share its note: if the nodes of a cluster
share the storage, the notes must be cluster-wide; for a storage of one node, they belong to the node. If C<load-note> dies,
there is no note, and a new one is stored. C<store-note> is called before the provider's C<backup_vm>. If it dies, it is called
again to remove the old note, which does not describe the new data; the log then says that the next backup is full. If it dies
again, the backup fails.

=item state-dir

The directory of those files. The default is C</var/lib/pve-backup-access> for root, and
C<.local/state/pve-backup-access> in the home directory of other users. If the provider's storage is a directory, one inside it
is better: all that use the storage then share the notes, and a copy or an earlier state of the storage has its own.

=item log

    log => sub ($level, $message) { ... },

A code ref that is called with each log message. C<$level> is C<debug>, C<info>, C<warn> or C<err>. Without this option,
warnings and errors go to C<warn>.

=back

Errors: C<ArgumentError> if an option is unknown, missing or wrong.

=head1 METHODS

=head2 run

=for run task

    my $task = PVE::BackupAccess::Task->new($options->%*);
    $provider->job_init(time);
    $provider->backup_init(100, 'qemu', time);
    my $result = $task->run;
    say "$_: $result->{devices}{$_}{'bitmap-mode'}" for sort keys $result->{devices}->%*;

Makes the backup: the part that VZDump does in C<archive_external>. Takes no arguments. It calls the provider's methods

    backup_get_mechanism($vmid, 'qemu')
    backup_vm_query_incremental($vmid, { $device => { size => $bytes, base => $id, identity => $text } })
    backup_vm($vmid, $guest_config, $volumes, { 'bandwidth-limit' => ..., 'firewall-config' => ...,
        'backup-id' => $new_id, 'guest-uuid' => $uuid, jobs => $count })

It sets up the access after the second call, with C<freeze> before and C<thaw> after the snapshot. If the provider returns
nothing from C<backup_vm_query_incremental>, no device gets a bitmap. A device that the provider omits there gets no
bitmap either.

B<Bitmaps are tied to backups> (L<PVE::BackupAccess/WHICH BACKUP A BITMAP IS RELATIVE TO>). The provider gets
C<base>, the ID of the backup that the device's bitmap is relative to, or undef if no bitmap can be
used. A provider that knows IDs returns C<< { $device => { 'bitmap-mode' => 'use', base => $id } } >> with the ID of
the archive that it would build on, and stores C<backup-id> with the new archive. If the hash has no C<base>, the device
gets a new bitmap. With a true C<audit> in that hash, the
bitmap is audited (L<PVE::BackupAccess/AUDITING A BITMAP>): the volume has C<bitmap-mode> C<new> and, for mechanism nbd,
C<audit-bitmap>.

B<Disks that change their names.> C<identity> tells the disk from others of the guest, whatever its name. C<node>, if
present, is the current name of its node. If the disk had another name in the last backup, C<base> is undef and
C<alias-base> has the ID. A provider that stores identities with its archives, and finds the disk in that archive by its
identity, adds C<identity> to its answer: the name then does not matter.

B<Providers that do not know IDs> return the word C<use>. For them, the task keeps a note of the backup and of the disk that
the newest data of each device comes from. If the ID in QEMU differs from the note, if the disk is another one, or if there
is no note, the device gets a new bitmap. The note names this backup from the call of C<backup_vm> on. If the backup fails after
that, the provider's newest data may be of this backup or of the last one, and the bitmap, which gets the ID of this one, fits
both. If it was killed, the next backup is full. The task cannot detect that such a provider lost an archive after a good
backup, or has one that was made with another target or without this note, or is one of several stores with one note.

B<Fleecing.> The log warns if the file system of a fleecing image is nearly full (see
L<PVE::BackupAccess/status>): at the beginning, after a failure, and with mechanism file-handle
every ten seconds.

B<Completion.> When C<backup_vm> returns, the archive must be complete: from then on, the bitmaps may be cleared. An
error of the teardown after that does not fail the backup. It is logged and is in the result, and the next
setup cleans up. A signal that arrives after the bitmaps are cleared does not fail the backup either. The exception of its
handler is thrown a statement or two after the call, when you have the result (see L<PVE::BackupAccess/teardown>), and
before another backup can begin. Keep the result in a variable outside of the C<eval> around the call. If the block has local
signal handlers, the exception is thrown where they end, still inside the C<eval>.

Returns a hash:

=over

=item devices

For each device: C<size>; C<bitmap-action> as QEMU returned it; C<bitmap-mode> as the provider got it
(C<none>, C<new>, C<reuse>); C<dirty>, the bytes that the provider had to read; and C<fallback>, why it had to read
everything although it asked for mode C<use> or got no C<base>, else undef.

=item id

The ID of this backup.

=item seconds

How long the backup took.

=item teardown-error

Only if there was one.

=back

Errors: run undoes everything and then dies with the first error, from whatever source. The bitmaps then hold everything
that they held before, and what the guest wrote since. C<ArgumentError> if the provider returned something that the API
does not allow; C<StateError> if the task belongs to another process: in a child that the provider forked and that
returns, run dies and does nothing else; C<StateError> if the note has changed since the provider was asked, because another
backup was made in between; and the errors of L<PVE::BackupAccess/setup> and L<PVE::BackupAccess/volumes>.

=head2 run_job

=for run task

    my $task = PVE::BackupAccess::Task->new($options->%*);
    my $result = $task->run_job;
    say "$result->{'archive-name'}: $result->{seconds} seconds";

Makes the backup as a job of its own, including what VZDump does around L</run>: C<job_init($time)>,
C<backup_init($vmid, 'qemu', $time)>, then L</run>, C<backup_cleanup($vmid, 'qemu', 1, {})>,
C<backup_handle_log_file($vmid, $file)>, C<job_cleanup()>. Takes no arguments. C<backup_cleanup> is called before the
teardown: if the provider dies there, it has no archive, and the bitmaps are kept as after a failure.

If a step from C<backup_init> to C<backup_cleanup> fails, C<backup_cleanup($vmid, 'qemu', 0, { error => $text })>
is called after the teardown. C<job_cleanup> is always called. The log file is passed to the provider if
C<job_init> succeeded.

If a signal arrives after the bitmaps are cleared, C<backup_handle_log_file> and C<job_cleanup> are still
called, and the exception is thrown after the call, as with L</run>. If one of these two dies, or a signal arrives while
they run, run_job dies with that exception, but the backup is good, and the provider is not told of a failure.

Returns the same hash as L</run>, with C<archive-name> and, if the provider returns it, C<archive-size>.

Errors: those of L</run>; C<ArgumentError> if C<backup_init> returns no valid C<archive-name>.

=head2 log

=for run task

    use Scalar::Util qw(weaken);

    my $logger;
    my $log_function = sub ($level, $message) { $logger->log($level, $message) if $logger };
    my $task = PVE::BackupAccess::Task->new($options->%*);
    weaken($logger = $task);    # the task holds the provider, which holds the log function
    $log_function->('info', 'a line of the provider');

Takes a level (C<debug>, C<info>, C<warn> or C<err>) and a message, and logs the message as the task does. Give a provider
such a function, as the log function of its C<new>, to have its lines in the log file of L</run_job>.

=head1 SEE ALSO

L<PVE::BackupAccess>, L<PVE::BackupAccess::Volume>, L<PVE::BackupAccess::GuestAgent>

=cut
