package PVE::BackupAccess;

use v5.36;

our $VERSION = '0.1.1';

use Cwd qw(realpath);
use Fcntl qw(F_SETFD FD_CLOEXEC);
use Hash::Util::FieldHash ();
use JSON::PP ();    # the booleans that a 'qmp' code ref is given
use Scalar::Util ();
use XSLoader;

use PVE::BackupAccess::Argument
    qw(bad_argument check_code check_filled_text check_flag check_hash check_options check_positive check_text);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Recovery qw(recover_all recover_foreign);
use PVE::BackupAccess::Try qw(deaths_of deaths_of_all is_own rethrow worst_of);
use PVE::BackupAccess::Volume;

XSLoader::load('PVE::BackupAccess', $VERSION);

my $Error = 'PVE::BackupAccess::Error';

my $default_timeout = 60;
my $map_batch = 10_000;    # dirty regions per call

# The file handles that an access has returned and that are still in use, as weak references.
Hash::Util::FieldHash::fieldhash(my %handles);

# The default of the 'log' option.
sub _warn ($message) {
    warn $message;
}

my sub check_qmp ($name, $value) {
    check_filled_text($name, $value) if ref($value) ne 'CODE';
}

my sub check_fleecing ($name, $value) {
    bad_argument("$name must be a hash of devices to node names")
        if ref($value) ne 'HASH';
    for my $device (sort keys $value->%*) {
        check_filled_text("a device of $name", $device);
        check_filled_text("$name of device '$device'", $value->{$device});
    }
}

my %qmp_options = (
    qmp => \&check_qmp,
    timeout => \&check_positive,
);

# Where files are created that QEMU opens, and the user that QEMU runs as.
my %place_options = map { $_ => \&check_filled_text }
    qw(run-dir fleecing-dir qemu-user qemu-group qemu-run-dir qemu-fleecing-dir);

my %access_options = (
    %qmp_options,
    %place_options,
    'target-id' => \&check_text,
    'bitmap-name' => \&check_filled_text,
    fleecing => \&check_fleecing,
    log => \&check_code,
    persistent => \&check_flag,
    'allow-shared' => \&check_flag,
    recover => \&check_flag,
);

my %forget_options = (%qmp_options, %place_options, %access_options{qw(target-id log)});

my %recover_options = (%forget_options, force => \&check_flag, foreign => \&check_flag);

my %status_options = (%qmp_options, %place_options, log => \&check_code);

my sub check_base ($name, $value) {
    check_text($name, $value) if defined($value);
}

my sub check_identity ($name, $value) {
    check_filled_text($name, $value) if defined($value);
}

my %device_keys = (
    device => \&check_filled_text,
    'bitmap-mode' => \&check_text,
    base => \&check_base,
    identity => \&check_identity,
    audit => \&check_flag,
);

# A VM has one identity, whatever path its socket is reached by.
my sub identity ($qmp) {
    return undef if ref($qmp);
    utf8::encode($qmp);
    return realpath($qmp) // $qmp;
}

# The number of a user or group that is given by name or number; $find looks a name up.
my sub number_of ($option, $name, $find) {
    return $name if $name =~ m/\A(?:0|[1-9][0-9]{0,8})\z/;
    return $find->($name) // bad_argument("$option '$name': there is no such name on this machine");
}

# { qemu-uid, qemu-gid } of QEMU's user, if it was given. Without a group it is the user's own
# group.
my sub qemu_user ($options) {
    my ($user, $group) = $options->@{qw(qemu-user qemu-group)};
    bad_argument('qemu-group needs qemu-user') if defined($group) && !defined($user);
    return if !defined($user);
    my $uid = number_of('qemu-user', $user, sub ($name) { return scalar(getpwnam($name)) });
    my $gid
        = defined($group)
        ? number_of('qemu-group', $group, sub ($name) { return scalar(getgrnam($name)) })
        : (getpwuid($uid))[3];
    bad_argument("qemu-user '$user': its group is not known on this machine - also give qemu-group")
        if !defined($gid);
    return ('qemu-uid' => $uid, 'qemu-gid' => $gid);
}

# The options in the core's form: paths as text, whether they are text or the bytes of a file name.
my sub core_options ($options) {
    my %core = (timeout => $default_timeout, $options->%*, qemu_user($options));
    for my $name (grep { exists($core{$_}) } 'qmp', grep { m/-dir\z/ } keys %place_options) {
        utf8::decode($core{$name}) if !ref($core{$name});
    }
    return { %core, identity => identity($core{qmp}) };
}

sub new ($class, @options) {
    my $options = check_options('new', \@options, \%access_options, qw(qmp target-id));
    return $class->_make($options);
}

