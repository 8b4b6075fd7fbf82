package Demo::Screen;

# The demo's output, the problems found, and interruption by Ctrl-C.

use v5.36;

use Exporter qw(import);
use IO::Handle ();
use POSIX ();
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Try qw(ensure);

our @EXPORT_OK = qw(heading milliseconds now output_of problem run step);

my @problems;
my $interrupted;

sub now () {
    return clock_gettime(CLOCK_MONOTONIC);
}

sub milliseconds ($seconds) {
    return defined($seconds) ? sprintf('%.1f', 1000 * $seconds) : '-';
}

sub heading ($text) {
    print "\n$text\n";
    return;
}

# Runs the code, and prints the label, the bytes and the seconds, then the problems found by the code and by
# the check that runs after it. The code returns the bytes, optionally a more precise label, and optionally
# the seconds, if not all of its time counts.
sub step ($label, $code, $check = sub { }) {
    my $terminal = -t STDOUT;
    my ($began, $known) = (now(), scalar(@problems));
    print "  $label ..." if $terminal;
    my ($bytes, $done, $seconds);
    ensure(sub { ($bytes, $done, $seconds) = $code->() }, sub (@) { print "\r\e[K" if $terminal },);
    check_interrupted();
    $seconds //= now() - $began;

    my $size = defined($bytes) ? bytes($bytes) : '';
    printf("  %-54s %10s %6.2f s\n", $done // $label, $size, $seconds);
    $check->();
    print "  WRONG: $_\n" for @problems[$known .. $#problems];
    return;
}

sub problem ($text) {
    push @problems, substr($text =~ s/\s*\n\s*(?=.)/; /gr =~ s/\s+\z//r, 0, 200);
    return;
}

# ---- other programs ----

# Returns the exit status of a program and its output.
sub output_of (@command) {
    my $pid = open(my $out, '-|') // die "fork: $!\n";
    exec_program(@command) if !$pid;
    local $/ = undef;
    my $text = <$out> // '';
    close($out);
    check_interrupted();
    return ($? & 127 ? 128 + ($? & 127) : $? >> 8, $text);
}

sub exec_program (@command) {
    open(STDIN, '<', '/dev/null') or POSIX::_exit(126);
    open(STDERR, '>&', \*STDOUT) or POSIX::_exit(126);
    { no warnings 'exec'; exec(@command) }
    syswrite(STDOUT, "$command[0]: $!\n");
    POSIX::_exit(127);
}

sub run (@command) {
    my ($status, $text) = output_of(@command);
    die "'@command' failed with status $status: $text\n" if $status != 0;
    return $text;
}

# ---- interruption ----

# A signal ends the current work like an error, so that everything is undone.
sub handle_signals () {
    for my $name (qw(INT TERM HUP)) {
        $SIG{$name} = sub {
            $interrupted = $name;
            $SIG{$name} = 'IGNORE';
            die "interrupted\n";
        };
    }
    return;
}

# After an interruption, the only warnings are that QEMU was interrupted too; they are not shown.
sub show_warning ($text) {
    return if $interrupted;
    print STDERR "\r\e[K" if -t STDERR;
    print STDERR "  $text";
    return;
}

# Dies again after an interruption, in case other code has caught the exception of the signal handler.
sub check_interrupted () {
    die "interrupted\n" if $interrupted;
    return;
}

sub die_of_signal () {
    return if !$interrupted;
    $SIG{$interrupted} = 'DEFAULT';
    kill $interrupted => $$;
    return;
}

# Runs the demo, prints how it ended, and returns the exit status.
sub main ($code) {
    STDOUT->autoflush(1);
    handle_signals();
    local $SIG{__WARN__} = \&show_warning;
    local $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin";
    my @errors = eval { $code->(); 1 } ? () : ($@);    ## bare eval: all ends here
    my $count = @problems;
    push @errors, "differences: $count, see above\n" if $count;
    print "\n";
    print STDERR $interrupted ? "demo: interrupted\n" : map { "demo: $_" } @errors;
    die_of_signal();
    print @errors ? "demo: NOT verified\n" : "demo: verified\n";
    return @errors ? 1 : 0;
}

1;
