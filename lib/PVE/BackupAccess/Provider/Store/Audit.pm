package PVE::BackupAccess::Provider::Store::Audit;

# Audits a dirty bitmap: the device was read in full and compared with the earlier archives, and the new archive has
# what differs. A difference that the bitmap does not cover shows that the bitmap was wrong.

use v5.36;

use Exporter qw(import);
use List::Util qw(min);

use PVE::BackupAccess::Provider::Store::Digests qw(each_known);
use PVE::BackupAccess::Volume;

our @EXPORT_OK = qw(audit is_due);

my $most_ranges = 1000;
my $most_shown = 8;
my $batch = 10_000;

# Whether the next backup of a device must be an audit. A full read for another reason counts as one.
sub is_due ($base, $device, $every) {
    return $every && ($base->device($device)->{increments} // 0) + 1 >= $every;
}

# Returns a function that says whether a range is dirty in the bitmap. It must be called with ascending ranges.
my sub dirty_map ($device, $volume) {
    my $map = PVE::BackupAccess::Volume->open(
        $device,
        {
            $volume->%{qw(nbd-path size)},
            'bitmap-mode' => 'reuse',
            'bitmap-name' => $volume->{'audit-bitmap'},
        }
    );
    my ($begin, $end, @regions) = (0, 0);
    return sub ($offset, $length) {
        while ($end <= $offset) {
            @regions = $map->dirty_regions($batch) if !@regions;
            return 0 if !@regions;
            ($begin, my $bytes) = splice(@regions, 0, 2);
            $end = $begin + $bytes;
        }
        return $begin < $offset + $length;
    };
}

my sub describe ($finding, $name) {
    my ($device, $bytes, $ranges, $suspects) = $finding->@{qw(device bytes ranges suspects)};
    my @shown = $ranges->@[0 .. min($most_shown, scalar($ranges->@*)) - 1];
    my $places = join(', ', map { "$_->[1] at offset $_->[0]" } @shown);
    $places .= ' and more' if $ranges->@* > @shown;
    my $others
        = $suspects->@*
        ? '; these archives may lack them: ' . join(', ', $suspects->@*)
        : '';
    return
        "device $device: its dirty bitmap was wrong: it called $bytes bytes clean that have changed:"
        . " $places. Archive $name has them$others";
}

# The archives that were made with this bitmap since the device was last read in full, the newest first.
my sub suspects_of ($device, @chain) {
    my @suspects;
    for my $archive (@chain) {
        last if !$archive->device($device)->{increments};
        push(@suspects, $archive->name);
    }
    return \@suspects;
}

# Returns what the archive stored although the bitmap calls it clean, undef if there is nothing: whatever the archive
# has differs from the chain.
sub audit ($archive, $device, $volume, @chain) {
    my $is_dirty = dirty_map($device, $volume);
    my ($bytes, @ranges) = (0);
    each_known(
        $archive->digests($device),
        sub ($offset, $length) {
            return if $is_dirty->($offset, $length);
            $bytes += $length;
            if (@ranges && $ranges[-1][0] + $ranges[-1][1] == $offset) {
                $ranges[-1][1] += $length;
            }
            elsif (@ranges < $most_ranges) {
                push(@ranges, [$offset, $length]);
            }
        }
    );
    return undef if !$bytes;
    my %finding = (
        device => $device,
        bytes => $bytes,
        ranges => \@ranges,
        suspects => suspects_of($device, @chain),
    );
    return { %finding, text => describe(\%finding, $archive->name) };
}

1;
