# Faults of archives: the process is killed at any point, the directory is full, files are lost or damaged.
# Existing archives stay intact, and an increment is never made on a wrong base.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use File::Copy ();
use JSON::PP ();
use POSIX ();
use Time::HiRes ();

use PBA::Test::Chain;
use PBA::Test::Handle;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Provider::Qcow2Chain;

my $seed = 20261123;
srand($seed);
note("seed $seed");

# Cases that differ only a little, for PBA_FULL=1.
sub more (@cases) {
    return $ENV{PBA_FULL} ? @cases : ();
}

my $base = PBA::Test::Chain->new->add_archives(3);
my @names = $base->names;
my $store = $base->store;

# Runs code in a process that is killed at a rename, or that ends. Returns whether it was killed.
sub killed_at ($rename, $when, $code) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        $ENV{TMPDIR} = $base->tmp;    # a killed process leaves its private directory behind
        my $count = 0;
        my $move = PVE::BackupAccess::File->can('move');
        my $counted = sub (@files) {
            my $is_it = ++$count == $rename;
            kill(KILL => $$) if $is_it && $when eq 'before';
            $move->(@files);
            kill(KILL => $$) if $is_it;
        };
        my @users
            = qw(Qcow2Chain::Archive Qcow2Chain::Merge Store::DirectoryArchive Store::DirectoryGuest);
        for my $user ('File', map { "Provider::$_" } @users) {
            no strict 'refs';
            no warnings 'redefine';
            *{"PVE::BackupAccess::${user}::move"} = $counted;
        }
        my $done = eval { $code->(); 1 };
        print {*STDERR} $@ if !$done;
        POSIX::_exit($done ? 0 : 1);
    }
    waitpid($pid, 0);
    die "the code failed\n" if $? == 1 << 8;
    return $? == 9;
}

# ---- lost, damaged, changed ----

# The offset of data in the image that the last archive shows: what later images contain is not read from here.
sub data_of ($file) {
    my $map = PBA::Test::QemuNbd::output_of('map', '-U', '--output=json', of(3));
    my ($depth) = grep { of(3 - $_) eq $file } 0 .. 2;
    my ($shown) = grep { $_->{data} && $_->{depth} == $depth } JSON::PP::decode_json($map)->@*;
    return $shown->{offset} + 1000;
}

sub spoil ($file, $at = data_of($file)) {
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    seek($fh, $at, $at < 0 ? 2 : 0);
    read($fh, my $byte, 1);
    seek($fh, -1, 1);
    print {$fh} chr(ord($byte) ^ 1);
    close($fh);
    return;
}

# The same without a change of the file's size and time.
sub spoil_silently ($file) {
    my ($read, $written) = (Time::HiRes::stat($file))[8, 9];
    spoil($file);
    Time::HiRes::utime($read, $written, $file);
    return;
}

# Sets this host's note about its last archive, until the next damage.
sub set_note ($content) {
    my ($name) = map { s{.*/}{}r } glob($base->state_dir . '/*.json');
    $base->{state_dir} = $base->tmp . '/state-' . ++$base->{states};
    mkdir($base->{state_dir}) or die "mkdir: $!\n";
    overwrite("$base->{state_dir}/$name", $content);
    $base->use_store($base->store);
    return;
}

sub overwrite ($file, $content) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} $content;
    close($fh);
    return;
}

sub remove_file ($file) {
    unlink($file) or die "$file: $!\n";
    return;
}

# The file of archive 1, 2 or 3.
sub of ($number, $file = 'drive-scsi0.qcow2') {
    return $base->path_of($names[$number - 1], $file);
}

my $not_read = qr/65536 bytes differ from what was read from the guest: 65536 at offset [0-9]+/;
my $digests = 'drive-scsi0.digests';