sub _make ($class, $options) {
    my $fleecing = { ($options->{fleecing} // {})->%* };
    return $class->_new({ recover => 1, core_options($options)->%*, fleecing => $fleecing });
}

sub capabilities ($class, @options) {
    my $options = check_options('capabilities', \@options, \%qmp_options, 'qmp');
    return _capabilities(core_options($options)->@{qw(qmp timeout)});
}

sub recover ($class, @options) {
    my $options = check_options('recover', \@options, \%recover_options, 'qmp');
    return recover_foreign($class, $options) if delete($options->{foreign});
    return recover_all($class, $options) if !defined($options->{'target-id'});
    return $class->_make($options)->_recover;
}

sub forget ($class, @options) {
    my $options = check_options('forget', \@options, \%forget_options, qw(qmp target-id));
    return $class->_make($options)->_forget;
}

sub status ($class, @options) {
    my $options = check_options('status', \@options, \%status_options, 'qmp');
    return _status(core_options($options));
}

# The same, with this access' knowledge of QEMU.
sub _look ($self, %options) {
    return _status({ core_options(\%options)->%*, access => $self });
}

sub bitmap_status ($action) {
    check_text('bitmap action', $action) if defined($action);
    return _bitmap_status($action);
}

sub sizes ($self, @devices) {
    bad_argument('sizes needs at least one device') if !@devices;
    check_filled_text('device', $_) for @devices;
    return $self->_sizes([map { "$_" } @devices]);
}

sub bases ($self, @devices) {
    bad_argument('bases needs at least one device') if !@devices;
    check_filled_text('device', $_) for @devices;
    my $seen = $self->_bases([map { "$_" } @devices]);
    return { map { $_ => $seen->{$_}{base} } keys $seen->%* };
}

# { device => { size, identity, base (or alias-base, if the disk had another name then), reason (why
# there is no base although there is a bitmap) } }, from one look at QEMU.
sub _sizes_and_bases ($self, @devices) {
    return $self->_bases([map { "$_" } @devices]);
}

sub new_id ($class) {
    my ($fh, $bytes);
    $Error->throw('SystemError', "cannot read /dev/urandom - $!")
        if !open($fh, '<:raw', '/dev/urandom') || read($fh, $bytes, 16) != 16;
    return unpack('H*', $bytes);
}

my %hooks = (
    freeze => \&check_code,
    thaw => \&check_code,
);

sub setup ($self, $devices, @hooks) {
    my $hooks = check_options('setup', \@hooks, \%hooks);
    bad_argument('freeze and thaw must be given together') if !$hooks->{freeze} != !$hooks->{thaw};
    bad_argument('setup takes an array ref of devices')
        if ref($devices) ne 'ARRAY';
    for my $device ($devices->@*) {
        check_hash('a device of setup', $device, \%device_keys);
        bad_argument("a device of setup lacks the key 'device'")
            if !defined($device->{device});
        bad_argument("device $device->{device}: an audit needs 'base'", device => $device->{device})
            if $device->{audit} && !exists($device->{base});
        bad_argument("device $device->{device}: 'identity' needs 'base'",
            device => $device->{device})
            if defined($device->{identity}) && !exists($device->{base});
    }
    my @plain = map { +{ $_->%* } } $devices->@*;    # even if theirs are tied
    my $was_up = $self->_is_up;                      # then it is refused, and left alone
    my @deaths = deaths_of(sub { $self->_prepare(\@plain) });
    @deaths = $self->_frozen($hooks, sub { $self->_cut }) if !@deaths;
    @deaths = deaths_of(sub { $self->_finish }) if !@deaths;
    return $self->_infos if !@deaths;

    # A setup that dies leaves nothing behind. The exception of a callback is passed on unchanged.
    my @undone = deaths_of(sub { $self->_undo_setup if !$was_up && $self->_is_up });
    my $worst = worst_of((grep { !is_own($_->[0]) } @undone), @deaths, @undone);
    $self->_log_warning("after that - $_->[0]") for grep { $_ != $worst } @deaths, @undone;
    rethrow($worst->[0]);
}

# The guest is always thawed, even if freezing it failed, because it may be frozen nevertheless. The
# undo steps wait until then. The hooks may use the monitor.
sub _frozen ($self, $hooks, $cut) {
    my ($freeze, $thaw) = $hooks->@{qw(freeze thaw)};
    return deaths_of($cut) if !$freeze;
    $self->_release;
    return deaths_of_all(sub { $freeze->(); $cut->() },
        sub ($failed) { $self->_release; $thaw->() });
}

sub volumes ($self, $mechanism) {
    check_text('mechanism', $mechanism);
    return $self->_nbd_volumes if $mechanism eq 'nbd';
    return $self->_handle_volumes if $mechanism eq 'file-handle';
    bad_argument("unknown mechanism '$mechanism' - must be one of nbd, file-handle");
}

sub _nbd_volumes ($self) {
    my $socket = $self->_export;
    my $volumes = {};
    for my $info ($self->_infos->@*) {
        my $status = bitmap_status($info->{'bitmap-action'});
        my $volume = $volumes->{ $info->{device} } = {
            size => $info->{size},
            'bitmap-mode' => $status,
            'nbd-path' => $socket,
        };
        $volume->{'bitmap-name'} = $info->{'bitmap-name'} if $status ne 'none';
        for my $key (grep { defined($info->{$_}) } qw(identity base audit-bitmap)) {
            $volume->{$key} = $info->{$key};
        }
    }
    return $volumes;
}

sub _handle_volumes ($self) {
    $self->_serve_files;
    my $nbd_volumes = $self->_nbd_volumes;
    my $infos = $self->_infos;
    my $volumes = {};
    for my $index (0 .. $infos->$#*) {
        my $device = $infos->[$index]{device};
        my $nbd_volume = $nbd_volumes->{$device};
        my $reader = PVE::BackupAccess::Volume->open($device, $nbd_volume);
        $volumes->{$device} = {
            size => $nbd_volume->{size},
            'bitmap-mode' => $nbd_volume->{'bitmap-mode'},
            (map { $_ => $nbd_volume->{$_} } grep { exists($nbd_volume->{$_}) } qw(identity base)),
            'file-handle' => $self->_open_handle($index),
            'next-dirty-region' => sub { return $reader->next_dirty_region },
        };
    }
    return $volumes;
}

sub _open_handle ($self, $index) {
    my $fd = $self->_open_file($index);
    open(my $handle, '+<&=', $fd)
        or $Error->throw('SystemError', "cannot use descriptor $fd - $!");

    # Perl's open has switched it off for descriptors up to $^F.
    fcntl($handle, F_SETFD, FD_CLOEXEC)
        or $Error->throw('SystemError', "cannot set the flags of descriptor $fd - $!");
    my $given = $handles{$self} //= [];
    $given->@* = grep { defined } ($given->@*, $handle);
    Scalar::Util::weaken($_) for $given->@*;
    return $handle;
}

sub volume ($self, $device) {
    check_filled_text('device', $device);
    my $volume = $self->volumes('nbd')->{$device}
        or bad_argument("device $device: is not part of this access", device => $device);
    return PVE::BackupAccess::Volume->open($device, $volume);
}

my %action_text = (
    'new' => 'created new',
    'missing-recreated' => 'was missing, created new',
    'invalid' => 'was invalid, created new',
    'not-used' => 'not used',
    'not-used-removed' => 'not used, old one removed',
);

sub bitmap_state ($self, $info) {
    my ($device, $size) = $info->@{qw(device size)};
    my $action = $info->{'bitmap-action'} // 'not-used';

    # The drive of a TPM state is attached anew for each backup, so its missing bitmap means
    # nothing.
    $action = 'new'
        if $action eq 'missing-recreated' && $device =~ m/\Adrive-tpmstate\d+-backup\z/;
    my $dirty = bitmap_status($action) eq 'none' ? $size : $self->_dirty_bytes($device);
    my $text
        = defined($info->{'audit-bitmap'}) ? 'is audited (' . bytes($dirty) . ' to be read)'
        : $action_text{$action} ? "$action_text{$action} (" . bytes($dirty) . ' to be read)'
        : $dirty ? 'OK (' . bytes($dirty) . ' of ' . bytes($size) . ' dirty)'
        : 'OK (nothing of ' . bytes($size) . ' dirty)';
    return { action => $action, dirty => $dirty, text => $text };
}

# As QEMU counts them, or by the map, without reading data. A map that ends early is an error.
sub _dirty_bytes ($self, $device) {
    $self->_export;
    my ($info) = grep { $_->{device} eq $device } $self->_infos->@*;
    return $info->{dirty} if $info && exists($info->{dirty});
    my $volume = $self->volume($device);
    my $sum = 0;
    while (my @regions = $volume->dirty_regions($map_batch)) {
        while (my (undef, $length) = splice(@regions, 0, 2)) {
            $sum += $length;
        }
    }
    $volume->close;
    return $sum;
}

sub teardown ($self, $success, $id = undef) {
    check_text('the id', $id) if defined($id);
    return $self->_end($success, $success ? $id : undef);
}

# With an ID, the bitmaps are relative to this backup even if it failed: they have at least what was written since its
# instant.
sub _end ($self, $success, $id) {

    # A program that still reads the file gets an error at once.
    close($_) for grep { defined } (delete($handles{$self}) // [])->@*;
    return $self->_teardown($success ? 1 : 0, $id);
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    local ($@, $!, $?);

    if ($self->_is_up) {

        # A handler that makes warnings fatal must not prevent the rest.
        eval { warn "backup access was not torn down - doing so now, as after a failed backup\n" };
        if (!eval { $self->_teardown(0, undef); 1 }) {
            my $error = $@;
            eval { warn $error };

            # The exception of a signal handler must not be lost here.
            _return_with_later(undef, $error)
                if ${^GLOBAL_PHASE} eq 'RUN' && !PVE::BackupAccess::Try::is_own($error);
        }
    }
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess - the disks of a running QEMU guest at one instant, and what changed since the last backup

=head1 SYNOPSIS

=for run proxmox

    use PVE::BackupAccess;

    my $access = PVE::BackupAccess->new(
        qmp => $qmp_socket,    # /var/run/qemu-server/100.qmp
        'target-id' => 'snapshot-access:mystore',
    );
    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }]);
    my $volume = $access->volume('drive-scsi0');
    while (my ($offset, $length) = $volume->next_dirty_region) {
        store($offset, $volume->pread($offset, $length));    # in pieces of at most 32 MiB
        $volume->discard($offset, $length);
    }
    $volume->close;
    $access->teardown(1);

=head1 DESCRIPTION

An access is a snapshot of one or more disks of a running guest at one instant. It exports each disk over NBD, together
with a dirty bitmap that tells which parts changed since the last successful backup for the same target. The guest
continues to run. Before it overwrites data, QEMU copies the old data to a I<fleecing image>.

A Proxmox QEMU makes the access by commands of its own (QAPI: C<backup-access-setup>,
C<backup-access-teardown>). On a stock QEMU 7.2 or later, this module makes the same access from upstream's commands.
The results are the same.

Bitmaps are kept per target and device. If a backup fails or its process is killed, no bit of a bitmap is lost: the
next backup contains everything that this one should have contained. If the module cannot be sure of a bitmap, the next
backup is a full one, and the log says so.

All offsets, lengths and sizes are bytes. A path is a text string, or the bytes of a file name in UTF-8.

=head1 ERRORS

All methods die with a L<PVE::BackupAccess::Error>. What your own signal handlers and callbacks die with is passed on
unchanged. Signal handlers run while a call waits. The description of each method lists the error classes that have a
special meaning for that method. In addition, every method can die with

=over

=item C<ArgumentError> - an argument is missing, unknown or wrong; no command that changes anything was sent

=back

and every method that sends commands to QEMU (all but L</new>, L</new_id> and L</bitmap_status>) with

=over

=item C<ConnectionError>, C<TimeoutError>, C<ProtocolError> - QEMU cannot be reached, does not answer in time, or gives
an answer that breaks the protocol

=item QEMU's own class, such as C<GenericError> - QEMU refused a command; the message has the command, the device and
QEMU's text

=item C<SystemError> - a system call failed; the message has the file

=back

=head1 CLASS METHODS

=head2 new

=for run proxmox

    my $access = PVE::BackupAccess->new(
        qmp => $qmp_socket,
        'target-id' => 'snapshot-access:mystore',
        timeout => 30,
        log => sub ($level, $message) { warn "$level: $message\n" },
    );

Checks the options and returns an access. Sends nothing to QEMU. The options are:

=over

=item qmp

Required. The path of a QMP socket. A connection is open only while commands run, because QEMU serves one client at a
time. Or a code ref that carries the commands:

    qmp => sub ($command, $arguments) { mon_cmd($vmid, $command, $arguments->%*) },

The code ref gets plain Perl data (integers are integers, booleans are those of L<JSON::PP>). It returns
what QMP's C<return> holds, or dies with QEMU's error as text. If it dies with an object, that object is passed on
unchanged. The exception of one of your signal handlers that runs inside the code ref is also passed on unchanged, even
if the code ref has wrapped it in other words. A handler that the code ref itself installs, for example for a time limit,
counts as part of the code ref.

=item target-id

Required. The target of the backup; a valid UTF-8 string. C<Proxmox> and C<Proxmox VE> are reserved, and so are the
names of bitmaps that this module or a Proxmox QEMU makes for itself, such as all that begin with C<pba-tied:>: a Proxmox
QEMU gives a target's bitmap the name of the target.

=item timeout

Seconds that any single QMP command may take. The default is 60. If C<qmp> is a code ref, it must enforce its own time
limits.

=item run-dir

The absolute path of the directory in which the private directory of the NBD socket is created. Both are
created with mode 0700. The default is C</run/pve-backup-access> for root, and C<$XDG_RUNTIME_DIR> or a
directory in C</tmp> for other users. QEMU must be able to create a socket there. No user other than root and you may be
able to rename entries in this directory or in a directory above it. So none of them may belong to another user, and none
may be writable to others without the sticky bit.

If root backs up a QEMU that runs as another user (C<-runas>, C<-run-with user=>), the private directory is
accessible to QEMU's group (mode 1730), C<run-dir> may be traversed by all users, and fleecing images belong to
QEMU's user. That user must be able to traverse the directories above. The QMP socket shows which user QEMU runs as. If
C<qmp> is a code ref, or if another program created the socket, set C<qemu-user>.

=item qemu-user, qemu-group

The user and group that QEMU runs as, by name or number. Set them where the socket does not show the user: for libvirt's
system domains, or if C<qmp> is a code ref. The default group is that of the user. If the caller is root, files are
given to this user as described for C<run-dir>.

=item qemu-run-dir, qemu-fleecing-dir

The paths of C<run-dir> and C<fleecing-dir> as QEMU sees them, if they differ: with C<-chroot>, or in a container
that has the directory mounted at another place.

=item log

    log => sub ($level, $message) { ... },

A code ref that is called with each log message. C<$level> is C<debug>, C<info> or C<warn>. Without this option,
warnings go to C<warn>.

=item fleecing-dir

Stock QEMU only: the absolute path of a directory in which a sparse fleecing image is created for each
device. The images are removed at teardown. QEMU must be able to open them. As for C<run-dir>, no user other than root
and you may be able to rename entries in this directory or above it.

=item fleecing

Stock QEMU only: a hash C<< { $device => $node_name } >> of fleecing nodes that you provide. Each node must have
exactly the size of its device, clusters of at most 64 KiB, and C<discard=unmap>; without C<discard=unmap>, a discard
frees no space. On a Proxmox QEMU, fleecing images are attached before setup, as C<< <device>-fleecing >>.

=item persistent

Stock QEMU only: 1 makes new bitmaps of qcow2 disks survive a restart of the VM. An existing bitmap keeps the setting
with which it was created; mode C<new> replaces it. A qcow2 image of version 2 (C<compat=0.10>) cannot store
bitmaps: its bitmap is not persistent, and a line in the log says so.

=item allow-shared

1 allows disks that other processes or hosts may write to (devices with C<share-rw>). The backup may or may not contain
what they write while it is made, so it is not the disk at one instant. No bitmap records their writes.

=item recover

If 0 and a killed process left behind an access for the same target, L</setup> dies with C<StateError> and changes
nothing. By default, setup undoes that access first.

=item bitmap-name

Only for the early form of Proxmox' command, which needs a new name for each new bitmap. The default is the target-id; the
same names are reserved. L</status> shows it as the bitmap's target, and L</forget> takes it as one.

=back

Errors: C<ArgumentError> if an option is unknown, missing or wrong.

=head2 capabilities

=for run proxmox

    my $capabilities = PVE::BackupAccess->capabilities(qmp => $qmp_socket);
    say "$capabilities->{backend}, QEMU $capabilities->{'qemu-version'}";

Asks a QEMU what it supports. Takes C<qmp> and C<timeout>, as L</new> does. Returns a hash: C<backend> (C<pve> or
C<upstream>), C<form> (of Proxmox' command: C<devices>, or the early C<devlist>), and C<qemu-version>.

Errors: C<UnsupportedError> if this QEMU supports neither backend; the message names what is missing.

=head2 recover

=for run proxmox

    my $lines = PVE::BackupAccess->recover(qmp => $qmp_socket, 'target-id' => 'snapshot-access:mystore');
    say for $lines->@*;

Undoes what a killed process left behind of an access for this target, as after a failed backup:
exports, its NBD server, block nodes, the access of a Proxmox QEMU, and run directories. Bitmaps keep
their old bits and get the new ones. L</setup> does the same automatically. Returns an array ref of lines
of text that say what was done. The array is empty if there was nothing to undo. It is safe to call recover at any time.

Takes C<qmp>, C<target-id>, C<run-dir>, C<fleecing-dir>, C<timeout> and C<log>, as L</new> does, and C<force> and
C<foreign>. C<run-dir> and C<fleecing-dir> must be the same as in the killed process, or its NBD server and files are not
found.

=for run proxmox

    my $lines = PVE::BackupAccess->recover(qmp => $qmp_socket);

Without a target-id, recover undoes what killed processes left behind for all targets, and each line names the target.
If there is nothing to undo, this takes one query. So call it at the beginning of a backup, before you attach anything
that the killed process also attached, such as a fleecing image.

If recover cannot tell whether the process still runs, it refuses to undo that process' access. This is so for a process
on another machine, of an earlier boot, in another PID namespace, or hidden in C</proc>. If you know that the
process has ended, set C<force>:

=for run proxmox

    PVE::BackupAccess->recover(qmp => $qmp_socket, 'target-id' => 'snapshot-access:mystore', force => 1);

The log and the returned lines say which process was assumed to be dead. Even with C<force>, recover never undoes an
access of a process that is known to run, or of another target.

    PVE::BackupAccess->recover(qmp => $path, 'target-id' => $id, foreign => 1);

With C<foreign>, recover undoes an access that another program made by Proxmox' own commands, such as a qemu-server
without this module: its exports, then the NBD server if it has no other export, then the access, as after a failed
backup. Without C<foreign>, such an access stays, and the log warns of it. Such an access has no marker, so recover
cannot tell whether that program still runs. If a backup is in progress, it fails. That is why nothing calls this
automatically. Use C<foreign> only if you know that the program has ended: on Proxmox VE, if no task of the guest runs.
After a killed C<vzdump>, the guest is still locked: unlock it by C<qm unlock VMID>.

Errors: C<StateError> if a process is backing up this guest (the message has its process ID), or if the access belongs
to another target. On a Proxmox QEMU, also if the disk or its bitmap has been removed since, because QEMU would crash;
the access then stays active until the VM is stopped.

=head2 forget

=for run proxmox

    my $lines = PVE::BackupAccess->forget(qmp => $qmp_socket, 'target-id' => 'snapshot-access:mystore');
    say for $lines->@*;

Removes the target's bitmaps of all disks, so that the next backup of each disk is a full one. QEMU refuses to load an
earlier state of a guest (C<loadvm>, C<qemu-img snapshot -a>) while a disk has a bitmap. Takes the same options as
L</recover> but C<force> and C<foreign>, and returns an array ref of lines that say what was done. QEMU cannot remove a
stored bitmap from an image below an overlay: a line says that it stays. Such a bitmap does not prevent loading a state.

Errors: C<StateError> while an access is active, for any target.

=head2 new_id

=for run proxmox

    my $id = PVE::BackupAccess->new_id;

Returns a new random ID for a backup: 32 hexadecimal digits. Takes no arguments.

Errors: C<SystemError> if F</dev/urandom> cannot be read.

=head2 status

=for run proxmox

    my $status = PVE::BackupAccess->status(qmp => $qmp_socket);
    say "$_->{device}: $_->{'dirty-bytes'} bytes dirty" for $status->{bitmaps}->@*;

Reports what backups of all targets have created in a QEMU and on disk. Changes nothing. Takes
C<qmp>, C<run-dir>, C<fleecing-dir>, the C<qemu-*> options, C<timeout> and C<log>, as L</new> does. In the result, sizes are
bytes, truth values are 1 or 0, and unknown values are undef. Returns a hash:

=over

=item backend

C<pve> or C<upstream>.

=item access

undef if no access is active and no process is setting one up. Otherwise a hash: C<target-id>; C<pid>, the process
that owns the access; C<alive>, whether that process runs (undef if that cannot be determined, see
L</recover>); and C<devices>, an array ref of names. If another program used Proxmox' own commands, C<pid> and C<alive>
are undef. The target-id is read from bitmaps and run directories, so it is undef for an access without bitmaps if
C<run-dir> is not the same as in that process.

=item bitmaps

An array ref of hashes: C<target-id>, C<device>, C<node> and C<name> of the bitmap, C<background> (1 for the bitmap
that records while an access is active), C<base> (the ID of the backup that the bitmap is relative to), C<dirty-bytes>,
C<granularity>, and QEMU's C<recording>, C<busy>, C<persistent> and C<inconsistent>. On a stock QEMU, only bitmaps of this
module are listed; on a Proxmox QEMU, all that have a name.

=item exports

An array ref of hashes: C<id>, C<type>, C<node>, C<ours> (whether this module made the export), and C<device> if it did.

=item fleecing

An array ref of hashes, one for each device of an active access: C<device>, C<node>, C<file>, C<size>, and
C<image-bytes>, the space that the image occupies. If the image is a file that this machine can see, also C<free-bytes> of
its file system, and C<nearly-full>: 1 if less than a tenth of the file system is free and the image
can outgrow that. A fleecing image that is full breaks the snapshot, and the backup fails.

=item left-overs

What killed processes left behind and L</recover> would undo, an array ref of hashes: C<target-id>, C<device>, C<what> (a
text as in the lines of L</recover>), and C<harmless>: 1 if it costs nothing and blocks nothing. An access of
a running process is not listed.

=item warnings

An array ref of lines of text, for example that the file system of a fleecing image is nearly full.

=item bitmap-info

Only on a Proxmox QEMU: what C<query-pbs-bitmap-info> returns for the devices of the last backup or access.

=back

Errors: C<UnsupportedError> if this QEMU supports neither backend.

=head1 FUNCTIONS

=head2 bitmap_status

=for run proxmox

    my $mode = PVE::BackupAccess::bitmap_status('used');    # 'reuse'

Takes QEMU's bitmap action, or undef, and returns the bitmap mode that a provider is given: C<none> for C<not-used>,
C<not-used-removed> and undef; C<new> for C<new>, C<invalid> and C<missing-recreated>; C<reuse> for C<used>.

Errors: C<ProtocolError> for any other action.

=head1 METHODS

=head2 sizes

=for run proxmox

    my $sizes = $access->sizes('drive-scsi0');
    say "drive-scsi0: $sizes->{'drive-scsi0'} bytes";

Takes the names of devices, at least one. Returns a hash of their sizes as QEMU reports them. Call it before L</setup>.

Errors: those of L</setup> for a device that cannot be backed up: it does not exist, has no medium, or is given twice.

=head2 bases

=for run proxmox

    my $bases = $access->bases('drive-scsi0');    # { 'drive-scsi0' => $id }

Takes the names of devices, at least one. First undoes what a killed process left behind, as L</setup> does. Returns a
hash of the IDs of the backups that the devices' bitmaps are relative to: see
L</WHICH BACKUP A BITMAP IS RELATIVE TO>. The value is undef if there is no bitmap, or if the bitmap must not be used.
Call it before setup.

Errors: those of L</setup>.

=head2 setup

=for run proxmox

    my $infos = $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }]);
    say "$_->{device}: $_->{size} bytes, bitmap $_->{'bitmap-action'}" for $infos->@*;

