package PVE::BackupAccess::CLI::Archives;

# What is done with archives: list, verify, prune and remove.

use v5.36;

use Cwd ();
use Exporter qw(import);
use List::Util qw(max);
use POSIX ();

use PVE::BackupAccess::CLI qw(untainted usage_error);
use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::Output qw(say_error say_json say_out);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Retention qw(periods);
use PVE::BackupAccess::Try qw(attempt);

our @EXPORT_OK = qw(parse_archive provider_for without_slash);

my sub log_line ($level, $message) {
    say_error("$level: $message") if $level !~ m/\A(?:debug|info)\z/;
}

# The provider of an existing directory. Its name as a storage matters to backups only.
sub provider_for ($directory) {
    die "$directory is not a directory\n" if !-d $directory;
    my $path = untainted(Cwd::realpath($directory));
    return PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $path }, 'none',
        \&log_line);
}

# A directory as it goes before a slash.
sub without_slash ($path) { return $path =~ s!(?<=.)/+\z!!r }

# Directory and name of an archive from its path; nothing if it is no such path.
sub parse_archive ($path) {
    my ($directory, $volname) = $path =~ m!\A(?:(.*)/)?(vm/[0-9]+/[^/]+)/*\z!s or return;
    return (defined($directory) ? $directory eq '' ? '/' : $directory : '.', $volname);
}

# ---- list ----

my sub print_archive ($directory, $entry) {
    my $path = text("$directory/$entry->{volname}");
    if (defined($entry->{problem})) {
        say_out("$path: cannot be used - $entry->{problem}");
        return;
    }
    my $time = POSIX::strftime('%Y-%m-%d %H:%M:%S', localtime($entry->{time}));
    say_out("$path  $time  " . bytes($entry->{size}));
    my $devices = $entry->{devices};
    my $width = max(map { length } keys $devices->%*);
    for my $name (sort keys $devices->%*) {
        my $device = $devices->{$name};
        my $kind = defined($device->{parent}) ? 'incremental' : 'full';
        say_out(
            sprintf(
                '    %-*s  %-11s  %s of %s',
                $width, $name, $kind,
                bytes($device->{'image-size'}),
                bytes($device->{size})
            )
        );
    }
}

sub list ($opt, $directory) {
    my $list = provider_for($directory)->list($opt->{vmid});
    if ($opt->{json}) {
        say_json($list);
    }
    elsif ($list->@*) {
        my $shown = without_slash($directory);
        print_archive($shown, $_) for $list->@*;
    }
    else {
        say_error("there are no archives in $directory");
    }
    return 0;
}

# ---- verify ----

# [provider, volname, path as the user would write it] of what a path means.
my sub archives_of ($path) {
    if (my ($directory, $volname) = parse_archive($path)) {
        return [provider_for($directory), $volname, $path];
    }
    my $provider = provider_for($path);
    my $shown = without_slash($path);
    return map { [$provider, $_->{volname}, "$shown/$_->{volname}"] } $provider->list->@*;
}

# What is said of a whole archive: the digests of version 0.1 are not of what was read.
my sub verdict ($result) {
    return 'DAMAGED' if $result->{problems}->@*;
    return 'ok' if !$result->{unproven}->@*;
    return 'ok as far as is known, but not provable: it has no digests of what was read of '
        . join(', ', $result->{unproven}->@*);
}

# An image that several archives build on is read once.
my sub verify_one ($provider, $volname, $path, $seen) {
    my @problems = $provider->verify($volname, $seen)->@*;
    my $unproven = @problems ? [] : $provider->unproven($volname);
    my %result = (problems => \@problems, unproven => $unproven);
    return {
        archive => text($path),
        map {
            $_ => [map { text($_) } $result{$_}->@*]
        } keys %result
    };
}

sub verify ($opt, @paths) {
    my (@results, %seen);
    for my $given (@paths) {
        my @archives = archives_of($given)
            or die "there are no archives in $given - is it mounted, and the right directory?\n";
        for my $archive (@archives) {
            my ($provider, $volname, $path) = $archive->@*;
            my $result = verify_one($provider, $volname, $path, \%seen);
            push(@results, $result);
            next if $opt->{json};
            say_out(text($path) . ': ' . verdict($result), map { "  $_" } $result->{problems}->@*);
        }
    }
    say_json(\@results) if $opt->{json};
    return (grep { $_->{problems}->@* } @results) ? 1 : 0;
}

# ---- prune and remove ----

# --keep is an older word for --keep-last.
my sub rules ($opt) {
    my %keep = map { $_ => $opt->{$_} } grep { defined($opt->{$_}) } periods();
    usage_error('--keep and --keep-last are the same: give one')
        if defined($opt->{keep}) && defined($keep{'keep-last'});
    for my $name (sort keys %keep) {
        usage_error("--$name wants a whole number, not '$keep{$name}'")
            if $keep{$name} !~ m/\A[0-9]{1,9}\z/;
    }
    usage_error("--keep wants a number from 1 on, not '$opt->{keep}'")
        if ($opt->{keep} // 1) !~ m/\A[1-9][0-9]{0,8}\z/;
    $keep{'keep-last'} = $opt->{keep} if defined($opt->{keep});
    usage_error('it needs something to keep: ' . join(', ', map { "--$_" } periods()))
        if !grep { $_ > 0 } values %keep;
    return \%keep;
}

my sub show_marks ($archives) {
    for my $archive ($archives->@*) {
        my $problem = $archive->{problems}[0];
        say_out(
            sprintf('%-9s  %s', $archive->{mark}, $archive->{volname})
                . (defined($problem) ? ' - cannot be restored: ' . text($problem) : ''));
    }
}

# The names of those that are there.
my sub names ($provider, $vmid) {
    return map { $_->{volname} } $provider->list($vmid)->@*;
}

# All guests are gone through, also where one cannot be pruned. Returns the removed, and what went wrong.
my sub prune_guests ($provider, $keep, @vmids) {
    my (@removed, @problems);
    for my $vmid (@vmids) {
        my @before = names($provider, $vmid);
        my $error = attempt { $provider->prune($vmid, $keep) };
        push(@problems, $error) if $error;
        my %stays = map { $_ => 1 } names($provider, $vmid);
        push(@removed, grep { !$stays{$_} } @before);
    }
    return (\@removed, @problems);
}

sub prune ($opt, $directory) {
    my $keep = rules($opt);
    my $provider = provider_for($directory);
    my %vmids = map { $_->{vmid} => 1 } $provider->list($opt->{vmid})->@*;
    my @vmids = sort { $a <=> $b } keys %vmids;
    if ($opt->{'dry-run'}) {
        my @archives = map { $provider->retention($_, $keep)->@* } @vmids;
        $opt->{json} ? say_json(\@archives) : show_marks(\@archives);
        return 0;
    }
    my ($removed, @problems) = prune_guests($provider, $keep, @vmids);
    if ($opt->{json}) {
        say_json($removed);
    }
    else {
        say_out(map { "removed $_" } $removed->@*);
        say_error('nothing to remove') if !$removed->@* && !@problems;
    }
    say_error("pve-backup-access prune: $_") for @problems;
    return @problems ? 1 : 0;
}

sub remove ($opt, $path) {
    my ($directory, $volname) = parse_archive($path)
        or usage_error(
        "'$path' is not the path of an archive, such as /backups/vm/100/20261122T064953Z");
    provider_for($directory)->remove($volname);
    say_out("removed $volname");
    return 0;
}

1;
