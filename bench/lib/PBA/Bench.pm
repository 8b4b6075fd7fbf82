package PBA::Bench;

# Measures this project beside a peer (how the same is done without it) and a floor (the least it
# can cost), all in one run and in turn, so that a busy machine is busy for all of them.
#
#   my $bench = PBA::Bench->new('regions', \@ARGV);     # takes --json --runs N --only SIDE,...
#   $bench->compare(
#       case => 'next_dirty_region',
#       ours => { prepare => sub { ... }, run => sub ($prepared) { return \%counts } },
#       peer => { name => 'nbdinfo --map', run => sub (@) { ... } },
#       floor => { name => 'bare C loop', run => sub (@) { ... } },
#   );
#
# Each run is a process of its own. What run returns is what was counted, and must be the same for
# all sides and runs, or the figures compare nothing: compare() dies. A run that measures itself,
# such as another program, may return { counts, seconds, rss_kib } where it knows better.

use v5.36;

use Getopt::Long ();
use JSON::PP ();
use POSIX ();
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

my $json = JSON::PP->new->canonical->utf8;
my @sides = qw(ours peer floor);

# getrusage has no Perl name in the core modules.
my %getrusage = (x86_64 => 98, aarch64 => 165);

sub new ($class, $name, $argv = [], %more_options) {
    my %options = (runs => 5, only => join(',', @sides));
    my $parser = Getopt::Long::Parser->new;
    $parser->getoptionsfromarray($argv, \%options, 'json', 'runs=i', 'only=s', keys(%more_options))
        or die "usage: bench $name [--json] [--runs N] [--only ours,peer,floor] "
        . join(' ', sort values(%more_options)) . "\n";
    my %only = map { $_ => 1 } split(/,/, delete $options{only});
    STDOUT->autoflush(1);
    return bless { name => $name, only => \%only, %options }, $class;
}

sub option ($self, $name, $default) { return $self->{$name} // $default }
sub runs ($self) { return $self->{runs} }

sub now () { return clock_gettime(CLOCK_MONOTONIC) }

sub median (@values) {
    @values = sort { $a <=> $b } @values;
    my $middle = $#values / 2;
    return ($values[POSIX::floor($middle)] + $values[POSIX::ceil($middle)]) / 2;
}

# ---- comparing ----

sub compare ($self, %case) {
    my @measured = grep { $case{$_} && $self->{only}{$_} } @sides;
    die "nothing to measure\n" if !@measured;
    my (%results, $counts);
    for my $run (1 .. $self->{runs}) {
        for my $side (@measured) {
            my $result = $self->_run_in_child($case{$side});
            push @{ $results{$side} }, $result;
            _check_counts($case{case}, $side, $counts //= $result->{counts}, $result->{counts});
        }
    }
    my %figures = map { $_ => _figures($case{$_}, @{ $results{$_} }) } @measured;
    $self->_print_comparison($case{case}, $counts, %figures);
    return { counts => $counts, %figures };
}

sub _check_counts ($case, $side, $expected, $got) {
    my ($left, $right) = map { $json->encode($_) } $expected, $got;
    die "$case: $side counted $right, another run $left\n" if $left ne $right;
    return;
}

sub _figures ($side, @results) {
    my %figures = (name => $side->{name});
    delete $figures{name} if !defined($side->{name});
    $figures{seconds} = 0 + sprintf('%.6f', median(map { $_->{seconds} } @results));
    my @memory = grep { defined } map { $_->{rss_kib} } @results;
    $figures{rss_kib} = @memory ? int(median(@memory)) : undef;
    return \%figures;
}

sub _run_in_child ($self, $side) {
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
    return $result;
}

sub _measure ($side) {
    my $prepared = $side->{prepare} ? $side->{prepare}->() : undef;
    _forget_peak();
    my $before = _peak_kib();
    my $start = now();
    my $returned = $side->{run}->($prepared);
    my $seconds = now() - $start;
    my $memory = _peak_kib() - $before;
    my $children = _children_peak_kib();
    my %own = (
        seconds => $seconds,
        rss_kib => defined($children) ? $memory + $children : undef,
    );
    return { %own, %$returned } if ref($returned) eq 'HASH' && $returned->{counts};
    return { %own, counts => $returned };
}

# Makes what loading and preparing took no part of the peak.
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

# The largest of the programs this process ran; all of it is growth, since it was not there before.
sub _children_peak_kib () {
    my $number = $getrusage{ (POSIX::uname())[4] } // return undef;
    my $usage = "\0" x 256;
    syscall($number, -1, $usage) == 0 or return undef;
    return unpack('x32 q', $usage);
}

# ---- printing ----

sub emit ($self, %record) {
    say $json->encode({ bench => $self->{name}, %record });
    return;
}

sub json_wanted ($self) { return $self->{json} }

sub _print_comparison ($self, $case, $counts, %figures) {
    my ($ours, $peer) = @figures{qw(ours peer)};
    my $ratio
        = $ours && $peer && $ours->{seconds} > 0
        ? 0 + sprintf('%.3f', $peer->{seconds} / $ours->{seconds})
        : undef;
    my $common = { case => $case, runs => $self->{runs}, counts => $counts, ratio => $ratio };
    return $self->emit(%$common, map { $_ => $figures{$_} } @sides) if $self->{json};

    my $counted = join(', ', map { "$_ $counts->{$_}" } sort keys(%$counts));
    printf("%s: %s (%s), median of %d\n", $self->{name}, $case, $counted, $self->{runs});
    for my $side (grep { $figures{$_} } @sides) {
        my ($seconds, $memory) = @{ $figures{$side} }{qw(seconds rss_kib)};
        my $name = join(': ', $side, $figures{$side}{name} // ());
        printf("    %-40s %12.6f s %12s KiB", $name, $seconds, $memory // 'unknown');
        printf('   %.2f of ours', $seconds / $ours->{seconds}) if $ours && $side ne 'ours';
        print "\n";
    }
    return;
}

# Rows of a table with the column names first.
sub print_table ($self, @rows) {
    my @width;
    for my $row (@rows) {
        for my $i (0 .. $#$row) {
            my $length = length($row->[$i]);
            $width[$i] = $length if $length > ($width[$i] // 0);
        }
    }
    for my $row (@rows) {
        my @cells = map { sprintf($_ ? '%*s' : '%-*s', $width[$_], $row->[$_]) } 0 .. $#$row;
        say join('  ', @cells);
    }
    return;
}

1;
