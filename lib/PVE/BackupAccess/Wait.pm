package PVE::BackupAccess::Wait;

# Waits for processes, handles and locks. If a signal handler of the caller dies, the wait always
# ends. Perl runs a handler between two operations. A signal that arrives just before a blocking
# call does not end that call, so no call here blocks for longer than a slice: "./run check waits"
# finds calls that do.

use v5.36;

use Exporter qw(import);
use Fcntl qw(LOCK_EX LOCK_NB);
use IO::Select ();
use List::Util qw(min);
use POSIX qw(WNOHANG);
use Time::HiRes qw(sleep);

use PVE::BackupAccess;
use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(file_system_of);

our @EXPORT_OK
    = qw(child_ends fail_to_lock is_taken keep_trying next_line pause read_some slice wait_for_child wait_for_lock wait_until_readable);

my $slice = 0.2;            # seconds
my $look_again = 0.02;      # the same, where nothing tells
my $read_size = 1 << 16;    # bytes, of a stream of lines

our $longest_refusal = 60;  # seconds

# How long a blocking call may wait at once, of the given number of seconds.
sub slice ($seconds) { return min($seconds, $slice) }

# Sleeps for that many seconds, or not at all if the number is negative.
sub pause ($seconds) {
    my $end = now() + $seconds;
    while ((my $left = $end - now()) > 0) {
        sleep(slice($left));
    }
    return;
}

# Calls the code until it returns a true value or the seconds are over, but at least once. Returns its last value. The
# pauses vary, so that two processes that try at once do not do so again.
sub keep_trying ($seconds, $code) {
    my $end = now() + $seconds;
    my $value;
    while (!($value = $code->()) && (my $left = $end - now()) > 0) {
        pause(min($left, $slice * (1 + rand(0.5))));
    }
    return $value;
}

# Waits until a child has ended, or the code, which is called at least once in a slice, returns that no seconds are left.
# Returns what waitpid does.
my sub wait_while ($pid, $seconds_left) {
    my $fd = PVE::BackupAccess::_open_process($pid);
    my $process;
    undef($process) if $fd < 0 || !open($process, '<&=', $fd);
    my $ended;
    while (($ended = waitpid($pid, WNOHANG)) == 0 && (my $left = $seconds_left->()) > 0) {
        $process
            ? IO::Select->new($process)->can_read(slice($left))
            : sleep(min($left, $look_again));
    }
    return $ended;
}

# Waits until a child has ended, and meanwhile calls the code, if any, at least once in a slice. Returns its status, as in $?,
# undef if other code of this process has waited for it. For a child that was killed: see kill_child of Program.pm.
sub wait_for_child ($pid, $meanwhile = undef) {
    my $ended = wait_while(
        $pid,
        sub () {
            $meanwhile->() if $meanwhile;
            return $slice;
        }
    );
    return $ended == $pid ? $? : undef;
}

# The same, but waits no longer than that. Returns whether the child has ended.
sub child_ends ($pid, $seconds) {
    my $end = now() + $seconds;
    return wait_while($pid, sub () { $end - now() }) != 0;
}

# The handles that have input or are at their end.
sub wait_until_readable (@handles) {
    my $select = IO::Select->new(@handles);
    my @ready;
    1 until @ready = $select->can_read($slice);
    return @ready;
}

# Waits for input and appends at most that many bytes to the text. Returns their number, 0 at the
# end, undef on error.
sub read_some ($handle, $text, $most) {
    my $got;
    do {
        wait_until_readable($handle);
        $got = sysread($handle, $text->$*, $most, length($text->$*));
    } while !defined($got) && $!{EINTR};
    return $got;
}

# The next line, with its newline unless it is the last; undef at the end. The caller keeps the
# text, which has what was read beyond the line, for the next call. If a line has more than $most
# bytes, only a part of it is returned.
sub next_line ($handle, $text, $most = undef) {
    1 while $text->$* !~ m/\n/
        && !(defined($most) && length($text->$*) > $most)
        && read_some($handle, $text, $read_size);
    return $text->$* =~ s/\A([^\n]*\n|[^\n]+)// ? $1 : undef;
}

# After flock has failed: whether it may succeed later, because another process has the lock. CIFS says EACCES for that (see
# fcntl(2)), but also if its server permits no locks. On other file systems, EACCES does not end by waiting.
sub is_taken ($handle) {
    return 1 if $!{EWOULDBLOCK} || $!{EINTR};
    return 0 if !$!{EACCES};
    local $!;
    my ($type) = file_system_of($handle);
    return $type =~ m/\A(?:cifs|smb3)\z/;
}

# Dies after flock has failed for another reason. more: what else is known of it.
sub fail_to_lock ($path, $more = '') {
    PVE::BackupAccess::Error->throw('SystemError',
        "cannot lock $path - $!$more - it must be on a file system on which flock works");
}

# Takes the exclusive lock of flock, of a file that processes lock only for a moment. Dies if it cannot be had.
sub wait_for_lock ($handle, $path) {
    my $end = now() + $longest_refusal;
    until (flock($handle, LOCK_EX | LOCK_NB)) {
        fail_to_lock($path) if !is_taken($handle);
        fail_to_lock($path,
            " for $longest_refusal seconds: another process has the lock, or the server permits none"
        ) if $!{EACCES} && now() > $end;
        sleep($look_again);
    }
    return;
}

1;
