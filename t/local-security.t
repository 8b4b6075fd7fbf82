# Other users of the machine, and the provider's own child processes, must not get access to anything. The test
# runs as root: each case is a child process of an ordinary user in a directory that another user has prepared.

use v5.36;

use lib 't/lib';

use File::Temp ();
use IO::Socket::UNIX ();
use POSIX ();
use Test::More;
use Time::HiRes qw(time);

use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;
use PVE::BackupAccess;

plan(skip_all => 'needs root') if $> != 0;

my ($user, $other) = (64_001, 64_002);
my $base = File::Temp->newdir('pba-local-XXXXXXXX', TMPDIR => 1);
chmod(0755, $base) or die "chmod: $!\n";
umask(022);

# What the code writes to a pipe, as that user; it must not die.
sub as_user ($id, $code) {
    my $pid = open(my $pipe, '-|') // die "cannot fork: $!\n";
    if (!$pid) {
        $) = "$id $id";
        POSIX::setgid($id);
        POSIX::setuid($id);
        my $said = eval { $code->() } // "died: $@";
        syswrite(STDOUT, $said);
        POSIX::_exit(0);
    }
    my $said = do { local $/; <$pipe> };
    close($pipe);
    return $said;
}

# Creates a directory with that owner and mode for one case.
sub make_dir ($owner, $mode, $path = undef) {
    state $count = 0;
    $path //= "$base/" . ++$count;
    mkdir($path) or die "cannot make $path: $!\n";
    chown($owner, $owner, $path) or die "chown: $!\n";
    chmod($mode, $path) or die "chmod: $!\n";
    return $path;
}

sub put_file ($path, $owner) {
    open(my $fh, '>', $path) or die "cannot write $path: $!\n";
    close($fh);
    chown($owner, $owner, $path) or die "chown: $!\n";
    return;
}

# Tries an access with the socket in that directory. Returns the result and the messages.
sub try_run_dir ($dir, $during = sub ($access, $path) { 'done' }, %options) {
    my $calls = qmp_calls({ pve_returns() });
    my $access = PVE::BackupAccess->new(
        qmp => $calls->{code},
        'target-id' => $target,
        (defined($dir) ? ('run-dir' => $dir) : ()), %options
    );
    my $said = eval {
        $access->setup(\@one);
        $during->($access, $access->volumes('nbd')->{'drive-scsi0'}{'nbd-path'});
    } // "died: $@";
    eval { $access->teardown(0) };
    return $said;
}

sub refused ($dir, $name, $pattern = qr/run directory/, %options) {
    my $before = join(' ', glob("$base/*/*"));
    my $said = as_user(
        $user,
        sub {
            try_run_dir($dir, sub (@) { 'done' }, %options);
        }
    );
    like($said, qr/\Adied: .*$pattern/, "$name: refused");
    is(join(' ', glob("$base/*/*")), $before, "$name: nothing was made");
    return;
}

subtest 'a run directory' => sub {
    my $dir = make_dir(0, 01777);
    my $said = as_user(
        $user,
        sub {
            umask(0);
            return try_run_dir(
                "$dir/run",
                sub ($access, $path) {
                    my $private = $path =~ s{/[^/]+\z}{}r;
                    my @modes = map { sprintf('%04o', (stat($_))[2] & 07777) } "$dir/run", $private;
                    my @owners = map { (stat($_))[4] } "$dir/run", $private, $path;
                    return "@modes @owners";
                }
            );
        }
    );
    is($said, "0700 0700 $user $user $user", 'is private, whatever the umask');
    is_deeply([glob("$dir/run/*")], [], 'nothing is left in it');
    ok(!-e "$dir/run/x", 'the directory stays');
    is(as_user($user, sub { try_run_dir("$dir/run/") }), 'done',
        'is taken again, with a slash too');
};

subtest 'a socket' => sub {
    my $dir = make_dir(0, 01777);
    pipe(my $told, my $tell) or die "cannot make a pipe: $!\n";
    pipe(my $waits, my $go) or die "cannot make a pipe: $!\n";
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        close($go);
        as_user(
            $user,
            sub {
                try_run_dir(
                    "$dir/run",
                    sub ($access, $path) {
                        chmod(0777, $path);
                        syswrite($tell, "$path\n");
                        sysread($waits, my $end, 1);
                    }
                );
            }
        );
        POSIX::_exit(0);
    }
    close($waits);
    chomp(my $path = <$told>);
    my $connect = sub {
        return IO::Socket::UNIX->new(Peer => $path) ? 'connected' : "refused: $!";
    };
    is(as_user($user, $connect), 'connected', 'is there for its user');
    like(as_user($other, $connect), qr/refused: Permission denied/, 'other users cannot connect');
    like(as_user($other, sub { opendir(my $dh, "$dir/run") ? 'read' : "$!" }),
        qr/denied/, 'other users cannot list the directory');
    close($go);
    waitpid($pid, 0);
};

