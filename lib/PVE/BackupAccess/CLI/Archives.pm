package PVE::BackupAccess::CLI::Archives;

# The subcommands list, verify, prune and remove.

use v5.36;

use JSON::PP ();
use List::Util qw(max uniq);
use POSIX ();

use PVE::BackupAccess::CLI qw(usage_error);
use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::ArchivePath qw(archive_at find_archive provider_for without_slash);
use PVE::BackupAccess::CLI::Output qw(advice_on say_error say_json say_out);
use PVE::BackupAccess::CLI::Store qw(check_store store_name_of store_number_of store_numbers);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(check_name);
use PVE::BackupAccess::Retention qw(periods);
use PVE::BackupAccess::Try qw(attempt reason rethrow);

# ---- list ----

my sub print_archive ($opt, $directory, $entry) {
    my $path = text("$directory/$entry->{volname}");
    if (defined($entry->{problem})) {
        say_out("$path: cannot be used - " . text($entry->{problem}));
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
    say_out("    backup ID $entry->{id}");
    say_out(map { '    DAMAGED: ' . text($_) } ($entry->{damaged} // [])->@*);
}

# The guest's number by --vmid or --guest, undef for all guests.
my sub vmid_of ($opt, $directory) {
    return $opt->{vmid} if !defined($opt->{guest});
    usage_error('--vmid and --guest exclude each other') if defined($opt->{vmid});
    my $name = check_name($opt->{guest});
    return store_number_of($opt, $directory, $name)
        // die "there is no guest '$name' in $directory - 'list' shows its guests\n";
}

# The numbers of the guests that a command is for.
my sub vmids_of ($opt, $directory) {
    my $vmid = vmid_of($opt, $directory);
    return $vmid if defined($vmid);
    return sort { $a <=> $b } store_numbers($opt, check_store($opt, $directory));
}

# Calls the code for each guest, and goes on if it dies. Prints the errors. Returns whether there were any.
my sub each_guest ($command, $code, @vmids) {
    my @errors;
    for my $vmid (@vmids) {
        my $error = attempt { $code->($vmid) };
        push(@errors, $error // ());
    }
    say_error("pve-backup-access $command: $_") for @errors;
    say_error(uniq(map { advice_on($_) // () } @errors));
    return @errors ? 1 : 0;
}

# The entries of all guests, and whether one of them could not be listed.
my sub entries_of ($opt, $directory, $provider, $command) {
    my @list;
    my $status = each_guest(
        $command,
        sub ($vmid) { push(@list, $provider->list($vmid)->@*) },
        vmids_of($opt, $directory)
    );
    return ($status, @list);
}

# An entry for JSON. The names of files in texts are bytes.
my sub readable ($entry) {
    my %texts = map { $_ => text($entry->{$_}) } grep { defined($entry->{$_}) } qw(problem);
    for my $key (grep { $entry->{$_} } qw(damaged problems)) {
        $texts{$key} = [map { text($_) } $entry->{$key}->@*];
    }
    return { $entry->%*, %texts };
}

sub list ($opt, $directory) {
    my $provider = provider_for($directory, $opt);
    my ($status, @list) = entries_of($opt, $directory, $provider, 'list');
    if ($opt->{json}) {
        say_json([map { readable($_) } @list]);
    }
    elsif (@list) {
        my $shown = without_slash($directory);
        print_archive($opt, $shown, $_) for @list;
    }
    elsif ($status == 0) {
        say_error("there are no archives in $directory");
    }
    return $status;
}

# ---- verify ----

# Whether a guest could not be looked at, and [provider, volname, path in the user's form] of each archive that a path means.
my sub archives_of ($opt, $path) {
    if (my ($directory, $volname) = find_archive($opt, $path)) {
        usage_error('--vmid and --guest need a DIRECTORY, not an archive')
            if defined($opt->{vmid} // $opt->{guest});
        my $provider = provider_for($directory, $opt);
        die "there is no archive $path - 'list' shows the archives\n" if !$provider->has($volname);
        return (0, [$provider, $volname, without_slash($directory) . "/$volname"]);
    }
    my $provider = provider_for($path, $opt);
    my $shown = without_slash($path);
    my ($status, @list) = entries_of($opt, $path, $provider, 'verify');
    die "there are no archives in $path - check that the directory is right and mounted\n"
        if !@list && !$status;
    return ($status, map { [$provider, $_->{volname}, "$shown/$_->{volname}"] } @list);
}

# The line for an archive. The digests of version 0.1 do not prove what was read from the guest.
my sub verdict ($result) {
    return 'not verified' if $result->{unverified};
    return 'DAMAGED' if $result->{problems}->@*;
    return 'ok' if !$result->{unproven}->@*;
    return 'no damage found, but not proven intact: the archive has no digests of '
        . join(', ', $result->{unproven}->@*);
}

# An image that several archives build on is only read once. Returns undef if another process has removed the archive in the
# meantime.
my sub verify_one ($provider, $volname, $path, $seen) {
    my (@problems, @unproven);
    my $error = attempt {
        @problems = $provider->verify($volname, $seen)->@*;
        @unproven = $provider->unproven($volname)->@* if !@problems;
    };
    return undef if ($error || @problems) && !$provider->has($volname);
    @problems = reason($error) if $error;
    return {
        archive => text($path),
        problems => [map { text($_) } @problems],
        unproven => [map { text($_) } @unproven],
        $error ? (unverified => JSON::PP::true) : (),
    };
}

sub verify ($opt, @paths) {
    my ($failed, @results, %seen) = (0);
    for my $given (@paths) {
        my ($status, @archives) = archives_of($opt, $given);
        $failed ||= $status;
        for my $archive (@archives) {
            my ($provider, $volname, $path) = $archive->@*;
            my $result = verify_one($provider, $volname, $path, \%seen);
            say_error(text($path) . ': was removed in the meantime') if !$result && !$opt->{quiet};
            push(@results, $result // next);
            $failed ||= $result->{problems}->@* ? 1 : 0;
            next if $opt->{json} || ($opt->{quiet} && !$result->{problems}->@*);
            say_out(text($path) . ': ' . verdict($result), map { "  $_" } $result->{problems}->@*);
        }
    }
    say_json(\@results) if $opt->{json};
    return $failed;
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
        my $what = $archive->{unsure} ? ' - cannot be checked: ' : ' - damaged: ';
        say_out(
            sprintf('%-9s  %s', $archive->{mark}, $archive->{volname})
                . (defined($problem) ? $what . text($problem) : ''));
    }
}

# The names of a guest's archives in a list of entries.
my sub names_of ($vmid, @list) {
    return map { $_->{volname} } grep { $_->{vmid} == $vmid } @list;
}

# Adds the archives that were removed from a guest: also those that a prune had removed until it failed. Then it dies.
# before: the names of all.
my sub prune_guest ($provider, $keep, $removed, $vmid, @before) {
    my $error = attempt { push($removed->@*, $provider->prune($vmid, $keep)->@*) };
    return if !$error;
    my %stays = map { $_ => 1 } names_of($vmid, $provider->list($vmid)->@*);
    push($removed->@*, grep { !$stays{$_} } @before);
    rethrow($error);
}

my sub show_removed ($opt, $status, @removed) {
    return say_json(\@removed) if $opt->{json};
    return if $opt->{quiet};
    say_out(map { "removed $_" } @removed);
    say_error('nothing to remove') if !@removed && !$status;
}

sub prune ($opt, $directory) {
    my $keep = rules($opt);
    my $provider = provider_for($directory, $opt);
    my ($unlisted, @list) = entries_of($opt, $directory, $provider, 'prune');
    my @vmids = uniq(map { $_->{vmid} } @list);

    # This warning is shown with --quiet too. Otherwise, a job whose directory is wrong or no longer mounted would look
    # like a job that has nothing to remove.
    say_error("warn: there are no archives in $directory"
            . " - check that the directory and the guest are right, and that it is mounted")
        if !@vmids && !$unlisted;
    my @results;
    my $do
        = $opt->{'dry-run'}
        ? sub ($vmid) { push(@results, $provider->retention($vmid, $keep)->@*) }
        : sub ($vmid) { prune_guest($provider, $keep, \@results, $vmid, names_of($vmid, @list)) };
    my $status = each_guest('prune', $do, @vmids) || $unlisted;
    if (!$opt->{'dry-run'}) {
        show_removed($opt, $status || !@vmids, @results);
    }
    elsif ($opt->{json}) {
        say_json([map { readable($_) } @results]);
    }
    else {
        show_marks(\@results);
    }
    return $status;
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
