package PBA::Bench::Program;

# Compiles a C program of the benches: returns its path, in that directory.

use v5.36;

use Config;
use File::Basename qw(basename);

sub compile ($source, $dir, $library) {
    my $program = "$dir/" . basename($source, '.c');
    my $flags = `pkg-config --cflags --libs $library`;
    die "pkg-config knows no $library\n" if $?;
    my @command = ($Config{cc}, '-O2', '-o', $program, $source, split(' ', $flags));
    system(@command) == 0 or die "cannot compile $source\n";
    return $program;
}

1;