subtest 'directories that another user has prepared' => sub {
    my $sticky = make_dir(0, 01777);
    my $own = make_dir($user, 0700);
    my $others = make_dir($other, 0777);

    symlink($own, "$sticky/to-own") or die "symlink: $!\n";
    refused("$sticky/to-own", 'a link to a directory of the user');
    symlink($others, "$sticky/to-others") or die "symlink: $!\n";
    refused("$sticky/to-others", "a link to another's directory");
    symlink("$sticky/not-there", "$sticky/dangling") or die "symlink: $!\n";
    refused("$sticky/dangling", 'a link to nothing');
    put_file("$sticky/file", $user);
    refused("$sticky/file", 'a file');
    POSIX::mkfifo("$sticky/fifo", 0666);
    refused("$sticky/fifo", 'a pipe');
    make_dir($other, 0700, "$sticky/private");
    refused("$sticky/private", "another's directory");
    make_dir($other, 0777, "$sticky/open");
    refused("$sticky/open", "another's open directory");
    make_dir(0, 0777, "$sticky/of-root");
    refused("$sticky/of-root", "root's open directory");

    for my $mode (0777, 0770, 0720, 0702, 01777) {
        my $name = sprintf('%04o', $mode);
        make_dir($user, $mode, "$sticky/mode-$name");
        refused("$sticky/mode-$name", "the user's own with mode $name");
    }
};

# A safe directory does not help if others can replace it.
subtest 'above the run directory' => sub {
    my $pattern = qr/users other than root and this user may change/;
    my $open = make_dir(0, 0777);
    refused("$open/run", 'no sticky bit', $pattern);
    make_dir($user, 0700, "$open/ready");
    refused("$open/ready", 'no sticky bit, a directory that is all right', $pattern);
    my $others = make_dir($other, 01777);
    refused("$others/run", "another's directory", $pattern);
    make_dir($user, 0700, "$others/mine");
    refused("$others/mine/run", "the user's directory in another's", $pattern);
    my $sticky = make_dir(0, 01777);
    make_dir($user, 0700, "$sticky/mine");
    symlink("$sticky/mine", "$others/link") or die "symlink: $!\n";
    is(as_user($user, sub { try_run_dir("$others/link/run") }),
        'done', "another's link to a directory of the user: used where it leads");
    ok(-d "$sticky/mine/run", "the link's target is used");
    refused("$sticky/nothing/run", 'nothing', qr/No such file/);
};

subtest 'without the option run-dir' => sub {
    my $default = "/tmp/pve-backup-access-$user";
    delete(local $ENV{XDG_RUNTIME_DIR});
    my $own = make_dir($user, 0700);
    symlink($own, $default) or die "symlink: $!\n";
    refused(undef, 'the default path is a link');
    unlink($default);
    make_dir($other, 0777, $default);
    refused(undef, "the default path is a directory of another user");
    rmdir($default);
    is(as_user($user, sub { try_run_dir(undef) }), 'done', 'a directory is created');
    is(sprintf('%04o', (stat($default))[2] & 07777), '0700', 'private');
    rmdir($default);

    local $ENV{XDG_RUNTIME_DIR} = make_dir(0, 0777);
    refused(undef, 'XDG_RUNTIME_DIR is open to all', qr/may change/);
    local $ENV{XDG_RUNTIME_DIR} = 'relative';
    is(as_user($user, sub { try_run_dir(undef) }), 'done',
        'a relative XDG_RUNTIME_DIR is not used');
    rmdir($default);
};

# The other user continuously creates, links, renames and removes what is to be the run directory.
sub start_attacker ($dir, $trap) {
    my $attacker = fork() // die "cannot fork: $!\n";
    return $attacker if $attacker;
    POSIX::setgid($other);
    POSIX::setuid($other);
    my $parent = getppid();
    while (getppid() == $parent) {
        symlink($trap, "$dir/run");
        unlink("$dir/run");
        mkdir("$dir/run");
        rename("$dir/run", "$dir/old");
        symlink($trap, "$dir/link");
        rename("$dir/link", "$dir/run");
        unlink("$dir/run");
        rmdir("$dir/old");
    }
    POSIX::_exit(0);
}

# How often each result occurred with that directory.
sub try_often ($dir) {
    my %seen;
    for (1 .. 300) {
        my $result = try_run_dir(
            "$dir/run",
            sub ($access, $path) {
                (stat($path =~ s{/[^/]+\z}{}r))[4] == $user ? 'own' : 'trapped';
            }
        );
        $seen{ $result =~ m/\Adied: .*run directory/ ? 'refused' : $result }++;
        rmdir("$dir/run");
    }
    return join(' ', map { "$_: $seen{$_}" } sort keys %seen);
}

