package PBA::Bench::Measure;

# Runs one side in its own process, and measures time, memory and CPU.
#
#   my $result = PBA::Bench::Measure::run({
#       before => sub { ... },                      # in this process, first
#       prepare => sub { return $prepared },        # in the new process, not measured
#       run => sub ($prepared) { return \%counts },
#       after => sub { ... },                       # in this process, at the end
#   });
#   # { counts, times => { '' => seconds }, rss_kib, cpu_seconds }
#
# run may return { counts, seconds, rss_kib, cpu_seconds } with its own figures, as a program that measures
# itself does, or { counts, times => { name => seconds } } for several times of a run.

use v5.36;

use JSON::PP ();
use List::Util ();
use POSIX ();
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

my $json = JSON::PP->new->canonical->utf8;

# Perl's core modules have no getrusage.
my %getrusage = (x86_64 => 98, aarch64 => 165);

sub now () { return clock_gettime(CLOCK_MONOTONIC) }

sub run ($side) {
    $side->{before}->() if $side->{before};
    pipe(my $reader, my $writer) or die "cannot create a pipe: $!\n";
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        my $result = eval { _measure($side) } // { error => "$@" };
        print {$writer} $json->encode($result);
        close($writer);
        POSIX::_exit(0);
    }
    close($writer);
    my $text = do { local $/; <$reader> }
        // '';
    waitpid($pid, 0);
    die "a measured process ended with status $?\n" if $? || $text eq '';
    my $result = $json->decode($text);
    die $result->{error} if defined($result->{error});
    $side->{after}->() if $side->{after};
    return $result;
}

sub _measure ($side) {
    my $prepared = $side->{prepare} ? $side->{prepare}->() : undef;
    _forget_peak();
    my ($memory, $cpu, $start) = (_peak_kib(), cpu_seconds(), now());
    my $returned = $side->{run}->($prepared);
    my $seconds = now() - $start;
    my $growth = _peak_kib() - $memory;
    my $children = _children_peak_kib();
    my %own = (
        seconds => $seconds,
        rss_kib => defined($children) ? $growth + $children : undef,
        cpu_seconds => cpu_seconds() - $cpu,
    );
    my $knows_better = ref($returned) eq 'HASH' && $returned->{counts};
    my %result = (%own, $knows_better ? %$returned : (counts => $returned));
    $result{times} //= { '' => $result{seconds} };
    delete $result{seconds};
    return \%result;
}

# Resets the peak, so that it does not include loading and preparation.
sub _forget_peak () {
    open(my $fh, '>', '/proc/self/clear_refs') or return;
    syswrite($fh, '5');
    return;
}

sub _peak_kib () {
    open(my $fh, '<', '/proc/self/status') or die "cannot read /proc/self/status: $!\n";
    my ($kib) = map { /^VmHWM:\s+(\d+)/ } <$fh>;
    return $kib // die "no VmHWM in /proc/self/status\n";
}

# The peak of the largest program that this process has run.
sub _children_peak_kib () {
    my $number = $getrusage{ (POSIX::uname())[4] } // return undef;
    my $usage = "\0" x 256;
    syscall($number, -1, $usage) == 0 or return undef;
    return unpack('x32 q', $usage);
}

# Of this process, of the programs that it has run and that have ended, and of the given processes.
sub cpu_seconds (@pids) {
    my ($user, $system, $user_of_others, $system_of_others) = times();
    my $own = $user + $system + $user_of_others + $system_of_others;
    return $own + List::Util::sum0(map { _cpu_seconds_of($_) } @pids);
}

sub _cpu_seconds_of ($pid) {
    open(my $fh, '<', "/proc/$pid/stat") or die "cannot read /proc/$pid/stat: $!\n";
    my @fields = split(' ', <$fh> =~ s/.*\)//sr);
    return ($fields[11] + $fields[12]) / POSIX::sysconf(POSIX::_SC_CLK_TCK);
}

1;
