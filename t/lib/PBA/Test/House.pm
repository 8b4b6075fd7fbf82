package PBA::Test::House;

# The rules for the floors of src/: checks #include lines, names of other files that a file uses, and that files
# do not call each other in a cycle:
#
#   my @broken = broken_rules({ 'src/copy/loop.c' => $text, 'glue/hash.c' => $text, ... });
#
# Returns a line for each broken rule, with the file and the rule; an empty list if there are none.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

our @EXPORT_OK = qw(broken_rules definitions);

# A folder may use the folders on lower floors. Folders on the same floor must not use each other. A backend is
# a folder in access/, and the backends must not use each other either.
my %FLOOR = (
    '' => 1,
    base => 2,
    qmp => 3,
    volume => 3,
    qemu => 4,
    copy => 4,
    vfile => 4,
    access => 5,
);
my $backends_floor = 6;

sub _backend ($folder) { return $folder =~ m{^access/(\w+)\z} ? $1 : undef }
sub _floor ($folder) { return _backend($folder) ? $backends_floor : $FLOOR{$folder} }

# The headers that other folders may include. Nobody may include headers of a folder that has none here: it is
# called through src/pba.h, or is a program.
my %PUBLIC = (
    '' => ['pba.h'],
    (map { $_ => ["$_/$_.h"] } qw(base qmp volume qemu)),
    access => [qw(access/access.h access/backend.h)],
);

sub _public ($folder) {
    my $backend = _backend($folder);
    return $backend ? ["$folder/$backend.h"] : $PUBLIC{$folder};
}

sub _folder ($file) { return $file =~ m{\Asrc/(.*)/} ? $1 : '' }

# The only file that knows which backends exist.
my $CHOOSES_BACKEND = 'src/access/backend.c';

# A file as the compiler reads it: with joined lines and without comments. Comment marks in strings are no
# comments.
sub _without_comments ($text) {
    my $quoted = qr/"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'/;
    return $text =~ s/\\\n//gr =~ s{($quoted)|/\*.*?\*/|//[^\n]*}{$1 // ' '}gser;
}

