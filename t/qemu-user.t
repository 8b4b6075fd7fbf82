# A QEMU that runs as another user, or sees other paths than this program: which options are needed, and that
# other users have no access to directories and images.
#
# One QEMU is enough: the kernel checks the permissions of files.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use POSIX ();
use Test::More;

use PBA::Test::Backend;

my ($Backend, $VM) = ('PBA::Test::Backend', 'PBA::Test::VM');

plan(skip_all => 'needs root') if $> != 0;

# That user may not be able to read the files of another QEMU.
plan(skip_all => 'only for a stock QEMU') if $ENV{PBA_QEMU};

my $mib = 1024 * 1024;
my $nogroup = (getpwnam('nobody'))[3];

# IDs that nobody else uses on this machine: of QEMU, of a backup program, and of a group with both as members.
my ($qemus, $ours, $group) = (64_101, 64_102, 64_103);

# QEMU 9.1 has -run-with user=, and 10.0 no longer has -runas and -chroot.
sub run_with (%how) {
    my $has_user = qx(@{[$VM->qemu]} -help) =~ m/-run-with .*user=/;
    return ('-run-with', join(',', map { "$_=$how{$_}" } sort keys %how)) if $has_user;
    my %option = (user => '-runas', chroot => '-chroot');
    return map { ($option{$_}, $how{$_}) } sort keys %how;
}

sub start ($how, %opt) {
    return $Backend->start(name => 'upstream', guest => 0, args => [run_with($how->%*)], %opt);
}

sub open_above ($backend, @dirs) {
    chmod(0711, $backend->vm->dir, @dirs) == 1 + @dirs or die "chmod: $!\n";
    return;
}

# The data of one backup; look is called while the access exists.
sub back_up ($access, $look = sub { }) {
    $access->setup([{ device => 'disk0', 'bitmap-mode' => 'new' }]);
    $look->();
    my $data = $access->volume('disk0')->pread($mib, 65536);
    $access->teardown(1);
    return $data;
}

sub is_backed_up ($backend, $text, $look, %options) {
    my $before = $backend->outside;
    $backend->vm->qemu_io('disk0', 'write -P 0x41 1M 64k');
    my $data = eval { back_up($backend->access(%options), $look) } // "$@";
    ok($data eq "\x41" x 65536, "$text: it is read") or diag(substr($data, 0, 500));
    is_deeply($backend->outside, $before, "$text: nothing is left");
    return;
}

sub fails_and_says ($backend, $text, $pattern, %options) {
    my $before = $backend->outside;
    is(eval { back_up($backend->access(%options)) }, undef, "$text: the backup fails");
    like("$@", $pattern, "$text: the error says why");
    is_deeply($backend->outside, $before, "$text: nothing is left");
    return;
}

# Ends the access as a signal handler would: QEMU keeps the export until this process' connection to it is
# closed.
sub ends_below_copy ($backend, $text, %options) {
    $backend->vm->qemu_io('disk0', 'write -P 0x42 0 8M');
    my $access = $backend->access(%options);
    $access->setup([{ device => 'disk0', 'bitmap-mode' => 'new' }]);
    my ($calls, $done) = (0, 0);
    my $take = sub ($, $) {
        return if ++$calls != 3;
        local $SIG{ALRM} = sub { die "it waits\n" };
        alarm(30);
        $done = eval { $access->teardown(0); 1 } or diag($@);
        alarm(0);
    };
    eval { $access->volume('disk0')->copy(to => $take, 'request-size' => 65536) };
    ok($done, "$text: a teardown from below a copy");
    return;
}

# QEMU creates the socket and opens the images; root created the socket of the monitor.
subtest 'root, and a QEMU of another user' => sub {
    my $backend = start({ user => 'nobody' });
    my $run_dir = $backend->work_dir('run');
    fails_and_says(
        $backend,
        'closed directories',
        qr/ - QEMU runs as user 'nobody' \(\d+\), and this program as 0: /
    );
    open_above($backend, $backend->work_dir('fleecing'));
    my $look = sub {
        my ($dir) = glob("$run_dir/pba-run-*");
        my @dir = stat($dir);
        is(sprintf('%o', $dir[2] & 07777), '1730', 'its directory is open to its group only');
        is_deeply([@dir[4, 5]], [0, $nogroup], 'the directory belongs to root');
    };
    is_backed_up($backend, 'open ones', $look);
};

