# pve-backup-access with a real QEMU, on both backends: backups, restores and the management of archives,
# through pipes and on a terminal. t/cli-guest.t tests what shows the guest, and interruptions.
#
# One QEMU is enough: the command knows QEMU only through the module.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use POSIX ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command start_command start_on_terminal);
use PBA::Test::CommandGuest;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::CLI;
use PVE::BackupAccess::CLI::Backup;

my $damaged
    = qr/.*65536 bytes differ from what was read from the guest: 65536 at offset 16777216.*/;

sub check_pipes ($test) {
    my $vm = $test->{vm};
    $vm->qemu_io('scsi0', 'write -P 0x11 0 8M');
    $vm->qemu_io('efidisk0', 'write -P 0x12 0 528k');
    open(my $config, '>', "$test->{dir}/guest.conf") or die "guest.conf: $!\n";
    print {$config} "name: tested\n";
    close($config);

    my $full = succeeds('full', backup($test, '--guest-config', "$test->{dir}/guest.conf"));
    like($full->{out}, qr!\A\Q$test->{store}\E/$archive_name\n\z!, 'full: prints the path only');
    like($full->{err}, qr/^drive-scsi0: storing a full image$/m, 'full: the log');
    unlike($full->{err}, qr/[^\n\x20-\x7e]/, 'full: plain lines');
    my $alarm = qr/warn|error|wrong|lost|lose|fail|damage|unusable|corrupt|abort|cannot|crash/i;
    unlike($full->{err}, $alarm, 'full: no alarming line');
    check_outside($test, 'full');

    $vm->qemu_io('scsi0', 'write -P 0x21 16M 64k');
    my $run = succeeds('incremental', backup($test, '--json'));
    my $result = $json->decode($run->{out});
    my $scsi = $result->{devices}{'drive-scsi0'};
    is($scsi->{'bitmap-mode'}, 'reuse', 'incremental: the bitmap is used');
    cmp_ok($scsi->{dirty}, '<=', 4 * $mib, 'incremental: the changed part is read');
    is($result->{devices}{'drive-efidisk0'}{dirty}, 0, 'incremental: no unchanged disk is read');
    chomp(my $archive = $full->{out});
    utf8::encode($result->{archive});    # file names are bytes here
    cmp_ok($result->{archive}, 'gt', $archive, 'incremental: a later archive');
    my $dir = restore_and_compare($test, $result->{archive}, 'incremental');
    is(-s "$dir/guest.conf", undef, 'incremental: the archive has no configuration');
    check_one_device($test, $archive);
    return ($archive, $result->{archive});
}

sub check_one_device ($test, $archive) {
    symlink("$test->{dir}/elsewhere", "$test->{dir}/one.raw.part") or die "symlink: $!\n";
    my $again = succeeds('one device', 'restore', $archive, "$test->{dir}/one.raw", '--device',
        'drive-efidisk0', '--json');
    utf8::decode(my $file = "$test->{dir}/one.raw");
    is_deeply(
        $json->decode($again->{out}),
        { devices => { 'drive-efidisk0' => $file }, 'guest-config' => undef, damaged => {} },
        'one device: JSON'
    );
    is(-s "$test->{dir}/one.raw", 528 * 1024, 'one device: the size of the image');
    ok(!-e "$test->{dir}/elsewhere", 'one device: a symbolic link is not followed');
    mkdir("$test->{dir}/out/full");
    succeeds('full: restore', 'restore', $archive, "$test->{dir}/out/full/");
    is(-s "$test->{dir}/out/full/guest.conf", 13, 'full: the configuration is restored');
    is_private("$test->{dir}/out/full", 'full');
}

