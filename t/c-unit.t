# The C core's pure parts, without Perl: each program in t/c is built with the whole core under the
# sanitizers and speaks TAP itself.

use v5.36;

use File::Temp ();
use POSIX ();
use Test::More;

sub pkg_config (@options) {
    open(my $pipe, '-|', 'pkg-config', @options, 'libnbd', 'json-glib-1.0', 'glib-2.0')
        or return;
    my $flags = join(' ', <$pipe>);
    close($pipe) or return;
    return split(' ', $flags);
}

my @cflags = pkg_config('--cflags') or plan(skip_all => 'no pkg-config, or no -dev packages');
my @libs = pkg_config('--libs');
my @warnings = qw(-std=gnu11 -Wall -Wextra -Wpedantic -Werror);
my @debug = qw(-g -O1 -fno-omit-frame-pointer);
my $build = File::Temp->newdir('pba-c-unit-XXXXXXXX', TMPDIR => 1);

# The exit status and all that was said.
sub run_command (@command) {
    my $pid = open(my $pipe, '-|') // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>&', \*STDOUT) or die "cannot redirect: $!\n";
        exec(@command) or exit(127);
    }
    my @lines = <$pipe>;
    close($pipe);
    return ($?, @lines);
}

sub sanitizer_flags () {
    my @flags = ('-fsanitize=address,undefined', '-fno-sanitize-recover=undefined');
    open(my $fh, '>', "$build/probe.c") or die "cannot write: $!\n";
    print {$fh} "int main(void)\n{\n    return 0;\n}\n";
    close($fh) or die "cannot write: $!\n";
    my ($status) = run_command('gcc', @flags, '-o', "$build/probe", "$build/probe.c");
    ($status) = run_command("$build/probe") if $status == 0;
    return $status == 0 ? @flags : ();
}

my @sanitize = sanitizer_flags();
diag('no sanitizer runtime: without it') if !@sanitize;

# Two at a time, as there are two processors on most small machines.
sub compile_all (@sources) {
    my (%running, @failed);
    while (@sources || %running) {
        while (@sources && keys(%running) < 2) {
            my $source = shift(@sources);
            my $object = $source =~ s{[/.]}{-}gr;
            my $pid = fork() // die "cannot fork: $!\n";
            if (!$pid) {
                my @command = ('gcc', '-c', @warnings, @debug, @sanitize, @cflags, '-I.');
                exec(@command, '-o', "$build/$object.o", $source) or POSIX::_exit(127);
            }
            $running{$pid} = $source;
        }
        my $pid = waitpid(-1, 0);
        my $source = delete($running{$pid}) // next;
        push @failed, $source if $?;
    }
    return @failed;
}

my @core = sort glob('src/*.c');
my @programs = sort glob('t/c/*.c');

# The virtual file's server is a program of its own.
@core = grep { !_has_main($_) } @core;

sub _has_main ($source) {
    open(my $fh, '<', $source) or die "cannot read $source: $!\n";
    return grep { m/^int main\(/ } <$fh>;
}

is_deeply([compile_all(@core, @programs)], [], 'everything compiles without a warning')
    or BAIL_OUT('the C core does not compile');

my @core_objects = map { "$build/" . s{[/.]}{-}gr . '.o' } @core;

sub run_program ($source) {
    my ($name) = $source =~ m{([^/]+)\.c\z};
    my $object = "$build/" . $source =~ s{[/.]}{-}gr . '.o';
    my ($status, @output)
        = run_command('gcc', @sanitize, '-o', "$build/$name", $object, @core_objects, @libs);
    is($status, 0, 'links') or diag(@output);
    return if $status;

    # GLib's critical messages are our bugs, and must end the program.
    local $ENV{G_DEBUG} = 'fatal-criticals';
    local $ENV{G_SLICE} = 'always-malloc';
    local $ENV{ASAN_OPTIONS} = 'detect_leaks=1:abort_on_error=0';
    local $ENV{UBSAN_OPTIONS} = 'print_stacktrace=1';
    ($status, @output) = run_command("$build/$name");
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