Makes the snapshot of all given devices at one instant. Takes an array ref of hashes, one per device:

=over

=item C<device> - required: the name of a block backend or node; on a stock QEMU, also the ID or QOM path of a guest device.
A name that several disks have is refused

=item C<bitmap-mode> - C<none> (the default) removes this target's bitmap; C<new> creates a bitmap in which everything is
dirty; C<use> continues the bitmap, or creates one if there is none that can be trusted

=item C<base>, C<identity> - tie the bitmap to a backup, see L</WHICH BACKUP A BITMAP IS RELATIVE TO>

=item C<audit> - true audits a bitmap that mode C<use> would continue, see L</AUDITING A BITMAP>; needs C<base>

=back

Returns an array ref of hashes, one per device, as in QEMU's reply: C<device>, C<node-name>, C<size>, and with a bitmap
C<bitmap-node-name>, C<bitmap-name> and C<bitmap-action>.

=for run proxmox

    $access->setup([{ device => 'drive-scsi0' }], freeze => sub { say 'freeze' }, thaw => sub { say 'thaw' });

C<freeze> is called immediately before the instant, when all other preparations are done. C<thaw> is called immediately
after it. Between the two, QEMU gets one query that checks that the devices have not changed, and the command that makes
the snapshot. The monitor is free while either hook runs. If C<freeze> was called, C<thaw> is called in any case: also if
C<freeze> or the snapshot failed, or if a signal came. Setup then dies with that first error. It undoes its changes after
C<thaw>.