subtest 'a race' => sub {
    my $dir = make_dir(0, 01777);
    my $trap = make_dir($other, 0777);
    my $attacker = start_attacker($dir, $trap);
    my $said = as_user($user, sub { try_often($dir) });
    kill('KILL', $attacker);
    waitpid($attacker, 0);
    like($said, qr/\A(?:own: \d+)? ?(?:refused: \d+)?\z/, "each attempt succeeds or is refused");
    note($said);
    is_deeply([glob("$trap/*")], [], 'nothing was made in the directory of the attacker');
};

# The result of an access with this fleecing directory, and what it left there.
sub try_fleecing ($dir) {
    my @files;
    my %returns = upstream_returns(
        'blockdev-add' => sub ($arguments) {
            return {} if ($arguments->{driver} // '') ne 'file';
            my $file = $arguments->{filename};
            push(@files, sprintf('%04o %d', (lstat($file))[2] & 07777, (lstat($file))[4]));
            die "enough\n";
        }
    );
    my $calls = qmp_calls(\%returns);
    my $access = PVE::BackupAccess->new(
        qmp => $calls->{code},
        'target-id' => $target,
        'run-dir' => "$dir->{run}/run",
        'fleecing-dir' => $dir->{fleecing}
    );
    eval { $access->setup(\@one) };
    return "@files $@";
}

# The fleecing image of the upstream backend before QEMU opens the file.
subtest 'a fleecing directory' => sub {
    my $run = make_dir($user, 0700);
    my $pattern = qr/fleecing-dir .*users other than root and this user may change/;
    my %bad = (
        'no sticky bit' => make_dir(0, 0777),
        "another's" => make_dir($other, 01777),
    );
    symlink(make_dir($other, 0777), "$run/link") or die "symlink: $!\n";
    $bad{'a link to another\'s'} = "$run/link";
    for my $name (sort keys %bad) {
        my $said
            = as_user($user, sub { try_fleecing({ run => $run, fleecing => $bad{$name} }) });
        like($said, $pattern, "$name: refused");
        is_deeply([glob("$bad{$name}/*")], [], "$name: nothing was made");
    }
    for my $good (make_dir(0, 01777), make_dir($user, 0755)) {
        my $said
            = as_user($user, sub { umask(0); try_fleecing({ run => $run, fleecing => $good }) });
        like($said, qr/\A0600 $user .*enough/, 'a good directory: the image is private');
        is_deeply([glob("$good/*")], [], 'the image is removed after the error');
    }
};

subtest 'children of the provider' => sub {
    my $server = PBA::Test::NBDServer->start(
        size => 1 << 20,
        export => 'disk',
        dirty => [[0, 1 << 20]]
    );
    my $list = sub {
        my $program
            = 'opendir(my $dh, "/proc/self/fd"); print grep { m/\d/ } join(" ", readdir($dh))';
        return join(' ', sort { $a <=> $b } grep { m/\d/ } split(' ', qx{$^X -e '$program'}));
    };
    my $before = $list->();
    my %inherited = map { $_ => 1 } split(' ', $before);
    my $peer = start_peer({ pve_returns() });
    my $access = new_access($peer);
    $access->setup(\@one);
    my $path = $access->volumes('nbd')->{'drive-scsi0'}{'nbd-path'};
    my $volume = open_volume($server);
    $volume->next_dirty_region;
    is($list->(), $before, 'inherit no descriptor while all is up');
    my $during = '';
    open(my $target_file, '+>', undef) or die "cannot make a file: $!\n";
    my $with_file = $list->();
    $volume->copy(
        to => $target_file,
        'without-base' => 1,
        progress => sub (@) { $during = $list->(); return },
    );
    is($during, $with_file, 'children inherit nothing during a copy');
    close($target_file);
    my %fds
        = map { $_ => 1 } grep { m/\A\d+\z/ } do { opendir(my $dh, '/proc/self/fd'); readdir($dh) };
    my @open = grep { !$inherited{$_} && !_closes_on_exec($_) } keys %fds;
    is("@open", '', 'every descriptor of ours closes on exec');
    like($path, qr/nbd/, 'the access was up');
    $volume->close;
    $access->teardown(1);
};

sub _closes_on_exec ($fd) {
    open(my $fh, '<', "/proc/self/fdinfo/$fd") or return 1;
    my ($flags) = map { m/^flags:\s+0?(\d+)/ ? oct($1) : () } <$fh>;
    return $flags & 02000000;
}

done_testing();
