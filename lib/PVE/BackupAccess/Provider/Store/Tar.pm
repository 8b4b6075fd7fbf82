package PVE::BackupAccess::Provider::Store::Tar;

# A container's tree as a stream: tar, compressed by zstd.

use v5.36;

use Digest::SHA ();
use Exporter qw(import);

use PVE::BackupAccess::Argument qw(bad_argument check_filled_text);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(open_if_there);
use PVE::BackupAccess::Program qw(is_of_system new_pipe run_program);
use PVE::BackupAccess::Provider::Store::Filter;
use PVE::BackupAccess::Wait qw(next_line read_some);

our @EXPORT_OK = qw(compress extract is_for_pct start_tar stream_problem);

our ($tar, $zstd) = qw(tar zstd);

my $Error = 'PVE::BackupAccess::Error';
my $Filter = 'PVE::BackupAccess::Provider::Store::Filter';

my $piece = 1 << 18;    # bytes in memory at a time

# The same metadata that pve-container's own tar keeps, as far as a user namespace permits it.
my @kept = qw(--sparse --numeric-owner --acls --xattrs --xattrs-include=user.*
    --xattrs-include=security.capability);

my sub fail ($class, $message) { $Error->throw($class, $message) }

# ---- writing a tar ----

# The caller's argument without taint: it is passed to tar unchanged, and to no shell.
my sub untainted ($name, $text) {
    check_filled_text($name, $text);
    return $text =~ m/\A(.+)\z/s ? $1 : undef;
}

my sub checked_source ($source) {
    $source = untainted('a source', $source);
    bad_argument("a source must be in the container's directory, and begin with '.', not '$source'")
        if $source !~ m!\A\.(?:/|\z)! || $source =~ m!(?:\A|/)\.\.(?:/|\z)!;
    return $source;
}

# Converts patterns to tar's options. A pattern that begins with a slash is relative to the container's
# root; others match in each directory. tar's '*' matches slashes, and so does '**', but tar's
# 'a/**/b' does not match 'a/b', which it should. A slash at the end means directories: their
# content is excluded, and a file of that name is not.
my sub exclusions (@patterns) {
    my (%seen, @anchored, @others);
    for my $pattern (map { untainted('a pattern', $_) } @patterns) {
        my $whole = $pattern =~ s!/+\z!/*!r;
        for my $form (grep { !$seen{$_}++ } $whole, $whole =~ s!/\*\*/!/!gr) {
            push(@anchored, "--exclude=.$form") if $form =~ m!\A/!;
            push(@others, "--exclude=$form") if $form !~ m!\A/!;
        }
    }
    return ('--no-anchored', @others, '--anchored', @anchored);
}

# Starts tar with the arguments of backup_container. It writes the tree to one handle, and its messages to another.
sub start_tar ($out, $err, $patterns, $info) {
    my @sources = map { checked_source($_) } ($info->{sources} // ['.'])->@*;
    bad_argument('sources must not be empty') if !@sources;

    # lost+found belongs to the host's root, so the root of a user namespace cannot read it.
    my @own = $info->{'backup-user-id'} ? ('lost+found') : ();
    return $Filter->start(
        { out => $out, err => $err },
        $tar,
        '--create',
        '--file=-',
        @kept,
        '--one-file-system',
        '--warning=no-file-ignored',
        '--warning=no-xdev',
        '--directory=' . untainted('directory', $info->{directory}),
        exclusions(@own, $patterns->@*),
        @sources
    );
}

my sub write_all ($to, $data) {
    my $at = 0;
    while ($at < length($data)) {
        my $done = syswrite($to, $data, length($data) - $at, $at);
        return 0 if !defined($done) && !$!{EINTR};
        $at += $done // 0;
    }
    return 1;
}

# Compresses what next returns, until it returns nothing, and writes it to a handle. Returns { size, sha256 } of the stream before
# compression.
sub compress ($name, $out, $next) {
    my ($from, $to) = new_pipe();
    my $program = $Filter->start({ in => $from, out => $out }, $zstd, '--quiet', '--stdout');
    close($from);
    my $digest = Digest::SHA->new(256);
    my ($size, $is_taken) = (0, 1);
    local $SIG{PIPE} = 'IGNORE';
    while ($is_taken && length(my $data = $next->() // '')) {
        $digest->add($data);
        $size += length($data);
        $is_taken = write_all($to, $data);
    }
    close($to);
    my $problem = $program->problem // ($is_taken ? undef : "$zstd stopped reading its input");
    fail('SystemError', "cannot write $name - $problem") if defined($problem);
    return { size => $size, sha256 => $digest->hexdigest };
}

# ---- reading a tar ----

# Where a tar is read from: { name; handle, undef if it is missing; program, a Filter that writes to the handle }. A path is a
# source too.
my sub source_of ($source) {
    return ref($source) ? $source : { name => $source, handle => open_if_there($source) };
}

# Starts a program that reads the source. Returns it, and the handle to read what it writes.
my sub read_by ($source, @command) {
    my ($from, $to) = new_pipe();
    my $program = $Filter->start({ in => $source->{handle}, out => $to }, @command);
    close($to);
    close($source->{handle});    # if the reader ends, the source's program must notice
    return ($program, $from);
}

# Why a source does not contain the stream with this size and SHA-256, or undef. Dies if that cannot be determined.
sub stream_problem ($where, $stream) {
    my $source = source_of($where);
    my $name = $source->{name};
    return "$name is missing" if !$source->{handle};
    my ($program, $from) = read_by($source, $zstd, '--decompress', '--stdout');
    my $digest = Digest::SHA->new(256);
    my ($size, $data) = (0, '');
    while (my $got = read_some($from, \$data, $piece)) {
        $digest->add(substr($data, 0, $got, ''));
        $size += $got;
    }
    my $problem = $program->problem;
    fail('SystemError', "cannot check $name - $problem") if $program->is_of_system_problem;
    my $unread = $source->{program} ? $source->{program}->problem : undef;
    fail('SystemError', "cannot check $name - $unread")
        if defined($unread) && !$source->{program}->is_unread;
    $problem //= 'it differs from what was read from the container'
        if $size != $stream->{size} || $digest->hexdigest ne $stream->{sha256};
    return defined($problem) ? "$name is damaged - $problem" : undef;
}

# Whether pct accepts the tar. It refuses one without a directory or link sbin, or with less than 10 members, such as that
# of a container with a single program.
my $least_members = 10;

sub is_for_pct ($where) {
    my $source = source_of($where);
    fail('ArchiveError', "$source->{name} is missing") if !$source->{handle};
    my @list = ('--list', '--verbose', '--numeric-owner', '--zstd', '--file=-');
    my ($program, $from) = read_by($source, $tar, @list);
    my ($members, $has_sbin, $text) = (0, 0, '');
    while (defined(my $line = next_line($from, \$text))) {
        $members++;
        $has_sbin ||= $line =~ m!\A[dlh].* (?:\./)?sbin(?:/$| -> | link to )!;
        last if $has_sbin && $members >= $least_members;
    }
    $program->stop;
    return $has_sbin && $members >= $least_members;
}

sub extract ($path, $directory) {
    my @how = ('--extract', '--zstd', '--preserve-permissions', '--same-owner', @kept);
    my ($status, undef, $message)
        = run_program($tar, @how, "--file=$path", "--directory=$directory");
    fail(
        is_of_system($status, $message) ? 'SystemError' : 'ArchiveError',
        "cannot extract $path - tar: " . $message =~ s/\n.*//sr
    ) if $status != 0;
    return;
}

1;
