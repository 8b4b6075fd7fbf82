# pve-backup-access and archives, without a guest: names, retention, removal, silence.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(O_EXCL O_RDONLY);
use File::Find ();
use File::Temp ();
use JSON::PP ();
use Test::More;
use Time::HiRes ();

use PBA::Test::Chain;
use PBA::Test::Command qw(run_command start_command);
use PBA::Test::QemuNbd;
use PVE::BackupAccess::CLI::Archives;
use PVE::BackupAccess::File qw(remove_tree write_file);
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(check_name name_of number_for number_of);

my $json = JSON::PP->new->utf8;

sub new_chain ($count) {
    return PBA::Test::Chain->new->add_archives($count);
}

sub paths ($chain) {
    return map { $chain->path_of($_) } $chain->names;
}

# [exit status, standard output, standard error]
sub run_of (@arguments) {
    my $run = run_command(@arguments);
    return [$run->@{qw(status out err)}];
}

sub content ($file) {
    open(my $fh, '<:raw', $file) or return undef;
    local $/ = undef;
    return scalar(<$fh>);
}

# The command must restore this archive by that path.
sub restores ($chain, $path, $name) {
    my $file = $chain->tmp . '/' . ++$chain->{restored} . '.raw';
    my $run = run_command('restore', $path, $file, '--device', 'drive-scsi0', '--quiet');
    is_deeply([$run->@{qw(status out err)}], [0, '', ''], "restore $path: silent");
    is(content($file), $chain->{expected}{$name}{'drive-scsi0'}, "restore $path: the content");
}

subtest 'the latest archive of a guest' => sub {
    my $chain = new_chain(2);
    my $store = $chain->store;
    my @names = $chain->names;
    write_file($chain->guest_dir . '/name', "web1\n");
    restores($chain, "$store/$_", $names[1])
        for qw(100 100/ 100/latest web1 web1/latest vm/100 vm/100/latest vm/100/latest/);
    restores($chain, "$store/$names[0]", $names[0]);
    my ($old, $new) = paths($chain);
    is_deeply(
        run_of('verify', "$store/web1"),
        [0, "$new: ok\n", ''],
        'verify names the archive of the result'
    );
    is_deeply(run_of('remove', "$store/web1/latest", '-q'), [0, '', ''], 'remove, silent');
    is_deeply([paths($chain)], [$old], 'the latest is gone');
    like(run_of('list', $store)->[1], qr/^\Q$old\E .*  web1$/m, 'list shows the name');

    for my $path ('101', 'web', 'web1/20', 'vm/101', 'vm/latest', 'latest') {
        my $run = run_of('restore', "$store/$path", $chain->tmp . '/none');
        is($run->[0], 1, "$path: exit status");
        like(
            $run->[2],
            qr/\A[^\n]*(?: is not an archive - |there is no guest )[^\n]*\n\z/,
            "$path: says so"
        );
    }
    mkdir("$store/vm/102") or die "mkdir: $!\n";
    like(
        run_of('remove', "$store/102")->[2],
        qr/: guest 102 has no archive in /,
        'a guest without archives'
    );
};

subtest 'guests by name' => sub {
    my $chain = new_chain(1);
    my $store = $chain->store;
    is(number_of($store, 'web1'), undef, 'an unknown name has no number');
    is(number_for($store, 'web1'), 1, 'the least number');
    is(number_for($store, 'db.example'), 2, 'a second guest gets the next number');
    is(number_for($store, 'web1'), 1, 'the same name gets the same number');
    is(number_of($store, 'db.example'), 2, 'the number of a name is found');
    is(name_of($store, 100), undef, 'a guest of a number has no name');

    for my $bad ('', '7', '.lock', '-x', 'a/b', '..', "a\nb", 'x' x 129) {
        ok(!eval { check_name($bad); 1 }, "'$bad' is refused");
    }
    write_file($chain->guest_dir . '/name', "old\n");
    my ($path) = paths($chain);
    like(run_of('list', $store, '--guest', 'old')->[1], qr/^\Q$path\E /m, 'list --guest');
    is(run_of('list', $store, '--guest', 'web1')->[1], '', 'list of a guest without archives');
    like(
        run_of('list', $store, '--guest', 'none')->[2],
        qr/there is no guest 'none' in/,
        'list of an unknown guest'
    );
    is(run_of('list', $store, '--guest', 'old', '--vmid', 100)->[0],
        2, '--guest and --vmid exclude each other');
};

