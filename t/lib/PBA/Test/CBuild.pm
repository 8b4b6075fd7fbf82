package PBA::Test::CBuild;

# Builds C programs of the tests with the whole core, under the sanitizers. The objects of the core are kept in
# the cache, so they are compiled only once for all tests:
#
#   my $build = PBA::Test::CBuild->new or plan(skip_all => ...);
#   my @failed = $build->compile('t/c/json.c');
#   my ($status, @output) = $build->link('json', ['t/c/json.c'], @flags);
#   ($status, @output) = $build->run('json', @arguments);

use v5.36;

use Digest::SHA ();
use File::Temp ();
use POSIX ();

use PBA::Test::Cache;

my @WARNINGS = qw(-std=gnu11 -Wall -Wextra -Wpedantic -Werror);
my @DEBUG = qw(-g -O1 -fno-omit-frame-pointer);

# Returns undef if the -dev packages are not installed.
sub new ($class) {
    my $self = bless({ dir => File::Temp->newdir('pba-c-XXXXXXXX', TMPDIR => 1) }, $class);
    $self->{cflags} = _pkg_config('--cflags') or return undef;
    $self->{libs} = _pkg_config('--libs');
    $self->{sanitize} = $self->_sanitizer_flags;
    return $self;
}

sub is_sanitized ($self) { return scalar($self->{sanitize}->@*) }

# The sources of the core, without the program that serves virtual files.
sub _core () {
    return grep { !m{^src/vfile/} } sort glob('src/*/*.c src/*/*/*.c');
}

# A key that changes with the core, the compiler and the headers of the libraries.
sub _core_key ($self) {
    my $digest = Digest::SHA->new(256);
    my (undef, @version) = _run_command('gcc', '--version');
    my (undef, @libraries)
        = _run_command(qw(pkg-config --modversion libnbd json-glib-1.0 glib-2.0 libcrypto));
    $digest->add("@version @libraries @{[$self->_flags]}");
    $digest->addfile($_) for sort glob('src/*.h src/*/*.[ch] src/*/*/*.[ch]');
    return substr($digest->hexdigest, 0, 16);
}

# The objects of the core, compiled if necessary; an empty list if they do not compile.
sub _core_objects ($self) {
    my $dir = eval {
        PBA::Test::Cache->built(
            'core-' . $self->_core_key,
            sub ($tmp) {
                PBA::Test::Cache->remove_old('core-*');
                my @failed = $self->_compile_into($tmp, _core());
                die "these do not compile without a warning: @failed\n" if @failed;
            }
        );
    };
    warn $@ if !$dir;
    return $dir ? glob("$dir/*.o") : ();
}

sub _pkg_config (@options) {
    open(my $pipe, '-|', 'pkg-config', @options, 'libnbd', 'json-glib-1.0', 'glib-2.0', 'libcrypto')
        or return;
    my $flags = join(' ', <$pipe>);
    close($pipe) or return;
    return [split(' ', $flags)];
}

# Returns the exit status and the whole output.
sub _run_command (@command) {
    my $pid = open(my $pipe, '-|') // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>&', \*STDOUT) or die "cannot redirect: $!\n";
        exec(@command) or exit(127);
    }
    my @lines = <$pipe>;
    close($pipe);
    return ($?, @lines);
}

sub _sanitizer_flags ($self) {
    my $probe = "$self->{dir}/probe";
    my @flags = ('-fsanitize=address,undefined', '-fno-sanitize-recover=undefined');
    open(my $fh, '>', "$probe.c") or die "cannot write: $!\n";
    print {$fh} "int main(void)\n{\n    return 0;\n}\n";
    close($fh) or die "cannot write: $!\n";
    my ($status) = _run_command('gcc', @flags, '-o', $probe, "$probe.c");
    ($status) = _run_command($probe) if $status == 0;
    return $status == 0 ? \@flags : [];
}

sub _flags ($self) {
    return (@WARNINGS, @DEBUG, $self->{sanitize}->@*, $self->{cflags}->@*, '-I.');
}

sub _object ($dir, $source) {
    return "$dir/" . $source =~ s{[/.]}{-}gr . '.o';
}

# Compiles the core and the sources. Returns the sources that do not compile.
sub compile ($self, @sources) {
    $self->{core} = [$self->_core_objects];
    return ($self->{core}->@* ? () : 'the core', $self->_compile_into($self->{dir}, @sources));
}

# Compiles two at a time, because most small machines have two processors.
sub _compile_into ($self, $dir, @sources) {
    my (%running, @failed);
    while (@sources || %running) {
        while (@sources && keys(%running) < 2) {
            my $source = shift(@sources);
            my $pid = fork() // die "cannot fork: $!\n";
            if (!$pid) {
                exec('gcc', '-c', $self->_flags, '-o', _object($dir, $source), $source)
                    or POSIX::_exit(127);
            }
            $running{$pid} = $source;
        }
        my $pid = waitpid(-1, 0);
        my $source = delete($running{$pid}) // next;
        push(@failed, $source) if $?;
    }
    return @failed;
}

# Links a program from the compiled sources and the core. Returns the status and the output, like run.
sub link ($self, $name, $sources, @flags) {
    my @objects = map { _object($self->{dir}, $_) } $sources->@*;
    return _run_command('gcc', $self->{sanitize}->@*,
        @flags, '-o', "$self->{dir}/$name", @objects, $self->{core}->@*, $self->{libs}->@*);
}

sub run ($self, $name, @arguments) {

    # GLib's critical messages are caused by our bugs, so they must end the program.
    local $ENV{G_DEBUG} = 'fatal-criticals';
    local $ENV{G_SLICE} = 'always-malloc';
    local $ENV{ASAN_OPTIONS} = 'detect_leaks=1:abort_on_error=0:hard_rss_limit_mb=600';
    local $ENV{UBSAN_OPTIONS} = 'print_stacktrace=1';
    return _run_command("$self->{dir}/$name", @arguments);
}

1;