If a killed process left behind an access for the same target, setup undoes that access first and logs a warning: see
L</recover>. If setup dies, it undoes its changes, and no bitmap loses a bit.

Errors: C<StateError> if this access is already set up, or while another process has an access to this guest;
C<UnsupportedError> if this QEMU, a device or this host lacks what the access needs.

=head2 volumes

=for run proxmox

    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }]);
    my $volumes = $access->volumes('nbd');
    say "$_: $volumes->{$_}{'nbd-path'}" for sort keys $volumes->%*;

Takes the mechanism, C<nbd> or C<file-handle>. Exports the devices and returns the hash that the provider API's
C<backup_vm()> gets. The keys are the devices. Each value is a hash with C<size> and C<bitmap-mode> (C<none>, C<new> or
C<reuse>). If setup was given a C<base>, the hash also has C<identity> and, if the bitmap is used, that C<base>
(L</WHICH BACKUP A BITMAP IS RELATIVE TO>). It also has

=over

=item for C<nbd>

C<nbd-path> (the Unix socket; the export has the name of the device) and, with a bitmap,
C<bitmap-name>. The first call exports the devices.

=item for C<file-handle>

C<file-handle>, a file handle that is open for reading with O_DIRECT and for punching holes. A hole frees fleecing space
(L<fallocate(2)> with FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE). Only whole clusters are freed: of 64 KiB, or of the
C<f_frsize> of L<statvfs(3)> if the fleecing image has larger clusters. The space is freed soon after the call returns; if
that fails, the next call reports the error.

