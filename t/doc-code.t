# Runs every code block of the documentation: README.md, doc/*.md, those of examples, and the synopses in POD.
# HACKING.md describes marks and fixtures. With arguments, runs only those of these files.

use v5.36;

use Cwd qw(getcwd);
use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;

use PBA::Test::DocCode;

my $root = getcwd();

sub content ($file) {
    open(my $fh, '<:encoding(UTF-8)', $file) or die "$file: $!\n";
    local $/;
    return scalar(<$fh>);
}

sub without_indent ($text) {
    return join("\n", grep { $_ ne '' } map { s/\A\s+//r } split(m/\n/, $text)) . "\n";
}

# Fixtures for all files; the others are in t/doc-code/FIXTURE.pl, which returns a function.
my %fixtures = (

    # The block is a part of a file that a test runs, word for word except for the indent.
    in => sub ($block) {
        my $part = without_indent($block->{code} =~ s/^#line .*\n//mgr);
        die "this block is not in $block->{argument}\n"
            if index(without_indent(content($block->{argument})), $part) < 0;
    },

    # For blocks that would need a Proxmox host; the rest of the mark is the reason.
    compiles => sub ($block) {
        die "say why it is only compiled\n" if $block->{argument} eq '';
        PBA::Test::DocCode::run_perl({ $block->%*, code => "return;\n$block->{code}" });
    },

    json => sub ($block) {
        JSON::PP->new->decode($block->{code});
    },
);

sub fixture ($name) {
    return $fixtures{$name} //= do {
        my $file = "t/doc-code/$name.pl";
        die "there is no fixture '$name', no $file\n" if !-e $file;
        my $code = do "$root/$file";
        die $@ || "$file does not return a function\n" if ref($code) ne 'CODE';
        $code;
    };
}

# Not in a plain run: the Debian package is built by the same commands, and tested. Trying a provider takes long, so a
# plain run has one of the blocks that do it, chosen by the seed.
my $seed = $ENV{PBA_SEED} // time();
my $tried = 0;
note("PBA_SEED=$seed");

sub is_left_out ($block) {
    return if $ENV{PBA_FULL} || @ARGV;
    return $block->{fixture} eq 'build'
        || ($block->{code} =~ m/ try-provider / && ($tried++ + $seed) % 3);
}

sub check_block ($block) {
    my $name = "$block->{file}:$block->{line}: $block->{fixture}";
    SKIP: {
        skip("needs PBA_FULL: $name", 1) if is_left_out($block);
        run_block($block, $name);
    }
    return;
}

sub run_block ($block, $name) {
    my $ok = eval { fixture($block->{fixture})->($block); 1 };
    my $error = $@;
    chdir($root) or die "cannot enter $root: $!\n";
    ok($ok, $name) or diag($error);
    return;
}

my @modules = split(m/\n/, qx(find lib -name '*.pm' -o -name '*.pod'));
my @files
    = @ARGV ? @ARGV : (sort(glob('*.md')), sort(glob('{doc,examples/*}/*.md')), sort(@modules));
for my $file (@files) {
    my ($blocks, $problems) = PBA::Test::DocCode::read_file($file);
    is("@$problems", '', "$file: all blocks are marked") or diag(join("\n", $problems->@*));
    check_block($_) for $blocks->@*;
}
done_testing;
