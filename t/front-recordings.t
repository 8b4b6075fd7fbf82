# Compares the front with recordings of a real Proxmox QEMU: the same requests must return the same keys,
# actions, numbers and errors. If PBA_QEMU itself has Proxmox' commands, the requests go directly to it.
#
# What is compared: the class and text of every error; complete replies of the backup access commands and of the
# NBD and job commands; of query-block and query-named-block-nodes only the drivers and named bitmaps, because
# the rest differs between versions. Names of block nodes, times and versions may differ; within one recording,
# a name means the same node.
#
# Not recorded: an access in an iothread, because the replies are the same; and block-export-del and
# nbd-server-stop while an NBD client is working, because the front only passes these commands on.
#
# One QEMU is enough: the recordings are of one QEMU, and the front answers the same on all.

use v5.36;

use FindBin ();
use lib "$FindBin::Bin/lib";

use File::Temp ();
use IO::Select ();
use IO::Socket::UNIX ();
use JSON::PP ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::Front ();

my $json = JSON::PP->new->utf8->canonical->allow_nonref;

$SIG{PIPE} = 'IGNORE';
my $qemu = $ENV{PBA_QEMU} // 'qemu-system-x86_64';
my @qemu_arguments = split(' ', $ENV{PBA_QEMU_ARGS} // '');
my $mib = 1 << 20;

# shape: the configuration of the disks; fatal: the last of these commands kills QEMU; damage: it does not, but
# the front must record it; until: where QEMU 7 stops, because it cannot remove a filter above one that was left
# behind.
my @recordings = (
    ['support-and-schema'],
    ['drive-shape-all-modes', shape => 'drive'],
    ['drive-shape-brief', shape => 'drive', fleecing => 1],
    ['drive-shape-query-block', shape => 'drive', fleecing => 1],
    ['blockdev-shape-two-disks'],
    ['teardown-with-export-without-bitmap'],
    ['teardown-with-export-mode-none'],
    ['teardown-with-export-client-connected'],
    ['second-device-fails-late', damage => 1, until => 15],
    ['same-device-twice', damage => 1],
    ['fleecing-write-error'],
    ['quit-while-active'],
    ['resize', fleecing_mib => 72],
    ['odd-target-ids', damage => 1],
    ['native-backup-and-access'],
    ['snapshot-and-mirror-during-access'],
    ['restart-before'],
    ['restart-after'],
    ['nbd-server-stop-with-client'],
    ['mixed-modes-device-left-out'],
    ['fatal-teardown-with-exported-bitmap-success', fatal => 'backup-access-teardown'],
    ['fatal-teardown-with-exported-bitmap-failure', fatal => 'backup-access-teardown'],
    ['fatal-empty-device-list', fatal => 'backup-access-setup'],
    ['fatal-bitmap-removed-during-access', fatal => 'backup-access-teardown'],
    ['fatal-teardown-of-native-backup', fatal => 'backup-access-teardown'],
    ['fatal-teardown-of-native-backup-no-cancel', fatal => 'backup-access-teardown'],
    ['fatal-empty-removable-drive', cdrom => 1, fatal => 'backup-access-setup'],
    ['fatal-hot-unplug-during-access', fatal => 'backup-access-teardown'],
);

# Replies that depend on the machine or on the version of QEMU.
my %not_compared = map { $_ => 1 } qw(query-kvm query-blockstats query-qmp-schema query-commands);

my %any_value = map { $_ => 1 } qw(
    start-time end-time transferred uuid UUID backup-file pbs-library-version timestamp
);

# ---- a QEMU with the disks of the recordings ----

sub make_files ($dir, %option) {
    my $fleecing = $option{fleecing_mib} // ($option{shape} eq 'drive' ? 64 : 66);
    make_raw("$dir/conf", 1 / 1024);    # for a native backup, which reads data first
    make_raw("$dir/d.raw", 64, 'd' x $mib);
    make_raw("$dir/fleece.raw", $fleecing);
    make_raw("$dir/fleece-wrong.raw", 32);
    my $qemu_img = $ENV{PBA_QEMU_IMG} // 'qemu-img';
    for my $name (qw(d1 fleece1)) {
        my @command = ($qemu_img, qw(create -q -f qcow2), "$dir/$name.qcow2", '48M');
        system(@command) == 0 or die "$qemu_img failed\n";
    }
    return;
}

sub make_raw ($path, $size, $data = '') {
    open(my $fh, '>', $path) or die "cannot create $path: $!\n";
    print {$fh} $data;
    truncate($fh, $size * $mib) or die "cannot extend $path: $!\n";
    close($fh) or die "cannot write $path: $!\n";
    return;
}

sub drive_shape ($dir, %option) {
    my @fleecing = (
        '-drive', "if=none,id=drive-scsi0-fleecing,file=$dir/fleece.raw,format=raw,discard=unmap",
    );
    return (
        '-drive',
        "if=none,id=drive-scsi0,file=$dir/d.raw,format=raw,discard=on,detect-zeroes=on",
        '-device',
        'scsi-hd,drive=drive-scsi0,id=scsi0,bus=hba.0',
        $option{fleecing} ? @fleecing : (),
    );
}

sub blockdev_shape ($dir, %option) {
    my @cdrom = ('-drive', 'if=none,id=drive-ide2,media=cdrom');
    push(@cdrom, '-device', 'ide-cd,drive=drive-ide2,id=ide2');
    my @arguments = $option{cdrom} ? @cdrom : ();
    my @disks = (['scsi0', 'raw', 'd.raw'], ['scsi1', 'qcow2', 'd1.qcow2']);
    for my $disk (@disks) {
        my ($id, $driver, $file) = @$disk;
        my %node = (driver => $driver, 'node-name' => 'f' . '0' x 25 . $id, discard => 'unmap');
        $node{file} = { driver => 'file', filename => "$dir/$file", discard => 'unmap' };
        my %top = (driver => 'throttle', 'node-name' => "drive-$id", file => \%node);
        $top{'throttle-group'} = "throttle-drive-$id";
        push(@arguments, '-object', "throttle-group,id=throttle-drive-$id");
        push(@arguments, '-blockdev', $json->encode(\%top));
        push(@arguments, '-device', "scsi-hd,drive=drive-$id,id=$id,bus=hba.0");
    }
    return @arguments;
}

sub start_qemu ($dir, %option) {
    my @shape
        = $option{shape} eq 'drive' ? drive_shape($dir, %option) : blockdev_shape($dir, %option);
    my $accel = grep { /\A--?(?:accel|enable-kvm)\z/ } @qemu_arguments;
    my @command = ($qemu, $accel ? () : qw(-accel tcg), qw(-S -nodefaults -display none -m 64));
    push(@command, '-device', 'virtio-scsi-pci,id=hba', @shape);
    push(@command, '-qmp', "unix:$dir/qemu.qmp,server=on,wait=off", @qemu_arguments);
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDOUT, '>', "$dir/stdout") or POSIX::_exit(1);
        open(STDERR, '>', "$dir/stderr") or POSIX::_exit(1);
        exec { $command[0] } @command or POSIX::_exit(127);
    }
    for (1 .. 400) {
        return $pid if IO::Socket::UNIX->new("$dir/qemu.qmp");
        die "$qemu did not start: ", read_file("$dir/stderr"), "\n"
            if waitpid($pid, POSIX::WNOHANG());
        sleep(0.05);
    }
    die "$qemu did not open its monitor\n";
}

