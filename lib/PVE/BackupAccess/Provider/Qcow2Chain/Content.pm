package PVE::BackupAccess::Provider::Qcow2Chain::Content;

# Finds the parts of a chain's images, or of a new image once it is closed, that differ from what was read from the guest,
# and merges one image into another.

use v5.36;

use Digest::SHA qw(sha256);
use Exporter qw(import);
use List::Util qw(min);

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Store::Digests qw(each_digest known_in);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(commit_image extents image_problem);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Provider::Store::Content
    qw(add_range beyond compare damage describe describe_unread joined problem_of);
use PVE::BackupAccess::Try qw(attempt rethrow);

our @EXPORT_OK = qw(chain_damage check_image content_problem merge_damage merge_image note_ranges);

my $Error = 'PVE::BackupAccess::Error';
my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

# Writes the archive's own data of the device into the image that it builds on, and reads it back there. The archive's own
# image stays as it is until the caller replaces it, so a merge that goes wrong loses nothing. Earlier damage remains
# detectable, because its digests are kept.
sub merge_image ($archive, $device, $into) {
    my $digests = $archive->digests($device);
    return commit_image($archive->image($device)) if !defined($digests);    # version 0.1
    my $size = $archive->device($device)->{size};

    # Before the merge: afterwards, damage by the merge could not be told from earlier damage.
    my @known = $archive->is_intact($device) ? () : damage($archive, $device);
    $archive->note_damage($device, 1) if @known;
    commit_image($archive->image($device));
    my ($damage, $unread) = compare(sub () { $Server->start($into) }, $size, $digests);
    $Error->throw('SystemError', "$into: " . describe_unread($unread->@*), device => $device)
        if $unread->@*;
    my @new = beyond($damage, \@known);
    $Error->throw(
        'ContentError',
        "device $device: the merged image $into lacks what was merged - " . describe(@new),
        device => $device
    ) if @new;
    return;
}

# Returns a function that returns the extent of an image, without its backing file, at an offset: its end, undef behind the last
# one; whether the image holds it, and whether it holds zeroes there. It must be called with ascending offsets.
my sub extents_by_offset ($image) {
    my $next = extents($image);
    my @extent = (0);
    return sub ($offset) {
        @extent = $next->() while defined($extent[0]) && $extent[0] <= $offset;
        return @extent;
    };
}

# Whether the image holds all of a block, and, unless these are zeroes, other data than zeroes. Of other data, a part may be
# zeroes: a file system that stores none shows a hole there.
my sub is_held ($extent_at, $offset, $length, $is_zeroes) {
    for (my ($at, $end) = ($offset); $at < $offset + $length; $at = $end) {
        ($end, my ($is_there, $is_zero)) = $extent_at->($at);
        return 0 if !$is_there;
        $is_zeroes ||= !$is_zero;
    }
    return $is_zeroes;
}

# Adds the parts of a range that the image holds to the ranges.
my sub add_held ($held, $extent_at, $at, $until) {
    while ($at < $until) {
        my ($end, $is_there) = $extent_at->($at);
        $end = min($end // $until, $until);
        add_range($held, $at, $end - $at) if $is_there;
        $at = $end;
    }
    return;
}

# What the tables of the closed image get wrong: the blocks that have digests, and that the image does not hold itself; and
# the ranges that an increment holds although it has no digests of them, which would hide what it builds on. Zeroes may be
# stored as data or as zeroes. An image without a backing file need not hold zeroes.
my sub wrong_tables ($archive, $device) {
    my $extent_at = extents_by_offset($archive->image($device));
    my $size = $archive->device($device)->{size};
    my ($is_increment) = $archive->parent_of($archive->own($device));
    my ($told, $lost, $stray, %zeroes) = (0, [], []);
    my $code = sub ($offset, $length, $digest) {
        add_held($stray, $extent_at, $told, $offset) if $is_increment;
        $told = $offset + $length;
        my $zeroes = $zeroes{$length} //= sha256("\0" x $length);
        add_range($lost, $offset, $length)
            if !is_held($extent_at, $offset, $length, $digest eq $zeroes);
    };
    each_digest($archive->digests($device), $code);
    add_held($stray, $extent_at, $told, $size) if $is_increment;
    return ($lost, $stray);
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

# The blocks of the ranges for which none of the files has a digest.
my sub without_known ($ranges, $block, @files) {
    return $ranges->@* if !@files || !$ranges->@*;
    my @is_known = map { known_in($_) } @files;
    my $left = [];
    for my $range ($ranges->@*) {
        my ($at, $end) = ($range->[0], $range->[0] + $range->[1]);
        for (; $at < $end; $at += $block) {
            add_range($left, $at, min($block, $end - $at)) if !grep { $_->($at) } @is_known;
        }
    }
    return $left->@*;
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
        my @visible = without_known($ranges, $block, @newer);
        push(@found, [$archive, @visible]) if @visible;
        push(@newer, $archive->digests($device));
    }
    return @found;
}

# Notes for each archive of the chain that it is damaged if the first one shows data of it in these ranges.
sub note_ranges ($ranges, $device, @chain) {
    for my $archive (@chain) {
        my $block = $archive->device($device)->{digests}{block};
        my @older = without_known($ranges, $block, $archive->digests($device));
        $archive->note_damage($device, 1) if beyond($ranges, \@older);
        $ranges = \@older;
    }
    return;
}

1;
