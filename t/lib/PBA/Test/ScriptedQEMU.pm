package PBA::Test::ScriptedQEMU;

# A scripted QEMU: a table of commands and their replies, over a socket (start_peer) or as a code ref
# (qmp_calls). A test changes single replies. Also contains helpers for the tests that use it.

use v5.36;

use Exporter qw(import);
use File::Temp ();
use IO::Socket::UNIX ();
use JSON::PP ();
use Test::More;

use PBA::Test::QMPPeer;
use PVE::BackupAccess;

our @EXPORT = qw(
    $json $dir $run_dir $target $size @upstream_commands @one
    commands schema version device node mark answers pve_returns upstream_returns setup_reply value_of spoiled
    start_peer action qmp_calls arguments_of new_access capabilities error_class dies
    peak_rss_kib reset_peak
);

our $json = JSON::PP->new->canonical->utf8->allow_nonref;
our $dir = File::Temp->newdir('pba-qmp-XXXXXXXX', TMPDIR => 1);
our $run_dir = "$dir/run";
our $target = 'snapshot-access:mystore';
our $size = 64 << 20;

our @upstream_commands = qw(
    query-version query-commands query-status query-block query-named-block-nodes
    x-debug-query-block-graph query-block-exports query-iothreads query-name query-uuid query-jobs
    nbd-server-start nbd-server-stop block-export-add block-export-del blockdev-add blockdev-del blockdev-reopen
    blockdev-backup block-dirty-bitmap-add block-dirty-bitmap-merge block-dirty-bitmap-remove
    transaction qom-set qom-get job-dismiss
);

sub commands (@names) {
    return [map { { name => $_ } } @names];
}

sub schema ($form) {
    my @members = $form eq 'devlist' ? qw(target-id devlist bitmap-name) : qw(target-id devices);
    return [
        { name => 'backup-access-setup', 'meta-type' => 'command', 'arg-type' => '17' },
        { name => '17', 'meta-type' => 'object', members => [map { { name => $_ } } @members] },
        { name => 'stop', 'meta-type' => 'command', 'arg-type' => '0' },
    ];
}

sub version ($major, $minor, $micro = 2, $package = 'scripted') {
    my $qemu = { major => $major, minor => $minor, micro => $micro };
    return { qemu => $qemu, package => $package };
}

