# pve-backup-access with a real QEMU, on both backends: backups, restores and what looks after archives,
# through pipes and on a terminal.
#
# One QEMU is enough: the command has all it knows of QEMU from the module.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use JSON::PP ();
use POSIX ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command start_command start_on_terminal);
use PVE::BackupAccess::CLI;
use PVE::BackupAccess::CLI::Backup;

my $mib = 1024 * 1024;
my $json = JSON::PP->new->utf8;
my @devices = qw(drive-efidisk0 drive-scsi0);
my %disk = ('drive-scsi0' => 'scsi0', 'drive-efidisk0' => 'efidisk0');

umask(022);
my $archive_name = qr!vm/100/[0-9]{8}T[0-9]{6}Z!;

my @disks = (
    { id => 'scsi0', size => 32 * $mib, bus => 'scsi', shape => 'drive' },
    { id => 'efidisk0', size => 528 * 1024, bus => 'scsi', shape => 'drive' },
);

sub start ($name, @disks) {
    my $backend = PBA::Test::Backend->start(name => $name, guest => 0, disks => \@disks);

    # As on Proxmox VE, the socket's name tells the number of the guest. That of the directory, where
    # all else is, means something to Perl, to JSON and to URIs.
    my $dir = $backend->vm->dir . "/Gr\xc3\xb6\xc3\x9fe%26&#+";
    mkdir($dir) or die "$dir: $!\n";
    symlink($backend->qmp_path, "$dir/100.qmp") or die "symlink: $!\n";
    my $test = { backend => $backend, vm => $backend->vm, dir => $dir, store => "$dir/store" };
    mkdir($_) or die "$_: $!\n" for $test->{store}, "$dir/out", "$dir/tmp";
    $test->{guest} = ['--qmp', "$dir/100.qmp", '--run-dir', $backend->work_dir('run')];
    push($test->{guest}->@*, '--fleecing-dir', $backend->work_dir('fleecing'))
        if $name eq 'upstream';
    $test->{outside} = $backend->outside;
    return $test;
}

# What holds whenever no command runs.
sub check_outside ($test, $name) {
    is_deeply($test->{backend}->outside, $test->{outside}, "$name: nothing is left in QEMU");
    my $all = $test->{vm}->bitmaps;
    my @bitmaps = map { values $all->{$_}->%* } keys $all->%*;
    is(scalar(grep { !$_->{recording} } @bitmaps), 0, "$name: every bitmap records");
    cmp_ok(scalar(@bitmaps), '<=', 2, "$name: none but the targets'");
}

sub succeeds ($name, @arguments) {
    my $run = run_command(@arguments);
    is($run->{status}, 0, "$name: exit status") or diag($run->{err});
    return $run;
}

sub fails ($name, $pattern, @arguments) {
    my $run = run_command(@arguments);
    is($run->{status}, 1, "$name: exit status 1");
    like($run->{err}, qr/^pve-backup-access $arguments[0]: .*$pattern/m, "$name: says why");
    is($run->{out}, '', "$name: no result");
    return $run;
}

sub backup ($test, @more) { return ('backup', $test->{store}, $test->{guest}->@*, @more) }

sub same_disks ($test, $dir, $name) {
    for my $device (@devices) {
        my $disk = $test->{vm}->raw_image($disk{$device});
        is(system('cmp', '-s', $disk, "$dir/$device.raw"), 0, "$name: $device equals the disk");
    }
}

# A disk is nobody else's business, whatever the umask.
sub is_private ($dir, $name) {
    my @public = grep { ((stat)[2] & 0777) != 0600 } glob("$dir/*");
    is_deeply(\@public, [], "$name: only the owner can read it");
}

sub restore_and_compare ($test, $archive, $name) {
    my $dir = "$test->{dir}/out/" . ++$test->{restores};
    mkdir($dir) or die "$dir: $!\n";
    my $run = succeeds("$name: restore", 'restore', $archive, $dir);
    is($run->{out}, join('', map { "$dir/$_.raw\n" } @devices), "$name: prints the files");
    same_disks($test, $dir, $name);
    is_private($dir, $name);
    return $dir;
}

