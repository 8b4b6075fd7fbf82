package PVE::BackupAccess::CLI::Map::Heat;

# Counts the dirty bytes of equal parts of a disk. Regions are added one by one; only one number is
# kept for each part, whatever the number of regions.

use v5.36;

use List::Util qw(min);
use POSIX qw(ceil);

my @blocks = map { chr } 0x2581 .. 0x2588;    # from one eighth of a block to a whole one
my @letters = split(//, '.:-=+*#@');

# Parts are whole multiples of $unit bytes, so a small disk may have fewer than $count.
sub new ($class, $size, $count, $unit = 1) {
    my $part = int(($size + $count - 1) / $count) || 1;
    $part = int(($part + $unit - 1) / $unit) * $unit;
    my $parts = int(($size + $part - 1) / $part);
    return bless({ size => $size, part => $part, dirty => [(0) x $parts] }, $class);
}

sub add ($self, $offset, $length) {
    my ($part, $end) = ($self->{part}, $offset + $length);
    while ($offset < $end) {
        my $index = int($offset / $part);
        my $next = min($end, ($index + 1) * $part);
        $self->{dirty}[$index] += $next - $offset;
        $offset = $next;
    }
    return;
}

sub count ($self) { return scalar($self->{dirty}->@*) }

# Offset, length and dirty bytes of a part.
sub part ($self, $index) {
    my $offset = $index * $self->{part};
    return ($offset, min($self->{part}, $self->{size} - $offset), $self->{dirty}[$index]);
}

# One character for each part; even the smallest dirty part is visible.
sub strip ($self, $is_utf8) {
    my $levels = $is_utf8 ? \@blocks : \@letters;
    my $strip = '';
    for my $index (0 .. $self->count - 1) {
        my (undef, $length, $dirty) = $self->part($index);
        $strip .= $dirty ? $levels->[ceil(8 * $dirty / $length) - 1] : q( );
    }
    return $strip;
}

1;
