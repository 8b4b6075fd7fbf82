# Qcow2Chain on a network file system: no flock, no holes, open files that keep another name when they are
# removed, and a server with intermittent errors. Every failure names the path, and no archive is lost.
#
# The file system is t/network-fs.c.
#
# One QEMU is enough: qemu-img and qemu-nbd only use files.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Errno qw(EACCES EINVAL EIO EMFILE ENFILE ENOLCK ENOMEM EOPNOTSUPP ESTALE);
use File::Temp ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Chain;
use PBA::Test::Handle;
use PVE::BackupAccess::Provider::Qcow2Chain::Mount qw(mount_warning);
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(number_for);

my $missing = PBA::Test::Handle->missing;
plan(skip_all => $missing) if defined($missing);

my $tmp = File::Temp->newdir('pba-network-XXXXXXXX', TMPDIR => 1);
my ($mount, $faults) = ("$tmp/mount", "$tmp/faults");
mkdir("$tmp/$_") or die "mkdir: $!\n" for qw(source mount);
my @flags = split(' ', qx(pkg-config --cflags --libs fuse3));
system(qw(gcc -std=gnu11 -O1 -Wall -Wextra -Werror -o),
    "$tmp/network-fs", "$FindBin::Bin/network-fs.c", @flags) == 0
    or die "gcc failed\n";
my $server = fork() // die "fork: $!\n";
exec("$tmp/network-fs", "$tmp/source", $faults, $mount) or POSIX::_exit(127) if !$server;
my $tries = 500;
sleep(0.02) while (stat($mount))[0] == (stat("$tmp"))[0] && --$tries;
$tries or die "the file system is not mounted\n";

END {
    if ($server) {
        local $?;
        system('fusermount3', '-u', '-z', $mount);
        waitpid($server, 0);
    }
}

# The table of mounts, which most tests do not need.
$PVE::BackupAccess::File::mountinfo = "$tmp/mountinfo";

# Sets the operations that fail: [operation, errno, part of the path].
sub set_faults (@faults) {
    open(my $fh, '>', "$faults.new") or die "$faults: $!\n";
    print {$fh} map { "$_->@*\n" } @faults;
    close($fh) or die "$faults: $!\n";
    rename("$faults.new", $faults) or die "$faults: $!\n";
    return;
}

my $chain = PBA::Test::Chain->new(store => "$tmp/source/store")->add_archives(3);
my @names = $chain->names;
my $kept = $chain->store;
my %expected = $chain->{expected}->%*;

# Continues in a copy of the store. Returns its path on the file system.
sub start_again () {
    my $copy = 'copy-' . ++$chain->{copies};
    system('cp', '-a', $kept, "$tmp/source/$copy") == 0 or die "cp: $?\n";
    $chain->use_store("$tmp/source/$copy");
    $chain->{expected} = {%expected};
    $chain->log;
    return "$mount/$copy";
}

# Runs an operation while something fails. Returns its error, or ''.
sub error_of ($action, @faults) {
    my $store = $chain->store;
    $chain->use_store($store =~ s{/source/}{/mount/}r);
    set_faults(@faults);
    my $error = eval { $action->(); 1 } ? '' : "$@";
    set_faults();

    # The server releases the locks of closed files in the order in which it is asked for something.
    stat("$mount/none");
    $chain->use_store($store);
    return $error;
}

sub back_up () {
    $chain->backup or die $chain->error;
    return;
}
sub remove_first () { return $chain->provider->remove($names[0]) }
sub prune () { return $chain->provider->prune(100, 1) }

# All listed archives must be intact, and only those that may be gone may be missing.
sub check_archives ($text, @may_be_gone) {
    my %there = map { $_ => 1 } $chain->names;
    $chain->forget(grep { !$there{$_} } @may_be_gone);
    $chain->check($text);
    return;
}

subtest 'no fault' => sub {
    start_again();
    $chain->write_random;
    is(error_of(\&back_up), '', 'a backup');
    is(error_of(\&remove_first), '', 'a removal');
    check_archives('afterwards', $names[0]);
};

