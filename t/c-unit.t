# Tests of the pure parts of the C core, without Perl: each program in t/c is built with the whole core under
# the sanitizers and prints TAP.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::CBuild;

my $build = PBA::Test::CBuild->new or plan(skip_all => 'no pkg-config, or no -dev packages');
diag('no sanitizer runtime: without it') if !$build->is_sanitized;

my @programs = sort glob('t/c/*.c');
is_deeply([$build->compile(@programs)], [], 'everything compiles without a warning')
    or BAIL_OUT('the C core does not compile');

sub run_program ($source) {
    my ($name) = $source =~ m{([^/]+)\.c\z};
    my ($status, @output) = $build->link($name, [$source]);
    is($status, 0, 'links') or diag(@output);
    return if $status;

    ($status, @output) = $build->run($name);
    my ($count, $planned) = (0, undef);
    for my $line (@output) {
        if ($line =~ m/^(not )?ok (\d+) - (.*)/) {
            ok(!$1, $3);
            $count++;
        }
        elsif ($line =~ m/^1\.\.(\d+)$/) {
            $planned = $1;
        }
        else {
            chomp($line);
            diag($line);
        }
    }
    is($count, $planned // 'a plan', 'ran to its end');
    is($status, 0, 'exit status');
    return;
}

for my $program (@programs) {
    subtest $program => sub { run_program($program) };
}

done_testing();
