# A signal that arrives just before a call that blocks: Perl runs its handler when the call has returned, so
# nothing may wait in one call for what may never come, and no handler may end code that has blocked signals.
# A library that is preloaded sends it there, before each such call in turn, and right after each start of a process. No child is left.
#
# One QEMU is enough: none is run.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(:flock O_CREAT O_RDWR);
use File::Temp ();
use IO::Socket::UNIX ();
use POSIX ();
use Socket qw(SOMAXCONN);
use Test::More;
use Time::HiRes qw(sleep time);

use PVE::BackupAccess::GuestAgent;
use PVE::BackupAccess::Image;
use PVE::BackupAccess::Libvirt::Shell;
use PVE::BackupAccess::Program qw(run_program);
use PVE::BackupAccess::Provider::Store::Container;
use PVE::BackupAccess::Provider::Store::Filter;
use PVE::BackupAccess::Provider::Qcow2Chain::Names;
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Provider::Store::Tar qw(is_for_pct stream_problem);
use PVE::BackupAccess::Provider::Store::Workers qw(side_by_side);

my $provider = 'PVE::BackupAccess::Provider::Qcow2Chain';
my $seconds = 20;                     # that a call may take to end
my $most = $ENV{PBA_FULL} ? 6 : 4;    # calls that block, each of which gets the signal

# Stops the process for which the code waits.
sub hold ($pid) {
    kill(STOP => $pid);
    return $pid;
}

sub image ($dir) {
    my $image = "$dir/image";
    system($ENV{PBA_QEMU_IMG} // 'qemu-img', qw(create -q -f qcow2), $image, 1 << 20) == 0
        or die "qemu-img failed\n";
    return $image;
}

# Creates a program that accepts any arguments and never ends.
sub slow ($dir) {
    open(my $script, '>', "$dir/slow") or die "$dir/slow: $!\n";
    print {$script} "#!/bin/sh\nexec sleep 1000\n";
    close($script) && chmod(0755, "$dir/slow") or die "$dir/slow: $!\n";
    return "$dir/slow";
}

sub silent_socket ($path) {
    return IO::Socket::UNIX->new(Local => $path, Listen => SOMAXCONN) // die "$path: $!\n";
}

# Each waits forever, with its own directory.
my %waits = (
    'a program' => sub ($dir) { run_program('sleep', 1000) },
    'a filter' => sub ($dir) {
        PVE::BackupAccess::Provider::Store::Filter->start({}, 'sleep', 1000)->problem;
    },
    'a stream' => sub ($dir) {
        local $PVE::BackupAccess::Provider::Store::Tar::zstd = slow($dir);
        stream_problem(image($dir), {});
    },
    'a list of lines' => sub ($dir) {
        local $PVE::BackupAccess::Provider::Store::Tar::tar = slow($dir);
        is_for_pct(image($dir));
    },
    'a server that is to end' => sub ($dir) {
        my $server = "${provider}::Server"->start(image($dir));
        hold($server->pid);
        $server->stop;
    },
    'a daemon that is to end' => sub ($dir) {
        my $daemon = PVE::BackupAccess::Image->start(
            disks => [{ device => 'x', file => image($dir), format => 'qcow2' }]);
        hold($daemon->{pid});
        $daemon->stop;
    },
    'workers' => sub ($dir) {
        side_by_side(1, ['x'], sub (@) { sleep(1000) }, sub (@) { });
    },
    'the guest agent' => sub ($dir) {
        my $socket = silent_socket("$dir/agent");
        PVE::BackupAccess::GuestAgent->new(socket => "$dir/agent")->freeze;
    },
    'processes that store containers' => sub ($dir) {
        my %how = map {
            $_ => sub () { }
        } qw(publish discard unlock);
        while (1) {
            PVE::BackupAccess::Provider::Store::Container->start({}, %how)->end(1);
        }
    },
    virsh => sub ($dir) {
        my $shell = PVE::BackupAccess::Libvirt::Shell->new(undef, 1000);
        $shell->{command} = ['sleep', '1000'];
        $shell->ask('list');
    },
    'a virsh of its own' => sub ($dir) {
        my $shell = PVE::BackupAccess::Libvirt::Shell->new(undef, 1000);
        $shell->{command} = ['sleep'];
        $shell->run('1000');
    },
    'the names of a store' => sub ($dir) {
        mkdir("$dir/vm");
        sysopen(my $lock, "$dir/vm/.lock", O_RDWR | O_CREAT) or die "$dir: $!\n";
        flock($lock, LOCK_EX);
        PVE::BackupAccess::Provider::Qcow2Chain::Names::number_for($dir, 'web');
    },
);

# A child that is not about to end.
sub has_child () {
    my $tries = 100;
    while ((my $ended = waitpid(-1, POSIX::WNOHANG)) != -1) {
        return 1 if !$tries--;
        sleep(0.05) if !$ended;
    }
    return 0;
}

# Runs in a separate process, which gets the signal at the Nth call that would block. Its output says how it ended.
sub wait_for_it ($name, $dir) {
    $SIG{ALRM} = sub { die "enough\n" };
    my $ended = eval { $waits{$name}->($dir); 1 } ? 'ended' : $@;
    POSIX::sigprocmask(POSIX::SIG_BLOCK, POSIX::SigSet->new, my $mask = POSIX::SigSet->new);
    print $ended, $mask->ismember(POSIX::SIGALRM) ? 'and signals are blocked' : ();

    # A daemon was told to end, and ends when it has written its bitmaps.
    print 'and a child is left' if $name !~ m/daemon/ && has_child();
    STDOUT->flush;
    POSIX::_exit(0);
}

if (@ARGV) {
    wait_for_it(@ARGV);
}

my $dir = File::Temp->newdir('pba-late-XXXXXXXX', TMPDIR => 1);
my $library = "$dir/late-signal.so";
system(qw(gcc -shared -fPIC -O1 -Wall -Wextra -Werror -o),
    $library, "$FindBin::Bin/late-signal.c", '-ldl') == 0
    or die "gcc failed\n";

# The output, or undef if the process had to be killed, together with everything that it had started.
sub run_with ($number, $name, $own) {
    pipe(my $out, my $in) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        POSIX::setpgid(0, 0);
        open(STDOUT, '>&', $in) or POSIX::_exit(126);
        local @ENV{qw(LD_PRELOAD PBA_LATE_SIGNAL)} = ($library, $number);
        exec($^X, (map { "-I$_" } @INC), $0, $name, $own) or POSIX::_exit(127);
    }
    close($in);
    my $deadline = time + $seconds;
    my $said = '';
    vec(my $ready = '', fileno($out), 1) = 1;
    while (time < $deadline) {
        next if select(my $now = $ready, undef, undef, 0.1) < 1;
        sysread($out, $said, 4096);
        last;
    }
    kill(KILL => -$pid);
    waitpid($pid, 0);
    return $said eq '' ? undef : $said;
}

for my $name (sort keys %waits) {
    my %said;
    for my $number (1 .. $most) {
        my $own = File::Temp->newdir('own-XXXXXXXX', DIR => "$dir");
        $said{$number} = run_with($number, $name, "$own");
    }
    is_deeply(\%said, { map { $_ => "enough\n" } 1 .. $most }, "$name: a signal ends it");
}

done_testing;
