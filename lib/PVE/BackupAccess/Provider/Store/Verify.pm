package PVE::BackupAccess::Provider::Store::Verify;

# Verifies an archive that depends on no other one.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Content qw(damage describe problem_of problems_or_die);
use PVE::BackupAccess::Try qw(attempt reason);

our @EXPORT_OK = qw(archive_to_compare problems_of);

# Returns what the code finds, or undef, and notes whether it is damaged. Dies if the data cannot be read, for example because
# a server does not answer. That is no damage, and is not noted.
my sub noted_problem ($archive, $what, $look) {
    my $problem = problem_of($look);
    attempt { $archive->note_damage($what, defined($problem) ? 1 : 0) };
    return $problem;
}

my sub device_problem ($guest, $archive, $device) {
    my $look = sub () {
        my $problem = $guest->device_problem($archive->name, $device);
        return $problem if defined($problem);
        my @damage = damage($archive, $device);
        return @damage ? describe(@damage) : undef;
    };
    my $problem = noted_problem($archive, $device, $look);
    return defined($problem) ? "$device: $problem" : ();
}

# The problems as texts, none if the archive is intact. Damage is noted, so that no backup builds on it. Dies if no problem was
# found, but something could not be read.
sub problems_of ($guest, $name) {
    my $archive;
    my $problem = problem_of(sub () { $archive = $guest->archive($name); return undef });
    return $problem if defined($problem);
    return noted_problem($archive, 'container', sub () { $archive->container_damage }) // ()
        if $archive->container;
    my (@problems, @unread);
    for my $device ($archive->devices) {
        my $unread
            = attempt { push(@problems, device_problem($guest, $archive, $device)) };
        push(@unread, "$device: " . reason($unread)) if $unread;
    }
    return problems_or_die(\@problems, \@unread);
}

# The archive whose digests a restored device must match.
sub archive_to_compare ($guest, $name, $device) {
    my ($archive) = $guest->chain($name, $device);
    my $problem = $archive->digests_problem($device);
    PVE::BackupAccess::Error->throw(
        'ArchiveError',
        "device $device: a restored disk cannot be verified - $problem",
        device => $device
    ) if defined($problem);
    return $archive;
}

1;
