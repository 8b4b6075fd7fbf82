# Looks for inputs that break a target, with clang's libFuzzer:
#
#   perl t/fuzz/run.pl TARGET [libFuzzer's options]      e.g. -max_total_time=600
#   perl t/fuzz/run.pl --coverage TARGET                 what the inputs in t/fuzz/corpus reach
#
# New inputs are stored in .fuzz/TARGET. Inputs that found a fault are added to t/fuzz/corpus/TARGET with a
# descriptive name, together with all inputs that reach new code:
#
#   .fuzz/build/TARGET -merge=1 t/fuzz/corpus/TARGET .fuzz/TARGET

use v5.36;

use File::Path qw(make_path);

my $coverage = @ARGV && $ARGV[0] eq '--coverage' && shift(@ARGV);
my ($target, @options) = @ARGV;
my ($known) = grep { defined($target) && $_ eq $target }
    map { m{(\w+)\z} } glob('t/fuzz/corpus/*');
die "usage: perl t/fuzz/run.pl [--coverage] wire|replies|nbd|monitor [OPTION...]\n" if !$known;

my $dir = $coverage ? '.fuzz/coverage' : '.fuzz/build';
my @wrapped = qw(poll getpid kill g_get_monotonic_time g_file_get_contents);
my $wrap = join(',', '-Wl', map { "--wrap=$_" } @wrapped);
my @core = grep { !m{^src/vfile/} } sort(glob('src/*/*.c src/*/*/*.c'));
my @sources = (@core, glob("t/fuzz/${target}{,-*}.c"), 't/fuzz/fake.c');
push(@sources, 't/fuzz/replay.c') if $coverage;
my @sanitize
    = $coverage
    ? qw(-fprofile-instr-generate -fcoverage-mapping)
    : ('-fsanitize=fuzzer,address,undefined', '-fno-sanitize-recover=undefined');

sub run (@command) {
    system(@command) == 0 or die "'$command[0]' failed\n";
    return;
}

sub pkg_config ($option) {
    open(my $pipe, '-|', 'pkg-config', $option, qw(libnbd json-glib-1.0 glib-2.0 libcrypto))
        or die "no pkg-config: $!\n";
    my $flags = join(' ', <$pipe>);
    close($pipe) or die "a -dev package is missing\n";
    return split(' ', $flags);
}

make_path($dir, ".fuzz/$target");
run('clang', qw(-std=gnu11 -g -O1 -fno-omit-frame-pointer -I.),
    @sanitize, $wrap, pkg_config('--cflags'), '-o', "$dir/$target", @sources, pkg_config('--libs'));
my @inputs = glob("t/fuzz/corpus/$target/*");
if (!$coverage) {
    my $dictionary = "t/fuzz/$target.dict";
    unshift(@options, "-dict=$dictionary") if -e $dictionary;
    exec("$dir/$target", ".fuzz/$target", "t/fuzz/corpus/$target", @options)
        or die "cannot run $target: $!\n";
}
$ENV{LLVM_PROFILE_FILE} = "$dir/$target.profraw";
open(my $quiet, '>&', \*STDOUT) or die "cannot keep the output: $!\n";
open(STDOUT, '>', '/dev/null') or die "cannot redirect: $!\n";
run("$dir/$target", @inputs);
open(STDOUT, '>&', $quiet) or die "cannot restore the output: $!\n";
run('llvm-profdata', 'merge', '-o', "$dir/$target.profdata", "$dir/$target.profraw");
run('llvm-cov', 'report', "$dir/$target", "-instr-profile=$dir/$target.profdata", @core);
