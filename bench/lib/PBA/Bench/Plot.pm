package PBA::Bench::Plot;

# Plots as SVG files, drawn by gnuplot.
#
#   PBA::Bench::Plot::lines('map.svg',
#       title => 'Dirty regions', x => 'extents', y => 'seconds',      # both axes logarithmic
#       series => [{ name => 'ours', points => [[1000, 0.001], ...] }, ...],
#   );
#   PBA::Bench::Plot::bars('regions.svg', 'regions', \@records);      # of PBA::Bench

use v5.36;

use File::Basename qw(dirname);
use File::Path qw(make_path);
use List::Util qw(uniq);

my @colours = map { "#$_" } qw(1b6ca8 d1495b 7a9e3f 8e6bbf c98a1b 444444);

sub lines ($file, %plot) {
    my @series = grep { $_->{points}->@* } $plot{series}->@*;
    return if !@series;
    my @commands = map {
        "'-' using 1:2 with linespoints lw 2 pt 7 ps 0.5 lc rgb '$colours[$_ % @colours]' title "
            . _quoted($series[$_]{name})
    } 0 .. $#series;
    _draw(
        $file, 760, 460,
        $plot{title},
        'set logscale xy',
        'set format x "10^%L"',
        'set xlabel ' . _quoted($plot{x}),
        'set ylabel ' . _quoted($plot{y}),
        'set key left top',
        'plot ' . join(', ', @commands),
        map {
            ((map { "$_->[0] $_->[1]" } $_->{points}->@*), 'e')
        } @series,
    );
    return;
}

# A row of bars for each record, with its figure at the end.
sub bars ($file, $title, $records) {
    my @bars = _bars_of($records);
    my %colour = (ours => $colours[0], peer => $colours[1], floor => $colours[2]);
    my @roles = uniq map { $_->{role} } @bars;
    my @commands = map {
        "'-' using (\$1/2):2:(\$1/2):(0.4) with boxxyerror fs solid noborder lc rgb '$colour{$_}'"
            . " title '$_'"
    } @roles;
    my @text = "'-' using 1:2:3 with labels left offset 0.5,0 font ',9' notitle";
    my @tics = map { _quoted($_->{label}) . " $_->{y}" } @bars;
    my @blocks = map {
        my $role = $_;
        ((map { "$_->{seconds} $_->{y}" } grep { $_->{role} eq $role } @bars), 'e')
    } @roles;
    _draw(
        $file,
        900,
        90 + 17 * @bars,
        "$title: seconds, less is better",
        'set logscale x',
        'set grid x',
        'set key outside top right horizontal',
        'set ytics (' . join(', ', @tics) . ') font ",9"',
        "set yrange [@{[$bars[-1]{y} - 1]}:1]",
        'set rmargin 12',
        'plot ' . join(', ', @commands, @text),
        @blocks,
        (map { sprintf('%g %g "%.4g"', $_->@{qw(seconds y seconds)}) } @bars),
        'e',
    );
    return;
}

# Bars below each other, with space between the cases.
sub _bars_of ($records) {
    my ($y, @bars) = (0);
    for my $case (uniq map { $_->{case} } @$records) {
        my @of_case = grep { $_->{case} eq $case } @$records;
        my @sides = (
            [ours => $of_case[0]{ours}],
            (map { [peer => $_->{peer}] } @of_case),
            [floor => $of_case[0]{floor}],
        );
        for my $side (grep { $_->[1] && $_->[1]{seconds} > 0 } @sides) {
            my ($role, $figures) = @$side;
            my $label = $role eq 'ours' ? $case : $figures->{name} // $role;
            push @bars,
                { role => $role, y => $y--, seconds => $figures->{seconds}, label => $label };
        }
        $y--;
    }
    return @bars;
}

sub _quoted ($text) { return '"' . ($text =~ s/(["\\])/\\$1/gr) . '"' }

sub _draw ($file, $width, $height, $title, @commands) {
    make_path(dirname($file));
    open(my $fh, '|-', 'gnuplot') or die "cannot run gnuplot: $!\n";
    say {$fh} "set terminal svg size $width,$height noenhanced background 'white' font 'sans,11'";
    say {$fh} 'set output ', _quoted($file);
    say {$fh} 'set title ', _quoted($title);
    say {$fh} $_ for @commands;
    close($fh) or die "gnuplot cannot draw $file\n";
    return;
}

1;
