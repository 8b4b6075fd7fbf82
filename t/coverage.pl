# How much of src/, glue/ and lib/ the tests run: ./run coverage [T...]
#
# Builds in a private copy with gcov's counters and runs the tests there under Devel::Cover: all, or the
# ones named. Prints a line per file and the sums; what is not covered is listed in cover_db/.

use v5.36;

use Cwd qw(getcwd);
use File::Temp ();

my $wanted_percent = 90;
my $root = getcwd();
my $copy = File::Temp->newdir('pba-coverage-XXXXXXXX', TMPDIR => 1);

sub run (@command) {
    system(@command) == 0 or die "'@command' failed\n";
    return;
}

sub build () {
    run('sh', '-c', 'git ls-files -z | xargs -0 cp --parents -t "$1"', 'sh', "$copy");
    chdir($copy) or die "cannot enter $copy: $!\n";
    local $ENV{PBA_OPTIMIZE} = '-O0 -g --coverage -fprofile-update=atomic';
    local $ENV{PBA_LDFLAGS} = '--coverage';
    run('perl Makefile.PL >/dev/null && make -s -j2 >/dev/null');
    return;
}

# A test that fails under coverage has failed by its slowness, or fails elsewhere, too.
sub run_tests (@tests) {
    my $options
        = '-silent,1,-db,' . "$copy/cover_db" . ',-coverage,statement,-ignore,.,-select,blib/lib';
    local $ENV{PERL5OPT} = "-MDevel::Cover=$options";
    local $ENV{DEVEL_COVER_OPTIONS} = '';
    my $status = system('prove', '-j2', '-b', '-It/lib', @tests);
    say 'some tests failed: what they did not get to is counted as not covered' if $status;
    return;
}

my @tests = @ARGV ? @ARGV : sort(grep { !m{/(?:c-unit|fuzz|manifest|pod)\.t\z} } glob('t/*.t'));
build();
run_tests(@tests);
say "\n== C";
my @gcovr = (qw(gcovr --root . --filter src/ --filter glue/ --exclude-unreachable-branches));
my $c_bad = system(@gcovr, '--fail-under-line', $wanted_percent);
say "\n== Perl";
run('cover -silent -summary -report text cover_db >cover_db/perl.txt');
run(q(grep -A1000 '^File ' cover_db/perl.txt | sed '/^Total/q'));
run(@gcovr, '--html-details', "$copy/cover_db/c.html");
run('sh', '-c', 'rm -rf "$2/cover_db" && cp -r "$1/cover_db" "$2/"', 'sh', "$copy", $root);
chdir($root);
exit($c_bad ? 1 : 0);