# A table of the kernel's with a line for the device of the directory. The file systems of other devices are unknown.
sub mountinfo ($dir, $type, $options) {
    my $dev = (stat($dir))[0];
    my ($major, $minor) = ($dev >> 8 & 0xfff, $dev & 0xff | $dev >> 12 & 0xfff00);
    open(my $fh, '>', "$tmp/mountinfo") or die "mountinfo: $!\n";
    print {$fh} "22 1 259:1 / / rw - ext4 /dev/sda1 rw\n",
        "90 22 $major:$minor / /mnt\\040x rw,relatime shared:4 - $type host:/x $options\n";
    close($fh) or die "mountinfo: $!\n";
    return;
}

subtest 'a file system without locks' => sub {
    my $store = start_again();
    for my $errno (ENOLCK, EOPNOTSUPP) {
        my $text = do { local $! = $errno; "$!" };
        for my $action (\&back_up, \&remove_first, \&prune, sub { $chain->problem($names[0]) }) {
            like(
                error_of($action, ['flock', $errno, 'vm/100/']),
                qr{cannot lock \Q$store\E/vm/100/\.\w+ - \Q$text\E - it must be on a file system on which flock works$},
                "$text: the error names the file and what is needed"
            );
        }
    }
    check_archives('afterwards');
};

# CIFS says EACCES for a lock that another process has. Elsewhere, waiting for it would never end.
subtest 'a lock that is denied' => sub {
    my $denied = do { local $! = EACCES; "$!" };
    for my $type (qw(ext4 cifs smb3)) {
        my $is_told = $type eq 'ext4';
        my $store = start_again();
        mountinfo($mount, $type, 'rw');
        like(
            error_of(\&prune, ['flock', EACCES, '.lock']),
            $is_told
            ? qr{\Acannot lock \Q$store\E/vm/100/\.lock - $denied - it must be on a file system}
            : qr/is in use by another/,
            "$type: the lock of a guest"
        );
        set_faults(['flock', EACCES, 'vm/.lock']);
        my $other = fork() // die "fork: $!\n";
        if (!$other) {
            sleep(0.5);
            set_faults();
            POSIX::_exit(0);
        }
        my $number = eval { number_for($store, 'web') } // $@;
        like(
            $number,
            $is_told
            ? qr{\Acannot lock \Q$store\E/vm/\.lock - $denied - it must be on a file system}
            : qr/\A1\z/,
            "$type: that of the list of guests"
        );
        waitpid($other, 0);
    }
};

subtest 'a server that permits no locks' => sub {
    local $PVE::BackupAccess::Wait::longest_refusal = 0.3;
    mountinfo($mount, 'cifs', 'rw');
    my $store = start_again();
    set_faults(['flock', EACCES, 'vm/.lock']);
    ok(!eval { number_for($store, 'web'); 1 }, 'is not asked for ever');
    set_faults();
    like(
        $@,
        qr{\Acannot lock \Q$store\E/vm/\.lock - .* for 0\.3 seconds: another process has the lock, or},
        'and the error says both reasons'
    );
    unlink("$tmp/mountinfo");
};

# If the last archive is not visible or not readable, nothing on which it builds may be removed.
subtest 'errors while archives are listed' => sub {
    my $last = $names[2];
    my @faults = (
        (map { [$_, "$last/manifest.json"] } qw(stat open read)),
        ['stat', 'removed.json'],
        ['stat', 'protected'],
        ['readdir', 'vm/100'],
    );
    for my $fault (@faults) {
        my ($operation, $part) = $fault->@*;
        for my $action (\&remove_first, \&prune) {
            start_again();
            my $error = error_of($action, [$operation, $operation eq 'stat' ? ESTALE : EIO, $part]);
            note("$operation $part: ", $error || 'done');
            is_deeply([$chain->names], \@names,
                "$operation $part: the operation fails, and no archive is gone");
        }
    }
    check_archives('afterwards');
};

# What it does not build on may go.
subtest 'the last image is not seen' => sub {
    for my $action (\&remove_first, \&prune) {
        start_again();
        error_of($action, ['stat', ESTALE, "$names[2]/drive-scsi0.qcow2"]);
        check_archives('afterwards', @names[0, 1]);
    }
};

