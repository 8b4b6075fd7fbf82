# Targets that hang in any call: a signal ends the copy, the volume can be freed, another copy works, and the
# process ends, all while the target still hangs. With FUSE, the kernel lets no process end that has a file of a
# hanging server open.
#
# One QEMU is enough: qemu-storage-daemon is only used as a file system that can be stopped.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

plan(skip_all => 'no qemu-storage-daemon')
    if !grep { -x "$_/qemu-storage-daemon" } split(m/:/, $ENV{PATH});
plan(skip_all => 'no /dev/fuse') if !-e '/dev/fuse';

# Runs in a mount namespace of its own, so that nothing stays mounted however the test ends.
if (!$ENV{PBA_UNSHARED} && system('unshare --mount true 2>/dev/null') == 0) {
    $ENV{PBA_UNSHARED} = 1;
    exec(qw(unshare --mount), $^X, (map { "-I$_" } @INC), $0) or die "unshare: $!\n";
}

my $Server = 'PBA::Test::NBDServer';

my $MiB = 1 << 20;
my $size = 4 * $MiB;
my $limit = 30;    # seconds: only a hang takes longer
my $dir = File::Temp->newdir('pba-hung-XXXXXXXX', TMPDIR => 1);
my $source = $Server->start(size => $size, dirty => [[0, $size]]);

# Mounts the file "mnt", whose writes go to that NBD server.
sub serve ($backing) {
    open(my $fh, '>', "$dir/mnt") or die "$dir/mnt: $!\n";
    close($fh);
    my $pid = fork() // die "cannot fork: $!\n";
    my $node = 'driver=nbd,node-name=n,export=disk,server.type=unix,server.path=';
    my $export = "fuse,id=e,node-name=n,mountpoint=$dir/mnt,writable=on";
    if (!$pid) {
        exec('qemu-storage-daemon', '--blockdev', $node . $backing->socket_path,
            '--export', $export)
            or POSIX::_exit(127);
    }
    my $end = time + $limit;
    while ((-s "$dir/mnt" // 0) != $size) {
        time < $end or die "no FUSE file after $limit seconds\n";
        sleep(0.02);
    }
    return $pid;
}

sub unmount ($pid, $signal) {
    kill($signal, $pid);
    waitpid($pid, 0);
    system("umount -l $dir/mnt 2>/dev/null; true");
    return;
}

# Runs in a separate process: a copy that a signal must end while the target hangs, then another copy, then the
# end. It reports how far it came.
sub victim ($out, $stop, $to, $at) {
    my $pid = fork() // die "cannot fork: $!\n";
    return $pid if $pid;
    my $say = sub ($what) { syswrite($out, "$what\n") };
    local $SIG{ALRM} = sub { die "interrupted\n" };
    my $volume = open_volume($source);
    my $copy = sub {
        $stop->() if $at eq 'open';
        my %options;
        $options{progress} = sub ($done, $all) { $stop->() if $done > 0 }
            if $at eq 'write';
        $options{'bandwidth-limit'} = 2 * $MiB if $at eq 'write';
        alarm($at eq 'write' ? 2 : 1);
        $volume->copy(
            to => $to,
            'without-base' => 1,
            discard => 0,
            'request-size' => 65536,
            %options
        );
    };
    $say->(eval { $copy->(); 1 } ? 'copied' : $@ eq "interrupted\n" ? 'interrupted' : "died: $@");
    alarm(0);
    undef $volume;
    $say->('dropped');
    my $other
        = eval { open_volume($source)->copy(to => "$dir/other", discard => 0, 'without-base' => 1) };
    $say->($other ? 'copied again' : "not copied: $@");
    exit(0);
}

# The output until the process ended or the time was over.
sub hear ($in) {
    my ($text, $end) = ('', time + $limit);
    while (time < $end) {
        vec(my $ready = '', fileno($in), 1) = 1;
        next if select($ready, undef, undef, 0.1) <= 0;
        last if !sysread($in, $text, 4096, length($text));
    }
    return $text;
}

sub has_ended ($pid) {
    my $end = time + $limit;
    while (time < $end) {
        return 1 if waitpid($pid, POSIX::WNOHANG()) == $pid;
        sleep(0.02);
    }
    return 0;
}

for my $at (qw(open write flush)) {
    subtest "a target that hangs at $at" => sub {
        my $backing = $Server->start(size => $size, keep => 1, hang_flush => $at eq 'flush');
        my $daemon = serve($backing);
        pipe(my $in, my $out) or die "pipe: $!\n";
        my $pid = victim($out, sub { kill('STOP', $daemon) }, "$dir/mnt", $at);
        close($out);
        is(hear($in), "interrupted\ndropped\ncopied again\n", 'a signal, then another copy');
        ok(has_ended($pid), 'the process ends');
        ok(-s "$dir/other" == $size, 'the other copy is complete');
        unlink("$dir/other");
        $backing->stop;
        kill('CONT', $daemon);
        unmount($daemon, 'KILL');
    };
}

# Runs in a separate process, which then ends.
sub says_with (@options) {
    pipe(my $in, my $out) or die "pipe: $!\n";
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        local $SIG{ALRM} = sub { die "interrupted\n" };
        alarm(1);
        eval {
            open_volume($source)->copy(to => sub (@) { }, discard => 0, @options);
        };
        syswrite($out, $@);
        exit(0);
    }
    close($out);
    my $said = hear($in);
    my $ended = has_ended($pid);
    kill('KILL', $pid) if !$ended;
    return $ended ? $said : "$said, still there";
}

subtest 'files of digests' => sub {
    my $backing = $Server->start(size => $size, keep => 1);
    my $daemon = serve($backing);
    kill('STOP', $daemon);
    my @file = ("$dir/mnt");
    is(says_with(expected => \@file), "interrupted\n", 'a file of expected digests hangs');
    is(says_with(unchanged => \@file, 'without-base' => 1),
        "interrupted\n", 'a file of unchanged digests hangs');
    is(says_with(digests => @file), "interrupted\n", 'a file to which digests are written hangs');
    $backing->stop;
    kill('CONT', $daemon);
    unmount($daemon, 'KILL');
};

sub parent_of ($stat) {
    open(my $fh, '<', $stat) or return 0;
    return (readline($fh) // '') =~ m/\) \w (\d+) / ? $1 : 0;
}

sub children () {
    return grep { parent_of($_) == $$ } glob('/proc/[0-9]*/stat');
}

# The caller must not see writer processes as its children.
subtest 'the processes of a copy' => sub {
    my %before = map { $_ => 1 } children();
    my ($signals, $more, @found) = (0, 0);
    local $SIG{CHLD} = sub { $signals++ };
    my $look = sub (@) {
        push(@found, grep { $_ > 0 && !$before{$_} } waitpid(-1, POSIX::WNOHANG()));
        $more += grep { !$before{$_} } children();
    };
    open_volume($source)->copy(
        to => "$dir/other",
        'without-base' => 1,
        discard => 0,
        'bandwidth-limit' => 4 * $MiB,
        progress => $look
    );
    cmp_ok($more, '>', 0, 'there is a writer process');
    is_deeply(\@found, [], 'a wait for any child does not find it');
    is($signals, 0, 'its end sends no signal');
    is_deeply([grep { !$before{$_} } children()], [], 'no process is left');
};

done_testing;
