package PVE::BackupAccess::Provider::Qcow2Chain::Content;

# Whether images hold what was read from the guest, by the digests that were taken then.

use v5.36;

use Exporter qw(import);
use List::Util qw(min sum0);
use Time::HiRes qw(time);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Provider::Qcow2Chain::Digests qw(is_known);
use PVE::BackupAccess::Provider::Qcow2Chain::Image qw(commit_image);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Try qw(attempt reason);
use PVE::BackupAccess::Volume;

our @EXPORT_OK = qw(chain_damage check_base check_stored content_problem describe joined
    merge_image);

my $Error = 'PVE::BackupAccess::Error';
my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

my $most_shown = 8;

# Ranges, [offset, length], in order and neighbours as one.
sub joined (@ranges) {
    my @joined;
    for my $range (sort { $a->[0] <=> $b->[0] } @ranges) {
        if (@joined && $joined[-1][0] + $joined[-1][1] == $range->[0]) {
            $joined[-1][1] += $range->[1];
        }
        else {
            push(@joined, [$range->@*]);
        }
    }
    return @joined;
}

# As text: how much, and where.
sub describe (@ranges) {
    my $bytes = sum0(map { $_->[1] } @ranges);
    my @shown = @ranges[0 .. min($most_shown, scalar(@ranges)) - 1];
    my $more = @ranges - @shown;
    return
          "$bytes bytes are not what was read from the guest: "
        . join(', ', map { "$_->[1] at offset $_->[0]" } @shown)
        . ($more ? " and $more more" : '');
}

# The ranges of an image that are otherwise than files of digests know: all of the image, or only
# what one file knows. What the image builds on has to be there.
my sub damage_in ($image, $size, @digests) {
    local $SIG{CHLD} = 'DEFAULT';    # the caller's may wait for every child
    my $server = $Server->start($image);
    my $volume
        = PVE::BackupAccess::Volume->open('image', { 'nbd-path' => $server->uri, size => $size });
    my @ranges;
    $volume->check(
        expected => \@digests,
        'only-known' => @digests == 1 ? 1 : 0,
        damaged => sub ($offset, $length) { push(@ranges, [$offset, $length]) },
    );
    $volume->close;
    $server->kill;
    return joined(@ranges);
}

# Of what the archive itself has of the device.
my sub damage ($archive, $device) {
    return damage_in(
        $archive->image($device),
        $archive->device($device)->{size},
        $archive->digests($device)
    );
}

# Reads what was written just now, as a restore would. It comes from the page cache: what the disk
# below makes of it is not seen here.
sub check_stored ($archive, $device, $log) {
    my $start = time;
    my @damage = damage($archive, $device);
    $Error->throw(
        'ContentError',
        "device $device: its image lacks what was written to it - " . describe(@damage),
        device => $device
    ) if @damage;
    $log->('info', sprintf('%s: checked in %.1f s', $device, time - $start));
    return;
}

# The same for what was not written since what the archive builds on, the chain, has it already: all of
# the disk is read. Where that is not so the chain is damaged, and the next backup does not build on it.
sub check_base ($archive, $device, $log, @chain) {
    my $start = time;
    my @damage = damage_in(
        $archive->image($device),
        $archive->device($device)->{size},
        map { $_->digests($device) } $archive, @chain
    );
    if (@damage) {
        $chain[0]->note_damage($device, 1);
        $Error->throw(
            'ContentError',
            "device $device: archive "
                . $chain[0]->name
                . ', which this one builds on, is damaged, so that the next backup is a full one - '
                . describe(@damage),
            device => $device
        );
    }
    $log->('info', sprintf('%s: checked in full in %.1f s', $device, time - $start));
    return;
}

my sub offsets ($block, @ranges) {
    return map {
        my ($offset, $length) = $_->@*;
        map { $offset + $_ * $block } 0 .. ($length - 1) / $block
    } @ranges;
}

# Puts what the archive has of the device into the image that it builds on. Until the caller has moved
# that here, the archive shows what it has itself: nothing is lost when a merge goes wrong, which is
# found by reading what was merged. What was damaged before stays known by its digests.
sub merge_image ($archive, $device, $into) {
    my $digests = $archive->digests($device);
    return commit_image($archive->image($device)) if !defined($digests);    # version 0.1
    my $about = $archive->device($device);
    my $block = $about->{digests}{block};

    # Before the merge: afterwards what it has damaged could not be told from what was damaged before.
    my %known = map { $_ => 1 } offsets($block, damage($archive, $device));
    $archive->note_damage($device, 1) if %known;
    commit_image($archive->image($device));
    my @new = grep { !$known{$_} } offsets($block, damage_in($into, $about->{size}, $digests));
    $Error->throw(
        'ContentError',
        "device $device: the merged image $into lacks what was merged - "
            . describe(joined(map { [$_, min($block, $about->{size} - $_)] } @new)),
        device => $device
    ) if @new;
    return;
}

# Why the device's content is not what was read, or undef.
sub content_problem ($archive, $device) {
    my $problem = $archive->digests_problem($device);
    return $problem if defined($problem);
    my @ranges;
    my $error = attempt { @ranges = damage($archive, $device) };
    return $error ? reason($error) : @ranges ? describe(@ranges) : undef;
}

# Of a range, the blocks that none of the files knows.
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

# What is damaged of the device as the first of the chain shows it: [[archive, ranges...], ...]. What
# was found in an image is kept in seen: each is read once, however many build on it.
sub chain_damage ($seen, $device, @chain) {
    my (@found, @newer);
    for my $archive (@chain) {
        my $ranges = $seen->{ $archive->dir }{ $archive->own($device) }
            //= [damage($archive, $device)];
        my $block = $archive->device($device)->{digests}{block};
        my @visible = map { without_known($_, $block, @newer) } $ranges->@*;
        push(@found, [$archive, @visible]) if @visible;
        push(@newer, $archive->digests($device));
    }
    return @found;
}

1;