# description => [the damage, why the next backup of drive-scsi0 is full according to the log (undef: it is
# incremental), what verify says about archive 3 (undef: nothing)].
my %damage = (
    'the base is missing' => [
        sub { rename($base->path_of($names[0]), $base->tmp . '/gone-' . ++$base->{gone}) },
        qr/there is no archive/,
        qr/there is no archive/,
    ],
    'an image is missing' => [sub { remove_file(of(2)) }, qr/is missing/, qr/is missing/],
    'an image is cut off' =>
        [sub { truncate(of(1), 300_000) }, qr/it has 300000 bytes/, qr/300000/],
    'an image is damaged' => [sub { spoil(of(1)) }, $not_read, $not_read],
    'an image is damaged, its time is not' => [sub { spoil_silently(of(1)) }, undef, $not_read],
    'the last image is damaged' => [sub { spoil(of(3)) }, $not_read, $not_read],
    'an image of another chain' => [
        sub {
            PBA::Test::QemuNbd::img('rebase', '-u', '-f', 'qcow2', '-F', 'qcow2', '-b',
                "../" . ($names[0] =~ s{.*/}{}r) . '/drive-scsi0.qcow2', of(3));
        },
        qr/has a different backing file/,
        qr/has a different backing file/,
    ],
    'the digests are missing' =>
        [sub { remove_file(of(2, $digests)) }, (qr/\Q$digests\E is missing/) x 2],
    'the digests are damaged' =>
        [sub { spoil(of(2, $digests), 4096) }, (qr/\Q$digests\E is damaged - its SHA-256/) x 2],
    'the last manifest is no JSON' => [
        sub { overwrite(of(3, 'manifest.json'), '{') },
        qr/is not in this store/,
        qr/not a JSON object/
    ],
    'a manifest is missing' => [
        sub { remove_file(of(2, 'manifest.json')) },
        qr/there is no archive/,
        qr/there is no archive/
    ],
    'another archive under the name' => [
        sub {
            my $file = of(1, 'manifest.json');
            File::Copy::copy($file, "$file.old");
            open(my $fh, '<', $file) or die;
            local $/ = undef;
            overwrite($file, <$fh> =~ s/"id" : "\K\w+/0123456789abcdef/r);
        },
        qr/another archive has replaced it/,
        qr/another archive has replaced it/,
    ],
    'the configuration is damaged' => [
        sub { overwrite(of(3, 'guest.conf'), "name: y\n") },
        undef,
        qr/guest\.conf is damaged - it has 8 bytes/
    ],
    'what the bitmaps are relative to is not known' => [sub { set_note('{}') }, '', undef],
    'nor can be read' => [sub { set_note('[]') }, '', undef],
    'another storage' => [sub { $base->use_store($base->store, 'other') }, '', undef],
    'nothing' => [sub { }, undef, undef],
);

subtest 'damage' => sub {
    for my $damage (sort keys %damage) {
        my ($do, $log, $verify) = $damage{$damage}->@*;
        delete($base->{state_dir});
        $base->use_copy($store);
        $do->();
        my $modes = $base->next_modes;
        my $said = join("\n", grep { m/drive-scsi0/ } split(m/\n/, $base->log));
        is(
            $modes->{'drive-scsi0'},
            defined($log) ? 'new' : 'use',
            "$damage: the next one is " . (defined($log) ? 'full' : 'incremental')
        );
        like(
            $said,
            $log ? qr/warn: drive-scsi0: full backup - .*$log/ : qr/\A\z/,
            "$damage: the log"
        );
        my $problems = join("\n", $base->provider->verify($names[2])->@*);
        like($problems, $verify // qr/\A\z/, "$damage: verify");
        is($modes->{'drive-efidisk0'}, 'use', "$damage: the other disk is incremental")
            if $damage =~ m/image/;
    }
};

delete($base->{state_dir});

subtest 'an image of another chain is not restored' => sub {
    $base->use_copy($store);
    $damage{'an image of another chain'}[0]->();
    my $done = eval { $base->restored($names[2], 'drive-scsi0'); 1 };
    ok(!$done, 'the restore dies');
    like(
        $@,
        qr/has a different backing file or data file than the manifest says/,
        'the error says why'
    );
};

subtest 'a disk of another size' => sub {
    $base->use_copy($store);
    my $disk = $base->disk('drive-scsi0');
    my $size = $disk->size;
    local $disk->{size} = $size + 65536;
    is($base->next_modes->{'drive-scsi0'}, 'new', 'the next one is full');
    like(
        $base->log,
        qr/warn: drive-scsi0: full backup - the disk's size changed from $size/,
        'the log says why'
    );
};

# ---- killed while an archive is removed ----

# Kills the commit of the middle archive when only a part of the data has been merged.
sub commit_partly ($file) {
    my $pid = fork() // die "fork: $!\n";
    exec('qemu-img', 'commit', '-q', '-d', '-r', '400k', '-f', 'qcow2', $file) if !$pid;
    Time::HiRes::sleep(0.3);    # no event shows the progress, and any point will do
    kill(KILL => $pid);
    waitpid($pid, 0);
    kill(KILL => $$);
}

subtest 'a removal is killed' => sub {
    my $removed = $names[1];
    my $check = sub ($text) {
        $base->use_store($base->store);
        $base->check($text);
        return;
    };
    local $base->{expected} = { map { $_ => $base->{expected}{$_} } @names[0, 2] };
    for my $crash ((map { [$_, 'before'] } 2 .. 8), more(map { [$_, 'after'] } 1 .. 8)) {
        $base->use_copy($store);
        my $text = "killed $crash->[1] rename $crash->[0]";
        ok(killed_at($crash->@*, sub () { $base->provider->remove($removed) }), $text);
        $check->($text);
    }
    for (1 .. ($ENV{PBA_FULL} ? 10 : 1)) {
        $base->use_copy($store);
        my $remove = sub () {
            no warnings 'redefine';
            local *PVE::BackupAccess::Provider::Qcow2Chain::Content::commit_image = \&commit_partly;
            $base->provider->remove($removed);
        };
        ok(killed_at(0, 'never', $remove), 'killed in the merge');
        $check->('killed in the merge');
    }
};

# ---- a backup is killed ----

# Waits until no process has the text in its command line.
sub all_ended ($text) {
    my $deadline = Time::HiRes::time() + 60;
    while (my @left = grep { command_line($_) =~ m/\Q$text\E/ } glob('/proc/[0-9]*/cmdline')) {
        return 0 if Time::HiRes::time() > $deadline;
        Time::HiRes::sleep(0.02);
    }
    return 1;
}

sub command_line ($file) {
    open(my $fh, '<', $file) or return '';
    return <$fh> // '';
}

subtest 'a backup is killed in its data' => sub {
    $base->use_store($store);
    for (1 .. ($ENV{PBA_FULL} ? 20 : 2)) {
        $base->write_random(20);
        $base->provider->on_progress(sub (@) { kill(KILL => $$) });
        my $killed;
        $base->backup(run => sub ($code) { $killed = killed_at(0, 'never', $code) });
        ok($killed, 'killed');
        ok(all_ended($base->store), 'no server process is left');
        my @temporary = glob($base->guest_dir . '/.tmp-*');
        is(scalar(@temporary), 1, 'the backup had begun');
        is_deeply($base->provider->verify($names[-1]), [], 'the archives before are as they were');
        $base->backup or die $base->error;
        is_deeply([values $base->modes->%*], [qw(reuse reuse)], 'the next backup is incremental');
    }
    $base->check('the archives after all interrupted backups');
};

my $server_class = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';
my $raw_file = 'PVE::BackupAccess::Provider::Store::RawFile';

# What is in the directory for temporary files after a process that serves the image was killed.
sub left_by_killed ($image) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        eval {
            my $started = $server_class->start($image);
            my $file = -w '/dev/fuse' ? $raw_file->start($started, 4 << 20) : undef;
            kill(KILL => $$);
        };
        print {*STDERR} $@;
        POSIX::_exit(1);
    }
    waitpid($pid, 0);
    for (1 .. 300) {
        last if !PBA::Test::Handle->mounts($ENV{TMPDIR});    # its server ends by itself
        Time::HiRes::sleep(0.1);
    }
    return glob("$ENV{TMPDIR}/*");
}

