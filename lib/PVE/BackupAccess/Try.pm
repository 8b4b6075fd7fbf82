package PVE::BackupAccess::Try;

# Tries code that may fail, without mistaking a signal for a failure. Only this module may do that:
# a bare eval also catches the exception of a signal handler, and the work continues as if no signal
# had come. "./run check evals" finds bare evals.

use v5.36;

use Exporter qw(import);
use Scalar::Util qw(blessed);

our @EXPORT_OK
    = qw(attempt attempt_any deaths_of deaths_of_all ensure is_own reason rethrow worst_of);

# Whether an exception is one that our own code makes.
sub is_own ($error) {
    return blessed($error) && $error->isa('PVE::BackupAccess::Error');
}

# Dies with what was thrown before, as it is: a __DIE__ handler has had it then.
sub rethrow ($exception) {
    local $SIG{__DIE__} = undef;
    die $exception;
}

# Calls each code ref, even if an earlier one died, and passes it whether one did. Returns the
# exceptions, each as [exception, whether a signal handler threw it]. The caller must not lose any
# of them.
sub deaths_of (@code) {
    return PVE::BackupAccess::_run_all(0, @code)->@*;
}

# The same where the code refs after the first undo something: one that is ended by a signal is run
# once more.
sub deaths_of_all (@code) {
    return PVE::BackupAccess::_run_all(1, @code)->@*;
}

# Runs the code; returns its error, undef if there was none. Only an error of our own is returned: all
# else, such as a callback's exception or a mistake in the code, goes on as it was thrown.
sub attempt : prototype(&) ($code) {
    my ($death) = deaths_of($code) or return undef;
    my ($error, $by_signal) = $death->@*;
    rethrow($error) if $by_signal || !is_own($error);
    return $error;
}

# The same for code that has no errors of our own: a module of Perl's, a provider that is on trial.
# Only what a signal handler dies with goes on.
sub attempt_any : prototype(&) ($code) {
    my ($death) = deaths_of($code) or return undef;
    my ($error, $by_signal) = $death->@*;
    rethrow($error) if $by_signal;
    return $error;
}

# What an error says in one line.
sub reason ($error) { return $error =~ s/\n.*//sr }

# The death that counts: a signal's, since it is to end all of the work; else the first.
sub worst_of (@deaths) {
    my ($signal) = grep { $_->[1] } @deaths;
    return $signal // $deaths[0];
}

# Runs the work, and then the cleanup whatever becomes of it, which is told whether the work died. Dies
# as they did. What is not thrown of two errors is warned of.
sub ensure ($work, $cleanup) {
    my @deaths = deaths_of_all($work, $cleanup) or return;
    my $worst = worst_of(@deaths);
    warn "after that - $_->[0]" for grep { $_ != $worst } @deaths;
    rethrow($worst->[0]);
}

# Here, since it uses this module itself.
require PVE::BackupAccess;

1;
