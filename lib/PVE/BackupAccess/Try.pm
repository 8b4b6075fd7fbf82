package PVE::BackupAccess::Try;

# Tries code that may fail, without mistaking a signal for a failure. Only this module may do that:
# a bare eval also catches the exception of a signal handler, and the work continues as if no signal
# had come. "./run check evals" finds bare evals.

use v5.36;

use Exporter qw(import);
use Scalar::Util qw(blessed);

our @EXPORT_OK
    = qw(attempt attempt_any deaths_of deaths_of_all ensure is_own reason rethrow worst_of);

# Whether an exception was made by our own code.
sub is_own ($error) {
    return blessed($error) && $error->isa('PVE::BackupAccess::Error');
}

# Throws an earlier exception again, unchanged, and without the __DIE__ handler, which has already
# seen it.
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

# The same, but the code refs after the first undo something: if a signal ends one of them, it is
# run once more.
sub deaths_of_all (@code) {
    return PVE::BackupAccess::_run_all(1, @code)->@*;
}

# Runs the code. Returns its error, or undef. Only returns errors of our own: everything else, such
# as the exception of a callback or a mistake in the code, is passed on unchanged.
sub attempt : prototype(&) ($code) {
    my ($death) = deaths_of($code) or return undef;
    my ($error, $by_signal) = $death->@*;
    rethrow($error) if $by_signal || !is_own($error);
    return $error;
}

# The same for code that does not throw our own errors, such as a module of Perl or a provider under
# test. Only the exception of a signal handler is passed on.
sub attempt_any : prototype(&) ($code) {
    my ($death) = deaths_of($code) or return undef;
    my ($error, $by_signal) = $death->@*;
    rethrow($error) if $by_signal;
    return $error;
}

# The first line of an error.
sub reason ($error) { return $error =~ s/\n.*//sr }

# The most important exception: that of a signal handler, because it must end all of the work, else
# the first.
sub worst_of (@deaths) {
    my ($signal) = grep { $_->[1] } @deaths;
    return $signal // $deaths[0];
}

# Runs the work and then, in any case, the cleanup, which gets the information whether the work
# died. Dies with the exception of one of them, and warns of the other.
sub ensure ($work, $cleanup) {
    my @deaths = deaths_of_all($work, $cleanup) or return;
    my $worst = worst_of(@deaths);
    warn "after that - $_->[0]" for grep { $_ != $worst } @deaths;
    rethrow($worst->[0]);
}

# Here, since it uses this module itself.
require PVE::BackupAccess;

1;
