package PVE::BackupAccess::Provider::Store::Prune;

# Applies rules of retention to a guest's archives, and removes several archives. For a removal, the caller holds the
# guest's lock.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Content qw(is_damage);
use PVE::BackupAccess::Provider::Store::Disks qw(disk_keys);
use PVE::BackupAccess::Provider::Store::List qw(known_damage);
use PVE::BackupAccess::Retention qw(marks);
use PVE::BackupAccess::Try qw(attempt reason);

our @EXPORT_OK = qw(prune_guest retention_of);

# An archive as the rules of retention see it.
my sub look_at ($guest, $name, $time, $key_of, $damaged) {
    my $entry = { name => $name, time => $time, devices => {}, problems => [] };
    $entry->{protected} = $guest->is_protected($name);
    my $archive;
    my $error = attempt { $archive = $guest->archive($name) };
    if (!$archive) {
        my $is_damaged = is_damage($error);
        $entry->{unsure} = 1 if !$is_damaged;
        my $advice = ' - which disks it has is unknown, so nothing replaces it: remove it yourself';
        $entry->{problems} = [reason($error) . ($is_damaged ? $advice : '')];
        return $entry;
    }
    $entry->{guest} = $archive->guest;
    my $known = known_damage($archive, $damaged);
    my $look = sub ($key, $text, $problem, $find) {
        my $unsure = attempt { $problem = $find->() // $problem };
        $entry->{unsure} = 1 if $unsure && !defined($problem);
        $problem //= reason($unsure) if $unsure;
        push($entry->{problems}->@*, "$text$problem") if defined($problem);
        $entry->{devices}{$key} = defined($problem) ? 0 : 1;
    };

    $look->('container', '', undef, sub () { $archive->container_problem })
        if $archive->container;
    for my $device ($archive->devices) {
        $look->(
            $key_of->($archive, $device),
            "$device: ", $known->{$device}, sub () { $guest->device_problem($name, $device) }
        );
    }
    return $entry;
}

# If several guests have had this number, the devices of each count separately. Archives without a guest's UUID belong to
# the only guest; if there are several, they count as those of a further one.
my sub tell_guests_apart (@archives) {
    my @known = uniq(map { $_->{guest} // () } @archives);
    return if @known < 2;
    for my $archive (@archives) {
        my ($guest, $devices) = ($archive->{guest} // '', $archive->{devices});
        $archive->{devices} = { map { ("$guest $_" => $devices->{$_}) } keys $devices->%* };
    }
    return;
}

# The archives, the oldest first: { name, time, protected, problems => [texts], mark => 'keep' |
# 'remove' | 'protected' | 'broken', unsure }. time_of converts a name to a time. unsure: it could not be determined whether the
# archive is damaged. So it does not count, and is not removed.
sub retention_of ($guest, $keep, $time_of) {
    my ($key_of, %damaged) = (disk_keys($guest->readable));
    my @archives
        = map { look_at($guest, $_, $time_of->($_), $key_of, \%damaged) } $guest->names;
    tell_guests_apart(@archives);
    my $marks = marks(\@archives, $keep);
    for my $archive (@archives) {
        my $mark = $marks->{ $archive->{name} };
        $archive->{mark} = $mark eq 'remove' && $archive->{unsure} ? 'broken' : $mark;
    }
    return @archives;
}

# Removes the archives, and goes on if one cannot be removed. Returns the names of the removed ones, and
# { name => why it was not removed }.
my sub remove_archives ($guest, @names) {
    my (@removed, %problems);
    my $try = sub ($name, $remove) {
        my $error = attempt { $remove->($name) };
        push(@removed, $name) if !$error;
        $problems{$name} = reason($error) if $error;
        return !$error;
    };

    # The newest first: an archive that nothing builds on any more is discarded without a merge, and without reading it.
    # So a chain that lacks an archive can be removed too.
    my @left;
    for my $name (reverse sort @names) {
        my $is_base = 1;
        my $error = attempt { $is_base = $guest->is_built_on($name) };
        push(@left, $name)
            if $error || $is_base || !$try->($name, sub ($gone) { $guest->discard($gone) });
    }

    # Then the oldest first: data that is still needed moves into the next archive.
    my $merge = sub ($gone) { $guest->remove($gone) };
    my @stuck
        = grep { !$try->($_, $merge) && $guest->has($_) } grep { !$problems{$_} } reverse @left;

    # A damaged archive cannot be merged into. Try the newest first again: nothing that is to go builds on it by then.
    for my $name (reverse @stuck) {
        delete($problems{$name});
        $try->($name, $merge);
    }
    return ([sort @removed], \%problems);
}

# Removes the archives that are marked so. Each has a volname. place: the guest's place in the store, such as vm/100.
# Returns the volnames of the removed archives.
sub prune_guest ($guest, $place, $log, @archives) {
    for my $archive (grep { $_->{mark} eq 'broken' } @archives) {
        my $why
            = $archive->{unsure}
            ? 'is kept, since it cannot be determined whether it is damaged'
            : 'is damaged, but is kept, since no newer one replaces it';
        $log->('warn', "archive $archive->{volname} $why - $archive->{problems}[0]");
    }
    my @names = map { $_->{volname} =~ s!.*/!!r } grep { $_->{mark} eq 'remove' } @archives;
    $log->('info', "removing $place/$_") for @names;
    my $alone = @names ? $guest->removal_lock : undef;
    my ($removed, $problems) = remove_archives($guest, @names);
    PVE::BackupAccess::Error->throw('ArchiveError',
        join('; ', map { "cannot remove $place/$_ - $problems->{$_}" } sort keys $problems->%*))
        if $problems->%*;
    return map { "$place/$_" } $removed->@*;
}

1;
