package PVE::BackupAccess::Program;

# Programs that are run to their end, and what others need that start them. None outlives the work that
# wants it: a signal handler of the caller's that dies ends the program as well, and so does the end of
# this process.

use v5.36;

use Exporter qw(import);
use POSIX qw(SIGTERM SIG_BLOCK SIG_SETMASK WNOHANG);
use Time::HiRes qw(sleep time);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(ensure);
use PVE::BackupAccess::Wait qw(wait_for_child);

our @EXPORT_OK = qw(end_with new_pipe program_environment run_program temporary_file);

my $not_run = 127;    # exit status of a child that cannot become the program

# How long a program that was killed is waited for: storage that does not answer may keep it.
my $end_limit = 0.5;

# Where programs are; nothing else of the caller's environment is given to them.
sub program_environment () {
    return (PATH => '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL => 'C');
}

my sub fail ($class, $message) {
    PVE::BackupAccess::Error->throw($class, $message);
}

# Its two ends, which no program inherits, whatever the caller has set.
sub new_pipe () {
    local $^F = 2;
    pipe(my $from, my $to) or fail('SystemError', "cannot make a pipe - $!");
    return ($from, $to);
}

# Has no name, and no program inherits it either.
sub temporary_file () {
    local $^F = 2;
    open(my $file, '+>:raw', undef) or fail('SystemError', "cannot make a temporary file - $!");
    return $file;
}

my sub read_all ($fh) {
    seek($fh, 0, 0);
    local $/ = undef;
    return <$fh> // '';
}

# In a child: from now on a signal ends it with its parent, which may have ended before. Handlers of the
# caller's would run its code here, or swallow the signal.
sub end_with ($parent, $signal = SIGTERM) {
    $SIG{$_} = 'DEFAULT' for grep { m/\A[A-Z]/ && ($SIG{$_} // '') ne 'IGNORE' } keys %SIG;
    PVE::BackupAccess::_end_with_parent($signal) or POSIX::_exit($not_run);
    POSIX::_exit($not_run) if getppid() != $parent;
    return;
}

my sub become ($parent, $mask, $out, $err, @command) {
    end_with($parent);
    POSIX::setsid();    # a terminal's signals are for the caller
    open(STDIN, '<', '/dev/null') or POSIX::_exit($not_run);
    open(STDOUT, '>&', $out) or POSIX::_exit($not_run);
    open(STDERR, '>&', $err) or POSIX::_exit($not_run);
    POSIX::sigprocmask(SIG_SETMASK, $mask);
    local %ENV = program_environment();
    { no warnings 'exec'; exec({ $command[0] } @command) }
    syswrite(STDERR, "$!");
    POSIX::_exit($not_run);
}

# Signals are blocked until the number of the child is known: the one that would be lost is the only
# way to end it.
my sub start ($pid, $out, $err, @command) {
    my ($all, $mask) = (POSIX::SigSet->new, POSIX::SigSet->new);
    my $parent = $$;
    $all->fillset;
    POSIX::sigprocmask(SIG_BLOCK, $all, $mask);
    $pid->$* = fork();
    become($parent, $mask, $out, $err, @command) if defined($pid->$*) && !$pid->$*;
    my $problem = $!;
    POSIX::sigprocmask(SIG_SETMASK, $mask);
    return if defined($pid->$*);
    fail('SystemError', "cannot fork - $problem");
}

# A child that has not been waited for keeps its number.
my sub kill_child ($pid) {
    my $deadline = time + $end_limit;
    return if waitpid($pid, WNOHANG) != 0;
    kill(KILL => $pid);
    sleep(0.005) while waitpid($pid, WNOHANG) == 0 && time < $deadline;
    return;
}

# Runs the program; returns its status, as in $?, and what it wrote to standard output and error.
sub run_program (@command) {
    my ($out, $err) = (temporary_file(), temporary_file());
    my ($pid, $status);
    local $SIG{CHLD} = 'DEFAULT';
    local ($!, $?);
    my $work = sub {
        start(\$pid, $out, $err, @command);
        $status = wait_for_child($pid);
    };
    ensure($work, sub ($died) { kill_child($pid) if $died && $pid });
    my $message = read_all($err);
    fail('SystemError', "cannot tell how $command[0] ended")
        if !defined($status);
    fail('UnsupportedError', "cannot run $command[0] - $message")
        if $status == $not_run << 8;
    return ($status, read_all($out), $message);
}

1;