# With a code ref, the user is not visible, so the caller must give it.
subtest 'root, and a QEMU of a user that has no name' => sub {
    my $backend = start({ user => "$qemus:$group" });
    my $vm = $backend->vm;
    my %options = (qmp => sub ($command, $arguments) { return $vm->qmp($command, $arguments->%*) });
    open_above($backend, $backend->work_dir('fleecing'), $backend->work_dir('run'));
    fails_and_says($backend, 'by a code ref', qr/give that user as qemu-user$/m, %options);
    fails_and_says(
        $backend, 'another user', qr/QEMU runs as user '\?' \(\d+\): that user must/,
        %options,
        'qemu-user' => $ours,
        'qemu-group' => $ours
    );
    is_backed_up(
        $backend, 'by qemu-user', sub { },
        %options,
        'qemu-user' => $qemus,
        'qemu-group' => $group
    );
    is_backed_up($backend, 'by the socket', sub { });
};

# A program that is not root cannot open what another user's process creates. It must say so, even if both users
# share a group that may use the directories and the monitor.
subtest 'two users with a shared group' => sub {
    my $backend = start({ user => "$qemus:$group" });
    my %dir = map { $_ => $backend->work_dir($_) } qw(run fleecing);
    chmod(0666, $backend->qmp_path);
    for my $dir (values %dir) {
        chown($ours, $group, $dir) == 1 && chmod(0750, $dir) == 1 or die "$dir: $!\n";
    }
    open_above($backend);
    my $before = $backend->outside;
    pipe(my $from, my $to) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        $) = "$group $group";
        POSIX::setgid($group);
        POSIX::setuid($ours);
        print {$to} eval { back_up($backend->access); 'done' } // "$@";
        close($to);
        POSIX::_exit(0);
    }
    close($to);
    my $said = do { local $/ = undef; <$from> };
    waitpid($pid, 0);
    like(
        $said,
        qr/QEMU runs as user '\?' \($qemus\), and this program as $ours: .* as root$/m,
        'the backup fails and says why'
    );
    is_deeply($backend->outside, $before, 'nothing is left');
};

sub make_dirs (@dirs) {
    mkdir($_) && chmod(0711, $_) or die "$_: $!\n" for @dirs;
    return;
}

# The directories have these paths here, and those in QEMU.
sub check_other_paths ($backend, $text, $here, $there) {
    my %here = ('run-dir' => "$here/run", 'fleecing-dir' => "$here/fleecing");
    my %there = ('qemu-run-dir' => "$there/run", 'qemu-fleecing-dir' => "$there/fleecing");
    fails_and_says(
        $backend,
        "$text: without a word",
        qr/No such file or directory.* - QEMU sees other paths.*--qemu-run-dir/, %here
    );
    is_backed_up($backend, $text, sub { }, %here, %there);
    ends_below_copy($backend, $text, %here, %there);
    is_deeply([glob("$here/*/*")], [], "$text: nothing is left here either");
    return;
}

subtest 'a QEMU that sees other paths' => sub {
    for my $user (undef, 'nobody') {
        my $root = File::Temp->newdir('pba-root-XXXXXX', TMPDIR => 1);
        chmod(0711, "$root");
        make_dirs("$root/run", "$root/fleecing");
        my $backend = start({ chroot => "$root", $user ? (user => $user) : () });
        check_other_paths($backend, 'chroot, ' . ($user // 'root'), "$root", '');
    }
};

# As a service of the system or a container starts it.
subtest 'a QEMU in a mount namespace of its own' => sub {
    plan(skip_all => 'no mount namespaces') if system('unshare --mount true 2>/dev/null') != 0;
    my $root = File::Temp->newdir('pba-root-XXXXXX', TMPDIR => 1);
    make_dirs(map { "$root/$_" } qw(here here/run here/fleecing there));
    my $qemu = $VM->qemu;
    my $program = "$root/qemu";
    open(my $fh, '>', $program) or die "$program: $!\n";
    print {$fh} "#!/bin/sh\nexec unshare --mount sh -ec '",
        "mount --bind $root/here $root/there; mount -t tmpfs none $root/here; ",
        qq{exec $qemu "\$@"' sh "\$@"\n};
    close($fh) or die "$program: $!\n";
    chmod(0755, $program);
    local $ENV{PBA_QEMU} = $program;
    my $backend = $Backend->start(name => 'upstream', guest => 0);
    check_other_paths($backend, 'mount namespace', "$root/here", "$root/there");
};

done_testing;
