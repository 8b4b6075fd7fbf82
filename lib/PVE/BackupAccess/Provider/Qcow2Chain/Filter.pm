package PVE::BackupAccess::Provider::Qcow2Chain::Filter;

# A program that reads or writes a stream while its caller goes on. It has the handles that it is given and nothing else of the
# caller's, and ends with this process.

use v5.36;

use Fcntl qw(F_DUPFD);
use POSIX ();

use PVE::BackupAccess;
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(end_with program_environment temporary_file);
use PVE::BackupAccess::Wait qw(wait_for_child);

my $Error = 'PVE::BackupAccess::Error';
my $first_free_fd = 10;    # past those that a program has by itself

my sub fail ($message) { $Error->throw('SystemError', $message) }

my sub run_instead ($parent, $handles, @command) {
    end_with($parent);
    $SIG{$_} = 'DEFAULT' for qw(HUP INT PIPE QUIT TERM);   # also what the caller ignores
    POSIX::setsid();                                       # a terminal's signals are for the caller
    open(my $null, '+<', '/dev/null') or POSIX::_exit(127);

    # First out of the way of each other, whatever numbers the handles have.
    my @fds = map { fcntl($_ // $null, F_DUPFD, $first_free_fd) } $handles->@{qw(in out err)};
    for my $fd (0 .. 2) {
        POSIX::dup2($fds[$fd], $fd) // POSIX::_exit(127);
        POSIX::close($fds[$fd]);
    }
    local %ENV = program_environment();
    no warnings 'exec';
    exec({ $command[0] } @command) or print {*STDERR} "$!\n";
    STDERR->flush;
    POSIX::_exit(127);
}

# handles: in, out, err. The default is /dev/null, and for err a file whose content said() returns.
sub start ($class, $handles, @command) {
    my $log = $handles->{err} ? undef : temporary_file();
    my $parent = $$;
    my $pid = fork() // fail("cannot fork - $!");
    run_instead($parent, { err => $log, $handles->%* }, @command) if !$pid;
    return bless({ pid => $pid, owner => $$, name => $command[0], log => $log }, $class);
}

# The first line of what it said.
sub said ($self) {
    my $log = $self->{log} // return '';
    seek($log, 0, 0);
    chomp(my $line = <$log> // '');
    return $line;
}

# Waits until it has ended. Returns its status, undef if other code of this process waited for it.
sub _wait ($self) {
    my $pid = delete($self->{pid});
    local ($!, $?);
    return wait_for_child($pid);
}

# Why it did not end well, undef if it did.
sub problem ($self) {
    my $status = $self->_wait;
    return undef if defined($status) && $status == 0;
    my $how
        = !defined($status) ? 'ended, and other code of this process waited for it'
        : $status & 127 ? 'was ended by signal ' . ($status & 127)
        : 'ended with status ' . ($status >> 8);
    my $said = $self->said;
    return "$self->{name} $how" . ($said eq '' ? '' : " - $said");
}

# Whatever it is at.
sub stop ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);

    # A child that has not been waited for keeps its number.
    kill('KILL', $pid) if waitpid($pid, POSIX::WNOHANG()) == 0;
    $self->_wait;
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    $self->stop if $self->{owner} == $$;
    return;
}

1;
