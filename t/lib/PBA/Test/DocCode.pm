package PBA::Test::DocCode;

# Finds and runs the code blocks of the documentation. HACKING.md describes how a block is marked.
#
#   my ($blocks, $problems) = PBA::Test::DocCode::read_file('doc/x.md');
#   PBA::Test::DocCode::run_perl($block, '$socket' => $path, store => sub { ... });
#
# A block is { file, line, language, fixture, argument, code, output => text or undef }, where code
# carries #line directives if it is Perl.

use v5.36;

use Exporter qw(import);
use File::Temp ();
use JSON::PP ();

use PBA::Test::Backend;

our @EXPORT_OK = qw(check_same run_perl start_guest);

# Languages of blocks that are not code: pictures, tables, output of programs.
my %no_code = map { $_ => 1 } qw(text);

sub read_file ($file) {
    open(my $fh, '<:encoding(UTF-8)', $file) or die "$file: $!\n";
    chomp(my @lines = <$fh>);
    my ($found, $problems) = $file =~ m/\.md\z/ ? _markdown(@lines) : _pod(@lines);
    my @blocks;
    for my $block ($found->@*) {
        $block->{file} = $file;
        my ($fixture, $argument) = split(' ', $block->{mark} // '', 2);
        $block->@{qw(fixture argument)} = ($fixture // '', $argument // '');
        push($problems->@*, _take($block, \@blocks));
    }
    return (\@blocks, [map { "$file:$_" } $problems->@*]);
}

# Adds the block, or joins it to the previous one. Returns what is wrong with it.
sub _take ($block, $blocks) {
    my ($line, $fixture) = $block->@{qw(line fixture)};
    my $last = $blocks->[-1];
    if ($fixture =~ m/\A(?:continued|output)\z/) {
        return "$line: there is no block before that this one goes with" if !$last;
        $last->{output} = $block->{code} if $fixture eq 'output';
        $last->{code} .= _numbered($block) if $fixture eq 'continued';
        return;
    }
    if ($no_code{ $block->{language} }) {
        return $fixture eq '' ? () : "$line: a block of text is not run";
    }
    return "$line: a block needs its language: ```perl, ```sh, ```json, or ```text for no code"
        if $block->{language} eq '';
    return "$line: nothing says how this block is run: put <!-- run: FIXTURE --> in the line"
        . ' before it (see HACKING.md)'
        if $fixture eq '';
    push($blocks->@*, { $block->%*, code => _numbered($block) });
    return;
}

sub _numbered ($block) {
    return $block->{code} if $block->{language} ne 'perl';
    my $first = $block->{line} + 1;
    return qq(#line $first "$block->{file}"\n$block->{code});
}

# Finds fenced blocks. Indented blocks cannot be marked, so they are only allowed in lists.
sub _markdown (@lines) {
    my (@blocks, @problems, $fence, $in_list);
    my ($before, $number) = ('', 0);
    for my $line (@lines) {
        $number++;
        if ($fence) {
            if ($line =~ m/\A\Q$fence->{fence}\E\s*\z/) {
                push(@blocks, $fence);
                undef $fence;
            }
            else {
                $fence->{code} .= $line =~ s/\A\Q$fence->{indent}\E//r . "\n";
            }
        }
        elsif ($line =~ m/\A((\s*)```+)(\w*)\s*\z/) {
            $fence = { line => $number, fence => $1, indent => $2, language => $3, code => '' };
            ($fence->{mark}) = $before =~ m/\A\s*<!--\s*run:\s*(.*?)\s*-->\s*\z/;
        }
        else {
            push(@problems, "$number: no block follows the mark '$1'")
                if $before =~ m/\A\s*<!--\s*(run:.*?)\s*-->/;
            push(@problems, "$number: an indented block: fence it with ``` (see HACKING.md)")
                if $line =~ m/\A {4}/ && $before eq '' && !$in_list;
            $in_list = $line =~ m/\A\s*(?:[-*+]|\d+[.)])\s/ if $line =~ m/\A\S/;
        }
        $before = $line;
    }
    push(@problems, "$fence->{line}: this block has no end") if $fence;
    return (\@blocks, \@problems);
}

# Finds blocks after '=for run FIXTURE'. A synopsis must be marked; other verbatim paragraphs may be.
sub _pod (@lines) {
    my (@blocks, @problems, $mark, $block);
    my ($in_pod, $in_synopsis, $number) = (0, 0, 0);
    for my $line (@lines) {
        $number++;
        if ($line =~ m/\A=(\w+)\s*(.*)\z/) {
            my ($word, $rest) = ($1, $2);
            push(@problems, _no_block($number, $mark)) if defined($mark) && !$block;
            undef $block;
            $in_pod = $word ne 'cut';
            $in_synopsis = $rest eq 'SYNOPSIS' if $word =~ m/\Ahead/;
            $mark = $word eq 'for' && $rest =~ m/\Arun\s+(.*)/ ? $1 : undef;
        }
        elsif ($in_pod && $line =~ m/\A\s+\S/) {
            if (!$block) {
                $block = { line => $number - 1, language => 'perl', mark => $mark, code => '' };
                push(@blocks, $block) if defined($mark);
                push(@problems,
                          "$number: nothing says how the synopsis is run: put a paragraph"
                        . ' "=for run FIXTURE" before it (see HACKING.md)')
                    if $in_synopsis && !defined($mark);
            }
            $block->{code} .= "$line\n";
        }
        elsif ($line ne '') {
            push(@problems, _no_block($number, $mark)) if defined($mark) && !$block;
            undef $block;
            undef $mark;
        }
        elsif ($block) {
            $block->{code} .= "\n";
        }
    }
    return (\@blocks, \@problems);
}

sub _no_block ($number, $mark) {
    return "$number: no block follows the paragraph '=for run $mark'";
}

# ---- for fixtures ----

# The guest of several fixtures, as on Proxmox VE, with the disk drive-scsi0 of 16 MiB.
sub start_guest () {
    return PBA::Test::Backend->start(
        name => 'pve',
        disks => [{ id => 'scsi0', size => 1 << 24, shape => 'drive' }],
    );
}

# Dies if the state after a block differs from the state before.
sub check_same ($before, $after) {
    state $json = JSON::PP->new->canonical;
    my @texts = map { $json->encode($_) } $before, $after;
    die "it left something behind: $texts[1]\ninstead of: $texts[0]\n" if $texts[0] ne $texts[1];
    return;
}

# Runs a block of Perl in a package of its own, and returns the name of the package. In the block, '$name' =>
# value is a variable, and name => code ref is a function. Dies with the block's error.
sub run_perl ($block, %given) {
    state $count = 0;
    my $package = __PACKAGE__ . '::Block' . ++$count;
    my @variables = sort grep { m/\A\$/ && $block->{code} !~ m/\bmy \Q$_\E\b/ } keys %given;
    for my $name (grep { !m/\A\$/ } keys %given) {
        no strict 'refs';
        *{"${package}::$name"} = $given{$name};
    }
    my $variables = join('', map { "my $_ = shift(\@_);" } @variables);
    my $text = "package $package; use v5.36; sub { $variables\n$block->{code}\n}";
    my $code = eval $text;    ## no critic (StringyEval)
    die $@ if !$code;
    my $output = _captured(sub { $code->(@given{@variables}) });
    _check_output($block, $output);
    return $package;
}

# Captures what the code prints, including the programs that it runs, through descriptor 1.
sub _captured ($code) {
    my $file = File::Temp->new;
    STDOUT->flush;
    open(my $saved, '>&', \*STDOUT) or die "cannot duplicate standard output: $!\n";
    open(STDOUT, '>&', $file) or die "cannot redirect standard output: $!\n";
    my $ok = eval { $code->(); 1 };
    my $error = $@;
    STDOUT->flush;
    open(STDOUT, '>&', $saved) or die "cannot restore standard output: $!\n";
    die $error if !$ok;
    seek($file, 0, 0);
    local $/ = undef;
    return <$file> // '';
}

# Runs a block of shell commands as one script, which ends at the first failure, in the project's directory,
# with the given environment. The output is compared with the block's output, if it has one.
sub run_shell ($block, %environment) {
    local @ENV{ keys %environment } = values %environment;
    my $script = File::Temp->new(SUFFIX => '.sh');
    print {$script} $block->{code};
    $script->flush;
    open(my $pipe, '-|', 'bash', '-euo', 'pipefail', "$script") or die "cannot run bash: $!\n";
    my $output = join('', <$pipe>);
    close($pipe) or die "'$block->{code}' failed with status $?: $output\n";
    _check_output($block, $output);
    return;
}

# Compares the output with the documented one, in which '...' stands for anything.
sub _check_output ($block, $output) {
    my $wanted = $block->{output} // return;
    my $pattern = join('.*', map { quotemeta } split(m/\.\.\./, $wanted, -1));
    die "the documentation shows another output than this:\n$output"
        if $output !~ m/\A$pattern\z/s;
    return;
}

1;
