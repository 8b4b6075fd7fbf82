package PBA::Test::VM;

# A real virtual machine for a test: QEMU without KVM, with the requested disks, in a private directory, and
# with the test guest unless the test says otherwise. It ends with the object.

use v5.36;

use File::Temp ();
use JSON::PP ();
use POSIX qw(WNOHANG);
use Scalar::Util ();
use Time::HiRes ();

use PBA::Test::Channel qw(now);
use PBA::Test::Graph;
use PBA::Test::Guest;
use PBA::Test::QMP;
use PBA::Test::VM::CommandLine qw(command_line drive_args);

my $JSON = JSON::PP->new->utf8->canonical;
my $DEFAULT_SIZE = 64 * 1024 * 1024;
my $START_TIMEOUT = 60;
my $BOOT_TIMEOUT = 180;
my $QUIT_TIMEOUT = 60;

# Machines that still exist when the program ends must be ended before Perl destroys objects in an arbitrary
# order.
my %STARTED;

sub _end_all () {
    $_->DESTROY for grep { defined } values %STARTED;
    return;
}

END {
    local $?;
    _end_all();
}

# An interrupted test also cleans up, and then dies of the signal. Handlers of other code are not replaced.
sub _handle_signals () {
    for my $name (grep { ($SIG{$_} // 'DEFAULT') =~ /\A(?:DEFAULT)?\z/ } qw(INT TERM HUP)) {
        $SIG{$name} = sub {
            _end_all();
            $SIG{$name} = 'DEFAULT';
            kill $name => $$;
        };
    }
    return;
}

# Options: disks => [{ id, size, format => raw|qcow2, cache => writeback|none, iothread => 0|1,
# bus => virtio|scsi, shape => blockdev|drive|proxmox (its node names), throttle => 0|1,
# file => existing image, readonly, filesystem => 'ext4', device_args => 'werror=report' }], empty_cdrom => 0|1,
# guest => 0|1, paused => 0|1, memory => MiB, machine => type, args => [further arguments of QEMU].
sub start ($class, %opt) {
    my $dir = File::Temp->newdir('pba-vm.XXXXXX', TMPDIR => 1);
    my $self = bless {
        tmp => $dir,
        dir => "$dir",
        owner => $$,
        opt => { guest => 1, machine => 'pc', memory => 256, %opt },
        disks => {},
        order => [],
    }, $class;
    Scalar::Util::weaken($STARTED{ 0 + $self } = $self);
    _handle_signals();
    my @disks = ($opt{disks} // [{ id => 'disk0' }])->@*;
    $self->_add_disk($_->%*) for @disks;
    $self->_launch;
    return $self;
}

# Stops QEMU if it still runs, and starts it again with the same disks, this time with additional arguments.
sub restart ($self, @args) {
    $self->quit if $self->is_alive;
    local $self->{once} = \@args;
    $self->_launch;
    return $self;
}

# Whether the QEMU of the tests has Proxmox' commands.
sub is_proxmox ($class = undef) {
    state %known;
    my $qemu = qemu();
    return $known{$qemu} //= do {
        my @ask = qw(qmp_capabilities query-commands quit);
        my $input = join('', map { $JSON->encode({ execute => $_ }) } @ask);
        my $replies = qx(echo '$input' | $qemu -nodefaults -display none -machine none -qmp stdio);
        die "$qemu does not list its commands\n" if $? || $replies !~ m/"query-commands"/;
        $replies =~ m/"backup-access-setup"/ ? 1 : 0;
    };
}

sub qemu ($class = undef) {
    return $ENV{PBA_QEMU} // 'qemu-system-x86_64';
}

# ---- disks ----

sub qemu_img ($class = undef) {
    return $ENV{PBA_QEMU_IMG} // 'qemu-img';
}

sub _system (@command) {
    local $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin";
    system(@command) == 0 or die "'@command' failed: status $?\n";
    return;
}

sub _add_disk ($self, %disk) {
    my $id = $disk{id} // die "a disk needs an id\n";

    # The guest finds a virtio-blk disk by its serial number, which has at most 20 bytes.
    die "disk id '$id' is not 1 to 20 plain characters\n" if $id !~ /\A[A-Za-z][\w.-]{0,19}\z/;
    %disk = (
        format => 'raw',
        cache => 'writeback',
        bus => 'virtio',
        shape => 'blockdev',
        iothread => 0,
        throttle => 0,
        readonly => 0,
        %disk,
    );
    my $existing = defined $disk{file};
    $disk{file} //= "$self->{dir}/$id.$disk{format}";
    $disk{size} //= $existing ? _image_size($disk{file}, $disk{format}) : $DEFAULT_SIZE;
    _create_image(\%disk) if !$existing;

    $disk{qdev_id} = $disk{shape} eq 'proxmox' ? $id : "$id-dev";
    my $anonymous = grep { $_->{anonymous} } values $self->{disks}->%*;
    my $place = $disk{anonymous} ? "-anon/device[$anonymous]" : "/$disk{qdev_id}";
    $disk{qom_path} = "/machine/peripheral$place";

    # The path that query-block shows, and that qom-get and qemu-io -d accept.
    $disk{qdev} = $disk{bus} eq 'scsi' ? $disk{qdev_id} : "$disk{qom_path}/virtio-backend";
    $disk{device} = $disk{shape} eq 'blockdev' ? $id : "drive-$id";
    $disk{index} = $self->{order}->@*;
    push $self->{order}->@*, $id;
    $self->{disks}{$id} = \%disk;
    return;
}

sub _image_size ($file, $format) {
    return -s $file if $format eq 'raw';
    open(my $out, '-|', qemu_img(), 'info', '-U', '-f', $format, '--output=json', $file)
        or die "qemu-img: $!\n";
    local $/ = undef;
    return $JSON->decode(scalar <$out>)->{'virtual-size'};
}

sub _create_image ($disk) {
    my ($file, $size) = $disk->@{qw(file size)};
    if ($disk->{filesystem}) {
        my $raw = "$file.mkfs";
        _create_raw($raw, $size);
        _system("mkfs.$disk->{filesystem}", '-q', '-F', $raw);
        _system(qemu_img(), 'convert', '-f', 'raw', '-O', $disk->{format}, $raw, $file);
        unlink $raw;
    }
    elsif ($disk->{format} eq 'raw') {
        _create_raw($file, $size);
    }
    else {
        _system(qemu_img(), 'create', '-q', '-f', $disk->{format}, $file, $size);
    }
    return;
}

sub _create_raw ($file, $size) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    truncate($fh, $size) or die "$file: $!\n";
    close($fh) or die "$file: $!\n";
    return;
}

# { id, file, size, format, ..., device => the name in backups (the drive, or the node if the disk has no
# drive), qdev_id, qom_path, qdev => as in query-block }
sub disk ($self, $id) {
    return $self->{disks}{$id} // die "no disk '$id'\n";
}

sub disk_ids ($self) {
    return $self->{order}->@*;
}

# Unplugs the guest device of a SCSI disk, which also removes a -drive.
sub unplug ($self, $id) {
    $self->clear_events;
    $self->qmp('device_del', id => $self->disk($id)->{qdev_id});
    $self->wait_event('DEVICE_DELETED');
    return;
}

# Plugs the guest device in again, optionally with the node of another disk.
sub plug ($self, $id, $of = $id) {
    my $disk = $self->disk($id);
    my (undef, $drive) = $disk->{shape} eq 'drive' ? drive_args($disk) : ();
    $self->hmp("drive_add 0 $drive") if defined $drive;
    $disk->{plugged} = $of;
    $self->qmp(
        'device_add',
        driver => 'scsi-hd',
        bus => "scsihw-$id.0",
        drive => $self->disk($of)->{device},
        id => $disk->{qdev_id},
        serial => $id,
    );
    return;
}

# A raw image of the disk as the host sees it now. It is only consistent while nobody writes.
sub raw_image ($self, $id) {
    my $disk = $self->disk($id);
    return $disk->{file} if $disk->{format} eq 'raw';
    my $raw = "$self->{dir}/$id.flat";
    my @from = ('-U', '-f', $disk->{format});
    _system(qemu_img(), 'convert', @from, '-O', 'raw', $disk->{file}, $raw);
    return $raw;
}

# ---- the process ----

# With setpriv, the kernel ends QEMU together with this process, even if this process is killed. With stdbuf,
# the output of qemu-io is available at once.
sub _spawn ($self, @command) {
    my $log = "$self->{dir}/qemu.log";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(STDIN, '<', '/dev/null') or POSIX::_exit(127);
        open(STDOUT, '>>', $log) or POSIX::_exit(127);
        open(STDERR, '>&', \*STDOUT) or POSIX::_exit(127);
        delete($ENV{LD_PRELOAD});    # the sanitizers are for our code, and slow QEMU down
        exec(qw(setpriv --pdeathsig KILL stdbuf -oL --), @command) or POSIX::_exit(127);
    }
    $self->{pid} = $pid;
    delete $self->@{qw(status booted killed)};
    return;
}

