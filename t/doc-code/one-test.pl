# The command that runs one test: that its files are there. It cannot run within itself.

use v5.36;

return sub ($block) {
    my @missing = grep { !-e } $block->{code} =~ m{\b(?:t|doc)/\S+\.\w+}g;
    die "there is no @missing\n" if @missing;
};
