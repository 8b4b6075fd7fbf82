package PVE::BackupAccess::Provider::Qcow2Chain::Verify;

# Verifies an archive: its files, the archives that it builds on, and the content of their images.

use v5.36;

use Exporter qw(import);
use List::Util qw(uniq);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Qcow2Chain::Content qw(chain_damage);
use PVE::BackupAccess::Provider::Store::Content qw(describe is_damage problem_of problems_or_die);
use PVE::BackupAccess::Provider::Store::DirectoryArchive qw($tree);
use PVE::BackupAccess::Try qw(attempt reason);

our @EXPORT_OK = qw(digests_of problems_of unproven_of);

my $Error = 'PVE::BackupAccess::Error';

# The problems of an archive's files: of all files, or of those of the devices. Each file is read once.
my sub file_problems ($seen, $archive, @devices) {
    my $known = $seen->{files}{ $archive->revision } //= {};
    my @files = @devices ? map { $archive->files_of($_) } @devices : $archive->files;
    my @problems = map { ($known->{$_} //= [$archive->problems($_)])->@* } @files;
    unshift(@problems, $archive->manifest_problem // ());
    return @problems;
}

my sub content_problems ($seen, $device, @chain) {
    for my $archive (@chain) {
        $seen->{noted}{ $archive->revision }{ $archive->own($device) }
            //= $archive->is_known_damaged($device) ? 1 : 0;
    }
    return map {
        my ($archive, @ranges) = $_->@*;
        "$device: " . describe(@ranges) . ' (in ' . $archive->image($device) . ')'
    } chain_damage($seen->{content} //= {}, $device, @chain);
}

# An archive of version 0.1 has the SHA-256 of its files, but this does not prove what was read from the guest.
my sub is_provable ($device, @chain) {
    return !grep { !$_->device($device)->{digests} } @chain;
}

# Notes for each archive whether its own files are damaged. An archive whose content was not read is only noted if it is
# damaged. That it could not be read is no damage: no program may run now, or there is no room for temporary files. If it
# were noted, the next backup would be full, and the next prune would remove the archive. Returns which damage cannot be noted.
my sub note_damage ($seen, $device, @chain) {
    my @unnoted;
    for my $archive (grep { !$_->is_being_removed } @chain) {
        my @which = ($archive->revision, $archive->own($device));
        my $ranges = $seen->{content}{ $which[0] }{ $which[1] };
        my @problems = file_problems($seen, $archive, $device);
        my $is_damaged = @problems || ($ranges && $ranges->@*) ? 1 : 0;

        # What a backup has found in the meantime stays noted.
        $archive->note_damage($device, $is_damaged)
            if $is_damaged || ($ranges && $seen->{noted}{ $which[0] }{ $which[1] });
        push(@unnoted,
            "$device: the damage cannot be noted, so the next backup may build on it - is the store full or read-only?"
        ) if $is_damaged && !$archive->is_known_damaged($device);
    }
    return @unnoted;
}

# Adds to what was found: the problems that the code returns, or its error, which may be no damage. Returns whether nothing
# was added.
my sub look ($found, $text, $code) {
    my @problems;
    my $error = attempt { @problems = $code->() };
    my $kind = $error && !is_damage($error) ? 'unread' : 'problems';
    push($found->{$kind}->@*, $error ? $text . reason($error) : @problems);
    return !$error && !@problems;
}

my sub look_at_device ($guest, $seen, $found, $device, $name) {
    my @chain;
    my $find = sub () { @chain = $guest->chain($name, $device); return };
    look($found, "$device: ", $find) or return;
    my @older = @chain[1 .. $#chain];
    my $is_good = look(
        $found, '',
        sub () {
            map { file_problems($seen, $_, $device) } @older;
        }
    );
    $is_good
        &= look($found, "$device: ", sub () { $guest->headers_problem($device, @chain) // () });
    look($found, "$device: ", sub () { content_problems($seen, $device, @chain) })
        if $is_good && is_provable($device, @chain);
    look($found, '', sub () { note_damage($seen, $device, @chain) });
    return;
}

# The same for a container, whose tree has been read by then, unless that was not possible.
my sub note_container ($seen, $archive) {
    my $problems = $seen->{files}{ $archive->revision }{$tree} // return;
    $archive->note_damage('container', $problems->@* ? 1 : 0);
    return;
}

# The problems of an archive as texts, none if it is intact. seen caches results for other archives that share files with
# this one. Dies if no problem was found, but something could not be read.
sub problems_of ($guest, $name, $seen) {
    my $archive;
    my $problem = problem_of(sub () { $archive = $guest->archive($name); return undef });
    return $problem if defined($problem);
    my $found = { problems => [], unread => [] };
    look($found, '', sub () { file_problems($seen, $archive) });
    note_container($seen, $archive) if $archive->container;
    look_at_device($guest, $seen, $found, $_, $name) for $archive->devices;
    my ($problems, $unread) = map { [uniq($_->@*)] } $found->@{qw(problems unread)};
    return problems_or_die($problems, $unread);
}

# The devices whose content no digests prove.
sub unproven_of ($guest, $name) {
    my $archive = $guest->archive($name);
    return grep { !is_provable($_, $guest->chain($name, $_)) } $archive->devices;
}

# The files of digests that the device must match, the newest first; none for an archive of version 0.1.
sub digests_of ($guest, $name, $device) {
    my @chain = $guest->chain($name, $device);
    return if !is_provable($device, @chain);
    my ($problem) = map { $_->digests_problem($device) // () } @chain;
    $Error->throw(
        'ArchiveError',
        "device $device: a restored disk cannot be verified - $problem",
        device => $device
    ) if defined($problem);
    return map { $_->digests($device) } @chain;
}

1;