sub check_refusals ($test, $archive) {
    fails('restore over files', 'already exists', 'restore', $archive, "$test->{dir}/out/full");
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

# The bitmaps continue the newest archive.
sub check_ids ($test, $list) {
    my @ids = $list =~ m!^    backup ID ([0-9a-f]{32})$!mg;
    is(scalar(@ids), 2, 'list: the IDs');
    my $status = succeeds('status', 'status', $test->{guest}->@*);
    is(scalar(() = $status->{out} =~ m!  \Q$ids[1]\E$!mg), 2,
        'status: the same ID for each bitmap');
    return;
}

sub check_archives ($test, @archives) {
    my $list = succeeds('list', 'list', "$test->{store}/");
    my @shown = $list->{out} =~ m!^(\S+/$archive_name)  !mg;
    is_deeply(\@shown, \@archives, 'list: the archives');
    like(
        $list->{out},
        qr/^    drive-scsi0 +full +[0-9.]+ MiB of 32\.0 MiB$/m,
        'list: a full backup'
    );
    like($list->{out}, qr/^    drive-scsi0 +incremental +[0-9.]+ KiB of/m, 'list: an increment');
    check_ids($test, $list->{out});
    is(succeeds('list of a guest', 'list', $test->{store}, '--vmid', 7)->{out},
        '', 'list of another guest is empty');

    my $verify = succeeds('verify', 'verify', "$test->{store}/");
    is($verify->{out}, join('', map { "$_: ok\n" } @archives), 'verify: all archives are intact');

    succeeds('prune', 'prune', $test->{store}, '--keep', 1);
    is($json->decode(run_command('prune', $test->{store}, qw(--keep 1 --json))->{out})->@*,
        0, 'prune: nothing more');
    restore_and_compare($test, $archives[1], 'after prune');

    my $image_file = "$archives[1]/drive-scsi0.qcow2";
    my $map = $json->decode(PBA::Test::QemuNbd::output_of('map', '--output=json', $image_file));
    my ($place) = grep { $_->{data} && $_->{start} >= 16 * $mib } $map->@*;
    open(my $image, '+<', $image_file) or die "$image_file: $!\n";
    seek($image, $place->{offset} + 70, 0);
    print {$image} 'damage';
    close($image);
    my $run = run_command('verify', $archives[1]);
    is($run->{status}, 1, 'verify: exit status with damage');
    like($run->{out}, qr/\A\Q$archives[1]\E: DAMAGED\n  $damaged /, 'verify: says what');
    my $problems = $json->decode(run_command('verify', $test->{store}, '--json')->{out});
    utf8::decode(my $damaged_path = $archives[1]);
    is($problems->[0]{archive}, $damaged_path, 'verify: JSON');
    is(scalar($problems->[0]{problems}->@*), 1, 'verify: a problem in it');
    check_damaged_restore($test, $archives[1]);
}

# Everything that is not damaged is restored, and the damage is reported.
sub check_damaged_restore ($test, $archive) {
    my $dir = "$test->{dir}/out/damaged";
    mkdir($dir) or die "$dir: $!\n";
    my $run = run_command('restore', $archive, $dir, '--json');
    is($run->{status}, 1, 'restore of what is damaged: exit status');
    like($run->{err}, qr/$damaged; the rest is restored/, 'restore of what is damaged: says what');
    my $result = $json->decode($run->{out});
    is_deeply($result->{damaged}, { 'drive-scsi0' => [[16 * $mib, 65536]] }, 'JSON');
    is(scalar(keys $result->{devices}->%*), 2, 'all devices are restored');
    is(-s "$dir/drive-scsi0.raw", 32 * $mib, 'the image has its full size');
    succeeds(
        'without verification',
        'restore', $archive, "$test->{dir}/out/unverified.raw",
        '--device', 'drive-scsi0', '--no-verify'
    );
    my $nothing = run_command('verify', $test->{dir});
    is($nothing->{status}, 1, 'verify of nothing: exit status');
    like($nothing->{err}, qr/there are no archives in .*mounted/, 'verify of nothing: the error');
}

# The image of the previous archive is damaged, so this backup is a full one, and says so.
sub check_terminal ($test) {
    my $backup = start_on_terminal(100, backup($test, '--bandwidth-limit', '8M'));
    $backup->wait_for(out => qr/2 disks +[0-9.]+ [KM]iB\/s: +[0-9]+% \[=* *\]\S+ Left/);
    my $run = $backup->finish;
    is($run->{status}, 0, 'terminal: exit status');
    like($run->{out}, qr/^warn: drive-scsi0: full backup - $damaged\r$/m, 'terminal: the log');
    my ($last) = $run->{out} =~ m/([^\n]*)\r\n\z/;
    like($last, qr!\A\Q$test->{store}\E/$archive_name\z!, 'terminal: the path is the last line');
    unlike($run->{out} =~ s/\e\[K//gr, qr/\e/, 'terminal: no other escape sequences');
    check_outside($test, 'terminal');
    chomp(my $archive = $last);
    restore_and_compare($test, $archive, 'terminal');
    check_same_on_terminal($test, $archive);
}

# If the commands are fast, a terminal shows the same as a pipe.
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

# Unusual paths for what QEMU creates or opens: the socket and the fleecing image. Both are removed after the
# backup.
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

# Two media that take turns at the same place, and another directory, all with the same target name: none of
# them may use a bitmap of another one.
sub check_directories ($test) {
    my %at = map { $_ => "$test->{dir}/$_" } qw(first second beside);
    mkdir($_) or die "$_: $!\n" for values %at;
    my $place = "$test->{dir}/place";
    my $offset = 0;
    for my $medium (qw(first beside second first beside)) {
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

# [kind of each disk's image] in the newest archive of a guest.
sub kinds ($test, @guest) {
    my $list = $json->decode(run_command('list', $test->{store}, @guest, '--json')->{out});
    my $devices = $list->[-1]{devices};
    return [
        map { defined($devices->{$_}{parent}) ? 'incremental' : 'full' }
        sort keys $devices->%*
    ];
}

sub check_full_and_named ($test) {
    my $full = succeeds('full', backup($test, '--full', '--quiet'));
    is($full->{out} . $full->{err}, '', '--quiet: silence');
    is_deeply(kinds($test, '--vmid', 100), [qw(full full)], '--full');
    succeeds('a backup after --full', backup($test));
    is_deeply(
        kinds($test, '--vmid', 100),
        [qw(incremental incremental)],
        'the next backup is incremental'
    );
    for my $kind (qw(full incremental)) {
        my $named = succeeds("--guest, $kind", backup($test, '--guest', 'web1'));
        like($named->{out}, qr!\A\Q$test->{store}\E/vm/1/!, '--guest: a number of its own');
        my @undo = $named->{err}
            =~ m!^warn: new guest 'web1' \(vm/1\) - if this is a mistake, remove .*? (/.*?/vm/1), .* (--target-id) '(.*?)'!mg;
        is(scalar(@undo), $kind eq 'full' ? 3 : 0, '--guest: a new one is said, once');
        is($undo[0], "$test->{store}/vm/1", '--guest: where its archives are') if @undo;
        like(
            run_command('status', $test->{guest}->@*)->{out},
            qr/^\Q$undo[2]\E  /m,
            '--guest: the target of its bitmaps'
        ) if @undo;
        is_deeply(kinds($test, '--guest', 'web1'), [$kind, $kind], "--guest: $kind");
    }
    restore_and_compare($test, "$test->{store}/web1", '--guest');
}

# If the first backups of several guests begin at the same time, the directory still gets a single ID.
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
    is("@others", '', 'all processes see the same ID');
}

sub check_agent ($test) {
    my $run = succeeds('no agent', backup($test, '--guest-agent', "$test->{dir}/nobody"));
    like($run->{err}, qr/^warn: could not freeze the guest/m, 'no agent: the log has a warning');
}

sub check_output_errors ($test) {
    my $command = start_command('list', $test->{store});
    $command->close_output('out');
    is($command->finish->{signal}, 13, 'a reader that goes away: SIGPIPE, and silence');
    my $full = system('/bin/sh', '-c', 'exec >/dev/full 2>/dev/null; exec "$@"',
        'sh', PBA::Test::Command::command('list', $test->{store})) >> 8;
    is($full, 1, 'a full disk for the output is an error');
}

subtest 'simultaneous first backups' => sub { check_identity() };
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $test = start_guest($name);
        local $ENV{TMPDIR} = "$test->{dir}/tmp";    # for leftovers of killed processes
        my @archives = check_pipes($test);
        check_refusals($test, $archives[0]);
        check_archives($test, @archives);
        check_terminal($test);
        check_output_errors($test);
        check_agent($test);
        check_odd_paths($test);
        check_full_and_named($test);
        check_directories($test);
        $test->{backend}->check_manners;
    };
}

done_testing;
