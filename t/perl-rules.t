# The gates for our own Perl code find what they are for, with file and line.
#
# One QEMU is enough: none is started.

use v5.36;

use lib 't/lib';

use File::Temp ();
use Test::More;

use PBA::Test::PerlRules qw(bare_evals long_files long_functions long_names long_waits wall_clocks);

my $dir = File::Temp->newdir('pba-rules-XXXXXXXX', TMPDIR => 1);

sub planted ($name, $text) {
    my $file = "$dir/$name";
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} $text and close($fh) or die "$file: $!\n";
    return $file;
}

my %evals = (
    'a block' => ['my $ok = eval { work(); 1 };', 1],
    'a text' => ['eval "require $module" or die;', 1],
    'a condition' => ['return if !eval { work() };', 1],
    'with parentheses' => ['eval($text);', 1],
    'a comment' => ['work();    # no eval', 0],
    'a text that names it' => ["say 'eval {';", 0],
    'a hash key' => ['my %h = (eval => 1);', 0],
    'a reason' => ['eval { work() };    ## bare eval: the last one', 0],
    'no reason' => ['eval { work() };    ## bare eval:', 1],
);

# Each case is a line of a function, and whether the gate must find it.
sub check_lines ($gate, $rule, $found_as, %cases) {
    for my $name (sort keys %cases) {
        my ($code, $count) = $cases{$name}->@*;
        my $file = planted("$gate.pm", "package X;\n\nsub f () {\n    $code\n}\n\n1;\n");
        my @expected = $count ? ("$file:4: $found_as") : ();
        is_deeply([$rule->($file)], \@expected, "$gate: $name");
    }
    return;
}

check_lines('evals', \&bare_evals, 'a bare eval', %evals);

my %waits = (
    'a child' => ['waitpid($pid, 0);', 1],
    'a child of a hash' => ['my $ended = waitpid($self->{pid}, 0);', 1],
    'one that is looked at' => ['return if waitpid($pid, WNOHANG) != 0;', 0],
    'handles' => ['for my $handle ($select->can_read) {', 1],
    'handles for a time' => ['$select->can_read(0.2);', 0],
    'select' => ['select($ready, undef, undef, undef);', 1],
    'select for a time' => ['select($ready, undef, undef, $left);', 0],
    'a lock' => ['flock($fh, LOCK_EX) or die;', 1],
    'a lock that is tried' => ['flock($fh, $how | LOCK_NB);', 0],
    'a lock that is let go' => ['flock($fh, LOCK_UN);', 0],
    'a long sleep' => ['sleep(60);', 1],
    'a short sleep' => ['sleep(0.02);', 0],
    'a comment' => ['work();    # not waitpid($pid, 0)', 0],
);

check_lines('waits', \&long_waits, 'a wait without an end', %waits);

my %loops = (
    'one that sleeps' => ['sleep(0.02) while waitpid($pid, WNOHANG) == 0;', 1],
    'one with a block' => ['while (($ended = waitpid($pid, WNOHANG)) == 0) {', 1],
    'by a method' => ['pause(0.02) while $self->is_running && now() < $deadline;', 1],
    'until it has ended' => ['until (!$server->is_running) {', 1],
    'another one' => ['while (defined(my $line = next_line($out, \$text))) {', 0],
    'one look' => ['return if !$server->is_running;', 0],
);

check_lines('loops', \&long_waits, 'a loop of looks at a child', %loops);

my %clocks = (
    'a deadline' => ['my $deadline = time + $seconds;', 1],
    'a call' => ['return if time() > $deadline;', 1],
    'by its long name' => ['my $began = Time::HiRes::time();', 1],
    'an argument' => ['begin($vmid, time);', 1],
    'another function' => ['my ($seconds) = gettimeofday();', 1],
    'another clock' => ['return clock_gettime(CLOCK_REALTIME);', 1],
    'a clock that nobody sets' => ['return clock_gettime(CLOCK_MONOTONIC);', 0],
    'a part of a name' => ['my $end = time_of($name) + $start_time;', 0],
    'a variable' => ['my ($time) = @times;', 0],
    'a method' => ['my $age = $archive->time;', 0],
    'keys of hashes' => ['my %entry = (time => $archive->{time});', 0],
    'a list of keys' => ['return $task->%{qw(vmid time)};', 0],
    'a text' => [q(die "got no time\n" if $text eq 'time';), 0],
    'a reason' => ['my $start_time = time();    ## wall clock: names the archive', 0],
    'no reason' => ['my $start_time = time();    ## wall clock:', 1],
);

