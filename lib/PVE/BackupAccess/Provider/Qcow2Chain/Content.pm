package PVE::BackupAccess::Provider::Qcow2Chain::Content;

# Finds the parts of a chain's images, or of a new image once it is closed, that differ from what was read from the guest,
# and merges one image into another.

use v5.36;

use Digest::SHA qw(sha256);
use Exporter qw(import);
use List::Util qw(min);

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Digests qw(each_digest is_known);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(commit_image extents image_problem);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Provider::Store::Content
    qw(compare damage describe describe_unread joined problem_of);
use PVE::BackupAccess::Try qw(attempt rethrow);

our @EXPORT_OK = qw(chain_damage check_image content_problem merge_damage merge_image);

my $Error = 'PVE::BackupAccess::Error';
my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

my sub offsets ($block, @ranges) {
    return map {
        my ($offset, $length) = $_->@*;
        map { $offset + $_ * $block } 0 .. ($length - 1) / $block
    } @ranges;
}

# Writes the archive's own data of the device into the image that it builds on, and reads it back there. The archive's own
# image stays as it is until the caller replaces it, so a merge that goes wrong loses nothing. Earlier damage remains
# detectable, because its digests are kept.
sub merge_image ($archive, $device, $into) {
    my $digests = $archive->digests($device);
    return commit_image($archive->image($device)) if !defined($digests);    # version 0.1
    my $about = $archive->device($device);
    my $block = $about->{digests}{block};

    # Before the merge: afterwards, damage by the merge could not be told from earlier damage.
    my @damage = $archive->is_intact($device) ? () : damage($archive, $device);
    my %known = map { $_ => 1 } offsets($block, @damage);
    $archive->note_damage($device, 1) if %known;
    commit_image($archive->image($device));
    my ($damage, $unread) = compare(sub () { $Server->start($into) }, $about->{size}, $digests);
    $Error->throw('SystemError', "$into: " . describe_unread($unread->@*), device => $device)
        if $unread->@*;
    my @new = grep { !$known{$_} } offsets($block, $damage->@*);
    $Error->throw(
        'ContentError',
        "device $device: the merged image $into lacks what was merged - "
            . describe(joined(map { [$_, min($block, $about->{size} - $_)] } @new)),
        device => $device
    ) if @new;
    return;
}

# What the tables of the closed image get wrong: the blocks that have digests, and that the image does not hold itself; and
# the ranges that an increment holds although it has no digests of them, which would hide what it builds on. Zeroes may be
# stored as data or as zeroes. Of other data, a part may be zeroes: a file system that stores none shows a hole there. An
# image without a backing file need not hold zeroes.
my sub wrong_tables ($archive, $device) {
    my $next = extents($archive->image($device));
    my ($parent) = $archive->parent_of($archive->own($device));
    my ($end, $is_there, $is_zero, $told, %zeroes, @lost, @stray) = (0, 0, 0, 0);
    my $find = sub ($offset) {
        while (defined($end) && $end <= $offset) {
            ($end, $is_there, $is_zero) = $next->();
        }
        return defined($end) && $is_there;
    };
    my $no_digests = sub ($begin, $until) {
        for (my $at = $begin; defined($parent) && $at < $until; $at = $end // $until) {
            push(@stray, [$at, min($end, $until) - $at]) if $find->($at);
        }
    };
    each_digest(
        $archive->digests($device),
        sub ($offset, $length, $digest) {
            $no_digests->($told, $offset);
            $told = $offset + $length;
            my $is_held = $digest eq ($zeroes{$length} //= sha256("\0" x $length));
            for (my $at = $offset; $at < $told; $at = $end) {
                if (!$find->($at)) {
                    $is_held = 0;
                    last;
                }
                $is_held ||= !$is_zero;
            }
            push(@lost, [$offset, $length]) if !$is_held;
        }
    );
    $no_digests->($told, $archive->device($device)->{size});
    return ([joined(@lost)], [joined(@stray)]);
}

my sub stray ($archive, $device) {
    my ($parent) = $archive->parent_of($archive->own($device));
    return defined($parent) ? (wrong_tables($archive, $device))[1]->@* : ();
}

# Checks that the closed image holds everything that was written and read back during the copy. Only the tables that
# locate the data could still have been lost. They are read, the data is not.
sub check_image ($archive, $device, $log) {
    my $start = now();
    my $problem = image_problem($archive->image($device));
    my @wrong = defined($problem) ? () : map { $_->@* } wrong_tables($archive, $device);
    $problem //= describe(joined(@wrong)) if @wrong;
    $Error->throw(
        'ContentError',
        "device $device: its image lacks what was written to it - $problem",
        device => $device
    ) if defined($problem);
    $log->(
        'info',
        sprintf(
            '%s: read back and compared while it was stored; image checked in %.1f s',
            $device, now() - $start
        )
    );
    return;
}

# The blocks of a range for which none of the files has a digest.
my sub without_known ($range, $block, @files) {
    return $range if !@files;
    my ($offset, $length) = $range->@*;
    my @left;
    for (my $at = $offset; $at < $offset + $length; $at += $block) {
        push(@left, [$at, min($block, $offset + $length - $at)])
            if !grep { is_known($_, $at) } @files;
    }
    return joined(@left);
}

# The damage of an archive's own image: its data, and what its tables show beside that. If one of them is damaged, an error in
# reading the other does not hide it.
my sub own_damage ($archive, $device) {
    my (@damage, @stray);
    my $error = attempt { @damage = damage($archive, $device) };
    my $other = attempt { @stray = stray($archive, $device) };
    my @all = joined(@damage, @stray);
    rethrow($error || $other) if ($error || $other) && !@all;
    return @all;
}

# Why the device's content is not what was read, or undef. Dies if that cannot be determined.
sub content_problem ($archive, $device) {
    my $problem = $archive->digests_problem($device);
    return $problem if defined($problem);
    return problem_of(
        sub () {
            my @ranges = own_damage($archive, $device);
            return @ranges ? 'archive ' . $archive->name . ': ' . describe(@ranges) : undef;
        }
    );
}

# Why the parent must not be merged into the archive, or undef: blocks that the parent's reference counts call free would be
# overwritten; and if the archive's own data is damaged, which was not known, the parent may be the last intact archive. Notes
# the damage.
sub merge_damage ($archive, $device, $parent) {
    return undef if !defined($archive->digests($device));    # version 0.1
    my $image = $parent->image($device);
    my $problem = image_problem($image);
    $parent->note_damage($device, 1) if defined($problem);
    return "$image is damaged - $problem" if defined($problem);
    return undef if $archive->is_known_damaged($device);
    my @damage = own_damage($archive, $device);
    $archive->note_damage($device, 1) if @damage;
    $archive->is_intact($device, !@damage);
    return @damage ? $archive->image($device) . ': ' . describe(@damage) : undef;
}

# The damage that the first archive of the chain shows: [[archive, ranges...], ...]. seen caches the damage of each image,
# so that each is read only once, however many archives build on it.
sub chain_damage ($seen, $device, @chain) {
    my (@found, @newer);
    for my $archive (@chain) {
        my $ranges = $seen->{ $archive->revision }{ $archive->own($device) }
            //= [own_damage($archive, $device)];
        my $block = $archive->device($device)->{digests}{block};
        my @visible = map { without_known($_, $block, @newer) } $ranges->@*;
        push(@found, [$archive, @visible]) if @visible;
        push(@newer, $archive->digests($device));
    }
    return @found;
}

1;