subtest 'prune by rules' => sub {
    my $chain = new_chain(4);
    my $store = $chain->store;
    my @paths = paths($chain);
    my @names = $chain->names;
    is_deeply(
        run_of('prune', $store, '--keep-last', 2, '--dry-run'),
        [
            0,
            join('', map { "remove     $_\n" } @names[0, 1])
                . join('', map { "keep       $_\n" } @names[2, 3]),
            ''
        ],
        'a dry run'
    );
    is_deeply([paths($chain)], \@paths, 'removes nothing');
    my $shown = $json->decode(run_of('prune', $store, qw(--keep-last 3 --dry-run --json))->[1]);
    is_deeply([map { $_->{mark} } $shown->@*], [qw(remove keep keep keep)], 'the marks in JSON');
    write_file("$paths[0]/protected", '');
    is_deeply(
        run_of('prune', $store, qw(--keep-daily 1 --keep-hourly 0)),
        [0, "removed $names[1]\nremoved $names[2]\n", ''],
        'prune keeps one archive for each day, and the protected one'
    );
    is_deeply([paths($chain)], [@paths[0, 3]], 'the kept archives stay');
    $chain->forget(@names[1, 2]);
    $chain->check('the remaining archives restore after prune');
    my $run = run_of('remove', $paths[0]);
    is($run->[0], 1, 'a protected one is not removed');
    like(
        $run->[2],
        qr/is protected - remove the file 'protected' in it first$/m,
        'the error says why'
    );
    is_deeply(run_of('prune', $store, qw(--keep-last 9)), [0, '', "nothing to remove\n"],
        'nothing');
    is_deeply(run_of('prune', $store, qw(--keep-last 9 -q)), [0, '', ''], 'silently');
};

subtest 'a prune of the wrong place, and bad rules' => sub {
    my $chain = new_chain(1);
    my $store = $chain->store;
    for my $empty ([$store, '--vmid', 101], ["$store/vm"], [$chain->guest_dir . '/..', '--json']) {
        my $run = run_of('prune', '-q', '--keep-last', 1, $empty->@*);
        is($run->[0], 0, "'$empty->@*': exit status");
        like($run->[2], qr/\Awarn: there are no archives in \S+ - check [^\n]+\n\z/, 'a warning');
    }
    for my $bad ([], ['--keep-last', 0], ['--keep-daily', 'x'], [qw(--keep 1 --keep-last 1)]) {
        is(run_of('prune', $store, $bad->@*)->[0], 2, "'$bad->@*' is bad usage");
    }
};

# A broken archive must not cause the removal of an intact one.
subtest 'a broken chain' => sub {
    my $chain = new_chain(3);
    my @names = $chain->names;
    remove_tree($chain->path_of($names[1]));
    my $run = run_of('prune', $chain->store, '--keep-last', 1);
    is($run->[0], 0, 'prune: exit status');
    is($run->[1], '', 'nothing is removed');
    like($run->[2], qr/^warn: archive \Q$names[2]\E is damaged, but is kept/m, 'and why');
    restores($chain, $chain->path_of($names[0]), $names[0]);
    is(run_of('restore', $chain->path_of($names[2]), $chain->tmp . '/no')->[0],
        1, 'restore reports the damage');
    like(
        run_of('prune', $chain->store, '--keep-last', 1, '--dry-run')->[1],
        qr/^broken     \Q$names[2]\E - damaged: /m,
        'prune --dry-run reports the damaged archive'
    );
};