# Nothing is done, and nothing is read without a lock.
subtest 'whether a guest is there is not known' => sub {
    my $store = start_again();
    my %actions = (prune => \&prune, remove => \&remove_first);
    for my $action (sort keys %actions) {
        like(
            error_of($actions{$action}, ['stat', EIO, 'vm/100']),
            qr{^cannot look for \Q$store\E/vm/100 - Input/output error$},
            "$action: it fails, and says why"
        );
    }
    check_archives('afterwards');
};

subtest 'an archive that cannot be looked at does not keep others from being read' => sub {
    start_again();
    my $problem;
    my $error = error_of(sub { $problem = $chain->problem($names[2]) },
        ['stat', EIO, "$names[0]/removed.json"]);
    is_deeply([$error, $problem], ['', ''], 'it is restored');
    like($chain->log, qr/^warn: cannot look for /m, 'and there is a warning');
    check_archives('afterwards');
};

subtest 'an archive whose manifest cannot be read holds nobody up' => sub {
    my $store = start_again();
    my $fault = ['read', EIO, "$names[2]/manifest.json"];
    my $message = qr{cannot read \Q$store\E/vm/100/\S+/manifest[.]json};
    $chain->write_random;
    is(error_of(\&back_up, $fault), '', 'a backup works');
    like(
        $chain->log,
        qr/^warn: all disks are backed up in full - $message/m,
        'the log says why the backup is full'
    );
    like(error_of(\&remove_first, $fault),
        $message, 'an archive on which it may build is not removed');
    check_archives('while it could not be read');
    is(error_of(sub { $chain->provider->remove($names[2]) }, $fault),
        '', 'the unreadable archive itself can be removed');
    is(error_of(\&remove_first), '', 'then others can be removed');
    check_archives('afterwards', @names[0, 2]);
};

subtest 'errors during a backup' => sub {
    my $store = start_again();
    for my $fault (
        ['write', EIO, '.qcow2'],
        ['write', ESTALE, 'manifest.json'],
        ['fsync', EIO, '.qcow2'],
        ['fsync', EIO, '.digests'],
        ['fsyncdir', EINVAL, 'vm/100'],
        ['rename', ESTALE, 'vm/100/'],
        ['mkdir', EIO, '.tmp'],
        ['read', EIO, '.tmp'],
        )
    {
        $chain->write_random;
        my $text = "$fault->[0] $fault->[2]";
        my $error = error_of(\&back_up, $fault);
        like($error, qr{\Q$store\E}, "$text: the backup fails, and says where");
        like($error, qr/ - Input\/output error$/m, "$text: and why") if $fault->[0] eq 'mkdir';
        note($error);
    }
    is(error_of(\&back_up), '', 'the next backup works');
    check_archives('after the last fault');
};

subtest 'a file of a removed archive is open' => sub {
    my $store = start_again();
    open(my $fh, '<', "$store/$names[0]/drive-scsi0.digests") or die "open: $!\n";
    is(error_of(\&remove_first), '', 'the removal works');
    is_deeply([$chain->names], [@names[1, 2]], 'the archive is gone');
    $chain->forget($names[0]);
    $chain->write_random;
    is(error_of(\&back_up), '', 'a backup works');
    close($fh);
    is(error_of(sub { $chain->provider->prune(100, 5) }), '', 'what was open is closed');
    check_archives('afterwards');
};