sub _launch ($self) {
    unlink map { "$self->{dir}/$_" } qw(qmp qmp2 agent);
    my $began = now();
    $self->_spawn(command_line($self));
    my $ok = eval {

        # A weak reference, because $self holds the connections.
        my $weak = $self;
        Scalar::Util::weaken($weak);
        my $alive = sub { $weak && $weak->is_alive };
        my %common = (timeout => $START_TIMEOUT, alive => $alive);
        $self->{qmp} = PBA::Test::QMP->new(%common, path => "$self->{dir}/qmp2");

        # The guest starts only when its channel is open, so that nothing that it says is lost.
        $self->{guest} = PBA::Test::Guest->new(%common, path => "$self->{dir}/agent");
        $self->cont if !$self->{opt}{paused};
        1;
    };
    my $error = $@;
    $self->{boot_seconds} = now() - $began;
    return if $ok;
    $error .= $self->logs;
    $self->kill9;
    die $error;
}

# Lets the guest run, and if it has just been started, waits until it has booted.
sub cont ($self) {
    $self->qmp('cont');
    return if !$self->{opt}{guest} || $self->{booted};
    $self->{guest}->wait_ready($BOOT_TIMEOUT);
    $self->{booted} = 1;
    return;
}

# Reaps QEMU if it has ended. The status is stored as in $?.
sub is_alive ($self) {
    return 0 if !$self->{pid};
    local ($!, $?);
    my $pid = waitpid($self->{pid}, WNOHANG);
    return 1 if $pid == 0;
    $self->{status} = $pid > 0 ? $? : -1;
    delete $self->{pid};
    return 0;
}