subtest 'unreadable archives, and directories that are not archives' => sub {
    my $chain = new_chain(4);
    my ($store, @paths) = ($chain->store, paths($chain));
    my @names = $chain->names;
    for my $odd (qw(20261399T999999Z 20260230T000000Z 99991231T235959Z)) {
        my $dir = $chain->guest_dir . "/$odd";
        mkdir($dir) or die "$dir: $!\n";
        write_file("$dir/manifest.json", 'x');
    }
    write_file("$paths[2]/manifest.json", 'x');
    for my $command (['list', $store], [qw(prune --keep-last 1 --dry-run), $store]) {
        my $run = run_of($command->@*);
        is($run->[0], 0, "$command->[0]: exit status");
        like($run->[1], qr/\Q$names[0]\E/, "$command->[0]: the intact archives are listed");
    }
    my $run = run_of('prune', $store, '--keep-last', 1);
    is_deeply([$run->@[0, 1]], [0, "removed $names[0]\n"], 'prune removes what it can')
        or diag($run->[2]);
    like(
        $run->[2],
        qr/^warn: archive \Q$names[2]\E .* is kept, .*: remove it yourself$/m,
        'a warning names the damaged archive'
    );

    # Each message names the archive that must be removed first, until all are removed.
    for my $case ([2, 3], [3, undef], [2, undef]) {
        my ($which, $first) = $case->@*;
        $run = run_of('remove', $paths[$which]);
        is($run->[0], defined($first) ? 1 : 0, "remove $which: exit status") or diag($run->[2]);
        my $name = defined($first) ? $names[$first] =~ s!.*/!!r : next;
        like($run->[2], qr/ - remove \Q$name\E first$/m,
            "remove $which: the error says what to do");
    }
    $chain->forget(@names[0, 2, 3]);
    restores($chain, $paths[1], $names[1]);
};

subtest 'other things where guests and archives are' => sub {
    my $chain = new_chain(2);
    my ($store, @paths) = ($chain->store, paths($chain));
    my @names = $chain->names;
    write_file("$store/vm/101", '');
    symlink('none', "$store/vm/102") or die "symlink: $!\n";
    symlink('none', $chain->guest_dir . '/20260101T000000Z') or die "symlink: $!\n";
    write_file($chain->guest_dir . '/20260102T000000Z', '');
    is(run_of('list', $store)->[0], 0, 'files and links to nothing: list');
    is_deeply(
        run_of('verify', $store),
        [0, join('', map { "$_: ok\n" } @paths), ''],
        'files and links to nothing: verify'
    );

    # As a directory that this user may not read.
    symlink('103', "$store/vm/103") or die "symlink: $!\n";
    my $problem = qr{: cannot read \Q$store\E/vm/103 - };
    for my $command (['list'], ['verify'], [qw(prune --keep-last 1 --dry-run)]) {
        my $run = run_of($command->@*, $store);
        is($run->[0], 1, "a guest that cannot be read: $command->[0]: exit status");
        like($run->[1], qr/\Q$names[1]\E/, "$command->[0] shows the archives of the others");
        like($run->[2], qr/\Apve-backup-access $command->[0]$problem/, "$command->[0] says which");
    }
    write_file($chain->guest_dir . '/name', "web1\n");
    my $run = run_of('list', $store, '--guest', 'web1');
    is_deeply([$run->@[0, 2]], [0, ''], 'another guest is found by name');
    like(
        run_of('list', $store, '--guest', 'none')->[2],
        qr{cannot read \Q$store\E/vm/103/name - },
        'but whether there is an unknown one cannot be said'
    );
    $run = run_of('prune', '--keep-last', 1, $store);
    is_deeply([$run->@[0, 1]], [1, "removed $names[0]\n"], 'prune: others are pruned')
        or diag($run->[2]);
};

