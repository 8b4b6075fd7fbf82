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

# The file handles that an access has given out and that are still in use, weakly.
Hash::Util::FieldHash::fieldhash(my %handles);

# Where the log goes without a 'log' option.
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

# Where files are made that QEMU opens, and who that is.
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

my %status_options = (%qmp_options, %place_options);

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

# One VM, one identity, by whatever path its socket is reached.
my sub identity ($qmp) {
    return undef if ref($qmp);
    utf8::encode($qmp);
    return realpath($qmp) // $qmp;
}

# The number of a user or group that is given by name or number; $find looks a name up.
my sub number_of ($option, $name, $find) {
    return $name if $name =~ m/\A(?:0|[1-9][0-9]{0,8})\z/;
    return $find->($name) // bad_argument("$option '$name': this machine knows no such name");
}

# { qemu-uid, qemu-gid } of QEMU's user, if that is told. Without a group it is the user's own.
my sub qemu_user ($options) {
    my ($user, $group) = $options->@{qw(qemu-user qemu-group)};
    bad_argument('qemu-group goes with qemu-user') if defined($group) && !defined($user);
    return if !defined($user);
    my $uid = number_of('qemu-user', $user, sub ($name) { return scalar(getpwnam($name)) });
    my $gid
        = defined($group)
        ? number_of('qemu-group', $group, sub ($name) { return scalar(getgrnam($name)) })
        : (getpwuid($uid))[3];
    bad_argument("qemu-user '$user': this machine does not know its group - give qemu-group, too")
        if !defined($gid);
    return ('qemu-uid' => $uid, 'qemu-gid' => $gid);
}

# As the core wants to have them: paths as text, whether they came as that or as a file name's bytes.
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

# The same with what this access knows of QEMU already.
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

# { device => { size, identity, base, alias-base: instead, where the disk had another name then, reason: why
# there is no base although there is a bitmap } }, by one look.
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
    bad_argument('freeze and thaw go together') if !$hooks->{freeze} != !$hooks->{thaw};
    bad_argument('setup takes an array ref of devices')
        if ref($devices) ne 'ARRAY';
    for my $device ($devices->@*) {
        check_hash('a device of setup', $device, \%device_keys);
        bad_argument("a device of setup lacks the key 'device'")
            if !defined($device->{device});
        bad_argument("device $device->{device}: an audit needs 'base'", device => $device->{device})
            if $device->{audit} && !exists($device->{base});
        bad_argument("device $device->{device}: 'identity' goes with 'base'",
            device => $device->{device})
            if defined($device->{identity}) && !exists($device->{base});
    }
    my @plain = map { +{ $_->%* } } $devices->@*;    # even if theirs are tied
    my $was_up = $self->_is_up;                      # then it is refused, and left alone
    my @deaths = deaths_of(sub { $self->_prepare(\@plain) });
    @deaths = $self->_frozen($hooks, sub { $self->_cut }) if !@deaths;
    @deaths = deaths_of(sub { $self->_finish }) if !@deaths;
    return $self->_infos if !@deaths;

    # A setup that dies leaves nothing. What a callback dies with meanwhile goes on as it is.
    my @undone = deaths_of(sub { $self->_undo_setup if !$was_up && $self->_is_up });
    my $worst = worst_of((grep { !is_own($_->[0]) } @undone), @deaths, @undone);
    $self->_log_warning("after that - $_->[0]") for grep { $_ != $worst } @deaths, @undone;
    rethrow($worst->[0]);
}

# The guest is thawed whatever becomes of it, and also if freezing it failed: it may have been frozen
# all the same. What is to be undone waits until then. The hooks may use the monitor.
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
        or $Error->throw('SystemError', "fcntl failed - $!");
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

    # A TPM state's drive is attached anew for each backup: that its bitmap is not there means nothing.
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

