# The C core under AddressSanitizer, LeakSanitizer and UBSan, as Perl uses it: ./run test --asan [T...]
#
# The module is built in a private copy. A test that fails elsewhere fails here, too. In addition, every report
# of a sanitizer fails the run, with one exception: Perl does not free everything at exit, so a leak counts only
# if our code is in its stack without an allocation by Perl between malloc and our code.

use v5.36;

use Cwd qw(getcwd);
use File::Copy qw(copy);
use File::Temp ();
use FindBin;
use lib "$FindBin::Bin/lib";
use TAP::Harness ();

use PBA::Test::Sources qw(lines_of source_files);

# Tests that use the C core and need no guest.
my @default_tests
    = qw(t/args.t t/qmp-hostile.t t/qmp-odd-replies.t t/qmp-code-ref.t t/qmp-early-form.t t/qmp-callbacks.t
    t/nbd-hostile.t t/nbd-reads.t t/nbd-block-sizes.t t/nbd-interrupted.t);

my @flags = ('-fsanitize=address,undefined', '-fno-omit-frame-pointer');
my $root = getcwd();
my $copy = File::Temp->newdir('pba-asan-XXXXXXXX', TMPDIR => 1);
my $reports = "$copy/.reports";

sub run (@command) {
    system(@command) == 0 or die "'@command' failed\n";
    return;
}

sub copy_tree () {
    run('cp', '-p', '--parents', '-t', $copy, source_files());
    mkdir($reports) or die "$reports: $!\n";
    return;
}

sub build () {
    local $ENV{PBA_OPTIMIZE} = "-O1 -g @flags";
    local $ENV{PBA_LDFLAGS} = "@flags";
    chdir($copy) or die "cannot enter $copy: $!\n";
    run("$^X Makefile.PL >/dev/null");
    run('make -s -j2 >/dev/null');
    return;
}

sub runtimes () {
    my @paths = map { lines_of('gcc', "-print-file-name=$_") } qw(libasan.so libubsan.so);
    my @missing = grep { !m{/} } @paths;
    die "gcc has no @missing\n" if @missing;
    return @paths;
}

# libnbd, GLib and Perl itself are not instrumented, but what they do with our memory is checked. The harness
# runs without the sanitizers.
sub run_tests (@tests) {
    my $log = "log_path=$reports/report";
    my @environment = (
        'LD_PRELOAD=' . join(' ', runtimes()),
        'G_SLICE=always-malloc',
        'PERL_DESTRUCT_LEVEL=2',
        'UBSAN_OPTIONS=print_stacktrace=1',
        'LSAN_OPTIONS=exitcode=0',
        "ASAN_OPTIONS=$log:detect_leaks=1:fast_unwind_on_malloc=0:malloc_context_size=40"
            . ':handle_abort=1',
    );
    my $harness = TAP::Harness->new(
        {
            exec => ['env', @environment, $^X, '-Mblib', '-It/lib'],
            timer => 1,
        }
    );

    # Under ASan, UBSan ignores log_path, so output on stderr is a report, too.
    open(my $stderr, '>&', \*STDERR) or die "cannot keep stderr: $!\n";
    open(STDERR, '>>', "$reports/report.stderr") or die "cannot redirect stderr: $!\n";
    my $aggregate = $harness->runtests(@tests);
    open(STDERR, '>&', $stderr) or die "cannot restore stderr: $!\n";
    copy("$reports/report.stderr", \*STDERR)
        if !$aggregate->all_passed;    # the output that prove shows
    return !$aggregate->all_passed;
}

# Whether our code caused the leak, by the frames from malloc outwards: ours come before any of Perl's.
sub is_our_leak (@frames) {
    for my $frame (@frames) {
        return 1 if $frame =~ m{\bBackupAccess\.(?:so|c|xs)\b|\bsrc/[\w/-]+\.[ch]:};
        return 0 if $frame =~ m{ in Perl\w*_|/(?:lib)?perl[\w.]*\+0x};
    }
    return 0;
}

# The relevant reports in one file of a sanitizer.
sub findings ($file) {
    open(my $fh, '<', $file) or die "cannot read $file: $!\n";
    my $text = do { local $/; <$fh> };
    my @findings;

    # Each leak is a paragraph. Only direct leaks are checked, because the indirect ones depend on them.
    for my $paragraph (split(/\n\s*\n/, $text)) {
        my @frames = $paragraph =~ m/^\s+#\d+ (.*)$/mg;
        if ($paragraph =~ m/^(?:Direct|Indirect) leak of/m) {
            push @findings, $paragraph if $paragraph =~ m/^Direct/m && is_our_leak(@frames);
        }
        elsif (
            $paragraph =~ m/ERROR: AddressSanitizer|runtime error:|DEADLYSIGNAL|LeakSanitizer has/)
        {
            push @findings, $paragraph;
        }
    }
    return @findings;
}

my @tests = @ARGV ? @ARGV : @default_tests;
copy_tree();
build();
my $failed = run_tests(@tests);
my (%seen, $found);
for my $finding (map { findings($_) } glob("$reports/report.*")) {
    my $key = $finding =~ s/==\d+==|0x[0-9a-f]+|\d+ (?:byte|object)//gr;
    next if $seen{$key}++;
    $found++;
    say "\n$finding";
}
chdir($root);
say $found ? "$found kinds of faults found by the sanitizers" : 'nothing found by the sanitizers';

# TAP, so that this can be one of the tests.
say "1..1\n", $failed || $found ? 'not ok' : 'ok', " 1 - @tests under the sanitizers";
exit($failed || $found ? 1 : 0);
