# The command that runs one test: checks that its files exist. It cannot run inside itself.

use v5.36;

return sub ($block) {
    my @missing = grep { !-e } $block->{code} =~ m{\b(?:t|doc)/\S+\.\w+}g;
    die "there is no @missing\n" if @missing;
};
