package PVE::BackupAccess::CLI::Archives;

# What is done with archives: list, verify and prune.

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

sub verify ($opt, @paths) {
    my (@results, $bad);
    for my $archive (map { archives_of($_) } @paths) {
        my ($provider, $volname, $path) = $archive->@*;
        my @problems = map { text($_) } $provider->verify($volname)->@*;
        $bad ||= @problems > 0;
        push(@results, { archive => text($path), problems => \@problems });
        next if $opt->{json};
        say_out(text($path) . (@problems ? ': DAMAGED' : ': ok'), map { "  $_" } @problems);
    }
    say_json(\@results) if $opt->{json};
    return $bad ? 1 : 0;
}

# ---- prune ----

sub prune ($opt, $directory) {
    my $keep = $opt->{keep};
    usage_error("--keep wants a number from 1 on, not '$keep'")
        if $keep !~ m/\A[1-9][0-9]{0,8}\z/;
    my $provider = provider_for($directory);
    my %vmids = map { $_->{vmid} => 1 } $provider->list($opt->{vmid})->@*;
    my @removed = map { $provider->prune($_, $keep)->@* } sort { $a <=> $b } keys %vmids;
    if ($opt->{json}) {
        say_json(\@removed);
    }
    else {
        say_out(map { "removed $_" } @removed);
        say_error('nothing to remove') if !@removed;
    }
    return 0;
}

1;
