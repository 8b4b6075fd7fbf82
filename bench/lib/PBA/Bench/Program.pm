package PBA::Bench::Program;

# The C programs of the benches.

use v5.36;

use Config;
use File::Basename qw(basename);

# Returns its path, in that directory.
sub compile ($source, $dir, $library) {
    my $program = "$dir/" . basename($source, '.c');
    my $flags = `pkg-config --cflags --libs $library`;
    die "pkg-config knows no $library\n" if $?;
    my @command = ($Config{cc}, '-O2', '-o', $program, $source, split(' ', $flags));
    system(@command) == 0 or die "cannot compile $source\n";
    return $program;
}

# Runs a program that measures itself, and returns the numbers that it prints.
sub figures ($program, @arguments) {
    open(my $fh, '-|', $program, @arguments) or die "cannot run $program: $!\n";
    my @figures = map { $_ + 0 } split(' ', <$fh> // '');
    close($fh) or die "$program ended with status $?\n";
    return @figures;
}

1;
