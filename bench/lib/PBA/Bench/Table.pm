package PBA::Bench::Table;

# The records of PBA::Bench as rows of a table, which can be printed one by one.

use v5.36;

my $format = "%-8s %-50s %9s %9s %6s %9s %9s %6s  %-28s %9s %8s %8s\n";

sub head () {
    my @names = (
        'bench', 'case', 'ours s', 'peer s', 'ratio', 'ours min',
        'peer min', 'ratio', 'peer', 'floor s', 'ours MiB', 'peer MiB',
    );
    return sprintf($format, @names) . sprintf($format, map { '-' x length($_) } @names);
}

sub row ($record) {
    my ($ours, $peer, $floor) = $record->@{qw(ours peer floor)};
    return sprintf($format,
        $record->@{qw(bench case)}, _seconds($ours),
        _seconds($peer), _ratio($record->{ratio}),
        _seconds($ours, 'seconds_min'), _seconds($peer, 'seconds_min'),
        _ratio($record->{ratio_min}), $peer->{name} // '-',
        _seconds($floor), _mib($ours),
        _mib($peer),);
}

sub _seconds ($figures, $key = 'seconds') {
    return '-' if !$figures;
    return sprintf($figures->{$key} < 1 ? '%.4f' : '%.2f', $figures->{$key});
}

sub _ratio ($ratio) {
    return defined($ratio) ? sprintf('%.2f', $ratio) : '-';
}

sub _mib ($figures) {
    return defined($figures->{rss_kib}) ? sprintf('%.1f', $figures->{rss_kib} / 1024) : '-';
}

1;
