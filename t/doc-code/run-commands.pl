# Lines of "./run COMMAND": checks that the command exists. CI runs "./run test", and t/demo.t runs the demo.

use v5.36;

return sub ($block) {
    my $usage = qx(./run --help);
    for my $line (split(m/\n/, $block->{code})) {
        my ($command) = $line =~ m{\A\./run (\w+)} or die "'$line' is no './run COMMAND'\n";
        die "./run has no command '$command'\n" if $usage !~ m/^  \Q$command\E\b/m;
    }
};