# The files that a file includes in any notation: "x.h" of its own folder, <src/x.h>, "../x.h". undef for a line
# that cannot be parsed here.
sub _includes ($files, $file) {
    my ($dir) = $file =~ m{\A(.*/|)};
    my @directives
        = _without_comments($files->{$file}) =~ m/^\s*(?:\#|%:|\?\?=)\s*(include.*|import.*)/mg;
    return
        map { m/\Ainclude\s*["<]([^\/].*?)[">]\s*\z/ ? _find_header($files, $dir, $1) : undef }
        @directives;
}

sub _find_header ($files, $dir, $name) {
    my @paths = map { _real_path($_) } "$dir$name", $name;
    return (grep { exists($files->{$_}) } @paths)[0] // $paths[1];
}

sub _real_path ($path) {
    $path =~ s{/(?:\./|/)+}{/}g;
    $path =~ s{\A(?:\./)+}{};
    1 while $path =~ s{(?:\A|(?<=/))(?!\.\./)[^/]+/\.\./}{};
    return $path;
}

# The rule that a file breaks by including a header or calling what another file defines; or nothing.
sub _broken_by ($file, $other) {
    my ($from, $to) = (_folder($file), _folder($other));
    return "floors: there is no folder '$to' in the house" if !_floor($to);
    return if $from eq $to;
    return 'nobody but access/ knows access/' if $to =~ m{^access\b} && $from !~ m{^access\b};
    return "$from/ and $to/ stand on one floor and do not know each other"
        if _floor($from) == _floor($to);
    return if $file eq $CHOOSES_BACKEND;
    return 'a file knows its own folder and lower floors only' if _floor($to) > _floor($from);
    return;
}

sub _broken_by_include ($file, $header) {
    my ($from, $to) = (_folder($file), _folder($header));
    my $rule = _broken_by($file, $header);
    return $rule if $rule || $from eq $to;
    my $public = _public($to);
    return "$to/ has no header for others" if !$public;
    return if grep { $header eq "src/$_" } $public->@*;
    return "of $to/ others include " . join(' and ', $public->@*) . ' only';
}

sub _broken_outside ($files, $file) {
    return map { "$file includes $_: what is not in src/ includes src/pba.h only" }
        grep { m{\Asrc/} && $_ ne 'src/pba.h' } grep { defined } _includes($files, $file);
}

sub _unreadable_includes ($files, $file) {
    return
        map { "$file: an include must be a line of its own, with the header's path from the root" }
        grep { !defined } _includes($files, $file);
}

sub _broken_includes ($files) {
    my @broken;
    for my $file (sort keys($files->%*)) {
        push(@broken, _unreadable_includes($files, $file));
        push(@broken, _broken_outside($files, $file)) if $file !~ m{\Asrc/};
        next if $file !~ m{\Asrc/};
        my $from = _folder($file);
        push(@broken, "$file: the folder '$from' has no floor") if !_floor($from);
        next if !_floor($from);
        for my $header (grep { m{\Asrc/} } grep { defined } _includes($files, $file)) {
            my $rule = _broken_by_include($file, $header) // next;
            push(@broken, "$file includes $header: $rule");
        }
    }
    return @broken;
}

# ---- calls and cycles ----

# What a file defines for others: functions, tables and variables.
sub definitions ($text) { return _definitions(_code($text)) }

sub _definitions ($code) {
    return uniq(
        $code =~ m/^(?!static|extern|typedef|struct\ \w+;|\#)\w[\w\ *]*?\b
            (\w+)(?=\([^;{]*\n?\{|(?:\[\w*\])*(?:\ =\ |;))/mgx
    );
}

# Names that a file declares itself although others define them, so that no header shows this use.
sub _declarations ($code) {
    return uniq($code =~ m/\bextern\b[^;(]*?(\w+)\s*[;([]/g,
        $code =~ m/^(?!static|typedef|\#)\w[\w\ *]*?[ *](\w+)\([^;{]*\);/mg);
}

sub _code ($text) {
    return _without_comments($text) =~ s/"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])+'/0/gr;
}

# { file => [the files whose names it uses] }. Headers define nothing, and pba.h belongs to all.
sub _uses ($code) {
    my (%home, %uses);
    for my $file (grep { m/\.c\z/ } sort keys($code->%*)) {
        $home{$_} = $file for _definitions($code->{$file});
    }
    for my $file (grep { $_ ne 'src/pba.h' } keys($code->%*)) {
        my @names
            = grep { $_ ne $file } map { $home{$_} // () } uniq($code->{$file} =~ m/\b(\w+)/g);
        $uses{$file} = [sort(uniq(@names))];
    }
    return \%uses;
}

# Macros and inline functions of a header are excluded, and so are names that are declared without a header.
sub _broken_calls ($uses) {
    my @broken;
    for my $file (grep { m{\Asrc/} } sort keys($uses->%*)) {
        for my $other ($uses->{$file}->@*) {
            my $rule = _floor(_folder($file)) && _broken_by($file, $other);
            push(@broken, "$file calls $other: $rule") if $rule;
        }
    }
    return @broken;
}

# Names that other files could use without a header.
sub _broken_names ($code) {
    my %face = map { $_ => 1 } $code->{'src/pba.h'} =~ m/\b(pba_\w+)/g;
    my @broken;
    for my $file (sort keys($code->%*)) {
        my $text = $code->{$file};
        if ($file !~ m{\Asrc/}) {
            push(@broken,
                map { "$file names $_: src/pba.h does not" }
                grep { !$face{$_} } sort(uniq($text =~ m/\b(pba_\w+)/g)));
        }
        next if $file =~ m/\.h\z/;
        push(@broken, map { "$file declares $_: that is for a header" } _declarations($text));
        push(@broken,
            map { "$file defines $_: what others may call begins with pba_" }
            grep { !m/\A(?:pba_|main\z)/ } _definitions($text))
            if $file =~ m{\Asrc/};
    }
    return @broken;
}

# All files that can be reached from a file.
sub _reach ($uses, $file) {
    my (%seen, @todo);
    @todo = $uses->{$file}->@*;
    while (defined(my $next = shift(@todo))) {
        push(@todo, $uses->{$next}->@*) if !$seen{$next}++;
    }
    return \%seen;
}

sub _circles ($uses) {
    my %reach = map { $_ => _reach($uses, $_) } keys($uses->%*);
    my %circles;
    for my $file (grep { $reach{$_}{$_} } keys(%reach)) {
        my @circle = sort(grep { $reach{$file}{$_} && $reach{$_}{$file} } keys(%reach));
        $circles{"@circle"} = 1;
    }
    return map { "$_: these files use each other in a circle" } sort keys(%circles);
}

sub broken_rules ($files) {
    my %code = map { $_ => _code($files->{$_}) } keys($files->%*);
    my $uses = _uses(\%code);
    return (_broken_includes($files), _broken_calls($uses), _broken_names(\%code), _circles($uses));
}

1;