subtest 'leftovers of the servers of a killed process' => sub {
    my $image = of(1);
    my $tmp = $base->tmp . '/private';
    mkdir($tmp) or die "$tmp: $!\n";
    local $ENV{TMPDIR} = $tmp;
    my @left = left_by_killed($image);
    is(scalar(@left), 1, 'a directory is left');
    my $mine = "$tmp/pba-server-mine";
    mkdir($_) or die "$_: $!\n" for "$tmp/other", $mine;
    overwrite("$mine/content", '');

    my $live = $server_class->start($image);
    is_deeply(
        [sort glob("$tmp/*")],
        [sort("$tmp/other", $mine, $live->dir)],
        'the next start removes the leftover directory and nothing else'
    );
    @left = left_by_killed($image);
    is(scalar(@left), 4, 'a second process leaves one, too');
    ok(-S $live->socket, 'the socket of a live server stays');
    my $other = $server_class->start($image);
    undef $live;
    undef $other;
    is_deeply(
        [sort glob("$tmp/*")],
        [sort("$tmp/other", $mine)],
        'the leftovers are removed when their servers have ended'
    );
};

# A process with that PID; undef if this machine does not allow choosing one.
sub start_with_number ($number) {
    for (1 .. 200) {
        open(my $last, '>', '/proc/sys/kernel/ns_last_pid') or return undef;
        print {$last} $number - 1;
        close($last) or return undef;
        my $pid = fork() // die "fork: $!\n";
        if (!$pid) {
            sleep(60);
            POSIX::_exit(0);
        }
        return $pid if $pid == $number;
        kill(KILL => $pid);
        waitpid($pid, 0);
    }
    return undef;
}