C<next-dirty-region>, a code ref that returns offset and length of the next dirty region, then the empty list. Without a
bitmap, the whole device is one region. Reading a range that is not dirty, or that was discarded, is an I/O error.

Other programs of the same user can open C</proc/PID/fd/N>, or attach a read-only loop device to it. L<lseek(2)> with
SEEK_DATA and SEEK_HOLE reports zeroes that the server knows of (NBD spec: base:allocation), of 256 KiB and more, unless
the bitmap-mode is C<reuse>: in an increment, a program that skips a hole would keep old data there. Before QEMU 10.0,
the block status of a snapshot must not be queried while it is read, so the whole file is reported as data.

The first call starts a process per device that serves the file over FUSE. The process ends with the access. A program
that still has the file open then gets errors.

=back

Stock QEMU 7.2 returns wrong data to NBD clients that read a snapshot across clusters of 64 KiB while
the guest writes. L<PVE::BackupAccess::Volume> never reads in this way from such a QEMU; C<nbdcopy>,
C<qemu-img> and others do. Read through L<PVE::BackupAccess::Volume>, or use QEMU 10.0.

Errors: C<StateError> if no access is set up, or if the access no longer exists in QEMU; C<UnsupportedError> for
C<file-handle> if FUSE is not available.

=head2 volume

