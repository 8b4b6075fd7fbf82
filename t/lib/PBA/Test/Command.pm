package PBA::Test::Command;

# Runs bin/pve-backup-access in taint mode, as it is installed: with pipes, or on a terminal.

use v5.36;

use Cwd qw(abs_path);
use Exporter qw(import);
use File::Basename qw(dirname);
use IO::Select ();
use POSIX ();
use Test::More ();

our @EXPORT_OK = qw(command put_in_path run_command start_command start_on_terminal);

my $root = abs_path(dirname(__FILE__) . '/../../../..');
my $time_limit = 120;

# What SIGHUP does to a command: 'DEFAULT', even if the tests run under nohup, or 'IGNORE'.
our $hangup = 'DEFAULT';

# In taint mode, Perl ignores PERL5OPT, with which t/coverage.pl counts statements.
sub command (@arguments) {
    my @options = ('-T', split(' ', $ENV{PERL5OPT} // ''));
    my @libraries = map { "-I$root/blib/$_" } qw(lib arch);
    return ($^X, @options, @libraries, "$root/blib/script/pve-backup-access", @arguments);
}

# Creates a program in the directory that replaces the installed command.
sub put_in_path ($dir) {
    my $file = "$dir/pve-backup-access";
    my $command = join(' ', map { "'$_'" } command());
    open(my $script, '>', $file) or die "$file: $!\n";
    print {$script} "#!/bin/sh\nexec $command \"\$@\"\n";
    close($script) && chmod(0755, $file) or die "$file: $!\n";
    return;
}

my sub child (@arguments) {
    no warnings 'exec';
    $SIG{HUP} = $hangup;
    exec(command(@arguments));
    POSIX::_exit(127);
}

# Runs the command to its end, with pipes: { status => exit status, signal => the signal that ended it, out, err
# }.
sub run_command (@arguments) {
    return start_command(@arguments)->finish;
}

# Starts the command and returns at once. The object has the methods wait_for, kill and finish.
sub start_command (@arguments) {
    pipe(my $out, my $out_end) && pipe(my $err, my $err_end) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(STDIN, '<', '/dev/null') or POSIX::_exit(126);
        open(STDOUT, '>&', $out_end) or POSIX::_exit(126);
        open(STDERR, '>&', $err_end) or POSIX::_exit(126);
        child(@arguments);
    }
    return _new($pid, out => $out, err => $err);
}

# Runs the command on a terminal with that many columns; 'out' is everything that it shows.
sub start_on_terminal ($columns, @arguments) {
    require IO::Pty;
    my $pty = IO::Pty->new;
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        $pty->make_slave_controlling_terminal;
        my $terminal = $pty->slave;
        $terminal->set_winsize(24, $columns);
        for ([\*STDIN, '<&'], [\*STDOUT, '>&'], [\*STDERR, '>&']) {
            open($_->[0], $_->[1], $terminal) or POSIX::_exit(126);
        }
        child(@arguments);
    }
    $pty->close_slave;
    return _new($pid, out => $pty);
}

sub _new ($pid, %handles) {
    my $self = bless({ pid => $pid, handles => \%handles, out => '', err => '' }, __PACKAGE__);
    $self->{select} = IO::Select->new(values %handles);
    return $self;
}

# Reads the available output, and waits for it a short time. Returns false at the end of all output.
sub _read ($self) {
    for my $ready ($self->{select}->can_read(0.2)) {
        my ($name) = grep { $self->{handles}{$_} == $ready } keys $self->{handles}->%*;

        # The end of a terminal is reported as an error.
        my $n = sysread($ready, $self->{$name}, 65536, length($self->{$name}));
        $self->{select}->remove($ready) if !$n;
    }
    return $self->{select}->count > 0;
}

# Waits until the output (out or err) matches. Dies if the command ends before that.
sub wait_for ($self, $name, $pattern) {
    my $deadline = time + $time_limit;
    while ($self->{$name} !~ $pattern) {
        die "no $pattern in: $self->{out}$self->{err}" if !$self->_read || time > $deadline;
    }
    return;
}

sub kill ($self, $signal) {
    CORE::kill($signal => $self->{pid});
    return;
}

# Sends what a user would type.
sub type ($self, $text) {
    syswrite($self->{handles}{out}, $text);
    return;
}

# Whether the command still runs, after a short time.
sub goes_on ($self) { return $self->_read }

sub pid ($self) { return $self->{pid} }

# The output so far.
sub text ($self, $name) { return $self->{$name} }

# Closes the reading end, so that nobody reads the output any more.
sub close_output ($self, $name) {
    $self->{select}->remove($self->{handles}{$name});
    close(delete($self->{handles}{$name}));
    return;
}

sub finish ($self) {
    my $deadline = time + $time_limit;
    while ($self->_read) {
        die "it does not end: $self->{out}$self->{err}" if time > $deadline;
    }
    waitpid(delete($self->{pid}), 0);
    return {
        status => $? & 127 ? undef : $? >> 8,
        signal => $? & 127,
        out => $self->{out},
        err => $self->{err},
    };
}

sub DESTROY ($self) {
    my $pid = delete($self->{pid}) // return;
    local ($?, $!);
    CORE::kill(KILL => $pid);
    waitpid($pid, 0);
    return;
}

1;