sub read_file ($path) {
    open(my $fh, '<', $path) or die "cannot read $path: $!\n";
    local $/;
    return <$fh> // '';
}

# Not every recording ends with quit, and some end QEMU in other ways.
sub end_qemu ($pid) {
    for my $try (1 .. 500) {
        return if waitpid($pid, POSIX::WNOHANG()) != 0;
        kill('TERM', $pid) if $try == 20;
        sleep(0.01);
    }
    kill('KILL', $pid);
    waitpid($pid, 0);
    return;
}

# ---- a client ----

sub connect_client ($path) {
    my $handle = IO::Socket::UNIX->new($path) // die "cannot connect to $path: $!\n";
    return { handle => $handle, buffer => '', events => [] };
}

# The next message, or undef at the end of the connection or the time.
sub receive ($client, $seconds = 60) {
    my ($deadline, $buffer, $end) = (time + $seconds, \$client->{buffer});
    while (($end = index($$buffer, "\n")) < 0) {
        my $left = $deadline - time;
        return undef if $left <= 0 || !IO::Select->new($client->{handle})->can_read($left);
        sysread($client->{handle}, $$buffer, 1 << 16, length($$buffer)) or return undef;
    }
    return $json->decode(substr($$buffer, 0, $end + 1, ''));
}

