package PBA::Bench;

# Measures this project, peers (the same task without it) and a floor (the minimal cost), in turn and in one
# run, so that other load on the machine affects all of them.
#
#   my $bench = PBA::Bench->new('regions', \@ARGV);
#   $bench->compare(
#       case => 'next_dirty_region',
#       ours => { prepare => sub { ... }, run => sub ($prepared) { return \%counts } },
#       peer => { name => 'nbdinfo --map', run => sub (@) { ... } },    # or a list of them
#       floor => { name => 'bare C loop', run => sub (@) { ... } },
#   );
#   $bench->finish;
#
# PBA::Bench::Measure runs a side. The counts must be the same for all sides and runs: otherwise the figures
# cannot be compared, and compare() dies. All figures are seconds; less is better. There is one record for
# each peer, printed as a line of JSON or a row of a table:
#
#   { bench, case, runs, counts, ours => { seconds, seconds_min, seconds_max, rss_kib, cpu_seconds },
#     peer => { name, ... }, floor => { name, ... }, ratio => peer's seconds / ours, ratio_min }
#
# seconds are medians. On a busy machine, the minimum of each side and the ratio of these say more.
#
# The arguments of the command line select the cases whose names contain one of them.

use v5.36;

use Getopt::Long ();
use JSON::PP ();
use List::Util qw(any max min uniq);
use POSIX ();

use PBA::Bench::Measure;
use PBA::Bench::Plot;
use PBA::Bench::Table;

my $json = JSON::PP->new->canonical->utf8;

sub new ($class, $name, $argv = [], %more_options) {
    my %options = (runs => 5, only => 'ours,peer,floor');
    my $parser = Getopt::Long::Parser->new;
    my @known = qw(json plot=s runs=i only=s);
    $parser->getoptionsfromarray($argv, \%options, @known, keys(%more_options))
        or die "usage: bench $name [CASE...] [--json] [--plot DIR] [--runs N]"
        . join(' ', ' [--only ours,peer,floor]', sort values(%more_options)) . "\n";
    my %only = map { $_ => 1 } split(/,/, delete $options{only});
    STDOUT->autoflush(1);

    # Programs end with their objects, also if this is interrupted.
    $SIG{$_} = sub { exit(1) }
        for qw(INT TERM HUP);
    return bless { name => $name, only => \%only, words => [@$argv], records => [], %options },
        $class;
}

sub option ($self, $name, $default) { return $self->{$name} // $default }
sub runs ($self) { return $self->{runs} }

sub now () { return PBA::Bench::Measure::now() }

sub median (@values) {
    @values = sort { $a <=> $b } @values;
    my $middle = $#values / 2;
    return ($values[POSIX::floor($middle)] + $values[POSIX::ceil($middle)]) / 2;
}

# Whether the case with this name is selected.
sub wants ($self, $case) {
    my @words = $self->{words}->@*;
    return !@words || any { index($case, $_) >= 0 } @words;
}

# ---- comparing ----

# Returns { counts, ours, peer, floor } with the figures of each (of the first peer), undef if the case is not
# selected.
sub compare ($self, %case) {
    return undef if !$self->wants($case{case});
    my @sides = $self->_sides(\%case);
    die "nothing to measure\n" if !@sides;
    my $counts = $self->_run_in_turn($case{case}, @sides);
    for my $time (uniq map { sort keys $_->{results}[0]{times}->%* } @sides) {
        my $name = join(': ', $case{case}, $time eq '' ? () : $time);
        $self->_record($name, $counts, map { _figures($_, $time) } @sides);
    }
    my %first = map { $_->{role} => _figures($_)->{figures} } reverse @sides;
    return { counts => $counts, %first };
}

# [{ role, name, prepare, run, results }], ours first.
sub _sides ($self, $case) {
    my @sides;
    for my $role (grep { $case->{$_} && $self->{only}{$_} } qw(ours peer floor)) {
        my $given = $case->{$role};
        push @sides,
            map { { role => $role, %$_, results => [] } } ref($given) eq 'ARRAY' ? @$given : $given;
    }
    return @sides;
}

sub _run_in_turn ($self, $case, @sides) {
    my $counts;
    for my $run (1 .. $self->{runs}) {
        for my $side (@sides) {
            my $result = PBA::Bench::Measure::run($side);
            push $side->{results}->@*, $result;
            _check_counts($case, $side->{role}, $counts //= $result->{counts}, $result->{counts});
        }
    }
    return $counts;
}

sub _check_counts ($case, $side, $expected, $got) {
    my ($left, $right) = map { $json->encode($_) } $expected, $got;
    die "$case: $side counted $right, another run $left\n" if $left ne $right;
    return;
}

# A side's seconds for one of its times (default: the first); nothing if there is no such time.
sub _figures ($side, $time = undef) {
    my @results = $side->{results}->@*;
    $time //= (sort keys $results[0]{times}->%*)[0];
    my @seconds = grep { defined } map { $_->{times}{$time} } @results;
    return () if !@seconds;
    my %figures = (
        seconds => 0 + sprintf('%.6f', median(@seconds)),
        seconds_min => 0 + sprintf('%.6f', min(@seconds)),
        seconds_max => 0 + sprintf('%.6f', max(@seconds)),
    );
    $figures{name} = $side->{name} if defined($side->{name});
    my @memory = grep { defined } map { $_->{rss_kib} } @results;
    $figures{rss_kib} = @memory ? int(median(@memory)) : undef;
    my @cpu = grep { defined } map { $_->{cpu_seconds} } @results;
    $figures{cpu_seconds} = @cpu ? 0 + sprintf('%.3f', median(@cpu)) : undef;
    return { role => $side->{role}, figures => \%figures };
}

# ---- results ----

sub _record ($self, $case, $counts, @sides) {
    my ($ours, $floor) = map {
        my $role = $_;
        map { $_->{figures} } grep { $_->{role} eq $role } @sides
    } qw(ours floor);
    my @peers = map { $_->{figures} } grep { $_->{role} eq 'peer' } @sides;
    for my $peer (@peers ? @peers : undef) {
        $self->_print(
            {
                bench => $self->{name},
                case => $case,
                runs => $self->{runs},
                counts => $counts,
                ours => $ours,
                peer => $peer,
                floor => $floor,
                ratio => _ratio('seconds', $ours, $peer),
                ratio_min => _ratio('seconds_min', $ours, $peer),
            }
        );
    }
    return;
}

sub _ratio ($key, $ours, $peer) {
    return undef if !$ours || !$peer || $ours->{$key} <= 0;
    return 0 + sprintf('%.3f', $peer->{$key} / $ours->{$key});
}

sub _print ($self, $record) {
    push $self->{records}->@*, $record;
    if ($self->{json}) {
        say $json->encode($record);
        return;
    }
    print PBA::Bench::Table::head() if $self->{records}->@* == 1;
    print PBA::Bench::Table::row($record);
    return;
}

# Adds a separate plot: see PBA::Bench::Plot::lines.
sub plot_lines ($self, $name, %plot) {
    return if !defined($self->{plot});
    PBA::Bench::Plot::lines("$self->{plot}/$self->{name}-$name.svg", %plot);
    return;
}

# Call it last: with --plot, draws all comparisons.
sub finish ($self) {
    return if !defined($self->{plot}) || !$self->{records}->@*;
    PBA::Bench::Plot::bars("$self->{plot}/$self->{name}.svg", $self->{name}, $self->{records});
    return;
}

1;
