package PBA::Test::PerlRules;

# Rules for our own Perl that perlcritic does not have, and for the length of all sources. Perl is analysed by
# lines in perltidy's format: a function ends at the first brace with the indentation of the function's first
# line, or has only one line.

use v5.36;

use Exporter qw(import);

our @EXPORT_OK = qw(bare_evals long_files long_functions long_names long_waits wall_clocks);

my $max_lines = 40;    # of a function
my $max_code = 500;    # lines of a file
my $max_names = 2;     # uses of a long name in a file

# [number, text] of the lines of code, up to the end of the program and without POD.
sub _code_lines ($file) {
    open(my $fh, '<', $file) or die "cannot read $file: $!\n";
    my ($in_pod, @lines);
    while (defined(my $line = <$fh>)) {
        last if $line =~ m/^__END__$/;
        $in_pod = 1 if $line =~ m/^=[a-z]/;
        push(@lines, [$., $line]) if !$in_pod;
        $in_pod = 0 if $line =~ m/^=cut/;
    }
    return @lines;
}

# A line without comments and texts.
sub _code_of ($text) { return $text =~ s/(?:^|\s)#.*//sr =~ s/'[^']*'|"[^"]*"//gr }

# The name of the function that begins in this line.
sub _function ($text) { return $text =~ m/^(?:my )?sub (\w+)/ ? $1 : undef }

# The name of the function that begins in this line, or the purpose of an anonymous one, if it ends in another
# line; and its indentation.
sub _opened ($text) {
    my ($indent, $what) = $text =~ m/^(\s*)(.*\bsub\b.*\{)\s*(?:#.*)?$/ or return;
    return (length($indent), _function($text) // "'$what'");
}

# Functions that are too long, also anonymous ones, as texts with file and line.
sub long_functions ($file) {
    my (@open, @found);
    for my $line (_code_lines($file)) {
        my ($number, $text) = $line->@*;
        if (@open && $text =~ m/^(\s*)\}/ && length($1) == $open[-1]->{indent}) {
            my $function = pop(@open);
            my $length = $number - $function->{begin} + 1;
            push(@found,
                "$file:$function->{begin}: $function->{name} has $length lines, more than $max_lines"
            ) if $length > $max_lines;
        }
        my ($indent, $name) = _opened($text) or next;
        push(@open, { indent => $indent, name => $name, begin => $number });
    }
    return @found;
}

# Files with too much code, and how many lines they have.
sub long_files ($file) {
    my $count = _code_lines($file);
    return $count > $max_code ? ("$file: $count lines of code, more than $max_code") : ();
}

# Long package names that are repeated in the code, except for the place that assigns a short name, and globs,
# for which no short name is possible.
sub long_names ($file) {
    my %count;
    for my $line (_code_lines($file)) {
        my $text = $line->[1] =~ s/(?:^|\s)#.*//sr;
        next if $text =~ m/^\s*(?:use|package|require)\b|^my \$\w+ = '[\w:]+';$/;
        $count{$1}++ while $text =~ m/(?<!\*)\b((?:PVE::BackupAccess|PBA::Test)(?:::[A-Z]\w*)+)/g;
    }
    return map { "$file: $_ stands there $count{$_} times, more than $max_names" }
        grep { $count{$_} > $max_names } sort keys %count;
}

# Blocking calls outside of the module that is meant for them: a signal that arrives just before such a call
# does not end it.
my @blocking = (
    qr/\bwaitpid\([^()]*(?:\([^()]*\)[^()]*)*,\s*0\)/, qr/->can_(?:read|write)\b(?:\(\))?(?!\()/,
    qr/\bselect\([^;]*,\s*undef\)/, qr/\bflock\((?![^;]*(?:LOCK_NB|LOCK_UN))/,
    qr/\bsleep\((?:\d{2,}|[1-9])\b/,
);

# Loops that look again and again whether a child has ended. The module that is meant for this is told when it has.
my $looks = qr/\b(?:while|until)\b.*(?:\bwaitpid\(|->is_(?:alive|running)\b)/;

sub long_waits ($file) {
    return if $file =~ m{PVE/BackupAccess/Wait\.pm\z};
    my @found;
    for my $line (_code_lines($file)) {
        my ($number, $text) = $line->@*;
        my $code = _code_of($text);
        push(@found, "$file:$number: a loop of looks at a child") if $code =~ $looks;
        push(@found, "$file:$number: a wait without an end") if grep { $code =~ $_ } @blocking;
    }
    return @found;
}

# Uses of eval, except in DESTROY, which must not let any exception out, and in the module that is meant for
# them.
sub bare_evals ($file) {
    return if $file =~ m{PVE/BackupAccess/Try\.pm\z};
    my ($name, @found) = ('');
    for my $line (_code_lines($file)) {
        my ($number, $text) = $line->@*;
        $name = _function($text) // $name;
        $name = '' if $text =~ m/^\}/;
        next if $text =~ m/## bare eval: \S/ || $name eq 'DESTROY';
        my $code = _code_of($text);
        push(@found, "$file:$number: a bare eval") if $code =~ m/(?<![\w\$\@%&>:-])eval\b(?!\s*=>)/;
    }
    return @found;
}

# Functions that return the system's time, or take a time limit by it.
my $wall_clock
    = qr/(?<![\w\$\@%&>:{-])(?:(?:CORE|POSIX|Time::HiRes)::)?time\b(?!\s*(?:=>|\}))|\bgettimeofday\b|\bCLOCK_REALTIME/;
my $wall_clock_in_c
    = qr/\bg_(?:get_(?:real|current)_time|date_time_new_now\w*)\b|\bgettimeofday\b|\bCLOCK_REALTIME|(?<![\w.>])time\(|\b(?:pthread|sem|mtx|cnd)_\w*timed\w+/;

# Uses of the system's time in Perl or C. It may be set while something waits or is measured.
sub wall_clocks ($file) {
    my $is_c = $file =~ m/\.(?:[ch]|xs)\z/;
    my @found;
    for my $line (_code_lines($file)) {
        my ($number, $text) = $line->@*;
        next if $text =~ m/## wall clock: \S/;
        my $code = $is_c ? $text : _code_of($text) =~ s/\bqw\([^)]*\)//gr;
        push(@found, "$file:$number: the system's time")
            if $code =~ ($is_c ? $wall_clock_in_c : $wall_clock);
    }
    return @found;
}

1;