# The name of the directory is in bytes, and messages contain it.
subtest 'a directory with a name beyond ASCII' => sub {
    my $tmp = File::Temp->newdir('pba-name-XXXXXXXX', TMPDIR => 1);
    my $store = "$tmp/b\xc3\xa4ckups \"1\"";
    my $chain = PBA::Test::Chain->new(store => $store)->add_archives(2);
    my ($bad) = paths($chain);
    write_file("$bad/manifest.json", 'x');
    my $problem = "the manifest of archive $bad is damaged - it is not a JSON object";
    utf8::decode(my $shown = $problem);
    like(run_of('list', $store)->[1], qr/^\Q$bad\E: cannot be used - \Q$problem\E$/m, 'list');
    my $list = $json->decode(run_of('list', $store, '--json')->[1]);
    is($list->[0]{problem}, $shown, 'list --json');
    my @dry_run = (qw(prune --keep-last 9 --dry-run), $store);
    like(run_of(@dry_run)->[1], qr/ - damaged: \Q$problem\E/, 'prune --dry-run');
    my $marks = $json->decode(run_of(@dry_run, '--json')->[1]);
    like($marks->[0]{problems}[0], qr/\A\Q$shown\E/, 'prune --dry-run --json');
};

# Everything that stat shows of a store, except when it was read.
sub state_of ($dir) {
    my @found;
    File::Find::find(
        { no_chdir => 1, wanted => sub { push(@found, join(' ', $_, (lstat)[1 .. 7, 9, 10])) } },
        $dir);
    return join("\n", sort @found);
}

subtest 'what changes nothing' => sub {
    my $chain = new_chain(3);
    my ($store, @paths) = ($chain->store, paths($chain));
    rename("$paths[0]/manifest.json", "$paths[0]/removed.json") or die "rename: $!\n";
    write_file("$paths[1]/manifest.json", 'x');
    mkdir($chain->guest_dir . '/.tmp-20260101T000000Z') or die "mkdir: $!\n";
    my $before = state_of($store);
    for my $command (['list'], [qw(prune --keep-last 1 --dry-run)]) {
        is(run_of($command->@*, $store)->[0], 0, "$command->@*: exit status");
        is(state_of($store), $before, "$command->@*: the store is as before");
    }
};

# The content of the image as qemu-img reads it, in raw format.
sub raw_of ($chain, $image) {
    my $file = $chain->tmp . '/' . ++$chain->{restored} . '.raw';
    PBA::Test::QemuNbd::img('convert', '-f', 'qcow2', '-O', 'raw', $image, $file);
    return content($file);
}

subtest 'restore to qcow2' => sub {
    my $chain = new_chain(2);
    my ($name) = reverse($chain->names);
    my $dir = $chain->tmp . '/qcow2';
    mkdir($dir) or die "mkdir: $!\n";
    my $run = run_of('restore', $chain->path_of($name), $dir, '--format', 'qcow2');
    is($run->[0], 0, 'exit status') or diag($run->[2]);
    is($run->[1], join('', map { "$dir/$_.qcow2\n" } $chain->devices), 'the files');
    is(raw_of($chain, "$dir/$_.qcow2"), $chain->{expected}{$name}{$_}, $_) for $chain->devices;
    is((stat("$dir/drive-scsi0.qcow2"))[2] & 0777, 0600, "only the owner can read the image");
    is(run_of('restore', $chain->path_of($name), $dir, '--format', 'vmdk')->[0],
        2, 'another format is refused');
};