# An error of the system is no damage: nothing is noted, verify does not call the archive damaged, and prune neither forgets nor
# removes it.
subtest 'errors while an archive is read' => sub {
    my @files
        = map { "$names[1]/$_" } qw(drive-scsi0.qcow2 drive-scsi0.digests guest.conf manifest.json);
    my @errors
        = (['open', EMFILE, ENFILE, EACCES, ENOMEM], ['read', EIO, ESTALE], ['stat', ESTALE]);
    my @faults = map {
        my ($operation, @errnos) = $_->@*;
        map { [$operation, $_] } @errnos
    } @errors;
    for my $fault (@faults) {
        push(@files, shift(@files));
        for my $file ($ENV{PBA_FULL} ? @files : $files[0]) {
            my $text = do { local $! = $fault->[1]; "$fault->[0] of $file: $!" };
            my @fault = ($fault->@*, $file);
            start_again();
            my $verdict = 'nothing';
            error_of(
                sub {
                    $verdict = join(' ', 'problems:', $chain->provider->verify($names[1])->@*);
                },
                \@fault
            );
            is($verdict, 'nothing', "$text: verify dies") or next;
            is_deeply([map { $_->{damaged} // () } $chain->provider->list(100)->@*],
                [], "$text: nothing is noted");
            error_of(sub { $chain->provider->prune(100, 2) }, \@fault);
            my %there = map { $_ => 1 } $chain->names;
            ok($there{ $names[1] }, "$text: prune keeps it");
        }
    }
    check_archives('once the server is well again', $names[0]);
};

subtest 'errors while an archive is restored' => sub {
    start_again();
    my @fault = ('read', EIO, "$names[1]/drive-scsi0.qcow2");
    isnt(error_of(sub { $chain->restored($names[2], 'drive-scsi0') }, \@fault), '', 'it fails');
    check_archives('once the server is well again');
};

# What reads from there cannot even be killed, but whoever wants its data can end.
my $hang = 9999;

subtest 'a server that does not answer' => sub {
    my $store = start_again();
    my $image = "$store/$names[0]/drive-scsi0.qcow2";
    my $server_class = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';
    set_faults(['read', $hang, $image =~ s{\A.*/copy}{copy}r]);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        local $SIG{ALRM} = sub { die "enough\n" };
        alarm(1);
        my $done = eval { $server_class->start($image); 1 };
        POSIX::_exit(!$done && $@ eq "enough\n" ? 0 : 1);
    }
    my $left = 1500;
    my $ended;
    sleep(0.02) while !($ended = waitpid($pid, POSIX::WNOHANG())) && $left--;
    is_deeply([$ended, $?], [$pid, 0], 'a signal ends the work');
    set_faults();
    if (!$ended) {
        kill(KILL => $pid);
        waitpid($pid, 0);
    }
    check_archives('afterwards');
};

subtest 'mounts with local locks' => sub {
    my $nfs = 'rw,vers=4.2,rsize=1048576,hard,proto=tcp,timeo=600,sec=sys,local_lock=none';
    my %cases = (
        "nfs4 $nfs" => undef,
        'nfs4 ' . $nfs =~ s/none/flock/r => 'local_lock=flock',
        'nfs ' . $nfs =~ s/none/all/r => 'local_lock=all',
        'nfs4 ' . $nfs =~ s/none/posix/r => undef,
        'nfs ' . $nfs =~ s/hard/hard,nolock/r => 'nolock',
        'nfs4 ' . $nfs =~ s/hard/soft/r => 'soft',
        'nfs4 ' . $nfs =~ s/hard/softerr/r => 'softerr',
        'cifs rw,vers=3.1.1,cache=strict,hard' => undef,
        'cifs rw,vers=3.1.1,cache=strict,soft,nobrl' => 'nobrl',
        'smb3 rw,nobrl' => 'nobrl',
        'ext4 rw,nolock' => undef,
    );
    for my $case (sort keys %cases) {
        mountinfo("$tmp", split(' ', $case));
        my $warning = mount_warning("$tmp");
        my $option = $cases{$case};
        defined($option)
            ? like($warning, qr/\A\Q$tmp\E is .* mounted with '\Q$option\E'/, $case)
            : is($warning, undef, $case);
    }
    mountinfo("$tmp", 'nfs4', 'rw,local_lock=flock');
    $chain->use_store("$tmp/nfs");
    ok(!eval { $chain->provider->backup_init(100, 'qemu', 1_900_000_000); 0 }, 'a backup begins');
    $chain->provider->backup_cleanup(100, 'qemu', 0, {});
    $chain->provider->prune(100, 1);
    is(() = $chain->log =~ m/^warn: .* mounted with 'local_lock=flock'/mg, 1, 'and warns once');
    unlink("$tmp/mountinfo");
    is(mount_warning("$tmp"), undef, 'without the table');
};

done_testing();