sub device ($name, $node) {
    my $inserted = { 'node-name' => $node, ro => JSON::PP::false, drv => 'raw' };
    $inserted->{image} = { 'virtual-size' => $size };
    return { device => $name, qdev => $name =~ s/^drive-//r, inserted => $inserted };
}

sub node ($name, @bitmaps) {
    my $node = { 'node-name' => $name, drv => 'raw', image => { 'virtual-size' => $size } };
    $node->{'dirty-bitmaps'}
        = [map { { name => $_, recording => JSON::PP::true, granularity => 65536 } } @bitmaps];
    return $node;
}

# Imitates QEMU's NBD server from outside: something listens at its socket.
sub nbd_server () {
    my $listener;
    my $start = sub ($arguments) {
        my $path = $arguments->{addr}{data}{path};
        $listener = IO::Socket::UNIX->new(Local => $path, Listen => 64)
            or die "cannot listen at $path: $!\n";
        return {};
    };
    my $stop = sub (@) {
        unlink($listener->hostpath) if $listener;
        undef $listener;
        return {};
    };
    return ('nbd-server-start' => $start, 'nbd-server-stop' => $stop);
}

# The default reply of each command. A code ref gets the arguments.
sub pve_returns (%more) {
    return (
        'query-version' => version(10, 0),
        'query-commands' => commands(@upstream_commands, 'backup-access-setup'),
        'query-qmp-schema' => schema('devices'),
        'query-block' => [device('drive-scsi0', '#block1'), device('drive-scsi1', '#block2')],
        'query-named-block-nodes' => [
            node('#block1', $target),
            node('#block2', $target),
            map { node("drive-scsi$_-fleecing") } 0, 1
        ],
        'query-block-exports' => [],
        'x-debug-query-block-graph' => { nodes => [], edges => [] },
        'query-status' => { status => 'running' },
        'query-migrate' => {},
        'x-debug-query-block-graph' => { nodes => [], edges => [] },
        'query-name' => { name => 'vm' },
        'query-jobs' => [],
        'query-uuid' => { UUID => 'a-b-c' },
        'backup-access-setup' => \&setup_reply,
        nbd_server(),
        map({ $_ => {} }
            qw(
                block-export-add block-export-del backup-access-teardown block-dirty-bitmap-remove
                blockdev-add blockdev-del
            )),
        %more,
    );
}

my %action_of = (none => undef, new => 'new', use => 'used');

sub setup_reply ($arguments) {
    my @reply;
    for my $device ($arguments->{devices}->@*) {
        my ($number) = $device->{device} =~ m/(\d+)/;
        my $info = { device => $device->{device}, 'node-name' => "#snap$number", size => $size };
        my $action = $action_of{ $device->{'bitmap-mode'} };
        if (defined($action)) {
            $info->{'bitmap-action'} = $action;
            $info->{'bitmap-name'} = $target;
            $info->{'bitmap-node-name'} = '#block' . ($number + 1);
        }
        push @reply, $info;
    }
    return \@reply;
}

sub upstream_returns (%more) {
    my $graph = { nodes => [{ id => 1, type => 'block-driver', name => '#block1' }], edges => [] };
    return (
        pve_returns(),
        'query-version' => version(8, 0),
        'query-commands' => commands(@upstream_commands),
        'x-debug-query-block-graph' => $graph,
        'query-iothreads' => [],
        map({ $_ => {} } qw(qom-set block-dirty-bitmap-add)),
        %more,
    );
}

sub value_of ($value, $arguments) { return ref($value) eq 'CODE' ? $value->($arguments) : $value }

# What an answer finally returns, by reference.
sub returned ($value) {
    return $value if ref($$value) ne 'HASH' || !exists($$value->{action});
    my $action = $$value->{action};
    my ($reply)
        = grep { ref($_) eq 'HASH' && exists($_->{return}) }
        ref($action) eq 'ARRAY' ? $action->@* : $action;
    return $reply ? \$reply->{return} : \undef;
}

sub mark ($name, $size) {
    my $mark = node($name);
    $mark->{image}{'virtual-size'} = $size;
    return $mark;
}

# While Proxmox' access is active, the nodes of its disks have a second bitmap.
sub with_background (@nodes) {
    my %background = (name => 'backup-access-background-bitmap', recording => JSON::PP::true);
    return map {
        my @bitmaps = ref($_) eq 'HASH' ? ($_->{'dirty-bitmaps'} // [])->@* : ();
        @bitmaps ? { $_->%*, 'dirty-bitmaps' => [@bitmaps, \%background] } : $_;
    } @nodes;
}

# The replies of one QEMU. Markers of processes that were added are among its nodes until they are deleted,
# whatever replies a test defines.
sub answers ($returns) {
    my (%marks, $is_up);
    return sub ($command, $arguments) {
        my $value = value_of($returns->{$command}, $arguments);
        my $name = $arguments->{'node-name'} // '';
        my $returned = returned(\$value);
        my $done = ref($$returned) eq 'HASH' && !$$returned->%*;
        $marks{$name} = mark($name, $arguments->{size})
            if $command eq 'blockdev-add' && $done && $name =~ m/\Apba-owner-/;
        delete($marks{$name}) if $command eq 'blockdev-del' && $done;
        $is_up = 1 if $command eq 'backup-access-setup' && ref($$returned) eq 'ARRAY';
        $is_up = 0 if $command eq 'backup-access-teardown' && $done;
        return $value if $command ne 'query-named-block-nodes' || ref($$returned) ne 'ARRAY';
        my %there
            = map { ref($_) eq 'HASH' ? (($_->{'node-name'} // '') => 1) : () } $$returned->@*;
        my @marks = map { $marks{$_} } grep { !$there{$_} } sort keys %marks;
        return $value if !@marks && !$is_up;
        $$returned = [($is_up ? with_background($$returned->@*) : $$returned->@*), @marks];
        return $value;
    };
}

# A peer ends with its object; these peers must outlive the accesses that a test creates.
my @peers;

# The replies of a peer: plain values are returned; { action => ... } is an action of QMPPeer.
sub start_peer ($returns, %options) {
    my $answer = answers($returns);
    my $handler = sub ($command, $arguments, $n) {
        return undef if !exists($returns->{$command});
        my $value = $answer->($command, $arguments);
        return $value->{action} if ref($value) eq 'HASH' && exists($value->{action});
        return { return => $value };
    };
    push @peers, PBA::Test::QMPPeer->start(handler => $handler, %options);
    shift(@peers) if @peers > 4;
    return $peers[-1];
}

sub action ($action) { return { action => $action } }

sub new_access ($qmp, %options) {
    return PVE::BackupAccess->new(
        qmp => ref($qmp) eq 'CODE' ? $qmp : $qmp->socket_path,
        'target-id' => $target,
        'run-dir' => $run_dir,
        timeout => 30,
        %options,
    );
}

our @one = ({ device => 'drive-scsi0', 'bitmap-mode' => 'use' });

sub error_class ($error) {
    local $@;
    return ref($error) && eval { $error->isa('PVE::BackupAccess::Error') }
        ? $error->class
        : "no object: $error";
}

# The code must die with one of our errors, in one line, and leave nothing on disk.
sub dies ($code, $class, $pattern, $name) {
    my $done = eval { $code->(); 1 };
    my $error = $@;
    return fail("$name: dies") if $done;
    my $ok = like(error_class($error), $class, "$name: class");
    $ok &= like("$error", $pattern, "$name: message");
    $ok &= unlike("$error", qr/[[:cntrl:]](?!\z)/, "$name: one line");
    diag("$error") if !$ok;
    is_deeply([glob("$run_dir/*")], [], "$name: nothing is left on disk");
    return $error;
}

sub capabilities ($peer, %options) {
    return PVE::BackupAccess->capabilities(qmp => $peer->socket_path, timeout => 30, %options);
}

# A good reply with one member removed, or with that member in every other type.
sub spoiled ($value, $path, $change) {
    my $copy = $json->decode($json->encode($value));
    my $at = $copy;
    my @path = @$path;
    my $last = pop(@path);
    $at = ref($at) eq 'ARRAY' ? $at->[$_] : $at->{$_} for @path;
    $change->($at, $last);
    return $copy;
}

sub qmp_calls ($returns) {
    my $calls = { names => [], arguments => [] };
    my $answer = answers($returns);
    $calls->{code} = sub ($command, $arguments) {
        push $calls->{names}->@*, $command;
        push $calls->{arguments}->@*, $arguments;
        die "no such command\n" if !exists($returns->{$command});
        return $answer->($command, $arguments);
    };
    return $calls;
}

sub arguments_of ($calls, $command) {
    my @found = grep { $calls->{names}[$_] eq $command } 0 .. $#{ $calls->{names} };
    return @found ? $calls->{arguments}[$found[0]] : undef;
}

sub peak_rss_kib () {
    open(my $fh, '<', '/proc/self/status') or die "cannot read the status: $!\n";
    my ($kib) = map { m/^VmHWM:\s+(\d+)/ ? $1 : () } <$fh>;
    return $kib;
}

sub reset_peak () {
    open(my $fh, '>', '/proc/self/clear_refs') or return;
    print {$fh} 5;
    close($fh);
    return;
}

1;
