# Measures how much of the C and the Perl code the tests run: ./run coverage [T...]
#
# Builds in .coverage with gcov's counters, and runs the tests there under Devel::Cover: all, or the named ones.
# While the sources stay the same, the results of all runs are added up. Prints one line per file, with the
# numbers of the lines that were not run, and the totals; it fails if the total of either language is below the
# limit. Detailed results are in .coverage/html.

use v5.36;

use Cwd qw(getcwd);
use Devel::Cover::DB ();
use Digest::SHA ();
use File::Path qw(make_path remove_tree);
use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();

use PBA::Test::Sources qw(lines_of source_files);

my $wanted_percent = 90;
my $root = getcwd();
my $tree = "$root/.coverage";

# Tests that do not contribute to the coverage: those of the tests' own tools and of the documentation, and
# those that build the C core themselves.
my $no_use = qr{/(?:bench|c-unit|demo|front-recordings|fuzz|harness|house|manifest|pod|soak)\.t\z};

sub run (@command) {
    system(@command) == 0 or die "'$command[0]' failed\n";
    return;
}

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "cannot read $file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# ---- the tree ----

sub sources_digest (@files) {
    my $digest = Digest::SHA->new(256);
    $digest->add($_, "\0", content($_)) for grep { !m{\At/} && m/\.(?:c|h|xs|pm|PL)\z/ } @files;
    return $digest->hexdigest;
}

sub prepare () {
    my @files = source_files();
    my $digest = sources_digest(@files);
    remove_tree($tree) if !-e "$tree/.sources" || content("$tree/.sources") ne $digest;
    make_path($tree);
    run('cp', '-p', '--parents', '-t', $tree, @files);
    chdir($tree) or die "cannot enter $tree: $!\n";
    return if -e '.sources';

    run(qw(gcc -c -fPIC -o coverage-exit.o t/coverage-exit.c));
    local $ENV{PBA_OPTIMIZE} = '-O0 -g --coverage -fprofile-update=atomic';
    local $ENV{PBA_LDFLAGS} = "--coverage -Wl,--wrap=_exit $tree/coverage-exit.o";
    run('perl Makefile.PL >/dev/null && make -s -j2 >/dev/null');

    # Some tests change their user for a while, who needs access to every file.
    make_path('cover_db');
    run('perl -Mblib -MPVE::BackupAccess -e1');
    system('blib/arch/auto/PVE/BackupAccess/pba-vfile 2>/dev/null');
    run(qw(chmod -R a+rwX .));
    open(my $fh, '>', '.sources') or die "cannot write .sources: $!\n";
    print {$fh} $digest;
    close($fh) or die "cannot write .sources: $!\n";
    return;
}

# A test that fails under coverage fails because it is slow, or fails elsewhere, too.
sub run_tests (@tests) {
    my $options = "-silent,1,-loose_perms,1,-db,$tree/cover_db,-coverage,statement"
        . ',-ignore,.,-select,blib/lib';
    local $ENV{PERL5OPT} = "-MDevel::Cover=$options -I$tree/t/lib -MPBA::Test::CoverageExit";
    local $ENV{DEVEL_COVER_OPTIONS} = '';
    my $status = system('prove', '-j' . ($ENV{PBA_JOBS} // 4), '-b', '-It/lib', @tests);
    say 'some tests failed: what they did not get to is counted as not run' if $status;
    return;
}

# ---- the results: { file => { line => [how often each of its statements was run] } } ----

sub c_lines () {
    make_path('html');
    my @filters = map { ('--filter', $_) } qw(src/ glue/ BackupAccess.xs);
    run(qw(gcovr --root . --json html/c.json --html-details html/c.html), @filters);
    my %lines;
    for my $file (JSON::PP->new->decode(content('html/c.json'))->{files}->@*) {
        my @lines = grep { !$_->{'gcovr/noncode'} } $file->{lines}->@*;
        $lines{ $file->{file} } = { map { $_->{line_number} => [$_->{count}] } @lines };
    }
    return \%lines;
}

sub perl_statements () {
    run('cover -silent -nogcov -report html_minimal -outputdir html/perl cover_db >/dev/null');
    my $cover = Devel::Cover::DB->new(db => 'cover_db')->cover;
    my %lines = map { $_ => {} } lines_of(qw(find lib -name *.pm));
    for my $file ($cover->items) {
        my $statements = $cover->file($file)->statement;
        my $name = $file =~ s{\A.*\bblib/}{}r;
        next if !$statements || !$lines{$name};
        for my $line ($statements->items) {
            my @counts = map { $_->covered } $statements->location($line)->@*;
            $lines{$name}{$line} = \@counts;
        }
    }
    return \%lines;
}

# ---- the report ----

# Such as '3,7-9'. Lines without code between two lines are included, so that a branch is one range.
sub ranges ($lines) {
    my ($last_missed, @ranges);
    for my $line (sort { $a <=> $b } keys($lines->%*)) {
        my $missed = grep { !$_ } $lines->{$line}->@*;
        push(@ranges, [$line, $line]) if $missed && !$last_missed;
        $ranges[-1][1] = $line if $missed;
        $last_missed = $missed;
    }
    return join(',', map { $_->[0] == $_->[1] ? $_->[0] : join('-', $_->@*) } @ranges);
}

sub percent ($run, $all) { return $all ? 100 * $run / $all : 0 }

# True if the coverage is sufficient. A file that was never loaded has no statements that can be counted.
sub report ($what, $lines) {
    my ($sum_run, $sum, $enough) = (0, 0, 1);
    say "\n$what";
    for my $file (sort keys $lines->%*) {
        my @counts = map { $_->@* } values($lines->{$file}->%*);
        my $run = grep { $_ } @counts;
        printf(
            "%6.1f %%  %5d of %5d  %s  %s\n",
            percent($run, scalar(@counts)),
            $run, scalar(@counts), $file, ranges($lines->{$file})
        );
        $sum_run += $run;
        $sum += @counts;
        $enough &&= @counts > 0;
    }
    printf("%6.1f %%  %5d of %5d  %s\n", percent($sum_run, $sum), $sum_run, $sum, $what);
    return $enough && percent($sum_run, $sum) >= $wanted_percent;
}

prepare();
run_tests(@ARGV ? @ARGV : grep { !m/$no_use/ } sort(glob('t/*.t')));
my $enough = report('lines of C', c_lines());
$enough &= report('statements of Perl', perl_statements());
say "less than the $wanted_percent % that are asked for" if !$enough;
exit($enough ? 0 : 1);
