# Runs the inputs that the fuzz targets in t/fuzz have found, and those that reach all code that the targets can
# reach, under the sanitizers. t/fuzz/run.pl looks for more.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::CBuild;
use PBA::Test::Watchdog;

my $build = PBA::Test::CBuild->new or plan(skip_all => 'no pkg-config, or no -dev packages');
diag('no sanitizer runtime: without it') if !$build->is_sanitized;

my @targets = map { m{(\w+)\z} } sort glob('t/fuzz/corpus/*');

# The sources of a target, including those that were split off by subject.
sub sources_of ($target) { return glob("t/fuzz/${target}{,-*}.c") }

my @common = map { "t/fuzz/$_.c" } qw(fake replay);
my @wrapped = qw(poll getpid kill g_get_monotonic_time g_file_get_contents);
my $wrap = join(',', '-Wl', map { "--wrap=$_" } @wrapped);

is_deeply([$build->compile(@common, map { sources_of($_) } @targets)],
    [], 'everything compiles without a warning')
    or BAIL_OUT('the fuzz targets do not compile');

for my $target (@targets) {
    subtest $target => sub {
        my ($status, @output)
            = $build->link($target, [sources_of($target), @common], $wrap);
        is($status, 0, 'links') or return diag(@output);
        my @inputs = sort glob("t/fuzz/corpus/$target/*");
        cmp_ok(scalar(@inputs), '>', 5, 'there are inputs');
        ($status, @output) = $build->run($target, @inputs);
        is($status, 0, 'all is well') or diag(@output[-60 .. -1]);
        my %ran = map { chomp; $_ => 1 } @output;
        is(scalar(grep { !$ran{$_} } @inputs), 0, 'each of ' . @inputs . ' was run');
    };
}

done_testing();