# Waits until QEMU ends. Returns its status as in $?.
sub wait_exit ($self, $timeout = $QUIT_TIMEOUT) {
    my $deadline = now() + $timeout;
    while ($self->is_alive) {
        die "QEMU has not ended within $timeout s\n" . $self->logs
            if now() > $deadline;
        Time::HiRes::sleep(0.01);
    }
    return $self->{status};
}

# The signal of which QEMU died, unless kill9 sent it: 6 for an abort, 11 for a segmentation fault.
sub crashed ($self) {
    return 0 if $self->is_alive || $self->{killed};
    return ($self->{status} // 0) & 127;
}

# For tests that make QEMU crash on purpose: the crash is not reported at the end.
sub forgive_crash ($self) {
    $self->{killed} = 1;
    return;
}

sub _disconnect ($self) {
    $_->close for grep { $_ } delete $self->@{qw(qmp guest)};
    return;
}

# Ends QEMU by quit. Dies if QEMU does not end properly.
sub quit ($self) {

    # QEMU may close the socket before its reply is read.
    eval { $self->{qmp}->execute('quit') };
    my $status = $self->wait_exit;
    $self->_disconnect;
    die "QEMU ended with status $status\n" . $self->logs if $status != 0;
    return;
}

sub kill9 ($self) {
    if ($self->{pid} && $self->is_alive) {
        $self->{killed} = 1;
        kill KILL => $self->{pid};
        $self->wait_exit;
    }
    $self->_disconnect;
    return;
}

# The ends of the logs of QEMU and of the guest's kernel.
sub logs ($self) {
    my $text = '';
    for my $name (qw(qemu.log console.log)) {
        open(my $fh, '<', "$self->{dir}/$name") or next;
        my @lines = <$fh>;
        splice(@lines, 0, -30) if @lines > 30;
        $text .= "--- $name\n" . join '', @lines if @lines;
    }
    return $text;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$ || !$self->{tmp};
    local ($@, $!, $?);
    delete $STARTED{ 0 + $self };
    my $crashed = $self->crashed;
    my $builder = Test::Builder->can('new') && Test::Builder->new;
    if ($builder && ($crashed || !$builder->is_passing)) {
        $builder->diag("QEMU of this test, killed by signal $crashed:") if $crashed;
        $builder->diag($self->logs);
    }
    eval { $self->kill9; 1 } or warn $@;
    delete $self->{tmp};
    return;
}

# ---- commands ----

sub qmp ($self, $command, %args) {
    return $self->{qmp}->execute($command, %args);
}

# Returns the whole reply, also of a failed command: { return => ... } or { error => { class, desc } }.
sub qmp_try ($self, $command, %args) {
    return $self->{qmp}->try($command, %args);
}

sub hmp ($self, $line) {
    return $self->qmp('human-monitor-command', 'command-line' => $line);
}

sub events ($self, $name = undef) {
    return $self->{qmp}->events($name);
}

sub clear_events ($self) {
    return $self->{qmp}->clear_events;
}

sub wait_event ($self, $name, %opt) {
    return $self->{qmp}->wait_event($name, %opt);
}

sub version ($self) {
    return $self->{qmp}->version;
}

sub qmp_path ($self) {
    return "$self->{dir}/qmp";
}

sub dir ($self) {
    return $self->{dir};
}

sub pid ($self) {
    return $self->{pid};
}

sub guest ($self) {
    return $self->{guest};
}

# The time from the start of QEMU until start() returned.
sub boot_seconds ($self) {
    return $self->{boot_seconds};
}

# Runs a qemu-io command on the guest device of a disk, given by its ID, or on any node. Returns its output, or
# dies if that is an error.
sub qemu_io ($self, $name, $command) {
    my $disk = $self->{disks}{$name};
    my $target = $disk ? "-d $disk->{qdev}" : $name;
    my $log = "$self->{dir}/qemu.log";
    my $before = -s $log;
    my $text = $self->hmp(qq(qemu-io $target "$command"));

    open(my $fh, '<', $log) or die "$log: $!\n";
    seek($fh, $before, 0);
    local $/ = undef;
    $text .= <$fh> // '';
    die "qemu-io $target '$command': $text\n"
        if $text =~ /fail|error|invalid|not found|cannot|usage|verification/i;
    return $text;
}

# ---- the state of QEMU ----

# The block graph in a form that is equal for equal graphs: { nodes => [...], edges => [...] }.
sub graph ($self) {
    my $graph = $self->qmp('x-debug-query-block-graph');
    my $nodes = $self->qmp('query-named-block-nodes', flat => JSON::PP::true);
    return PBA::Test::Graph::normalise($graph, $nodes, $self->{dir});
}

# { node => { bitmap => { count, granularity, recording, busy, persistent, inconsistent } } }
sub bitmaps ($self) {
    my %bitmaps;
    for my $node ($self->qmp('query-named-block-nodes', flat => JSON::PP::true)->@*) {
        for my $bitmap (($node->{'dirty-bitmaps'} // [])->@*) {
            my %values = map { $_ => 0 + ($bitmap->{$_} // 0) }
                qw(count granularity recording busy persistent inconsistent);
            $bitmaps{ $node->{'node-name'} }{ $bitmap->{name} // '' } = \%values;
        }
    }
    return \%bitmaps;
}

# The block exports, sorted by id.
sub exports ($self) {
    return [sort { $a->{id} cmp $b->{id} } $self->qmp('query-block-exports')->@*];
}

# Removes all exports and disconnects their readers. QEMU 7.2 may hang forever in nbd-server-stop if a client is
# just connecting.
sub end_exports ($self) {
    $self->qmp('block-export-del', id => $_->{id}, mode => 'hard') for $self->exports->@*;
    return;
}

# Adds a node that can be the fleecing image of the disk: size => default the disk's, as => node name (default
# <device>-fleecing), in => directory, cluster => of a qcow2 image. Returns the node name.
sub add_fleecing_node ($self, $id, %opt) {
    my $disk = $self->disk($id);
    my $node = $opt{as} // "$disk->{device}-fleecing";
    my $format = $opt{cluster} ? 'qcow2' : 'raw';
    my $file = ($opt{in} // $self->{dir}) . "/$node.$format";
    my $size = $opt{size} // $disk->{size};
    my @create = (qw(create -q -f qcow2 -o), 'cluster_size=' . ($opt{cluster} // 0), $file, $size);
    $opt{cluster} ? _system(qemu_img(), @create) : _create_raw($file, $size);
    $self->qmp(
        'blockdev-add',
        driver => $format,
        'node-name' => $node,
        discard => 'unmap',
        file => { driver => 'file', filename => $file, discard => 'unmap' },
    );
    $self->{fleecing}{$node} = $file;
    return $node;
}

# The file of a node made by add_fleecing_node.
sub fleecing_file ($self, $node) {
    return $self->{fleecing}{$node};
}

sub remove_fleecing_node ($self, $node) {
    $self->qmp('blockdev-del', 'node-name' => $node);
    unlink delete $self->{fleecing}{$node};
    return;
}

1;
