package PVE::BackupAccess::Provider::Store::Filter;

# Runs a program that reads or writes a stream while its caller goes on. The program gets only the handles that are passed
# to it, and ends with this process.

use v5.36;

use POSIX ();

use PVE::BackupAccess::Program qw(how_ended is_of_system kill_child start_program temporary_file);
use PVE::BackupAccess::Wait qw(wait_for_child);

# handles: in, out, err. The default is /dev/null, and for err a file whose first line said() returns.
sub start ($class, $handles, @command) {
    my $log = $handles->{err} ? undef : temporary_file();
    my $self = bless({ owner => $$, name => $command[0], log => $log }, $class);
    start_program(\$self->{pid}, { err => $log, $handles->%* }, @command);
    return $self;
}

# The first line that the program wrote to its standard error.
sub said ($self) {
    my $log = $self->{log} // return '';
    seek($log, 0, 0);
    chomp(my $line = <$log> // '');
    return $line;
}

# Waits for the program. Returns its status, undef if other code of this process waited for it. If a handler dies
# here, DESTROY kills the program.
sub _wait ($self) {
    local ($!, $?);
    my $status = wait_for_child($self->{pid});
    delete($self->{pid});
    return $status;
}

# Waits for the program. Returns why it failed, undef if it did not.
sub problem ($self) {
    my $status = $self->_wait;
    $self->{status} = $status;
    return undef if defined($status) && $status == 0;
    my $said = $self->said;
    $self->{'is of system'} = is_of_system($status, $said);
    return $said if $said =~ m/\Acannot run /;    # it never began
    return join(' - ', "$self->{name} " . how_ended($status), grep { $_ ne '' } $said);
}

# Whether the program failed because its reader had closed the pipe.
sub is_unread ($self) {
    return 1 if ($self->{status} // 0) == POSIX::SIGPIPE();
    my $log = $self->{log} // return 0;
    seek($log, 0, 0);
    return scalar(grep { m/Broken pipe/ } <$log>);
}

# Whether this problem is one of the system, not of what the program read.
sub is_of_system_problem ($self) { return $self->{'is of system'} }

# Kills the program.
sub stop ($self) {
    my $pid = $self->{pid} // return;
    local ($!, $?);
    kill_child($pid);
    delete($self->{pid});
    return;
}

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    $self->stop if $self->{owner} == $$;
    return;
}

1;
