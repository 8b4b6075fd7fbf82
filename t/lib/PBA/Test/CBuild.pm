package PBA::Test::CBuild;

# Builds C programs of the tests with the whole core, under the sanitizers:
#
#   my $build = PBA::Test::CBuild->new or plan(skip_all => ...);
#   my @failed = $build->compile($build->core, 't/c/json.c');
#   my ($status, @output) = $build->link('json', ['t/c/json.c', $build->core], @flags);
#   ($status, @output) = $build->run('json', @arguments);

use v5.36;

use File::Temp ();
use POSIX ();

my @WARNINGS = qw(-std=gnu11 -Wall -Wextra -Wpedantic -Werror);
my @DEBUG = qw(-g -O1 -fno-omit-frame-pointer);

# Undefined where there are no -dev packages.
sub new ($class) {
    my $self = bless({ dir => File::Temp->newdir('pba-c-XXXXXXXX', TMPDIR => 1) }, $class);
    $self->{cflags} = _pkg_config('--cflags') or return undef;
    $self->{libs} = _pkg_config('--libs');
    $self->{sanitize} = $self->_sanitizer_flags;
    return $self;
}

sub is_sanitized ($self) { return scalar($self->{sanitize}->@*) }

# The core's sources. The virtual file's server is a program of its own.
sub core ($self) {
    return grep { !m{^src/vfile/} } sort glob('src/*/*.c src/*/*/*.c');
}

sub _pkg_config (@options) {
    open(my $pipe, '-|', 'pkg-config', @options, 'libnbd', 'json-glib-1.0', 'glib-2.0')
        or return;
    my $flags = join(' ', <$pipe>);
    close($pipe) or return;
    return [split(' ', $flags)];
}

# The exit status and all that was said.
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

sub _object ($self, $source) {
    return "$self->{dir}/" . $source =~ s{[/.]}{-}gr . '.o';
}

# Those that do not compile; two at a time, as there are two processors on most small machines.
sub compile ($self, @sources) {
    my (%running, @failed);
    while (@sources || %running) {
        while (@sources && keys(%running) < 2) {
            my $source = shift(@sources);
            my $pid = fork() // die "cannot fork: $!\n";
            if (!$pid) {
                my @flags = (@WARNINGS, @DEBUG, $self->{sanitize}->@*, $self->{cflags}->@*, '-I.');
                exec('gcc', '-c', @flags, '-o', $self->_object($source), $source)
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

# A program of what was compiled. As run, returns the status and what was said.
sub link ($self, $name, $sources, @flags) {
    my @objects = map { $self->_object($_) } $sources->@*;
    return _run_command('gcc', $self->{sanitize}->@*,
        @flags, '-o', "$self->{dir}/$name", @objects, $self->{libs}->@*);
}

sub run ($self, $name, @arguments) {

    # GLib's critical messages are our bugs, and must end the program.
    local $ENV{G_DEBUG} = 'fatal-criticals';
    local $ENV{G_SLICE} = 'always-malloc';
    local $ENV{ASAN_OPTIONS} = 'detect_leaks=1:abort_on_error=0:hard_rss_limit_mb=600';
    local $ENV{UBSAN_OPTIONS} = 'print_stacktrace=1';
    return _run_command("$self->{dir}/$name", @arguments);
}

1;