=for run proxmox

    $access->setup([{ device => 'drive-scsi0' }]);
    my $volume = $access->volume('drive-scsi0');
    my $data = $volume->pread(0, 65536);

Takes the name of a device. Returns a connected L<PVE::BackupAccess::Volume> of that device.

Errors: those of L</volumes> and of L<PVE::BackupAccess::Volume/open>; C<ArgumentError> if the device is not part of this
access.

=head2 bitmap_state

=for run proxmox

    my $infos = $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }]);
    for my $info ($infos->@*) {
        my $state = $access->bitmap_state($info);
        say "$info->{device}: dirty-bitmap status: $state->{text}";
    }

Takes one of the hashes that L</setup> returned. Returns a hash for a log: C<text>, such as
C<OK (4.0 MiB of 32.0 MiB dirty)>; C<dirty>, the bytes that must be read; and C<action>, the bitmap's. The drive of a TPM
state is attached anew for each backup, so C<missing-recreated> is reported as C<new> there. The method exports the devices,
and reads the bitmap over NBD if QEMU's own count is not exact.

Errors: those of L</volume> and of L<PVE::BackupAccess::Volume/next_dirty_region>.

=head2 teardown

=for run proxmox

    my $id = PVE::BackupAccess->new_id;
    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use', base => undef }]);
    # back up all volumes here
    $access->teardown(1, $id);

