package PBA::Test::Gates;

# The gates of t/check.pl. A gate is { name, files => its files, is_own => true if the gate is our own code and
# no external tool, version => versions of its tools, depends_on => other files on which the result for a file
# depends, code => files of the gate itself, at_once => how many files one process checks, check => code that
# returns whether these files are good and prints what is wrong, hint => what to do }.

use v5.36;

use File::Temp ();
use List::Util qw(uniq);

use PBA::Test::House qw(broken_rules);
use PBA::Test::PerlRules qw(bare_evals long_files long_functions long_names
    long_waits wall_clocks);
use PBA::Test::Sources qw(lines_of source_files);

sub _files (@patterns) {
    state %found;
    $found{"@patterns"} //= [source_files(@patterns)];
    return $found{"@patterns"}->@*;
}

sub _perl_files () { return _files('*.pm', '*.pl', '*.t', '*.PL', 'bin/*') }

sub _version ($program) {
    state %version;
    return sub { $version{$program} //= join(' ', lines_of($program, '--version')) };
}

sub _module_version ($module) {
    return sub {
        return eval "require $module; \$${module}::VERSION"    ## no critic (StringyEval)
            // die "no $module\n";
    };
}

sub _run (@command) { return system(@command) == 0 }

sub all () {
    my @gates = (
        _clang_tidy(), _clang_analyzer(), _perltidy(), _perlcritic(),
        _cppcheck(), _clang_format(), _codespell(), _spelling(),
        _shellcheck(), _house(), _evals(), _waits(),
        _functions(), _names(), _lengths(), _clocks(),
    );
    for my $gate (@gates) {
        $gate->{code} = [__FILE__, $INC{'PBA/Test/Sources.pm'}, $INC{'PBA/Test/House.pm'}];
        $gate->{depends_on} //= sub ($file) { return };
        $gate->{at_once} //= 1000;
    }
    return @gates;
}

sub _clang_format () {
    return {
        name => 'clang-format',
        files => sub { _files('*.c', '*.h') },
        version => _version('clang-format'),
        depends_on => sub ($file) { '.clang-format' },
        check => sub (@files) { _run(qw(clang-format --dry-run --Werror), @files) },
        hint => './run tidy formats the files',
    };
}

sub _perltidy () {
    return {
        name => 'perltidy',
        files => \&_perl_files,
        version => _module_version('Perl::Tidy'),
        depends_on => sub ($file) { '.perltidyrc' },
        is_costly => 1,
        at_once => 20,
        check => sub (@files) {
            my @bad = grep { !_is_tidy($_) } @files;
            say "not formatted: $_" for @bad;
            return !@bad;
        },
        hint => './run tidy formats the files',
    };
}

sub _is_tidy ($file) {
    open(my $fh, '<:raw', $file) or die "cannot read $file: $!\n";
    my $source = do { local $/; <$fh> };
    my ($result, $errors) = ('', '');
    my $failed = Perl::Tidy::perltidy(
        argv => [],
        source => $file,
        destination => \$result,
        perltidyrc => '.perltidyrc',
        stderr => \$errors,
        errorfile => \$errors,
    );
    utf8::encode($result) if utf8::is_utf8($result);
    return !$failed && $result eq $source;
}

# Our own headers that a C source includes.
sub _included ($file, $seen = {}) {
    return if $seen->{$file}++;
    open(my $fh, '<', $file) or die "cannot read $file: $!\n";
    my ($dir) = $file =~ m{\A(.*/)};
    my @names = map { m/^#include "(.*)"/ ? $1 : () } <$fh>;
    my @found = grep { -e && !m/ppport/ } map { ("$dir$_", $_) } @names;
    return uniq(map { ($_, _included($_, $seen)) } @found);
}

sub _clang_tidy () { return _clang('clang-tidy', '-clang-analyzer-*') }

# Follows all paths through each function, which takes minutes.
sub _clang_analyzer () {
    my $others = '-bugprone-*,-misc-*,-performance-*,-readability-*';
    return { _clang('clang-analyzer', $others)->%*, is_slow => 1 };
}

# The checks of .clang-tidy without these.
sub _clang ($name, $checks) {
    return {
        name => $name,
        files => sub { _files('src/*.c', 'glue/*.c') },
        version => _version('clang-tidy'),
        depends_on => sub ($file) { ('.clang-tidy', _included($file)) },
        is_costly => 1,
        at_once => 2,
        check => sub (@files) {
            my @flags
                = lines_of(qw(pkg-config --cflags libnbd json-glib-1.0 glib-2.0 libcrypto fuse3));
            my ($perl) = lines_of($^X, '-MExtUtils::Embed', '-e', 'ccopts');

            # Only has the number of suppressed warnings.
            open(STDERR, '>', '/dev/null') or die "no /dev/null: $!\n";
            return _run(
                qw(clang-tidy --quiet),
                "--checks=$checks", @files, '--',
                qw(-std=gnu11 -I.),
                split(' ', "@flags $perl"),
            );
        },
        hint => 'fix it, or mark a false alarm with NOLINT and the reason',
    };
}

sub _cppcheck () {
    return {
        name => 'cppcheck',
        files => sub { _files('src/*.c') },
        version => _version('cppcheck'),
        depends_on => sub ($file) { ('.cppcheck-suppress', _included($file)) },
        at_once => 10,
        check => sub (@files) {
            _run(
                qw(cppcheck --quiet --error-exitcode=1),
                '--enable=warning,performance,portability',
                qw(--inline-suppr --std=c11 -I. --suppressions-list=.cppcheck-suppress),
                (
                    map { "-DG_DEFINE_${_}(a,b)=" }
                        qw(AUTOPTR_CLEANUP_FUNC AUTO_CLEANUP_CLEAR_FUNC EXTENDED_ERROR)
                ),
                @files,
            );
        },
        hint => 'fix it, or mark a false alarm with // cppcheck-suppress and the reason before it',
    };
}

sub _perlcritic () {
    return {
        name => 'perlcritic',
        files => \&_perl_files,
        version => _module_version('Perl::Critic'),
        depends_on => sub ($file) { '.perlcriticrc' },
        is_costly => 1,
        at_once => 15,
        check => sub (@files) {
            my $critic = Perl::Critic->new(-profile => '.perlcriticrc');
            Perl::Critic::Violation::set_format($critic->config->verbose);
            my @violations = map { $critic->critique($_) } @files;
            print @violations;
            return !@violations;
        },
        hint => 'fix it, or put "## no critic (Policy)" there with the reason;'
            . ' .perlcriticrc says which policies apply, and why the others do not',
    };
}

sub _own_perl_files () { return _files('lib/*.pm', 'bin/*', 'examples/*.pm', 'examples/*.pl') }

# One of our own gates: $problems returns the problems of a file as texts.
sub _own_gate ($name, $problems, $hint) {
    return {
        name => $name,
        files => \&_own_perl_files,
        is_own => 1,
        version => sub { return 1 },
        depends_on => sub ($file) { $INC{'PBA/Test/PerlRules.pm'} },
        check => sub (@files) {
            my @found = map { $problems->($_) } @files;
            say for @found;
            return !@found;
        },
        hint => $hint,
    };
}

sub _waits () {
    return _own_gate(
        'waits',
        \&long_waits,
        'a signal that arrives just before a blocking call does not end it: use'
            . ' PVE::BackupAccess::Wait, which waits in slices, and of a child without looking',
    );
}

sub _evals () {
    return _own_gate(
        'evals',
        \&bare_evals,
        'a bare eval swallows exceptions of signal handlers and callbacks: use attempt, attempt_any'
            . ' or ensure of PVE::BackupAccess::Try, or if it may catch everything, put'
            . ' "## bare eval: REASON" at the end of its line',
    );
}

sub _clocks () {
    return {
        _own_gate(
            'clocks',
            \&wall_clocks,
            "the system's time may be set meanwhile: use now of PVE::BackupAccess::Clock, or in C"
                . ' g_get_monotonic_time, or if it is the time of an archive, put "## wall clock:'
                . ' REASON" at the end of the line',
        )->%*,
        files => sub { (_own_perl_files(), _files('src/*.[ch]', 'glue/*.[ch]', '*.xs')) },
    };
}

sub _functions () {
    my $gate = _own_gate('functions', \&long_functions, 'split it by what its parts do');
    return { $gate->%*, files => \&_perl_files };
}

sub _lengths () {
    return {
        _own_gate('lengths', \&long_files, 'split it by subject')->%*,
        files => sub { (_perl_files(), _files('*.c', '*.h', '*.xs', '*.sh', 'run')) },
    };
}

sub _names () {
    my $gate = _own_gate('names', \&long_names,
              "import the module's functions, or give the class a short name: my \$Archive ="
            . " 'PVE::BackupAccess::Provider::Qcow2Chain::Archive'; then \$Archive->load");
    return { $gate->%*, files => \&_perl_files };
}

sub _shellcheck () {
    return {
        name => 'shellcheck',
        files => sub {
            grep { _first_line($_) =~ m/^#(?:!.*sh$| shellcheck shell=)/ }
                _files('run', '.ci/run', '*.sh', 'completion/*', 'debian/*');
        },
        version => _version('shellcheck'),
        check => sub (@files) { _run(qw(shellcheck --severity=warning), @files) },
        hint => 'fix it',
    };
}

sub _first_line ($file) {
    open(my $fh, '<', $file) or die "cannot read $file: $!\n";
    chomp(my $line = <$fh> // '');
    return $line;
}

# Checks all files together, because a cycle does not show in a single file.
sub _house () {
    my $files = sub { _files('src/*.[ch]', 'glue/*.[ch]', '*.xs') };
    return {
        name => 'house',
        files => $files,
        is_own => 1,
        version => sub { 1 },
        depends_on => sub ($file) { $files->() },
        check => sub (@changed) {
            my @broken = broken_rules({ map { $_ => _content($_) } $files->() });
            say for @broken;
            return !@broken;
        },
        hint =>
            'this breaks a rule of the floors in doc/architecture.md: move the function down, or'
            . ' call it through the header of its folder',
    };
}

sub _content ($file) {
    open(my $fh, '<:raw', $file) or die "cannot read $file: $!\n";
    local $/;
    return scalar(<$fh>);
}

# ---- words ----

sub _codespell () {
    return {
        name => 'codespell',
        files => sub {
            grep { !m{^t/(?:recordings|fuzz/corpus)/|^LICENSE$} } _files(':!*.svg');
        },
        version => _version('codespell'),
        check => sub (@files) { _run(qw(codespell --ignore-words-list=isnt), @files) },
        hint => 'a misspelt word: correct it',
    };
}

sub _spelling () {
    return {
        name => 'spelling of the documentation',
        files => sub { _files('*.md', 'lib/*.pm', 'lib/*.pod', 'bin/*') },
        version => _version('aspell'),
        depends_on => sub ($file) { 't/words.txt' },
        check => sub (@files) {
            my %known = map { $_ => 1 } lines_of('cat', 't/words.txt');
            my $found = 0;
            for my $file (@files) {
                my @unknown
                    = grep { !$known{$_} && !$known{ lc($_) } } _unknown_words(_prose($file));
                say "$file: $_" for @unknown;
                $found += @unknown;
            }
            return !$found;
        },
        hint => 'correct the word, or put it between backticks (POD: C<>) if it is a name in code,'
            . ' or add it to t/words.txt, which is sorted',
    };
}

# The text that is English: without code and addresses.
sub _prose ($file) {
    if ($file !~ m/\.md\z/) {
        require Pod::Spell;
        my $text = '';
        open(my $to, '>', \$text) or die "cannot open a string: $!\n";
        open(my $from, '<', $file) or die "cannot read $file: $!\n";
        Pod::Spell->new->parse_from_filehandle($from, $to);
        return $text;
    }
    open(my $fh, '<', $file) or die "cannot read $file: $!\n";
    my $text = do { local $/; <$fh> };
    $text =~ s/^\s*(```+).*?^\s*\1\s*$//gms;
    $text =~ s/<!--.*?-->//gs;
    $text =~ s/`[^`]*`//g;
    $text =~ s/\]\([^)]*\)/]/g;
    $text =~ s{\bhttps?://\S+}{}g;
    return $text;
}

sub _unknown_words ($text) {
    my $file = File::Temp->new;
    binmode($file, ':raw');
    print {$file} $text =~ s/'s?\b//gr;    # possessives of names
    $file->flush;
    my @words = lines_of('sh', '-c', 'aspell --lang=en --encoding=utf-8 list <"$1"', 'sh', "$file");
    return sort { $a cmp $b } uniq(@words);
}

1;
