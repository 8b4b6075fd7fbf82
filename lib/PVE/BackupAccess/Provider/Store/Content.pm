package PVE::BackupAccess::Provider::Store::Content;

# Whether an archive holds what was read from the guest, by the digests that were taken then.

use v5.36;

use Exporter qw(import);
use List::Util qw(min sum0);

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(attempt reason rethrow);
use PVE::BackupAccess::Volume;

our @EXPORT_OK
    = qw(add_range beyond by_blocks check_base check_stored compare damage describe describe_unread is_damage joined problem_of problems_or_die);

my $Error = 'PVE::BackupAccess::Error';

my $most_shown = 8;
my $block = 65536;

# Whether an error says that stored data is damaged. Any other only says that it could not be read now, for example because
# a program was killed, or because there is no room for temporary files.
sub is_damage ($error) { return $error->class =~ m/\A(?:Archive|Content)Error\z/ ? 1 : 0 }

# What the code returns: why data is damaged, or undef. If it finds damage in what it needs for that, that is the reason. Other
# errors do not count as damage, and are passed on.
sub problem_of ($code) {
    my $problem;
    my $error = attempt { $problem = $code->() };
    rethrow($error) if $error && !is_damage($error);
    return $error ? reason($error) : $problem;
}

# The result of a verification: what is wrong, and then what could not be read. Dies if nothing is known to be wrong, but
# something could not be read.
sub problems_or_die ($problems, $unread) {
    $Error->throw('SystemError', $unread->[0]) if !$problems->@* && $unread->@*;
    return ($problems->@*, $unread->@*);
}

# Ranges, [offset, length], in order and neighbours as one.
sub joined (@ranges) {
    my @joined;
    add_range(\@joined, $_->@*) for sort { $a->[0] <=> $b->[0] } @ranges;
    return @joined;
}

# Adds a range to others. One that begins where the last one ends is joined to it: a damaged disk may have millions of blocks.
sub add_range ($ranges, $offset, $length) {
    my $last = $ranges->[-1];
    if ($last && $last->[0] + $last->[1] == $offset) {
        $last->[1] += $length;
    }
    else {
        push($ranges->@*, [$offset, $length]);
    }
    return;
}

# The parts of the ranges that are not in the known ones. Both must be joined.
sub beyond ($ranges, $known) {
    my @known = $known->@*;
    my @left;
    for my $range ($ranges->@*) {
        my ($at, $end) = ($range->[0], $range->[0] + $range->[1]);
        while ($at < $end) {
            shift(@known) while @known && $known[0][0] + $known[0][1] <= $at;
            my $next = @known ? min($known[0][0], $end) : $end;
            push(@left, [$at, $next - $at]) if $next > $at;
            $at = $next < $end ? $known[0][0] + $known[0][1] : $end;
        }
    }
    return @left;
}

my sub describe_as ($what, @ranges) {
    my $bytes = sum0(map { $_->[1] } @ranges);
    my @shown = @ranges[0 .. min($most_shown, scalar(@ranges)) - 1];
    my $more = @ranges - @shown;
    return
          "$bytes bytes $what: "
        . join(', ', map { "$_->[1] at offset $_->[0]" } @shown)
        . ($more ? " and $more more" : '');
}

# Texts that say how much is damaged, or cannot be read, and where.
sub describe (@ranges) { return describe_as('differ from what was read from the guest', @ranges) }
sub describe_unread (@ranges) { return describe_as('cannot be read', @ranges) }

# Calls code that reads with options of a copy, and adds what cannot be read to unread. If there is any, the code is called again
# to read single blocks: otherwise, everything else that a request asks for would be missing, too.
sub by_blocks ($unread, $code) {
    $code->();
    return if !$unread->@*;
    $unread->@* = ();
    $code->('request-size' => $block);
    return;
}

# Serves an image by serve->(), and returns the ranges that do not match the files of digests, and those that cannot be read.
# With one such file, only the blocks that it has are read.
sub compare ($serve, $size, @digests) {
    local $SIG{CHLD} = 'DEFAULT';    # the caller's handler may wait for every child
    my $server = $serve->();
    my $volume
        = PVE::BackupAccess::Volume->open('image', { 'nbd-path' => $server->uri, size => $size });
    my (@ranges, @unread);
    by_blocks(
        \@unread,
        sub (%how) {
            @ranges = ();
            $volume->check(
                %how,
                expected => \@digests,
                'only-known' => @digests == 1 ? 1 : 0,
                damaged => sub (@range) { add_range(\@ranges, @range) },
                unreadable => sub (@range) { add_range(\@unread, @range) },
            );
        }
    );
    $volume->close;
    $server->kill;
    return ([joined(@ranges)], [joined(@unread)]);
}

# The damage in the archive's own data of the device. What cannot be read is damaged too if all of its image can be read, or if
# other data is damaged. Otherwise dies: the next try may succeed.
sub damage ($archive, $device) {
    my ($ranges, $unread) = compare(
        sub () { $archive->serve($device) },
        $archive->device($device)->{size},
        $archive->digests($device)
    );
    return joined($ranges->@*, $unread->@*)
        if $ranges->@* || !$unread->@* || $archive->is_readable($device);
    $Error->throw('SystemError', describe_unread($unread->@*));
}

# Reads the new data, as a restore would. It comes from the page cache, so faults of the underlying disk are not detected
# here.
sub check_stored ($archive, $device, $log) {
    my $start = now();
    my @damage = damage($archive, $device);
    $Error->throw(
        'ContentError',
        "device $device: its image lacks what was written to it - " . describe(@damage),
        device => $device
    ) if @damage;
    $log->('info', sprintf('%s: checked in %.1f s', $device, now() - $start));
    return;
}

# Also reads the data that was not written because the chain, which the archive builds on, already has it: the whole disk.
# If that data differs or cannot be read, the chain counts as damaged, and the next backup does not build on it: otherwise, that
# would fail in the same way.
sub check_base ($archive, $device, $log, @chain) {
    my $start = now();
    my @damage = joined(
        map { $_->@* } compare(
            sub () { $archive->serve($device) }, $archive->device($device)->{size},
            map { $_->digests($device) } $archive, @chain
        )
    );
    if (@damage) {
        $chain[0]->note_damage($device, 1);
        $Error->throw(
            'ContentError',
            "device $device: archive "
                . $chain[0]->name
                . ', which this one builds on, is damaged; the next backup will be full - '
                . describe(@damage),
            device => $device
        );
    }
    $log->('info', sprintf('%s: checked in full in %.1f s', $device, now() - $start));
    return;
}

1;