sub request ($client, $text) {
    syswrite($client->{handle}, "$text\n");
    while (my $message = receive($client)) {
        return $message if !$message->{event};
        push(@{ $client->{events} }, $message);
    }
    return undef;
}

# The events of a command may also arrive after its reply.
sub wait_for_events ($client, $count) {
    while (@{ $client->{events} } < $count) {
        my $message = receive($client, 10) // last;
        push(@{ $client->{events} }, $message);
    }
    return splice(@{ $client->{events} });
}

# ---- the recordings ----

# Returns { request, reply, events } of each command; reply is undef if there is none, and 'left out' if it was
# omitted.
sub read_recording ($name) {
    my @exchanges;
    for my $line (split(/\n/, read_file("$FindBin::Bin/recordings/$name.txt"))) {
        my ($who, $text) = $line =~ /\A([CS]): (.*)\z/ or die "$name: what is this: $line\n";
        if ($who eq 'C') {
            push(@exchanges, { request => $text, events => [] });
        }
        elsif ($text =~ /\A\(/) {
            $exchanges[-1]{reply} = 'left out';
        }
        else {
            my $message = $json->decode($text);
            next if $message->{QMP};
            push(@{ $exchanges[-1]{events} }, $message) if $message->{event};
            $exchanges[-1]{reply} = $message if !$message->{event};
        }
    }
    return @exchanges;
}

# The request with the paths of this machine and the node names that this QEMU has generated.
sub adapt ($text, $dir, $names) {
    $text =~ s{/vm/}{$dir/}g;
    $text =~ s/"(#block\d+)"/'"' . ($names->{$1} \/\/ $1) . '"'/ge;
    return $text;
}

# ---- comparing ----

sub bitmaps_of ($node) {
    my @named = grep { defined($_->{name}) } @{ $node->{'dirty-bitmaps'} // [] };
    my @keys = qw(name recording persistent busy granularity count);
    my @lines = map {
        my $bitmap = $_;
        join(' ', map { "$_=$bitmap->{$_}" } @keys)
    } @named;
    return [sort(@lines)];
}

sub essence_of_block ($reply) {
    return [map { essence_of_device($_) } @$reply];
}

sub essence_of_device ($entry) {
    my %device = map { $_ => $entry->{$_} } grep { exists($entry->{$_}) } qw(device qdev removable);
    my $node = $entry->{inserted} // return \%device;
    return { %device, drv => $node->{drv}, ro => $node->{ro}, bitmaps => bitmaps_of($node) };
}

sub essence_of_nodes ($reply) {
    my @nodes = map { { drv => $_->{drv}, bitmaps => bitmaps_of($_) } } @$reply;
    return [sort { $json->encode($a) cmp $json->encode($b) } @nodes];
}

my %essence = (
    'query-block' => \&essence_of_block,
    'query-named-block-nodes' => \&essence_of_nodes,
);

# Makes the permitted differences equal: replaces names in $expected by ours, and removes variable values from
# both.
sub normalise ($expected, $got, $names) {
    if (ref($expected) eq 'HASH' && ref($got) eq 'HASH') {
        my (%want, %have);
        for my $key (keys(%$expected)) {
            my $any = $any_value{$key};
            my ($w, $h) = @{ normalise($expected->{$key}, $got->{$key}, $names) };
            $want{$key} = $any ? 'any' : $w;
            $have{$key} = $any && defined($h) ? 'any' : $h if exists($got->{$key});
        }
        $have{$_} = $got->{$_} for grep { !exists($expected->{$_}) } keys(%$got);
        return [\%want, \%have];
    }
    if (ref($expected) eq 'ARRAY' && ref($got) eq 'ARRAY') {
        my (@want, @have);
        for my $i (0 .. $#$expected) {
            my ($w, $h) = @{ normalise($expected->[$i], $got->[$i], $names) };
            push(@want, $w);
            push(@have, $h) if $i < @$got;
        }
        return [\@want, [@have, @$got[@$expected .. $#$got]]];
    }
    if (!ref($expected) && defined($expected) && $expected =~ /\A#block\d+\z/) {
        $names->{$expected} //= $got;
        return [$names->{$expected}, $got];
    }
    return [$expected, $got];
}

sub compare ($command, $expected, $got, $names, $label) {
    return fail("$label: no reply") if !defined($got);
    return pass($label) if $expected eq 'left out' || $not_compared{$command};
    if (my $essence = $essence{$command}) {
        return is_deeply($essence->($got->{return}), $essence->($expected->{return}), $label);
    }
    my ($want, $have) = @{ normalise($expected, $got, $names) };
    return is_deeply($have, $want, $label) || diag($json->encode($got));
}

sub compare_events ($expected, $got, $label) {
    my ($want, $have) = map { event_names($_) } $expected, $got;
    is_deeply($have, $want, "$label: events") if @$want || @$have;
    return;
}

# Without the events of Proxmox' own backup job, because the front only pretends that it runs.
sub event_names ($events) {
    return [sort(map { event_name($_) } grep { !is_native_job($_) } @$events)];
}

sub event_name ($event) {
    return $event->{event} . ' ' . ($event->{data}{id} // $event->{data}{device} // '');
}

sub is_native_job ($event) {
    return event_name($event) =~ /\A(?:JOB_|BLOCK_JOB_)\w+ drive-/;
}

# ---- one recording ----

sub replay ($name, %option) {
    $option{shape} //= 'blockdev';
    my $dir = File::Temp->newdir('pba-recording-XXXXXXXX', TMPDIR => 1);
    make_files($dir, %option);
    my $pid = start_qemu($dir, %option);
    my $front = $option{native} ? undef : PBA::Test::Front->start(
        qemu_qmp => "$dir/qemu.qmp",
        listen => "$dir/front.qmp",
        pid => $pid,
    );
    my $client = connect_client($front ? $front->socket_path : "$dir/qemu.qmp");
    my $ok = eval {
        check_greeting($client);
        replay_exchanges($name, $client, "$dir", %option);
        check_fatal($front, $client, $pid, %option) if $front;
        1;
    };
    my $error = $@;
    close($client->{handle});
    undef $front;
    end_qemu($pid);
    die $error if !$ok;
    return;
}

sub check_greeting ($client) {
    my $greeting = receive($client)->{QMP};
    like($greeting->{version}{package}, qr/\Apve-qemu-kvm/, 'the greeting names Proxmox');
    is_deeply($greeting->{capabilities}, [], 'the greeting offers no capabilities');
    return;
}

sub replay_exchanges ($name, $client, $dir, %option) {
    my @exchanges = read_recording($name);
    my ($fatal) = grep { command($exchanges[$_]) eq ($option{fatal} // '') }
        reverse(0 .. $#exchanges);
    my $last = $fatal // $#exchanges;
    $last = $option{until} - 1 if defined($option{until}) && $option{major} < 8;
    my %names;
    for my $i (0 .. $last) {
        my $exchange = $exchanges[$i];
        my $label = sprintf('%d %s', $i + 1, command($exchange));
        my $got = request($client, adapt($exchange->{request}, $dir, \%names));
        if (defined($fatal) && $i == $fatal) {
            return is($got, undef, "$label: no reply any more");
        }
        compare(command($exchange), $exchange->{reply}, $got, \%names, $label)
            if defined($exchange->{reply});
        check_commands($exchange, $got) if command($exchange) =~ /query-(?:commands|qmp-schema)/;
        next if command($exchange) eq 'quit';
        my $events = [grep { !is_native_job($_) } @{ $exchange->{events} }];
        compare_events($events, [wait_for_events($client, scalar(@$events))], $label);
    }
    return;
}

sub command ($exchange) {
    return $exchange->{command} //= $json->decode($exchange->{request})->{execute};
}

# A fatal call must have ended QEMU and be recorded; any other call must not.
sub check_fatal ($front, $client, $pid, %option) {
    my $fatal = $front->fatal_call;
    if ($option{fatal}) {
        is(receive($client, 1), undef, 'the connection is closed');
        is($fatal->{execute}, $option{fatal}, 'the front has noted the fatal call');
        ok($fatal->{killed}, "why: $fatal->{why}");
        end_qemu($pid);
        is($? & 127, 9, 'the QEMU below was killed');
    }
    elsif ($option{damage}) {
        ok($fatal && !$fatal->{killed}, 'the front has noted the damage');
        note("why: $fatal->{why}");
    }
    else {
        is($fatal, undef, 'no call was fatal');
    }
    return;
}

# ---- commands and schema ----

sub check_commands ($exchange, $got) {
    my ($want, $have) = map { $_->{return} } $exchange->{reply}, $got;
    my %have = map { $_->{name} => $_ } @$have;
    is(scalar(keys(%have)), scalar(@$have), 'no name occurs twice');
    ok(exists($have{'blockdev-add'}), 'the commands of QEMU are listed');
    return check_names($want, \%have) if command($exchange) eq 'query-commands';
    my %want = map { $_->{name} => $_ } @$want;
    for my $command (grep { $_->{'meta-type'} eq 'command' } @$want) {
        my $name = $command->{name};
        my ($w, $h) = map { spelled_out($_, $name) } \%want, \%have;
        is_deeply($h, $w, "schema of $name");
    }
    return;
}

sub check_names ($want, $have) {
    ok(exists($have->{ $_->{name} }), "query-commands has $_->{name}") for @$want;
    return;
}

# The schema's entry with the types themselves in place of their names.
sub spelled_out ($by_name, $name) {
    my %entry = %{ $by_name->{$name} // return "no entry for $name" };
    return $name if $entry{'meta-type'} eq 'builtin';
    delete $entry{name} if $entry{'meta-type'} ne 'command';
    for my $key (qw(arg-type ret-type element-type)) {
        $entry{$key} = spelled_out($by_name, $entry{$key}) if exists($entry{$key});
    }
    return \%entry if $entry{'meta-type'} ne 'object';
    $entry{members} = [
        map {
            { %$_, type => spelled_out($by_name, $_->{type}) }
        } @{ $entry{members} },
    ];
    return \%entry;
}

# The properties of the QEMU: { native, major }.
sub probe_qemu () {
    my $dir = File::Temp->newdir('pba-recording-XXXXXXXX', TMPDIR => 1);
    my %option = (shape => 'drive', fleecing => 0);
    make_files($dir, %option);
    my $pid = start_qemu($dir, %option);
    my $client = connect_client("$dir/qemu.qmp");
    receive($client);
    request($client, '{"execute": "qmp_capabilities"}');
    my $commands = request($client, '{"execute": "query-commands"}')->{return};
    my $version = request($client, '{"execute": "query-version"}')->{return}{qemu};
    request($client, '{"execute": "quit"}');
    end_qemu($pid);
    my $native = grep { $_->{name} eq 'backup-access-setup' } @$commands;
    return (native => $native, major => $version->{major});
}

my %probed = probe_qemu();
note("QEMU $probed{major}, ", $probed{native} ? 'itself' : 'behind the front');
for my $recording (@recordings) {
    my ($name, %option) = @$recording;
    next if @ARGV && !grep { $name =~ /$_/ } @ARGV;

    # These end a real Proxmox QEMU, which says nothing about our code.
    next if $probed{native} && $option{fatal};
    subtest($name => sub { replay($name, %option, %probed) });
}

done_testing;