# ---- parts ----

sub check_pipes ($test) {
    my $vm = $test->{vm};
    $vm->qemu_io('scsi0', 'write -P 0x11 0 8M');
    $vm->qemu_io('efidisk0', 'write -P 0x12 0 528k');
    open(my $config, '>', "$test->{dir}/guest.conf") or die "guest.conf: $!\n";
    print {$config} "name: tested\n";
    close($config);

    my $full = succeeds('full', backup($test, '--guest-config', "$test->{dir}/guest.conf"));
    like($full->{out}, qr!\A\Q$test->{store}\E/$archive_name\n\z!, 'full: prints the path only');
    like($full->{err}, qr/^drive-scsi0: storing, full$/m, 'full: the log');
    unlike($full->{err}, qr/[^\n\x20-\x7e]/, 'full: plain lines');
    check_outside($test, 'full');

    $vm->qemu_io('scsi0', 'write -P 0x21 16M 64k');
    my $run = succeeds('incremental', backup($test, '--json'));
    my $result = $json->decode($run->{out});
    my $scsi = $result->{devices}{'drive-scsi0'};
    is($scsi->{'bitmap-mode'}, 'reuse', 'incremental: the bitmap is used');
    cmp_ok($scsi->{dirty}, '<=', 4 * $mib, 'incremental: what changed is read');
    is($result->{devices}{'drive-efidisk0'}{dirty}, 0, 'incremental: and nothing else');
    chomp(my $archive = $full->{out});
    utf8::encode($result->{archive});    # names of files are bytes here
    cmp_ok($result->{archive}, 'gt', $archive, 'incremental: a later archive');
    my $dir = restore_and_compare($test, $result->{archive}, 'incremental');
    is(-s "$dir/guest.conf", undef, 'incremental: no configuration was given');

    symlink("$test->{dir}/elsewhere", "$test->{dir}/one.raw.part") or die "symlink: $!\n";
    my $again = succeeds('one device', 'restore', $archive, "$test->{dir}/one.raw", '--device',
        'drive-efidisk0', '--json');
    utf8::decode(my $file = "$test->{dir}/one.raw");
    is_deeply(
        $json->decode($again->{out}),
        { devices => { 'drive-efidisk0' => $file }, 'guest-config' => undef },
        'one device: JSON'
    );
    is(-s "$test->{dir}/one.raw", 528 * 1024, 'one device: its size');
    ok(!-e "$test->{dir}/elsewhere", 'one device: nobody is followed elsewhere');
    mkdir("$test->{dir}/out/full");
    succeeds('full: restore', 'restore', $archive, "$test->{dir}/out/full/");
    is(-s "$test->{dir}/out/full/guest.conf", 13, 'full: the configuration is restored');
    is_private("$test->{dir}/out/full", 'full');
    return ($archive, $result->{archive});
}