# However a restore is interrupted, no file gets its name before all are complete, and the restore can be run
# again.
subtest 'an interrupted restore' => sub {
    my $chain = new_chain(1);
    my ($name) = $chain->names;
    my $interrupted = 0;
    for my $case ([TERM => 'raw', 'raw'], [KILL => 'qcow2', 'raw'], [KILL => 'raw', 'raw']) {
        my ($signal, $first, $second) = $case->@*;
        my $text = "SIG$signal, then $second";
        my $dir = $chain->tmp . "/$signal-$first";
        mkdir($dir) or die "mkdir: $!\n";
        my $command = start_command('restore', $chain->path_of($name), $dir, '--format', $first);
        $command->wait_for(err => qr/drive-scsi0: restoring/);
        $command->kill($signal);
        next if ($command->finish->{status} // 1) == 0;    # it had ended before
        $interrupted++;
        my @left = grep { !m/[.]part\z/ } glob("$dir/*");
        is_deeply(\@left, [], "$text: no incomplete image has its final name");
        is_deeply([glob("$dir/*")], [], "$text: no other file is left") if $signal ne 'KILL';
        is(run_of('restore', $chain->path_of($name), $dir, '-q')->[0], 0, "$text: run again");
        is(content("$dir/$_.$second"), $chain->{expected}{$name}{$_}, "$text: $_")
            for $chain->devices;
        is_deeply([glob("$dir/*.part")],
            [], "$text: no temporary file of the interrupted restore is left");
    }
    cmp_ok($interrupted, '>', 0, 'at least one restore was interrupted');
};

# Two restores to the same target: each file has only one writer, and existing files stay.
subtest 'two restores to one target' => sub {
    my $chain = new_chain(1);
    my ($name) = $chain->names;
    my $dir = $chain->tmp . '/both';
    mkdir($dir) or die "mkdir: $!\n";
    my $part = "$dir/drive-scsi0.raw.part";
    open(my $writer, '>', $part) or die "$part: $!\n";
    my $run = run_of('restore', $chain->path_of($name), $dir, '-q');
    is($run->[0], 1, 'another restore is running: exit status');
    like($run->[2], qr/: another restore writes to \Q$part\E - /, 'the error says why');
    ok(-e $part, "the other restore's file stays");
    close($writer);
    unlink(glob("$dir/*.raw"), "$dir/guest.conf");

    for my $case (
        ['drive-scsi0.raw', qr/another program has created \Q$dir\E\/drive-scsi0[.]raw/],
        ['drive-scsi0.raw.part', qr/another restore has replaced \Q$part\E - /],
        )
    {
        my ($file, $message) = $case->@*;
        my $command = start_command('restore', $chain->path_of($name), $dir);
        $command->wait_for(err => qr/drive-scsi0: restoring/);
        for (1 .. 1000) {
            last if -e $part;
            Time::HiRes::sleep(0.01);
        }
        $command->kill('STOP');
        my $is_under_way = -e $part;
        unlink("$dir/$file");
        write_file("$dir/$file", 'mine');
        $command->kill('CONT');
        $run = $command->finish;
        is(content("$dir/$file"), 'mine', "$file: the existing file stays") if $is_under_way;
        like($run->{err}, $message, "$file: the error says so") if $is_under_way;
        is_deeply([glob("$dir/*")], ["$dir/$file"], "$file: no other file is left")
            if $is_under_way;
        unlink(glob("$dir/*"));
    }
};

# Such as that of a volume that is not active.
subtest 'a restore to a link to nothing' => sub {
    my $chain = new_chain(1);
    my ($name) = $chain->names;
    my $link = $chain->tmp . '/link';
    symlink('none', $link) or die "symlink: $!\n";
    my $run = run_of('restore', $chain->path_of($name), $link, '--device', 'drive-scsi0', '-q');
    is($run->[0], 1, 'exit status');
    like($run->[2], qr/: \Q$link\E already exists and is not overwritten - /, 'it says so');
    ok(-l $link, 'the link stays');
};

# O_EXCL does not show that a loop device is over the device.
sub check_device_over ($device, $file, @restore) {
    chomp(my $over = `losetup --find --show --read-only $device`);
    my ($loop) = $over =~ m{([^/]+)\z};
    my $run = run_of(@restore, 'raw');
    is($run->[0], 1, 'a loop device is over it: exit status');
    like($run->[2], qr/cannot write to \Q$device\E: it is used by the device $loop - detach/,
        'why');
    is(content($file), "\0" x -s $file, 'untouched again');
    system('losetup', '--detach', $over) == 0 or die "losetup failed\n";
    return;
}

subtest 'restore to a block device' => sub {
    plan(skip_all => 'needs root and loop devices') if $> != 0 || !-e '/dev/loop-control';
    my $chain = new_chain(1);
    my ($name) = $chain->names;
    my $file = $chain->tmp . '/disk';
    open(my $fh, '>', $file) or die "$file: $!\n";
    truncate($fh, length($chain->{expected}{$name}{'drive-scsi0'})) or die "$file: $!\n";
    chomp(my $device = `losetup --find --show $file`);
    die "losetup failed\n" if $?;
    my @restore
        = ('restore', $chain->path_of($name), $device, '--device', 'drive-scsi0', '--format');
    is(run_of(@restore, 'qcow2')->[0], 2, 'a block device cannot be qcow2');
    my $used = open_exclusively($device);
    my $run = run_of(@restore, 'raw');
    is($run->[0], 1, 'in use: exit status');
    like($run->[2], qr/cannot write to \Q$device\E: .* - it is mounted, or another/, 'in use: why');
    is(content($file), "\0" x -s $file, 'in use: the device is unchanged');
    close($used);
    open($used, '+<', $device) or die "$device: $!\n";
    $run = run_of(@restore, 'raw');
    is($run->[0], 1, 'open in a program, as in QEMU: exit status');
    like($run->[2], qr/cannot write to \Q$device\E: a process, such as a running QEMU, has it/,
        'open: why');
    is(content($file), "\0" x -s $file, 'untouched again');
    close($used);
    check_device_over($device, $file, @restore);
    is(run_of(@restore, 'raw')->[0], 0, 'free: exit status');
    system('losetup', '--detach', $device) == 0 or die "losetup failed\n";
    is(content($file), $chain->{expected}{$name}{'drive-scsi0'}, 'free: the content');

    truncate($file, 1 << 20) or die "$file: $!\n";
    chomp($device = `losetup --find --show $file`);
    $restore[2] = $device;
    like(
        run_of(@restore, 'raw')->[2],
        qr/cannot write to \Q$device\E: it has 1048576 bytes, and the disk has 4194304$/m,
        'the device is too small'
    );
    system('losetup', '--detach', $device) == 0 or die "losetup failed\n";
};

# Opens the device like the kernel does with a mounted one.
sub open_exclusively ($device) {
    sysopen(my $fh, $device, O_RDONLY | O_EXCL) or die "$device: $!\n";
    return $fh;
}

subtest 'verify while another process prunes' => sub {
    my $chain = new_chain(2);
    my ($first) = $chain->names;
    my $verify = PVE::BackupAccess::Provider::Store->can('verify');
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Store::verify = sub ($provider, $volname, @seen) {
        $chain->provider->remove($first) if $volname eq $first;
        return $verify->($provider, $volname, @seen);
    };
    is(PVE::BackupAccess::CLI::Archives::verify({ quiet => 1 }, $chain->store),
        0, 'an archive that is removed in the meantime is not called damaged');
    $chain->forget($first);
    $chain->check('the other one');
};

subtest 'verify and help' => sub {
    my $chain = new_chain(2);
    is_deeply(run_of('verify', $chain->store, '--quiet'), [0, '', ''], 'all is well: silence');
    my ($first, $second) = paths($chain);
    open(my $fh, '+<', "$second/drive-scsi0.qcow2") or die "$second: $!\n";
    seek($fh, -70000, 2);
    print {$fh} 'damage';
    close($fh);
    my $run = run_of('verify', $chain->store, '--quiet');
    is($run->[0], 1, 'damage: exit status');
    like($run->[1], qr/\A\Q$second\E: DAMAGED\n  /, 'damage: only the damaged archive is printed');
    is_deeply(run_of('help', 'prune'), run_of('prune', '--help'), 'help COMMAND is its --help');
    is_deeply(run_of('help'), run_of('--help'), 'help alone');
    is(run_of('help', 'me')->[0], 2, 'help for no command');
    is(run_of('help', 'prune', 'now')->[0], 2, 'help with one argument too many');
};

done_testing;