check_lines('clocks', \&wall_clocks, "the system's time", %clocks);

my %clocks_in_c = (
    'gint64 until = g_get_real_time() + limit;' => 1,
    'time_t now = time(NULL);' => 1,
    'pthread_cond_timedwait(&done, &lock, &until);' => 1,
    'clock_gettime(CLOCK_REALTIME, &now);' => 1,
    'gint64 until = g_get_monotonic_time() + limit;' => 0,
    'g_cond_wait_until(&done, &lock, until);' => 0,
    'double seconds = run_time(copy) + copy->time(now);' => 0,
);

for my $line (sort keys %clocks_in_c) {
    my $c = planted('clock.c', "void f(void)\n{\n    $line\n}\n");
    my @expected = $clocks_in_c{$line} ? ("$c:3: the system's time") : ();
    is_deeply([wall_clocks($c)], \@expected, "clocks: $line");
}

my $file = planted('pod.pm', <<'END');
=head1 SYNOPSIS

    eval { work() };

=cut

sub DESTROY ($self) {
    eval { work() };
}

sub other () {
    eval { work() };
}

1;

__END__

eval { work() };
END
is_deeply([bare_evals($file)], ["$file:12: a bare eval"], 'evals: POD, DESTROY');

for my $lines (40, 41) {
    for my $begin ('sub f ($x) {', 'my sub f ($x) {') {
        my $body = "    work();\n" x ($lines - 2);
        my $long = planted('long.pm', "package X;\n\n$begin\n$body}\n\nsub g () {\n}\n");
        my @expected = $lines > 40 ? ("$long:3: f has 41 lines, more than 40") : ();
        is_deeply([long_functions($long)], \@expected, "functions: $begin of $lines lines");
    }
}

for my $lines (40, 41) {
    my %anonymous = (
        'a subtest' => ["subtest 'x' => sub {", '};'],
        'one with a signature' => ['my $work = sub ($x) {', '};'],
        'an argument' => ['    try(sub {', '    });'],
        'one in a short function' => ["sub f () {\n    return 1;\n}\nmy %h = (x => sub {", '});'],
    );
    for my $name (sort keys %anonymous) {
        my ($begin, $end) = $anonymous{$name}->@*;
        my $inner = "        work(sub { 1 });\n        if (x()) {\n        }\n";
        my $body = $inner . "        work();\n" x ($lines - 5);
        my $file = planted('anonymous.t', "$begin\n$body$end\n");
        my ($at, $what) = ($begin =~ tr/\n// + 1, $begin =~ s/\A.*\n|\A\s+//sr);
        my @expected = $lines > 40 ? ("$file:$at: '$what' has 41 lines, more than 40") : ();
        is_deeply([long_functions($file)], \@expected, "functions: $name, of $lines lines");
    }
}

{
    my $code = "sub one () { return 1 }\n" . "one();\n" x 60 . "if (one()) {\n}\n";
    is_deeply([long_functions(planted('one.pm', $code))],
        [], 'functions: a function of one line has only that line');
}

for my $lines (500, 501) {
    my $code = "work();\n" x ($lines - 2) . "\n=head1 NAME\n\nX\n\n=cut\n\n__END__\n\n=head1 X\n";
    my $long = planted('lines.pm', $code);
    my @expected = $lines > 500 ? ("$long: $lines lines of code, more than 500") : ();
    is_deeply([long_files($long)], \@expected, "lengths: $lines lines");
}

my %names = (
    'twice' => ['work(PVE::BackupAccess::X->y, PVE::BackupAccess::X::z());', 0],
    'three times' =>
        ['PVE::BackupAccess::X->y->(PVE::BackupAccess::X->y, PVE::BackupAccess::X::z);', 3],
    'of a test' => ["PBA::Test::X->y;\n" x 3, 3, 'PBA::Test::X'],
    'of its own' => ["use PVE::BackupAccess::X;\nmy \$X = 'PVE::BackupAccess::X';\n\$X->y;", 0],
);
for my $name (sort keys %names) {
    my ($code, $count, $class) = $names{$name}->@*;
    $class //= 'PVE::BackupAccess::X';
    my $long = planted('names.pm', "package PVE::BackupAccess::X;\n\n$code\n\n1;\n");
    my @expected = $count ? ("$long: $class stands there $count times, more than 2") : ();
    is_deeply([long_names($long)], \@expected, "names: $name");
}

done_testing;