sub check_refusals ($test, $archive) {
    fails('restore over files', 'exists already', 'restore', $archive, "$test->{dir}/out/full");
    fails('restore of two to a file', 'several devices', 'restore', $archive, "$test->{dir}/new");
    fails('restore to no directory', 'not a directory', 'restore', $archive, "$test->{dir}/new/");
    fails('restore of no device',
        'no device', 'restore', $archive, "$test->{dir}/new", '--device', 'nosuch');
    fails(
        'restore of no archive', 'no archive',
        'restore', "$test->{store}/vm/100/20200101T000000Z",
        "$test->{dir}/out"
    );
    fails(
        'restore of something',
        'is not an archive',
        'restore', $test->{store}, "$test->{dir}/out"
    );
    fails('backup of no device', 'no such', backup($test, '--device', 'nosuch'));
    fails('no QEMU', 'cannot connect', 'backup', $test->{store}, '--qmp', "$test->{dir}/1234.qmp");
    fails('no directory', 'not a directory', 'backup', "$test->{dir}/new", $test->{guest}->@*);
    is(scalar($json->decode(run_command('list', $test->{store}, '--json')->{out})->@*),
        2, 'no archive was added');

    for my $case (
        ['list', $test->{store}, '--vmid', '1.5'],
        ['prune', $test->{store}, '--keep', '0'],
        [backup($test, '--bandwidth-limit', 'fast')],
        ['backup', $test->{store}, '--qmp', "$test->{dir}/qmp"],
        )
    {
        my $run = run_command($case->@*);
        is($run->{status}, 2, "'$case->@*': bad usage");
        like($run->{err}, qr/\A[^\n]+\nTry '[^\n]+\n\z/, "'$case->@*': two lines");
    }
    check_outside($test, 'refusals');
}

sub check_archives ($test, @archives) {
    my $list = succeeds('list', 'list', "$test->{store}/");
    my @shown = $list->{out} =~ m!^(\S+/$archive_name)  !mg;
    is_deeply(\@shown, \@archives, 'list: the archives');
    like($list->{out}, qr/^    drive-scsi0 +full +[0-9.]+ MiB of 32\.0 MiB$/m, 'list: a full one');
    like($list->{out}, qr/^    drive-scsi0 +incremental +[0-9.]+ KiB of/m, 'list: an increment');
    is(succeeds('list of a guest', 'list', $test->{store}, '--vmid', 7)->{out},
        '', 'no other guest');

    my $verify = succeeds('verify', 'verify', "$test->{store}/");
    is($verify->{out}, join('', map { "$_: ok\n" } @archives), 'verify: all are whole');

    succeeds('prune', 'prune', $test->{store}, '--keep', 1);
    is($json->decode(run_command('prune', $test->{store}, qw(--keep 1 --json))->{out})->@*,
        0, 'prune: nothing more');
    restore_and_compare($test, $archives[1], 'after prune');

    open(my $image, '+<', "$archives[1]/drive-scsi0.qcow2") or die "$archives[1]: $!\n";
    seek($image, -70000, 2);
    print {$image} 'damage';
    close($image);
    my $damaged = run_command('verify', $archives[1]);
    is($damaged->{status}, 1, 'verify: exit status with damage');
    like($damaged->{out}, qr/\A\Q$archives[1]\E: DAMAGED\n  .*SHA-256/, 'verify: says what');
    my $problems = $json->decode(run_command('verify', $test->{store}, '--json')->{out});
    utf8::decode(my $damaged_path = $archives[1]);
    is($problems->[0]{archive}, $damaged_path, 'verify: JSON');
    is(scalar($problems->[0]{problems}->@*), 1, 'verify: a problem in it');
}

sub status ($test) {
    return $json->decode(succeeds('status', 'status', $test->{guest}->@*, '--json')->{out});
}

# Before there was a backup: nothing to see, and nothing is made by looking.
sub check_without_bitmaps ($test) {
    my $status = succeeds('status', 'status', $test->{guest}->@*);
    like(
        $status->{out},
        qr/\Abackend: $test->{backend}{name}\nno backup is going on\nno bitmaps/,
        'status: nothing yet'
    );
    fails('map without a bitmap', 'has no bitmap yet', 'map', 'drive-scsi0', $test->{guest}->@*);
    is_deeply($test->{vm}->bitmaps, {}, 'map without a bitmap: none is made');
    check_outside($test, 'map without a bitmap');
}

# The regions that writes make dirty: [offset, length], with a bitmap's granularity.
sub regions_of ($granularity, $size, @writes) {
    my %dirty;
    for my $write (@writes) {
        my ($offset, $length) = $write->@*;
        $dirty{$_} = 1
            for int($offset / $granularity) .. int(($offset + $length - 1) / $granularity);
    }
    my @regions;
    for my $index (sort { $a <=> $b } keys %dirty) {
        my $end = ($index + 1) * $granularity;
        my $length = ($end < $size ? $end : $size) - $index * $granularity;
        if (@regions && $regions[-1][0] + $regions[-1][1] == $index * $granularity) {
            $regions[-1][1] += $length;
        }
        else {
            push(@regions, [$index * $granularity, $length]);
        }
    }
    return \@regions;
}

sub check_map ($test) {
    my @writes = ([0, 64 * 1024], [9 * $mib + 512, 512], [24 * $mib, 8 * $mib]);
    $test->{vm}->qemu_io('scsi0', "write -P 0x51 $_->[0] $_->[1]") for @writes;
    my ($bitmap) = grep { $_->{device} eq 'drive-scsi0' } status($test)->{bitmaps}->@*;
    my $regions = regions_of($bitmap->{granularity}, 32 * $mib, @writes);
    my $bitmaps = $test->{vm}->bitmaps;
    my @map = ('map', 'drive-scsi0', $test->{guest}->@*);

    my $map = $json->decode(succeeds('map', @map, '--json')->{out});
    is_deeply([map { [$_->@{qw(offset length)}] } $map->{regions}->@*], $regions, 'map: regions');
    is($map->{dirty}, $bitmap->{'dirty-bytes'}, 'map: sum');
    is($map->{'target-id'}, $bitmap->{'target-id'}, 'map: the only target is found');
    my $clean
        = $json->decode(run_command('map', 'drive-efidisk0', $test->{guest}->@*, '--json')->{out});
    is_deeply($clean->{regions}, [], 'map: of a clean disk');

    local $ENV{LC_ALL} = 'C.UTF-8';
    my $shown = start_on_terminal(60, @map)->finish->{out};
    utf8::decode($shown);
    my ($totals, $strip) = split(m/\r\n/, $shown);
    like(
        $totals,
        qr/\Adrive-scsi0, target .*: [0-9.]+ MiB of 32\.0 MiB dirty \([0-9.]+ %\), 3 reg/,
        'map: totals on a terminal'
    );
    like($strip, qr/\A0 \x{2595}[\x{2581}-\x{2588}]/, 'map: a strip of blocks');
    like($strip, qr/ \x{2588}+\x{258f} 32\.0 MiB\z/, 'map: full at the end');
    cmp_ok(length($strip), '<=', 60, 'map: fits the terminal');
    $ENV{LC_ALL} = 'C';
    like(run_command(@map)->{out}, qr/\n0 \|[ .:=+*#@-]+\@\| 32\.0 MiB\n\z/, 'map: plain letters');

    succeeds('map: picture', @map, '--svg', "$test->{dir}/map.svg");
    open(my $svg, '<', "$test->{dir}/map.svg") or die "map.svg: $!\n";
    my $picture = join('', <$svg>);
    like($picture, qr!\A<svg .*</svg>\n\z!s, 'map: a picture');
    my $cells = 0;
    $cells += $_->[1] / 65536 for $regions->@*;
    is(scalar(() = $picture =~ m/<title>64\.0 KiB dirty of 64\.0 KiB/g), $cells,
        'map: dirty cells');

    is_deeply($test->{vm}->bitmaps, $bitmaps, 'map: every bitmap is as before');
    check_outside($test, 'map');
    is(run_command(@map, '--json', '--svg', 'x')->{status}, 2, 'map: one form at a time');
    fails('map: no such target', q(of target 'nosuch'), @map, '--target-id', 'nosuch');
}

# Whoever names a bitmap has no say in what a terminal does.
sub check_hostile_name ($test) {
    my ($node) = sort keys $test->{vm}->bitmaps->%*;
    my $target = "\e]0;owned\a\e[2Jevil\r\n\x{9b}31m";
    my $name = ($test->{backend}->name eq 'upstream' ? 'pba:' : '') . $target;
    my %bitmap = (node => $node, name => $name);
    $test->{vm}->qmp('block-dirty-bitmap-add', %bitmap);
    my $run = succeeds('a hostile name', 'status', $test->{guest}->@*);
    utf8::decode($run->{out});
    unlike($run->{out} =~ s/\n//gr, qr/[[:cntrl:]]/, 'a hostile name: no control characters');
    like($run->{out}, qr/^ \]0;owned  \[2Jevil   31m  +\S+ +0 B/m, 'a hostile name: its line');
    my ($found) = grep { $_->{'target-id'} eq $target } status($test)->{bitmaps}->@*;
    ok($found, 'a hostile name: as it is in JSON');
    my $map = run_command('map', $found->{device}, $test->{guest}->@*);
    utf8::decode($map->{err});
    like($map->{err}, qr/--target-id: .*evil.*\n\z/, 'a hostile name: in an error of one line');
    unlike($map->{err} =~ s/\n\z//r, qr/[[:cntrl:]]/, 'a hostile name: no control characters');
    $test->{vm}->qmp('block-dirty-bitmap-remove', %bitmap);
}

# A process that was killed: what it left can be seen, and undone.
sub check_recover ($test) {
    my $command = start_command(backup($test, '--bandwidth-limit', '1M'));
    $command->wait_for(err => qr/^drive-scsi0: storing, incremental/m);
    my $access = status($test)->{access};
    is($access->{alive}, 1, 'status: of a backup that runs');
    my $busy = run_command('status', $test->{guest}->@*)->{out};
    like($busy, qr/^backup access: target store\@\w+, process $access->{pid}\n/m, 'in words');
    like($busy, qr/^store\@\w+ +drive-scsi0 .* frozen$/m, 'with its bitmaps');
    fails('map meanwhile', 'not finished', 'map', 'drive-scsi0', $test->{guest}->@*);
    $command->kill('KILL');
    $command->finish;

    my $left = run_command('status', $test->{guest}->@*)->{out};
    like($left, qr/process $access->{pid}, which is dead/, 'status: of one that was killed');
    like($left, qr/^left over of a process that is gone/m, 'and what it left');
    my @recover = ('recover', $test->{guest}->@*, '--target-id', $access->{'target-id'});
    like(succeeds('recover', @recover)->{out}, qr/\w/, 'recover: says what it undoes');
    is_deeply($json->decode(succeeds('recover', @recover, '--json')->{out}), [], 'once');
    check_outside($test, 'recover');
}

# The image above is damaged, so this backup is a full one again, and says so.
sub check_terminal ($test) {
    my $backup = start_on_terminal(100, backup($test, '--bandwidth-limit', '24M'));
    $backup->wait_for(out => qr/drive-scsi0 +[0-9.]+ [KM]iB\/s: +[0-9]+% \[=* *\]\S+ Left/);
    my $run = $backup->finish;
    is($run->{status}, 0, 'terminal: exit status');
    like(
        $run->{out},
        qr/^warn: drive-scsi0: full backup - .*SHA-256 differs\r$/m,
        'terminal: the log'
    );
    my ($last) = $run->{out} =~ m/([^\n]*)\r\n\z/;
    like($last, qr!\A\Q$test->{store}\E/$archive_name\z!, 'terminal: the path is the last line');
    unlike($run->{out} =~ s/\e\[K//gr, qr/\e/, 'terminal: no other escape sequences');
    check_outside($test, 'terminal');
    chomp(my $archive = $last);
    restore_and_compare($test, $archive, 'terminal');
    check_same_on_terminal($test, $archive);
}

# Where nothing takes long, a terminal shows what a pipe gets.
sub check_same_on_terminal ($test, $archive) {
    my $dir = "$test->{dir}/out/terminal";
    mkdir($dir) or die "$dir: $!\n";
    my $restored = start_on_terminal(80, 'restore', $archive, $dir)->finish;
    is($restored->{status}, 0, 'terminal: restore: exit status');
    like($restored->{out}, qr!^\Q$dir/drive-scsi0.raw\E\r$!m, 'terminal: restore: a file');
    same_disks($test, $dir, 'terminal: restore');

    for my $arguments (
        ['list', $test->{store}],
        ['verify', $archive],
        ['status', $test->{guest}->@*],
        ['prune', $test->{store}, '--keep', 99],
        ['recover', $test->{guest}->@*, '--target-id', 'nobody'],
        )
    {
        my ($name) = $arguments->@*;
        my $piped = run_command($arguments->@*);
        my $shown = start_on_terminal(200, $arguments->@*)->finish;
        is($shown->{status}, $piped->{status}, "terminal: $name: exit status");
        is($shown->{out} =~ s/\r//gr, $piped->{err} . $piped->{out}, "terminal: $name: the same");
    }
}

# By a signal, by the terminal's interrupt key, by a closed pipe: a failed backup, all undone.
sub check_interruption ($test) {
    my $vm = $test->{vm};
    $vm->qemu_io('scsi0', 'write -P 0x31 0 16M');
    my %ways = (
        SIGTERM => [15, sub ($command) { $command->kill('TERM') }],
        'a closed pipe' => [13, sub ($command) { $command->close_output('err') }],
        'the interrupt key' => [2, sub ($command) { $command->type("\x03") }],
    );
    for my $way (sort keys %ways) {
        my ($signal, $interrupt) = $ways{$way}->@*;
        my $on_terminal = $way =~ m/key/;

        # A closed pipe shows at the next line, when the copy is done.
        my @slow = backup($test, '--bandwidth-limit', $way =~ m/pipe/ ? '16M' : '1M');
        my $command = $on_terminal ? start_on_terminal(80, @slow) : start_command(@slow);
        $command->wait_for($on_terminal ? 'out' : 'err', qr/^drive-scsi0: storing, incremental/m);
        $interrupt->($command);
        my $run = $command->finish;
        is($run->{signal}, $signal, "$way: ends the command");
        like($on_terminal ? $run->{out} : $run->{err}, qr/interrupted by SIG/, "$way: says so")
            if $way !~ m/pipe/;
        check_outside($test, $way);
    }
    my $run = succeeds('after them', backup($test));
    like($run->{err}, qr/^drive-scsi0: dirty-bitmap status: OK \(2[48]\.0 MiB/m, 'no bit was lost');
    chomp(my $archive = $run->{out});
    restore_and_compare($test, $archive, 'after them');
    is(scalar(grep { !m!/$archive_name\z! } glob("$test->{store}/vm/100/*Z")), 0, 'no remains');
}

# Wherever QEMU is to make something: the socket, the fleecing image. Both go with the backup.
sub check_odd_paths ($test) {
    my %at = map { ("--$_" => "$test->{dir}/$_") } qw(run-dir fleecing-dir);
    mkdir($_, 0700) or die "$_: $!\n" for values %at;
    my %guest = $test->{guest}->@*;
    delete($at{'--fleecing-dir'}) if !$guest{'--fleecing-dir'};
    my $run = succeeds('odd paths', 'backup', $test->{store}, %guest, %at);
    chomp(my $archive = $run->{out});
    restore_and_compare($test, $archive, 'odd paths');
    is_deeply([map { glob("$_/*") } values %at], [], 'odd paths: nothing is left');
}

# Two media that take turns in the same place, and a directory beside them, all with one name for the
# target: none of them may take the bitmap of another for its own.
sub check_directories ($test) {
    my %at = map { $_ => "$test->{dir}/$_" } qw(first second beside);
    mkdir($_) or die "$_: $!\n" for values %at;
    my $place = "$test->{dir}/place";
    my $offset = 0;
    for my $medium (qw(first second beside first second first beside)) {
        my $directory = $medium eq 'beside' ? $at{beside} : $place;
        rename($at{$medium}, $directory) or die "rename: $!\n" if $directory eq $place;
        $offset += 128 * 1024;
        $test->{vm}->qemu_io('scsi0', "write -P 0x61 $offset 64k");
        my $run = succeeds(
            "medium $medium",
            'backup', $directory, $test->{guest}->@*,
            '--target-id', 'rotated'
        );
        chomp(my $archive = $run->{out});
        restore_and_compare($test, $archive, "medium $medium");
        rename($directory, $at{$medium}) or die "rename: $!\n" if $directory eq $place;
    }
}

# First backups of several guests that begin at once: one directory has one identity.
sub check_identity () {
    my @others;
    for my $round (1 .. 50) {
        my $directory = File::Temp->newdir('pba-store-XXXXXXXX', TMPDIR => 1);
        pipe(my $start, my $starter) or die "pipe: $!\n";
        my @readers = map {
            my $pid = open(my $reader, '-|') // die "fork: $!\n";
            if (!$pid) {
                close($starter);
                sysread($start, my $go, 1);
                syswrite(STDOUT, PVE::BackupAccess::CLI::Backup::identity_of("$directory"));
                POSIX::_exit(0);
            }
            $reader;
        } 1 .. 3;
        close($starter);
        my @identities = map { scalar(<$_>) // '' } @readers;
        push(@others, $round) if grep { $_ ne $identities[0] || !length } @identities;
    }
    is("@others", '', 'all of them see the same');
}

sub check_agent ($test) {
    my $run = succeeds('no agent', backup($test, '--guest-agent', "$test->{dir}/nobody"));
    like($run->{err}, qr/^warn: could not freeze the guest/m, 'no agent: the log says so');
}

sub check_output_errors ($test) {
    my $command = start_command('list', $test->{store});
    $command->close_output('out');
    is($command->finish->{signal}, 13, 'a reader that goes away: SIGPIPE, and silence');
    my $full = system('/bin/sh', '-c', 'exec >/dev/full 2>/dev/null; exec "$@"',
        'sh', PBA::Test::Command::command('list', $test->{store})) >> 8;
    is($full, 1, 'no space for the output is an error');
}

subtest 'first backups at once' => sub { check_identity() };
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $test = start($name, @disks);
        local $ENV{TMPDIR} = "$test->{dir}/tmp";    # where one that is killed leaves something
        check_without_bitmaps($test);
        my @archives = check_pipes($test);
        check_refusals($test, $archives[0]);
        check_archives($test, @archives);
        check_terminal($test);
        check_map($test);
        check_hostile_name($test);
        check_recover($test);
        check_interruption($test);
        check_output_errors($test);
        check_agent($test);
        check_odd_paths($test);
        check_directories($test);
        $test->{backend}->check_manners;
    };
}

# As Proxmox VE 9 has disks: a throttle filter that is called like the drive of old.
sub check_blockdev ($test) {
    my $device = 'drive-scsi0';
    succeeds('blockdev', backup($test));
    $test->{vm}->qemu_io($device, 'write -P 0x71 0 64k');
    my $status = status($test);
    is_deeply([map { $_->{device} } $status->{bitmaps}->@*], [$device], 'blockdev: its bitmap');
    my $map = succeeds('blockdev: map', 'map', $device, $test->{guest}->@*, '--json');
    is_deeply($json->decode($map->{out})->{regions}[0]{offset}, 0, 'blockdev: what is dirty');
    check_outside($test, 'blockdev');

    # While the access of a killed process is up, another node is on top of the disk's.
    $test->{vm}->qemu_io($device, 'write -P 0x72 0 8M');
    my $command = start_command(backup($test, '--bandwidth-limit', '1M'));
    $command->wait_for(err => qr/^\Q$device\E: storing, incremental/m);
    $command->kill('KILL');
    $command->finish;
    my $run = succeeds('blockdev: after a kill', backup($test));
    like($run->{err}, qr/^\Q$device\E: storing, incremental/m, 'blockdev: the same disk');
    check_outside($test, 'blockdev: after a kill');
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name, blockdev" => sub {
        my %disk = (id => 'drive-scsi0', size => 32 * $mib, bus => 'scsi', throttle => 1);
        my $test = start($name, \%disk);
        check_blockdev($test);
        $test->{backend}->check_manners;
    };
}

done_testing;
