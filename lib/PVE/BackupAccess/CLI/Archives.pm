package PVE::BackupAccess::CLI::Archives;

# The subcommands list, verify, prune and remove.

use v5.36;

use List::Util qw(max);
use POSIX ();

use PVE::BackupAccess::CLI qw(usage_error);
use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::ArchivePath qw(archive_at find_archive provider_for without_slash);
use PVE::BackupAccess::CLI::Output qw(say_error say_json say_out);
use PVE::BackupAccess::CLI::Store qw(check_store store_name_of store_number_of);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(check_name);
use PVE::BackupAccess::Retention qw(periods);
use PVE::BackupAccess::Try qw(attempt);

# ---- list ----

my sub print_archive ($opt, $directory, $entry) {
    my $path = text("$directory/$entry->{volname}");
    if (defined($entry->{problem})) {
        say_out("$path: cannot be used - $entry->{problem}");
        return;
    }
    my $time = POSIX::strftime('%Y-%m-%d %H:%M:%S', localtime($entry->{time}));
    my $name = $entry->{type} eq 'qemu' ? store_name_of($opt, $directory, $entry->{vmid}) : undef;
    say_out("$path  $time  " . bytes($entry->{size}) . (defined($name) ? "  $name" : ''));
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
    say_out(map { '    DAMAGED: ' . text($_) } ($entry->{damaged} // [])->@*);
}

# The guest's number by --vmid or --guest, undef for all guests.
my sub vmid_of ($opt, $directory) {
    return $opt->{vmid} if !defined($opt->{guest});
    usage_error('--vmid and --guest exclude each other') if defined($opt->{vmid});
    my $name = check_name($opt->{guest});
    return store_number_of($opt, $directory, $name)
        // die "there is no guest '$name' in $directory\n";
}

sub list ($opt, $directory) {
    my $provider = provider_for($directory, $opt);
    my $list = $provider->list(vmid_of($opt, $directory));
    if ($opt->{json}) {
        say_json($list);
    }
    elsif ($list->@*) {
        my $shown = without_slash($directory);
        print_archive($opt, $shown, $_) for $list->@*;
    }
    else {
        say_error("there are no archives in $directory");
    }
    return 0;
}

# ---- verify ----

# [provider, volname, path in the user's form] of each archive that a path means.
my sub archives_of ($opt, $path) {
    if (my ($directory, $volname) = find_archive($opt, $path)) {
        usage_error('--vmid and --guest need a DIRECTORY, not an archive')
            if defined($opt->{vmid} // $opt->{guest});
        my $provider = provider_for($directory, $opt);
        die "there is no archive $path\n" if !$provider->has($volname);
        return [$provider, $volname, without_slash($directory) . "/$volname"];
    }
    my $provider = provider_for($path, $opt);
    my $shown = without_slash($path);
    return
        map { [$provider, $_->{volname}, "$shown/$_->{volname}"] }
        $provider->list(vmid_of($opt, $path))->@*;
}

# The line for an intact archive. The digests of version 0.1 do not prove what was read from the
# guest.
my sub verdict ($result) {
    return 'DAMAGED' if $result->{problems}->@*;
    return 'ok' if !$result->{unproven}->@*;
    return 'no damage found, but not proven intact: the archive has no digests of '
        . join(', ', $result->{unproven}->@*);
}

# An image that several archives build on is only read once.
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
        my @archives = archives_of($opt, $given)
            or die
            "there are no archives in $given - check that the directory is right and mounted\n";
        for my $archive (@archives) {
            my ($provider, $volname, $path) = $archive->@*;
            my $result = verify_one($provider, $volname, $path, \%seen);

            # A prune has removed it in the meantime.
            next if $result->{problems}->@* && !$provider->has($volname);
            push(@results, $result);
            next if $opt->{json} || ($opt->{quiet} && !$result->{problems}->@*);
            say_out(text($path) . ': ' . verdict($result), map { "  $_" } $result->{problems}->@*);
        }
    }
    say_json(\@results) if $opt->{json};
    return (grep { $_->{problems}->@* } @results) ? 1 : 0;
}

# ---- prune and remove ----

# --keep is the older name of --keep-last.
my sub rules ($opt) {
    my %keep = map { $_ => $opt->{$_} } grep { defined($opt->{$_}) } periods();
    usage_error('--keep and --keep-last are the same option - give only one of them')
        if defined($opt->{keep}) && defined($keep{'keep-last'});
    for my $name (sort keys %keep) {
        usage_error("--$name must be a whole number up to 999999999, not '$keep{$name}'")
            if $keep{$name} !~ m/\A[0-9]{1,9}\z/;
    }
    usage_error("--keep must be a number from 1 on, not '$opt->{keep}'")
        if ($opt->{keep} // 1) !~ m/\A[1-9][0-9]{0,8}\z/;
    $keep{'keep-last'} = $opt->{keep} if defined($opt->{keep});
    usage_error(
        'the rules keep nothing - give at least one of ' . join(', ', map { "--$_" } periods()))
        if !grep { $_ > 0 } values %keep;
    return \%keep;
}

my sub show_marks ($archives) {
    for my $archive ($archives->@*) {
        my $problem = $archive->{problems}[0];
        say_out(
            sprintf('%-9s  %s', $archive->{mark}, $archive->{volname})
                . (defined($problem) ? ' - damaged: ' . text($problem) : ''));
    }
}

# The names of the guest's archives.
my sub names ($provider, $vmid) {
    return map { $_->{volname} } $provider->list($vmid)->@*;
}

# Prunes each guest, even if another guest could not be pruned. Returns the removed archives and the
# errors.
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
    my $provider = provider_for($directory, $opt);
    my %vmids = map { $_->{vmid} => 1 } $provider->list(vmid_of($opt, $directory))->@*;
    my @vmids = sort { $a <=> $b } keys %vmids;

    # This warning is shown with --quiet too. Otherwise, a job whose directory is wrong or no longer mounted would look
    # like a job that has nothing to remove.
    say_error("warn: there are no archives in $directory"
            . " - check that the directory and the guest are right, and that it is mounted")
        if !@vmids;
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
        say_out(map { "removed $_" } $removed->@*) if !$opt->{quiet};
        say_error('nothing to remove')
            if @vmids && !$removed->@* && !@problems && !$opt->{quiet};
    }
    say_error("pve-backup-access prune: $_") for @problems;
    return @problems ? 1 : 0;
}

sub remove ($opt, $path) {
    my ($directory, $volname) = archive_at($opt, $path);
    my ($name) = $volname =~ m!([^/]+)\z!;
    die
        "$path is a guest, not an archive - give the archive, such as $directory/$volname, the latest one\n"
        if $path !~ m!(?:\A|/)(?:\Q$name\E|latest)/*\z!;
    provider_for($directory, $opt)->remove($volname);
    say_out("removed $volname") if !$opt->{quiet};
    return 0;
}

1;