Closes the file handles that L</volumes> returned, ends the access, and undoes everything that setup and
volumes created. Takes C<$success>, whether the backup succeeded, and optionally the ID of the backup. After a success,
each bitmap holds exactly what the guest wrote since the instant, and is relative to the backup with this ID. After a
failure, each bitmap holds that and everything that it held before.

Every step is tried, even if an earlier one failed. Teardown dies with the first error. A later call retries the failed
steps, as after a failed backup, whatever C<$success> is. If a bitmap cannot be brought to its right state, it is
removed, so that the next backup is a full one.

With C<$success>, teardown returns true or dies:

=over

=item * If it returns, the bitmaps are cleared, or the next backup is a full one. Errors after that moment are logged as
warnings.

=item * If it dies, the next backup also contains everything that this one contained. That holds even if the message says
that the outcome is unknown because QEMU cannot be asked. The access is then ended as after a failed backup. A later call
with C<$success> does not return true: when it has undone the rest, it dies with C<StateError>.

=back

If a signal arrives after the bitmaps are cleared, its handler runs, but teardown completes within a second. An exception
of the handler is thrown a statement or two later: not inside C<< eval { $access->teardown(1); 1 } >>, but
after it.

If an access goes out of scope without teardown, it is torn down as after a failed backup, with a warning. This does not
happen in a forked child.