# The process is not a child of this one, as in reality. It reports in lines that it exists and, when told to,
# whether it still does.
sub hold_number ($number, $say, $go) {
    my $other = start_with_number($number);
    syswrite($say, defined($other) ? "ready\n" : "no\n");
    sysread($go, my $line, 1);
    if (defined($other)) {
        kill(TERM => $other);
        waitpid($other, 0);
        syswrite($say, POSIX::WTERMSIG($?) == POSIX::SIGTERM() ? "lives\n" : "gone\n");
    }
    POSIX::_exit(0);
}

subtest 'a qemu-nbd that the caller has waited for' => sub {
    my $server = $server_class->start(of(1));
    my $number = $server->pid;
    kill(KILL => $number);
    waitpid($number, 0);
    pipe(my $from_holder, my $say) or die "pipe: $!\n";
    pipe(my $go, my $to_holder) or die "pipe: $!\n";
    my $holder = fork() // die "fork: $!\n";
    hold_number($number, $say, $go) if !$holder;
    close($say);
    my $ready = readline($from_holder) eq "ready\n";
    undef($server);
    syswrite($to_holder, "\n");
    my $is = $ready ? readline($from_holder) : undef;
    waitpid($holder, 0);
    plan(skip_all => 'needs root to choose the number of a process') if !$ready;
    is($is, "lives\n", 'a process with its number lives on');
};

# A real qemu-nbd loses that signal if it arrives before its main loop.
subtest 'a qemu-nbd that forgets a SIGTERM' => sub {
    my $script = "$store/forgets";
    open(my $fh, '>', $script) or die "$script: $!\n";
    print {$fh} "#!/bin/sh\ntrap '' TERM\necho \$\$ >$script.pid\nexec sleep 60\n";
    close($fh) && chmod(0755, $script) or die "$script: $!\n";
    my $user = fork() // die "fork: $!\n";
    if (!$user) {
        local $PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $script;
        eval { $server_class->start(of(1)) };
        POSIX::_exit(0);
    }
    my $in_time = sub ($is) {
        my $left = 200;
        Time::HiRes::sleep(0.05) while !$is->() && $left--;
        return $left > 0;
    };
    ok($in_time->(sub { -s "$script.pid" }), 'qemu-nbd runs') or return;
    chomp(my $pid = PVE::BackupAccess::File::read_file("$script.pid"));
    kill(KILL => $user);
    waitpid($user, 0);
    ok($in_time->(sub { !kill(0, $pid) }), 'qemu-nbd ends with the process that started it');
    kill(KILL => $pid);
    unlink($script, "$script.pid");
};

subtest 'a backup is killed at each rename' => sub {
    $base->use_store($store);
    for my $crash (
        [1, 'before'],
        [2, 'before'],
        [3, 'before'],
        [3, 'after'],
        more([1, 'after'], [2, 'after'])
        )
    {
        $base->write_random;
        my $killed;
        $base->backup(run => sub ($code) { $killed = killed_at($crash->@*, $code) });
        ok($killed, "killed $crash->[1] rename $crash->[0]");
        $base->write_random;
        $base->backup or die $base->error;
    }
    $base->check('the archives after all crashes');

    # No two archives build on the same one.
    my $removed = $base->provider->prune(100, 2);
    $base->forget($removed->@*);
    $base->check('pruned');
};

# ---- a full directory ----

subtest 'the directory is full' => sub {
    my $small = $base->tmp . '/small';
    mkdir($small) or die "$small: $!\n";
    my @mount = qw(mount -t tmpfs -o size=7m tmpfs);
    system("@mount $small 2>/dev/null") == 0 or plan(skip_all => 'needs root and loop devices');
    my $chain = PBA::Test::Chain->new(store => $small);
    my $disk = $chain->disk('drive-scsi0');
    $disk->write([0, $disk->size, 1]);
    $chain->backup or die $chain->error;
    $disk->write([0, $disk->size, 2]);
    is($chain->backup, undef, 'the second backup fails for lack of space');
    like($chain->error, qr/No space left on device/, 'the error says why');
    $chain->check('full');
    system("mount -o remount,size=64m $small") == 0 or die "mount: $?\n";
    $chain->write_random;
    $chain->backup or die $chain->error;
    is_deeply([values $chain->modes->%*], [qw(reuse reuse)],
        'with more space, the chain continues');
    $chain->check('with more space');
    undef($chain);
    system('umount', $small) == 0 or die "umount: $?\n";
};

done_testing;
