# Runs the module under valgrind, as Perl uses it: ./run test --valgrind [T...]
#
# An invalid memory access, a use of an uninitialised value or a leak fails the test, except for those of Perl
# itself that t/valgrind.supp lists. The default tests are those that use most of the XS part in the least time.

use v5.36;

use File::Copy qw(copy);
use File::Temp ();

my @default_tests = qw(t/args.t t/handle.t t/qmp-code-ref.t);

my @valgrind = (
    qw(valgrind --quiet --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite),
    qw(--error-exitcode=99 --child-silent-after-fork=yes --num-callers=30),
    '--suppressions=t/valgrind.supp',
);

# The output of the test itself matters only if it fails, because time limits also apply under valgrind.
sub run_test ($test, $log) {
    local $ENV{PERL_DESTRUCT_LEVEL} = 2;
    local $ENV{G_SLICE} = 'always-malloc';
    my @command = (@valgrind, "--log-file=$log", $^X, '-Mblib', '-It/lib', $test);
    my $output = File::Temp->new;
    my $status
        = system('sh', '-c', 'out=$1; shift; exec "$@" >"$out" 2>&1', 'sh', $output, @command);
    return 1 if $status == 0 && -z $log;
    copy($_, \*STDERR) for "$output", $log;    # the output that prove shows
    return 0;
}

my @tests = @ARGV ? @ARGV : @default_tests;
my $failed = 0;
say '1..', scalar(@tests);
for my $number (1 .. @tests) {
    my $test = $tests[$number - 1];
    my $log = File::Temp->new;
    my $ok = run_test($test, "$log");
    $failed++ if !$ok;
    say $ok ? 'ok' : 'not ok', " $number - $test under valgrind";
}
exit($failed ? 1 : 0);
