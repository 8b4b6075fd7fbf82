package PVE::BackupAccess::Program;

# Runs programs to their end, and has functions for modules that start programs themselves. No
# program outlives the work that started it: it ends if a signal handler of the caller dies, and
# with this process.

use v5.36;

use Errno ();
use Exporter qw(import);
use List::Util qw(first);
use POSIX qw(SIGTERM SIG_BLOCK SIG_SETMASK WNOHANG);

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(deaths_of ensure rethrow);
use PVE::BackupAccess::Wait qw(child_ends wait_for_child);

our @EXPORT_OK
    = qw($longest_socket block_signals end_with fork_child how_ended is_of_system kill_child new_pipe program_environment run_program run_program_to_file start_program temporary_file);

our $longest_socket = 107;    # bytes of a path in a struct sockaddr_un

my $not_run = 127;            # exit status of a child that cannot become the program

# How long to wait for a killed program: unresponsive storage may delay its end.
my $end_limit = 0.5;

# The search path for programs. They get nothing else of the caller's environment.
sub program_environment () {
    return (PATH => '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL => 'C');
}

my sub fail ($class, $message) {
    PVE::BackupAccess::Error->throw($class, $message);
}

# Returns the two ends of a pipe. No program inherits them, even if the caller has changed $^F.
sub new_pipe () {
    local $^F = 2;
    pipe(my $from, my $to) or fail('SystemError', "cannot make a pipe - $!");
    return ($from, $to);
}

# A file without a name, which no program inherits either.
sub temporary_file () {
    local $^F = 2;
    open(my $file, '+>:raw', undef) or fail('SystemError', "cannot make a temporary file - $!");
    return $file;
}

# A file in memory, or on disk if the kernel has none. Programs may not notice that what they print does not fit onto a
# disk: then it would lack something, and their status would be 0.
my sub memory_file () {
    local $^F = 2;
    my $fd = PVE::BackupAccess::_open_memory();
    my $file;
    return temporary_file() if $fd < 0 || !open($file, '+<&=', $fd);
    binmode($file);
    return $file;
}

my sub read_all ($fh) {
    seek($fh, 0, 0);
    local $/ = undef;
    return <$fh> // '';
}

# Blocks these signals, by default all. Returns the mask that was set before. The handler of a signal
# that arrived just before runs now, with the last operation of the inner code: later, its exception
# would leave the caller's work with the signals blocked for ever.
sub block_signals (@signals) {
    my ($set, $mask) = (POSIX::SigSet->new(@signals), POSIX::SigSet->new);
    $set->fillset if !@signals;
    POSIX::sigprocmask(SIG_BLOCK, POSIX::SigSet->new, $mask);
    my ($death) = deaths_of(sub (@) { POSIX::sigprocmask(SIG_BLOCK, $set) });
    return $mask if !$death;
    POSIX::sigprocmask(SIG_SETMASK, $mask);
    rethrow($death->[0]);
}

# Runs in a child: from now on, the kernel ends it by a signal when its parent ends, which may
# already have happened. Handlers of the caller would run its code here, or swallow the signal.
sub end_with ($parent, $signal = SIGTERM) {
    $SIG{$_} = 'DEFAULT' for grep { m/\A[A-Z]/ && ($SIG{$_} // '') ne 'IGNORE' } keys %SIG;
    PVE::BackupAccess::_end_with_parent($signal) or POSIX::_exit($not_run);
    POSIX::_exit($not_run) if getppid() != $parent;
    return;
}

# Forks. Returns undef, or why that failed. The parent passes the PID to the first function. The child calls the second one,
# which does not return, with the signal mask to restore. Signals are blocked until the parent has noted the PID and the child has
# its own handlers. An exception of a handler before that would leave the child running, or run the parent's cleanup in it.
sub fork_child ($note, $child) {
    my $mask = block_signals();
    my $pid = fork();
    $child->($mask) if defined($pid) && !$pid;
    my $problem = $!;
    $note->($pid) if defined($pid);
    POSIX::sigprocmask(SIG_SETMASK, $mask);
    return defined($pid) ? undef : $problem;
}

# Where the program is, by its PATH; '' if it is nowhere.
my sub path_of ($program, $search_path) {
    return $program if $program =~ m{/};
    return first { -f && -x _ } map { "$_/$program" } split(/:/, $search_path);
}

# Starts a program with these handles and nothing else of the caller's, and stores its PID. A signal handler that dies
# cannot run in between, because then the PID would be lost and the program could not be ended. how: in, out and err are
# handles, by default /dev/null; listener is a listening socket, passed by systemd's protocol; environment has more
# variables; signal is sent by the kernel when this process ends: 0 for none, by default SIGTERM.
sub start_program ($pid, $how, @command) {
    local $^F = 2;
    open(my $null, '+<', '/dev/null') or fail('SystemError', "cannot open /dev/null - $!");
    my @fds = map { fileno($_) } map({ $how->{$_} // $null } qw(in out err)),
        $how->{listener} // ();
    my %environment = (program_environment(), ($how->{environment} // {})->%*);
    my $path = path_of($command[0], $environment{PATH}) // '';
    my @variables = map { "$_=$environment{$_}" } sort keys %environment;
    local $! = PVE::BackupAccess::_start_program($pid->$*, $path, \@fds, $how->{signal} // SIGTERM,
        \@variables, \@command);
    fail('SystemError', "cannot start $command[0] - $!") if $! != 0;
    return;
}

# How a program has ended, by its status as in $?; undef: other code of this process has waited for it.
sub how_ended ($status) {
    return 'ended, and other code of this process waited for it' if !defined($status);
    return 'was ended by signal ' . ($status & 127) if $status & 127;
    return 'ended with status ' . ($status >> 8);
}

# Errors of the system that say nothing about the content of a file: the next try may succeed. Programs print their texts in
# the C locale.
my $passing = join(
    '|',
    map { local $! = Errno->can($_)->(); quotemeta("$!") }
        qw(EACCES EAGAIN EBUSY ECONNREFUSED ECONNRESET EDQUOT EHOSTDOWN EHOSTUNREACH EIO EMFILE ENETUNREACH ENFILE ENODEV
        ENOLCK ENOMEM ENOSPC ENOTCONN ENXIO EPERM EREMOTEIO EROFS ESTALE ETIMEDOUT)
);

# Whether a program failed because of the system, and not because of what it read: by its status, as in $?, and its message.
sub is_of_system ($status, $message) {
    return 1 if !defined($status) || $status & 127 || $status == $not_run << 8;
    return $message =~ m/: (?:$passing|Read error|.*not enough memory)$/m ? 1 : 0;
}

# Kills a child and waits for it, but not forever: a call that hangs may not let it end. A child keeps its PID until it
# has been waited for.
sub kill_child ($pid, $seconds = $end_limit) {
    return if waitpid($pid, WNOHANG) != 0;
    kill(KILL => $pid);
    child_ends($pid, $seconds);
    return;
}

# Runs the program with this file as its standard output.
my sub run_with ($out, @command) {
    my $meanwhile = ref($command[0]) ? shift(@command) : undef;
    my $err = memory_file();
    my ($pid, $status);
    local $SIG{CHLD} = 'DEFAULT';
    local ($!, $?);
    my $work = sub {
        start_program(\$pid, { out => $out, err => $err }, @command);
        $status = wait_for_child($pid, $meanwhile);
    };
    ensure($work, sub ($died) { kill_child($pid) if $died && $pid });
    my $message = read_all($err);
    fail('SystemError',
        "the exit status of $command[0] is unknown - other code of this process waited for it")
        if !defined($status);
    fail('UnsupportedError', $message =~ s/\n\z//r)
        if $status == $not_run << 8;
    seek($out, 0, 0);
    return ($status, $out, $message);
}

# Runs the program. Returns its status, as in $?, a file with its standard output, and its standard error. If the first
# argument is a code ref, it is called several times a second while the program runs.
sub run_program_to_file (@command) { return run_with(temporary_file(), @command) }

# The same, with the text of its standard output.
sub run_program (@command) {
    my ($status, $out, $message) = run_with(memory_file(), @command);
    return ($status, read_all($out), $message);
}

1;
