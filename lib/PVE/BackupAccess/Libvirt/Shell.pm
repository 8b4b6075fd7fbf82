package PVE::BackupAccess::Libvirt::Shell;

# One virsh process that runs many commands: starting one for each command would take longer than the command
# itself.

use v5.36;

use Errno qw(EINTR);
use IO::Select ();
use POSIX qw(SIG_SETMASK);

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(fork_child kill_child program_environment);
use PVE::BackupAccess::Try qw(attempt_any ensure);
use PVE::BackupAccess::Wait qw(slice wait_for_child);

my $Error = 'PVE::BackupAccess::Error';
my $max_reply = 64 << 20;

my %environment = (
    program_environment(),
    TERM => 'dumb',
    INPUTRC => '/dev/null',
);

sub new ($class, $uri, $timeout) {
    my @connect = defined($uri) ? ('--connect', $uri) : ();
    return bless({ command => ['virsh', '-q', @connect], timeout => $timeout }, $class);
}

my sub exec_virsh ($mask, @command) {
    delete(@ENV{qw(IFS CDPATH ENV BASH_ENV)});
    @ENV{ keys %environment } = values %environment;
    $SIG{$_} = 'DEFAULT' for qw(INT TERM HUP PIPE);
    POSIX::sigprocmask(SIG_SETMASK, $mask);
    no warnings 'exec';
    exec { $command[0] } @command;
    print {*STDERR} "error: virsh cannot be started - $!\n";
    POSIX::_exit(127);
}

# Both outputs are one. It is in a process group of its own: an interrupt on the terminal is for us.
my sub start ($process, @command) {
    pipe(my $in, my $to) && pipe(my $from, my $out) or die "cannot make a pipe to virsh - $!\n";
    my $note = sub ($pid) {
        $process->%* = (pid => $pid, to => $to, from => $from, owner => $$);
    };
    my $problem = fork_child(
        $note,
        sub ($mask) {
            setpgrp(0, 0);
            open(STDIN, '<&', $in) && open(STDOUT, '>&', $out) && open(STDERR, '>&', $out)
                or POSIX::_exit(126);
            exec_virsh($mask, @command);
        }
    );
    die "cannot start virsh - $problem\n" if defined($problem);
    return;
}

# If it hangs in a call, virsh is left behind: the caller must be able to end.
my sub end ($process) {
    my $pid = $process->{pid} // return;
    close($_) for $process->@{qw(to from)};
    local ($?, $!);
    kill_child($pid);
    return;
}

# The seconds until the deadline. Dies if none are left.
my sub seconds_left ($self, $deadline) {
    my $left = $deadline - now();
    die "virsh did not answer within $self->{timeout} seconds\n" if $left <= 0;
    return $left;
}

# Sends the next part of the command and appends the output that has arrived. Returns false at the end of the
# output. Signal handlers can run while it waits.
my sub go_on ($self, $process, $to_write, $text, $deadline) {
    my $left = seconds_left($self, $deadline);
    my $writer = $to_write->$* eq '' ? undef : IO::Select->new($process->{to});
    my ($readable, $writable)
        = IO::Select::select(IO::Select->new($process->{from}), $writer, undef, slice($left));
    if ($writable && $writable->@*) {
        my $n = syswrite($process->{to}, $to_write->$*, 4096);
        die "cannot send a command to virsh - $!\n" if !defined($n) && $! != EINTR;
        substr($to_write->$*, 0, $n // 0) = '';
    }
    return 1 if !$readable || !$readable->@*;
    my $n = sysread($process->{from}, $text->$*, 65536, length($text->$*));
    die "virsh's answer has more than $max_reply bytes\n" if length($text->$*) > $max_reply;
    return defined($n) ? $n : $! == EINTR;
}

# Returns the output of a separate virsh process, which gets its arguments without any quoting. Dies if virsh
# fails.
sub run ($self, @arguments) {
    my ($process, $text, $error, $status) = ({}, '');
    my $deadline = now() + $self->{timeout};
    my $work = sub {
        start($process, $self->{command}->@*, @arguments);
        close($process->{to});
        $error = attempt_any {
            1 while go_on($self, $process, \(my $nothing = ''), \$text, $deadline);
            local $?;
            $status
                = wait_for_child($process->{pid}, sub () { seconds_left($self, $deadline) });
        };
        end($process) if defined($error);
    };
    ensure($work, sub ($failed) { end($process) if $failed });
    my $problem = defined($error) ? "$error" : ($status // 0) ? $text : return $text;
    $Error->throw('ConnectionError',
        "virsh $arguments[0] failed - " . ($problem =~ s/^error:\s*//mgr) =~ s/\s+\z//r
            =~ s/\s*\n\s*/ - /gr);
}

# Returns the output of one command line in the virsh process for many commands. Any failure here also ends that
# process, because the rest of its output would be taken for the next command's.
sub ask ($self, $line) {
    my $process = delete($self->{process});
    $process = undef if $process && $process->{owner} != $$;
    $process //= {};
    my $mark = 'pba-' . ++$self->{count} . '-end';
    my $text = '';
    my $line_left = "$line\necho $mark\n";
    my $work = sub {
        start($process, $self->{command}->@*) if !$process->{pid};
        local $SIG{PIPE} = 'IGNORE';
        my $deadline = now() + $self->{timeout};
        while ($text !~ m/^\Q$mark\E/m) {
            go_on($self, $process, \$line_left, \$text, $deadline)
                or die 'virsh has ended: ' . ($text =~ s/\s+/ /gr =~ s/\A.*?error: //r) . "\n";
        }
    };
    ensure($work, sub ($failed) { end($process) if $failed });
    $self->{process} = $process;
    return $text =~ s/^virsh # .*$//mgr =~ s/^\Q$mark\E.*//msr;
}

sub DESTROY ($self) {
    my $process = delete($self->{process}) // return;
    end($process) if $process->{owner} == $$;
    return;
}

1;