Errors: C<StateError> if the access no longer exists in QEMU, because the VM was restarted or because another process
undid the access (L</recover>). Nothing is changed then. L</volumes> dies in the same way.

=head1 AUDITING A BITMAP

If a bitmap lacks bits, increments lack data, and nothing in the increments shows it. An audit finds such bits: the whole
disk is read and compared with what was read at the last backup. The bitmap has missed a block that differs but
is clean in the bitmap.

    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use', base => $id, audit => 1 }]);
    my $volume = $access->volumes('nbd')->{'drive-scsi0'};

If C<use> would continue the bitmap, setup copies the bitmap and then starts a new one, as for mode C<new>: the whole disk
can be read, and after a success the new bitmap is relative to this backup. C<audit-bitmap>, in the hash that L</setup>
returns for the device and in its volume, is the name of the copy. The copy is exported together with the new bitmap. Open
it as the bitmap of a volume:

    my $map = PVE::BackupAccess::Volume->open('drive-scsi0',
        { $volume->%{qw(nbd-path size)}, 'bitmap-mode' => 'reuse', 'bitmap-name' => $volume->{'audit-bitmap'} });
    while (my ($offset, $length) = $map->next_dirty_region) { ... }

The copy may have more bits than the bitmap had: those of writes immediately after the instant. There is no
C<audit-bitmap> if the bitmap could not be continued; C<bitmap-action> and C<reason> then say why, as without an audit.
After a failure, the next backup reads everything. L<PVE::BackupAccess::Provider::Qcow2Chain/audit_every> implements a
complete audit.

=head1 WHICH BACKUP A BITMAP IS RELATIVE TO

A bitmap records what has changed since one backup. When a guest is rolled back, its bitmap goes back in time too. When a
guest is migrated, or a disk is plugged in elsewhere, the bitmap moves along. Archives do not move. IDs ensure that
a bitmap is only used with the archive that it fits:

    my $id = PVE::BackupAccess->new_id;
    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use', base => $id_of_last_archive }]);
    ...
    $access->teardown(1, $id);    # store the ID with the archive

C<base> is the ID of the backup that the bitmap must be relative to, or undef if there is no backup. If one
device has this key, all bitmaps of the access are tied to backups. C<bitmap-action> is C<used> only if all of this holds:
the bitmap is relative to that backup, of this disk of this guest under this name; it is recording; and the disk was
not resized. Otherwise a new bitmap is created (C<missing-recreated>; on a QEMU with the early form of the command,
C<new>), and the log and C<reason> in the device's hash say why. If the bitmap is used, the device's hash has its C<base>.

A disk has several names, and a name may move from one disk to another: libvirt renumbers nodes. C<identity>, in
the hash that setup returns for the device and in its volume, tells the disk from all others of its guest, whichever name
it was given by. It is the drive, else the QOM path of the guest device, else the node; on a Proxmox QEMU it is the drive. A
program that stores the identity with the archive can find the base of a disk under another name, and passes it to setup:

    { device => 'virtio-disk0', 'bitmap-mode' => 'use', base => $id, identity => $identity_in_the_archive }

With C<identity>, the name does not matter. The bitmap is used only if the disk has this identity, and if all other
conditions above hold.

The ID is in the name of a second bitmap beside the target's, which takes the same memory. The second bitmap is stored,
migrated and rolled back with the first. It does not detect that a disk was resized and resized back by less than one bit
stands for (64 KiB; on a Proxmox QEMU usually 4 MiB). A teardown without an ID removes the ID.

Without C<base>, nothing ties a bitmap to an archive: after a rollback, a migration there and back, or a
swap of disks, C<use> reports C<used> although the bitmap does not fit the newest archive. Bitmaps with and
without an ID have different names in QEMU, so a program that does not know IDs, such as version 0.1.0,
never changes a bitmap that has one. The first backup with IDs is a full one.

=head1 SEE ALSO

L<PVE::BackupAccess::Volume>, L<PVE::BackupAccess::Task>, L<PVE::BackupAccess::Error>,
L<pve-backup-access>

=cut
