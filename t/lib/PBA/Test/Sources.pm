package PBA::Test::Sources;

# The project's files according to git, committed or not, and the output of other programs.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

our @EXPORT_OK = qw(lines_of source_files);

sub lines_of (@command) {
    open(my $pipe, '-|', @command) or die "cannot run $command[0]: $!\n";
    my @lines = <$pipe>;
    close($pipe) or die "'@command' failed\n";
    chomp(@lines);
    return @lines;
}

sub source_files (@patterns) {
    my @command = qw(git ls-files --cached --others --exclude-standard --);
    return grep { -e } uniq(lines_of(@command, @patterns));
}

1;