# From the map alone; nothing is read. A map that stops early dies.
sub _dirty_bytes ($self, $device) {
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

    # Whoever reads on is to get an error at once.
    close($_) for grep { defined } (delete($handles{$self}) // [])->@*;
    return $self->_teardown($success ? 1 : 0, $id);
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    local ($@, $!, $?);

    if ($self->_is_up) {

        # A handler that makes warnings fatal must not keep us from it.
        eval { warn "backup access was not torn down - doing so now, as after a failed backup\n" };
        if (!eval { $self->_teardown(0, undef); 1 }) {
            my $error = $@;
            eval { warn $error };

            # What a signal handler dies with must not end here.
            _return_with_later(undef, $error)
                if ${^GLOBAL_PHASE} eq 'RUN' && !PVE::BackupAccess::Try::is_own($error);
        }
    }
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess - the disks of a running QEMU guest as of one instant, and what changed since

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

An access freezes the state of one or more disks of a running guest at one instant and shows it
over NBD, together with a dirty bitmap: which parts changed since the last successful backup for
the same target. The guest runs on; what it overwrites meanwhile goes to a I<fleecing image> first.

On a Proxmox QEMU the access is made by its own commands (QAPI: C<backup-access-setup>,
C<backup-access-teardown>). On a stock QEMU since 7.2 the same is built from upstream's commands.
The results are the same.

Bitmaps are kept per target and device. A backup that failed, or whose process was killed, loses no
bit: the next one contains what it should have contained. What cannot be known for sure becomes a
full backup, and says so.

All offsets, lengths and sizes are bytes. Paths are text, or the bytes of a file's name, in UTF-8. All
methods die with a L<PVE::BackupAccess::Error>, but for what your own signal handlers and callbacks die
with: that goes on as it is. Signal handlers run while a call waits.

=head1 CLASS METHODS

=head2 new

    my $access = PVE::BackupAccess->new(%options);

Checks the options; nothing is sent. Options are:

=over

=item qmp

Required. The path of a QMP socket; a connection is open only while commands run, since QEMU serves
one client at a time. Or a code ref that carries the commands:

    qmp => sub ($command, $arguments) { mon_cmd($vmid, $command, $arguments->%*) },

It is given plain Perl data (integers are integers, booleans are those of L<JSON::PP>) and returns
what QMP's C<return> holds, or dies with QEMU's error as text. An object that it dies with goes on as
it is, and so does what a signal handler of yours dies with below it, even if the code ref has put
other words around that. A handler that the code ref installs itself, as for a time limit, is part of it.

=item target-id

Required. Who the backup is for; a valid UTF-8 string. C<Proxmox> and C<Proxmox VE> are reserved.

=item timeout

Seconds that any single QMP command may take, 60 if not given. With a code ref as C<qmp>, limits are
the code's own.

=item run-dir

An absolute path: the directory below which the private directory of the NBD socket is made. Both are
made with mode 0700. Without it, C</run/pve-backup-access> for root, C<$XDG_RUNTIME_DIR> or a
directory in C</tmp> for others. QEMU must be able to make a socket there. Neither it nor a
directory above it may be one in which others than root and you can rename things: of theirs, or open
to them without the sticky bit.

Where root backs up a QEMU that runs as another user (C<-runas>, C<-run-with user=>), the private directory is opened to QEMU's group
(mode 1730), this directory to all who want to go through it, and fleecing images are given to QEMU's user; that
user must be able to go through the directories above. Whose process QEMU is tells the other end of its socket; where
a code ref carries the commands, or another program has made the socket, C<qemu-user> does.

=item qemu-user, qemu-group

The user and group that QEMU runs as, by name or number, where the socket does not tell: libvirt's system domains, a
code ref as C<qmp>. Without a group it is the user's own. What is said under C<run-dir> is done for them by root.

=item qemu-run-dir, qemu-fleecing-dir

C<run-dir> and C<fleecing-dir> as QEMU sees them, where these are others than here: with C<-chroot>, or in a container
that has the directory mounted at another place.

=item log

    log => sub ($level, $message) { ... },

Is told what happens; C<$level> is C<debug>, C<info> or C<warn>. Without it warnings go to C<warn>.

=item fleecing-dir

Stock QEMU only: an absolute path of a directory where a sparse fleecing image is made for each
device, and removed at teardown. QEMU must be able to open it. As with C<run-dir>,
nobody but root and you may be able to rename what is in it or above it.

=item fleecing

Stock QEMU only: a hash C<< { $device => $node_name } >> of fleecing nodes of your own. Each must have
exactly the size of its device, clusters of at most 64 KiB, and be added with C<discard=unmap>, or
else discarding frees nothing. On a Proxmox QEMU fleecing images are attached as
C<< <device>-fleecing >> beforehand.

=item persistent

Stock QEMU only: 1 makes bitmaps of qcow2 disks survive a restart of the VM. A bitmap that is there
already stays as it was made; mode C<new> makes it anew. A qcow2 image of version 2 (C<compat=0.10>) can store no bitmap: its
bitmap is not persistent, and a line in the log says so.

=item allow-shared

1 allows disks that others may write to, too (devices with C<share-rw>). What they write while the backup is
made may be in it or not, so that it is not the disk at one instant, and it is in no bitmap.

=item recover

0 makes L</setup> die with class C<StateError> where a killed process left an access for the same target, and
change nothing, instead of undoing that first.

=item bitmap-name

For the early form of Proxmox' command only, which makes a new bitmap only under a new name. The
target-id if not given.

=back

=head2 capabilities

    my $capabilities = PVE::BackupAccess->capabilities(qmp => $path);

Asks a QEMU what it can do. Returns a hash: C<backend> (C<pve> or C<upstream>), C<form> (Proxmox'
command: C<devices> or the early C<devlist>), C<qemu-version>. Takes C<qmp> and C<timeout> as L</new>
does. Dies with class C<UnsupportedError> where neither backend is possible, naming what is missing.

=head2 recover

    my $lines = PVE::BackupAccess->recover(qmp => $path, 'target-id' => $id);

Undoes what a process that was killed left of an access for this target, as after a failed backup:
exports, its NBD server, block nodes, the access of a Proxmox QEMU, run directories; bitmaps keep
their old bits and get the new ones. L</setup> does the same by itself. Returns an array ref of lines
of text that say what was done, an empty one if there was nothing to do. It may be called again at any
time.

Takes C<qmp>, C<target-id>, C<run-dir>, C<fleecing-dir>, C<timeout> and C<log> as L</new> does, and C<force>; they have
to be those of the dead process for its NBD server and files to be found.

    my $lines = PVE::BackupAccess->recover(qmp => $path);

Without a target-id what dead processes left of all targets is undone, and each line says of which. That takes one
query where there is nothing, so a backup can begin with it: before it attaches what the dead one has attached as well,
such as a fleecing image.

Dies with class C<StateError> if a process is at a backup of this guest, naming its process ID, or if
what is left is another target's. On a Proxmox QEMU also where the disk or its bitmap was removed
meanwhile, so that QEMU would crash: then the access stays up until the VM is stopped.

Of a process on another machine, of an earlier boot or in another PID namespace, and of one that
C</proc> hides, it cannot be known whether it lives. Its access is refused as well; if you know that the
process has ended, say so:

    PVE::BackupAccess->recover(qmp => $path, 'target-id' => $id, force => 1);

The log and the lines returned say which process was taken for dead. An access of a process that is seen
to live, or of another target, is never undone.

    PVE::BackupAccess->recover(qmp => $path, 'target-id' => $id, foreign => 1);

Undoes an access that another program has made by Proxmox' own commands, such as a qemu-server without this module:
its exports, the NBD server if nothing else is exported, then the access, as after a failure. Such an access has no
marker, so whether its program lives cannot be known; a backup that is under way would fail. That is why nothing does it
by itself. Say it only when you know that the program has ended: on Proxmox VE when no task of the guest runs. After a
killed C<vzdump> the guest is still locked: C<qm unlock VMID>.

=head2 forget

    my $lines = PVE::BackupAccess->forget(qmp => $path, 'target-id' => $id);

Removes the target's bitmaps of all disks, so that the next backup of each is a full one. QEMU loads no
earlier state of a guest (C<loadvm>, C<qemu-img snapshot -a>) whose disk has a bitmap. Takes what L</recover>
takes and returns lines likewise. Dies with class C<StateError> while an access is up, of whatever target.

=head2 new_id

    my $id = PVE::BackupAccess->new_id;

A new random id for a backup: 32 hexadecimal digits.

=head2 status

    my $status = PVE::BackupAccess->status(qmp => $path);

Looks at what there is of backups in a QEMU and on disk, for all targets, and changes nothing. Takes
C<qmp>, C<run-dir>, C<fleecing-dir> and C<timeout> as L</new> does. Sizes are bytes, truth values 1 or 0,
what is not known is undef. Returns a hash:

=over

=item backend

C<pve> or C<upstream>.

=item access

undef where no access is up and no process is setting one up, else a hash: C<target-id>; C<pid> of the process
that has it, and C<alive>, whether that process lives (undef where that cannot be known from here, see
L</recover>); C<devices>, an array ref of names. Where another
program has used Proxmox' own commands C<pid> and C<alive> are undef. C<target-id> is told by bitmaps and by
run directories, so it is undef for an access without bitmaps if C<run-dir> is another one.

=item bitmaps

An array ref of hashes: C<target-id>, C<device>, C<node> and C<name> of the bitmap, C<background> (1 for that
which records while an access is up), C<base> (the id of the backup that it is relative to), C<dirty-bytes>, C<granularity>, and QEMU's C<recording>, C<busy>,
C<persistent> and C<inconsistent>. On a stock QEMU only those of this module, on a Proxmox QEMU all that
have a name.

=item exports

An array ref of hashes: C<id>, C<type>, C<node>, C<ours>, and C<device> if it is ours.

=item fleecing

An array ref of hashes, one for each device of an access that is up: C<device>, C<node>, C<file>, C<size>, and
C<image-bytes>, what it occupies. If it is a file that this machine can see there are C<free-bytes> of its
file system, and C<nearly-full>: 1 if less than a tenth of the file system is free and the image
can outgrow that. A fleecing image that is full breaks the snapshot, and the backup fails.

=item left-overs

What dead processes left and L</recover> would undo, an array ref of hashes: C<target-id>, C<device>, C<what> (a
text as in L</recover>'s lines) and C<harmless>: 1 for what costs nothing and is in nobody's way. An access of
a live process is not left over.

=item warnings

An array ref of lines of text, such as that a fleecing image's file system is nearly full.

=item bitmap-info

On a Proxmox QEMU only: what C<query-pbs-bitmap-info> says of the devices of the last backup or access.

=back

=head1 FUNCTIONS

=head2 bitmap_status

    PVE::BackupAccess::bitmap_status('used');    # 'reuse'

What a provider is told for a bitmap action of QEMU: C<not-used>, C<not-used-removed> and undef are
C<none>; C<new>, C<invalid> and C<missing-recreated> are C<new>; C<used> is C<reuse>. Dies on anything
else.

=head1 METHODS

=head2 sizes

    my $sizes = $access->sizes('drive-scsi0', 'drive-scsi1');    # { 'drive-scsi0' => 34359738368, ... }

The sizes of devices before L</setup>, as QEMU has them. Dies like setup for a device that cannot be
backed up: one that is not there, has no medium, or is listed twice.

=head2 bases

    my $bases = $access->bases('drive-scsi0', 'drive-scsi1');    # { 'drive-scsi0' => $id, ... }

The ids of the backups that the devices' bitmaps are relative to, before L</setup> and after what a killed
process left is undone: see L</WHICH BACKUP A BITMAP IS RELATIVE TO>. undef where a bitmap is not there, or
must not be used.

=head2 setup

    my $infos = $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use' }, ...]);

Freezes the state of all these devices at one instant. C<device> is the name of a block backend, the
id of a guest device (stock QEMU only) or the name of its node. C<bitmap-mode> is C<none> (the
default; removes this target's bitmap), C<new> (starts a bitmap with everything dirty) or C<use>
(continues the bitmap, or starts one if there is none to be trusted).

Returns a hash per device, as in QEMU's reply: C<device>, C<node-name>, C<size>, and with a bitmap
C<bitmap-node-name>, C<bitmap-name> and C<bitmap-action>. A C<base> per device ties the bitmaps to backups:
see L</WHICH BACKUP A BITMAP IS RELATIVE TO>.

With a true C<audit> per device, beside C<base>, a bitmap that mode C<use> would continue is audited: see
L</AUDITING A BITMAP>.

When setup dies, what it did is undone, and no bitmap lost a bit.

    $access->setup(\@devices, freeze => sub { ... }, thaw => sub { ... });

Calls C<freeze> right before that instant, when all is done that may be done before it, and C<thaw> right after it.
Between the two QEMU is sent one query, which sees whether the devices are still what they were, and the instant
itself; the monitor is free while either runs. Once C<freeze> was called C<thaw> is, whatever happens: also where
C<freeze> or the instant failed, which is what setup dies with then, or a signal came. What is to be undone is undone
after it.

What a killed process left of an access for the same target is undone first, with a warning in the log: see
L</recover>. While another process has an access to this guest, setup dies with class C<StateError>.

=head2 volumes

    my $volumes = $access->volumes('nbd');
    my $volumes = $access->volumes('file-handle');

The devices' data as a backup provider wants it: exactly the hash of the provider API's
C<backup_vm()>. Per device there are C<size> and C<bitmap-mode> (C<none>, C<new> or C<reuse>), where setup was
given a C<base> C<identity> and, if the bitmap is used, that C<base> (L</WHICH BACKUP A BITMAP IS RELATIVE TO>), and

=over

=item for C<nbd>

C<nbd-path> (the Unix socket; the export has the name of the device) and, with a bitmap,
C<bitmap-name>. The first call exports the devices.

=item for C<file-handle>

C<file-handle>, open for reading with O_DIRECT and for punching holes, which frees fleecing space
(L<fallocate(2)> with FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE, whole clusters: of 64 KiB, or of what
L<statvfs(3)> calls C<f_frsize> where the fleecing image has larger ones), and C<next-dirty-region>, a code
ref that returns offset and length of the next dirty region, then the empty list. Without a bitmap the whole device is one region. Reading what is not dirty, or what was
discarded, is an I/O error. The space is freed soon after the call has returned; if that fails, the next
one says so. Other programs of the same user can open C</proc/PID/fd/N>, or put a read-only loop
device on it. L<lseek(2)> with SEEK_DATA and SEEK_HOLE tells where the server knows of zeroes (NBD spec:
base:allocation), of 256 KiB and more, unless the bitmap-mode is C<reuse>: a program that passes over what
it takes for a hole would keep old data there. Over a snapshot of QEMU before 10.0, which must not be asked
beside reads, all is data.

The first call starts a process per device that serves the file (FUSE). It ends with the access; what
still has the file open then gets errors. Without FUSE this dies with class C<UnsupportedError>.

=back

Stock QEMU 7.2 returns wrong data to NBD clients that read a snapshot across clusters of 64 KiB while
the guest writes. L<PVE::BackupAccess::Volume> never does that with such a QEMU; C<nbdcopy>,
C<qemu-img> and others do. Read by the former, or use QEMU 10.0.

=head2 volume

    my $volume = $access->volume('drive-scsi0');

One device's data as a L<PVE::BackupAccess::Volume>, connected.

=head2 bitmap_state

    my $state = $access->bitmap_state($info);    # one of those that setup returned
    say "$info->{device}: dirty-bitmap status: $state->{text}";

For a log: C<text>, such as C<OK (4.0 MiB of 32.0 MiB dirty)>, C<dirty>, the bytes that are to be read, and C<action>,
the bitmap's. A TPM state's drive is attached for each backup, so that C<missing-recreated> is C<new> there. The map is read for it.

=head2 teardown

    $access->teardown($success);
    $access->teardown(1, $id);

Closes the file handles that volumes has given out, ends the access and undoes everything setup and
volumes made. After a success each bitmap holds exactly what the guest wrote since the instant; after a
failure it holds that and all it held before. C<$id> is the id of a backup that has ended well: the bitmaps
are relative to it from now on.

Every step is tried even if an earlier one failed; the first error is what it dies with, and a later
call tries again what is left, as after a failed backup, whatever it is told. A bitmap that could not be brought to its right state is
removed, so that the next backup is a full one.

With C<$success> it returns true, or dies. When it returns, the bitmaps have begun anew, or the next backup
is a full one: nothing that goes wrong after that moment makes it die, it is logged as a warning. When it
dies the next backup contains what this one contained as well, also where the message says that the end
is not known, because QEMU cannot be asked. A success that could not be carried out is ended as a failure, and that is what
it dies of. So a later call with C<$success> does not return: when it has undone what was left, it dies with
class C<StateError>.

A signal that comes after that moment is handled, but teardown comes to its end within a second. What the
handler dies with comes a statement or two later: not in C<< eval { $access->teardown(1); 1 } >>, but
after it.

Dies with class C<StateError>, and touches nothing, if the access is no more in QEMU: since the VM was started
again, or another process has undone it (L</recover>). The same holds for volumes.

When an access goes out of scope that was not torn down, that is done as after a failed backup, with a
warning. A forked child does nothing of the kind.

=head1 AUDITING A BITMAP

A bitmap that lacks bits makes increments that lack data, and nothing in them shows it. An audit finds it: all of the
disk is read, and compared with what was read at the last backup. What differs, and is clean in the bitmap, is what the
bitmap has missed.

    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use', base => $id, audit => 1 }]);
    my $volume = $access->volumes('nbd')->{'drive-scsi0'};

If C<use> would continue the bitmap, it is copied, and begun anew as by C<new>: all of the disk can be read, and after a
success the new bitmap is relative to this backup. C<audit-bitmap>, in the device's hash of L</setup> and in its volume, is
the name of the copy, which is exported beside the new bitmap. Its map is that of a volume:

    my $map = PVE::BackupAccess::Volume->open('drive-scsi0',
        { $volume->%{qw(nbd-path size)}, 'bitmap-mode' => 'reuse', 'bitmap-name' => $volume->{'audit-bitmap'} });
    while (my ($offset, $length) = $map->next_dirty_region) { ... }

It may have more bits than the bitmap had, those of writes right after the instant. There is no C<audit-bitmap> if the
bitmap could not be continued; then C<bitmap-action> and C<reason> say why, as without an audit. After a failure the next
backup reads everything. L<PVE::BackupAccess::Provider::Qcow2Chain/audit_every> does all of this.

=head1 WHICH BACKUP A BITMAP IS RELATIVE TO

A bitmap holds what has changed since one backup. It goes back in time with the guest, moves with it to
another node, and stays with a disk that is plugged in elsewhere; archives do not. With ids neither can be
taken for what the other does not fit:

    my $id = PVE::BackupAccess->new_id;
    $access->setup([{ device => 'drive-scsi0', 'bitmap-mode' => 'use', base => $id_of_last_archive }]);
    ...
    $access->teardown(1, $id);    # kept with the archive

C<base> is the id of the backup that the bitmap has to be relative to, undef if there is none; where one
device has the key, all bitmaps of the access are tied to backups. C<use> then gives C<used> only if the
bitmap is relative to that backup, of this disk of this guest under this name, is recording, and the disk was
not resized. Otherwise it is made anew (C<missing-recreated>; on a QEMU with the early form of the command
C<new>), and the log and C<reason> in the device's hash say why. C<base> in there is the id of a bitmap that is
used.

A disk has several names, and a name may go from one disk to another: libvirt numbers its nodes anew. C<identity> in
the device's hash of setup, and in its volume, is what tells the disk from others of its guest, whichever name was given:
the drive, else the guest device by its QOM path, else the node; on a Proxmox QEMU the drive. Whoever keeps it with the
archive can find the base of a disk under another name, and says so:

    { device => 'virtio-disk0', 'bitmap-mode' => 'use', base => $id, identity => $identity_in_the_archive }

With C<identity> the name does not matter. The bitmap is used only if that is the identity of this disk. What else
C<use> needs is the same.

The id is in the name of a second bitmap beside the target's, which takes the same memory. It is stored,
migrated and rolled back with it. It tells no change of the disk's size back and forth by less than what a bit
stands for (64 KiB, on a Proxmox QEMU usually 4 MiB). A teardown without an id takes the id away.

Without C<base> nothing ties a bitmap to an archive: after a rollback, a migration there and back, or a
swap of disks, C<use> says C<used> although the bitmap does not fit the newest archive. Bitmaps with and
without an id have different names in QEMU, so that a program that knows of no ids, such as version 0.1.0,
touches none that has one. The first backup with ids is a full one.

=head1 SEE ALSO

L<PVE::BackupAccess::Volume>, L<PVE::BackupAccess::Task>, L<PVE::BackupAccess::Error>,
L<pve-backup-access>

=cut
