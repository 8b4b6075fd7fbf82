package PBA::Test::House;

# The floors of src/, held by the #include lines, and that no files call each other in a circle:
#
#   my @broken = broken_rules({ 'src/copy/loop.c' => $text, 'glue/hash.c' => $text, ... });
#
# A line for each rule that is broken, with the file and the rule; none if the house stands.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

our @EXPORT_OK = qw(broken_rules);

# A folder stands on what is below it. Folders on one floor do not know each other; a backend's folder
# belongs to access/, and the backends do not know each other either.
my %FLOOR = (
    '' => 1,
    base => 2,
    qmp => 3,
    volume => 3,
    qemu => 4,
    copy => 4,
    vfile => 4,
    access => 5,
    'access/pve' => 6,
    'access/upstream' => 6,
);

# The headers that others include. What has none, nobody includes: it is called through src/pba.h, or
# is a program.
my %PUBLIC = (
    '' => ['pba.h'],
    (map { $_ => ["$_/$_.h"] } qw(base qmp volume qemu)),
    access => [qw(access/access.h access/backend.h)],
    'access/pve' => ['access/pve/pve.h'],
    'access/upstream' => ['access/upstream/upstream.h'],
);

sub _folder ($file) { return $file =~ m{\Asrc/(.*)/} ? $1 : '' }

sub _includes ($files, $file) {
    my ($dir) = $file =~ m{\A(.*/|)};
    my @names = $files->{$file} =~ m/^#include "(.*)"/mg;
    return map { exists($files->{"$dir$_"}) ? "$dir$_" : $_ } @names;
}

# The rule that is broken, or nothing.
sub _broken_by ($from, $header) {
    my $to = _folder($header);
    return "floors: there is no folder '$to' in the house" if !$FLOOR{$to};
    return if $from eq $to;
    my $is_backend = $to =~ m{\A\Q$from\E/};
    return 'nobody but access/ knows access/' if $to =~ m{^access\b} && $from !~ m{^access\b};
    return "$from/ and $to/ stand on one floor and do not know each other"
        if $FLOOR{$from} == $FLOOR{$to};
    return 'a file includes headers of its own folder and of lower floors only'
        if $FLOOR{$to} > $FLOOR{$from} && !$is_backend;
    my $public = $PUBLIC{$to};
    return "$to/ has no header for others" if !$public;
    return if grep { $header eq "src/$_" } $public->@*;
    return "of $to/ others include " . join(' and ', $public->@*) . ' only';
}

sub _broken_outside ($files, $file) {
    return map { "$file includes $_: what is not in src/ includes src/pba.h only" }
        grep { m{\Asrc/} && $_ ne 'src/pba.h' } _includes($files, $file);
}

sub _broken_includes ($files) {
    my @broken;
    for my $file (sort keys($files->%*)) {
        push(@broken, _broken_outside($files, $file)) if $file !~ m{\Asrc/};
        next if $file !~ m{\Asrc/};
        my $from = _folder($file);
        push(@broken, "$file: the folder '$from' has no floor") if !$FLOOR{$from};
        next if !$FLOOR{$from};
        for my $header (grep { m{\Asrc/} } _includes($files, $file)) {
            my $rule = _broken_by($from, $header) // next;
            push(@broken, "$file includes $header: $rule");
        }
    }
    return @broken;
}

# ---- circles ----

# What a file defines for others: functions and tables whose names begin with pba_.
sub _definitions ($text) {
    return uniq(
        $text =~ m/^(?!static|extern|typedef|#)\w[\w *]*?\b(pba_\w+)(?=\([^;{]*\n?\{| = \{)/mg);
}

sub _code ($text) { return $text =~ s{/\*.*?\*/|"(?:\\.|[^"\\])*"}{}gsr }

# { file => [the files whose functions it uses] }
sub _uses ($files) {
    my (%home, %uses);
    my %code = map { $_ => _code($files->{$_}) } grep { m/\.c\z/ } keys($files->%*);
    for my $file (keys(%code)) {
        $home{$_} = $file for _definitions($code{$file});
    }
    for my $file (keys(%code)) {
        my @names
            = grep { $_ ne $file } map { $home{$_} // () } uniq($code{$file} =~ m/\b(pba_\w+)/g);
        $uses{$file} = [sort(uniq(@names))];
    }
    return \%uses;
}

# All that can be reached from a file.
sub _reach ($uses, $file) {
    my (%seen, @todo);
    @todo = $uses->{$file}->@*;
    while (defined(my $next = shift(@todo))) {
        push(@todo, $uses->{$next}->@*) if !$seen{$next}++;
    }
    return \%seen;
}

sub _circles ($files) {
    my $uses = _uses($files);
    my %reach = map { $_ => _reach($uses, $_) } keys($uses->%*);
    my %circles;
    for my $file (grep { $reach{$_}{$_} } keys(%reach)) {
        my @circle = sort(grep { $reach{$file}{$_} && $reach{$_}{$file} } keys(%reach));
        $circles{"@circle"} = 1;
    }
    return map { "$_: these files use each other in a circle" } sort keys(%circles);
}

sub broken_rules ($files) {
    return (_broken_includes($files), _circles($files));
}

1;
