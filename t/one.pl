# Runs one test for t/all.pl: t/one.pl FILE [ARGUMENTS]. Ends a test that hangs. A test that leaves a process
# running fails, because the process would hold the harness' pipe, on which the harness would wait forever.
# PBA_ERRORS is a file for what the test prints to standard error. If the test passes, it is removed.

use v5.36;

use File::Copy qw(copy);
use FindBin;
use lib "$FindBin::Bin/lib";

use POSIX qw(WNOHANG);
use Time::HiRes qw(sleep);

use PBA::Test::Orphans qw(adopt_orphans);

my $limit = $ENV{PBA_LIMIT} // ($ENV{PBA_FULL} ? 6 * 3600 : 1200);
my $grace = $limit < 10 ? $limit : 10;
my $errors = delete($ENV{PBA_ERRORS});    # not for tests that this one runs

adopt_orphans();                          # so that leftover processes can be named

sub processes () {
    my %process;
    for my $file (glob('/proc/[0-9]*/stat')) {
        open(my $fh, '<', $file) or next;
        my ($pid, $name, $parent) = (<$fh> // '') =~ m/\A(\d+) \((.*)\) \S (\d+) /s or next;
        $process{$pid} = { pid => $pid, name => $name, parent => $parent };
    }
    return \%process;
}

# All descendants of this process, the youngest last.
sub descendants () {
    my $process = processes();
    my @found = ($$);
    my %of;
    push($of{ $_->{parent} }->@*, $_->{pid}) for values $process->%*;
    for (my $i = 0; $i < @found; $i++) {
        push(@found, sort { $a <=> $b } ($of{ $found[$i] } // [])->@*);
    }
    return map { $process->{$_} // () } @found[1 .. $#found];
}

sub command_line ($pid) {
    open(my $fh, '<', "/proc/$pid/cmdline") or return '';
    my $line = <$fh> // '';
    $line =~ tr/\0/ /;
    return substr($line, 0, 300);
}

sub end_them ($why) {
    my @processes = descendants();
    print STDERR "# $why: $_->{pid} $_->{name}: " . command_line($_->{pid}) . "\n" for @processes;
    while (@processes) {
        kill('KILL', map { $_->{pid} } @processes);
        sleep(0.05);
        1 while waitpid(-1, WNOHANG) > 0;
        @processes = descendants();
    }
    return;
}

# The status of the test, or nothing if it did not end in time.
sub wait_for ($test) {
    my $end = time() + $limit;
    while (time() < $end) {
        my $pid = waitpid(-1, WNOHANG);
        return $? if $pid == $test;
        sleep(0.02) if $pid == 0;
    }
    return;
}

# A process that is just ending may take a moment.
sub leaves_nothing () {
    for (1 .. $grace * 20) {
        my $pid = waitpid(-1, WNOHANG);
        return 1 if $pid < 0;
        sleep(0.05) if $pid == 0;
    }
    return 0;
}

# Shows at once, so that tests that run at the same time do not mix, what the test has printed.
sub finish ($status) {
    exit($status) if !defined($errors);
    copy($errors, \*STDERR);
    unlink($errors) if $status == 0;
    exit($status);
}

my $test = fork() // die "fork: $!\n";
if (!$test) {
    open(STDERR, '>', $errors) or die "$errors: $!\n" if defined($errors);
    exec($^X, (map { "-I$_" } qw(blib/lib blib/arch t/lib)), @ARGV) or die "$^X: $!\n";
}
for my $signal (qw(INT TERM HUP)) {
    $SIG{$signal} = sub { kill($signal, $test) };    ## no critic (RequireLocalizedPunctuationVars)
}
my $status = wait_for($test);
if (!defined($status)) {
    end_them("not ended after $limit s");
    finish(124);
}
if (!leaves_nothing()) {
    end_them('left running by the test');
    finish(125);
}
finish(($status & 127) ? 128 + ($status & 127) : $status >> 8);
