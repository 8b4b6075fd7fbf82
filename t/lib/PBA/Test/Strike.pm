package PBA::Test::Strike;

# Runs code at the nth call by which this process changes files or runs another program, before or after the
# call. Must be loaded before the modules whose calls it intercepts.
#
#   strike_at($number, sub ($where) { kill(KILL => $$) });
#   strike_at($number, sub ($where) { 1 });    # true: the call fails, as on a full disk
#   my $where = strikes_ended();                # undef: there were fewer calls

use v5.36;

use Errno ();
use Exporter qw(import);

our @EXPORT_OK = qw(strike_at strikes_ended);

my ($left, $action, $owner, $struck) = (0, undef, 0, undef);

sub strike_at ($number, $code) {
    ($left, $action, $owner, $struck) = ($number, $code, $$, undef);
    return;
}

sub strikes_ended () {
    $action = undef;
    return $struck;
}

# Does not count in a process that was forked to run a program.
my sub point ($where) {
    return 0 if !$action || $$ != $owner || --$left;
    my $code = $action;
    ($action, $struck) = (undef, $where);
    return $code->($where);
}

my sub around ($name, $call) {
    if (point("before $name")) {
        $! = Errno::ENOSPC();
        return 0;
    }
    my $result = $call->();
    my $errno = $! + 0;
    point("after $name");
    $! = $errno;
    return $result;
}

# Counts once, when the process has ended: how often its state is queried depends on the time.
my sub wait_for ($pid, $flags) {
    my $ended = CORE::waitpid($pid, $flags);
    my ($errno, $status) = ($! + 0, $?);
    point('after a program') if $ended > 0;
    ($!, $?) = ($errno, $status);
    return $ended;
}

BEGIN {
    no warnings 'once';
    *CORE::GLOBAL::rename = sub : prototype($$) ($from, $to) {
        return around("rename to $to", sub { CORE::rename($from, $to) });
    };
    *CORE::GLOBAL::unlink = sub : prototype(@) (@files) {
        return @files ? around("unlink @files", sub { CORE::unlink(@files) }) : 0;
    };
    *CORE::GLOBAL::mkdir = sub : prototype(_;$) ($path, $mode = 0777) {
        return around("mkdir $path", sub { CORE::mkdir($path, $mode) });
    };
    *CORE::GLOBAL::rmdir = sub : prototype(_) ($path) {
        return around("rmdir $path", sub { CORE::rmdir($path) });
    };
    *CORE::GLOBAL::fork = sub : prototype() () {
        my $pid = CORE::fork();
        point('after fork') if $pid;
        return $pid;
    };
    *CORE::GLOBAL::waitpid = sub : prototype($$) ($pid, $flags) { return wait_for($pid, $flags) };
    no feature 'signatures';

    # The first argument is a variable of the caller.
    *CORE::GLOBAL::sysopen = sub (*$$;$) {
        my ($handle, @more) = (\$_[0], @_[1 .. $#_]);
        return around(
            "open $more[0]",
            sub {
                @more == 3
                    ? CORE::sysopen(${$handle}, $more[0], $more[1], $more[2])
                    : CORE::sysopen(${$handle}, $more[0], $more[1]);
            }
        );
    };
}

# Loaded after these changes. Programs are not started by Perl's fork.
use PVE::BackupAccess;

BEGIN {
    no warnings 'redefine';
    my $start = \&PVE::BackupAccess::_start_program;
    *PVE::BackupAccess::_start_program = sub {
        my $problem = $start->(@_);
        point('after fork') if !$problem;
        return $problem;
    };
}

1;
