package PVE::BackupAccess::CLI::Map::SVG;

# A dirty map as a picture: the disk in rows from left to right, with a cell for each part of it.
# The more of a part is dirty, the darker is its cell.

use v5.36;

use List::Util qw(min);

use PVE::BackupAccess::Format qw(bytes);

my ($columns, $max_rows) = (64, 24);
my ($cell, $gap) = (11, 1);
my ($left, $top, $right, $bottom) = (84, 66, 20, 52);
my $clean = '#eceff1';
my @colours = map { "#$_" } qw(fed976 feb24c fd8d3c f03b20 bd0026);
my $font = q(font-family="system-ui, 'DejaVu Sans', sans-serif");

sub cells () { return $columns * $max_rows }

my sub escape ($text) {
    state $entities = { '&' => '&amp;', '<' => '&lt;', '>' => '&gt;', '"' => '&quot;' };
    $text =~ s/[[:cntrl:]]/ /g;    # not allowed in XML
    return $text =~ s/([&<>"])/$entities->{$1}/gr;
}

my sub text ($x, $y, $text, %style) {
    my $attributes = join('', map { qq( $_="$style{$_}") } sort keys %style);
    return qq(<text x="$x" y="$y"$attributes>) . escape($text) . '</text>';
}

my sub colour_of ($part) {
    return $colours[min($#colours, int($part * @colours))];
}

my sub cell_at ($heat, $index) {
    my ($offset, $length, $dirty) = $heat->part($index);
    my $x = $left + $index % $columns * ($cell + $gap);
    my $y = $top + int($index / $columns) * ($cell + $gap);
    my $colour = $dirty ? colour_of($dirty / $length) : $clean;
    my $rect = qq(<rect x="$x" y="$y" width="$cell" height="$cell" fill="$colour");
    return "$rect/>" if !$dirty;
    my $what = escape(bytes($dirty) . ' dirty of ' . bytes($length) . ' at ' . bytes($offset));
    return "$rect><title>$what</title></rect>";
}

# The offset at which each row begins, or every fourth one if there are many.
my sub row_labels ($heat) {
    my $rows = int(($heat->count + $columns - 1) / $columns);
    my $step = $rows > 8 ? 4 : 1;
    my @labels;
    for (my $row = 0; $row < $rows; $row += $step) {
        my ($offset) = $heat->part($row * $columns);
        my $y = $top + $row * ($cell + $gap) + $cell - 1;
        push(@labels, text($left - 8, $y, bytes($offset), 'text-anchor' => 'end'));
    }
    return @labels;
}

my sub legend ($y) {
    my @parts = (text($left, $y + $cell - 1, 'clean'));
    my $x = $left + 40;
    for my $colour ($clean, @colours) {
        push(@parts, qq(<rect x="$x" y="$y" width="$cell" height="$cell" fill="$colour"/>));
        $x += $cell + $gap;
    }
    return (@parts, text($x + 6, $y + $cell - 1, 'all dirty'));
}

# Returns the picture as UTF-8.
sub draw ($heat, $title, $totals) {
    my $rows = int(($heat->count + $columns - 1) / $columns);
    my $width = $left + $columns * ($cell + $gap) + $right;
    my $height = $top + $rows * ($cell + $gap) + $bottom;
    my (undef, $part) = $heat->part(0);
    my $svg = join("\n",
        qq(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" width="$width")
            . qq( height="$height" $font font-size="11" fill="#37474f">),
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        text($left, 28, $title, 'font-size' => 16, 'font-weight' => 600),
        text($left, 48, "$totals, one cell is " . bytes($part), 'font-size' => 12),
        (map { cell_at($heat, $_) } 0 .. $heat->count - 1),
        row_labels($heat),
        legend($height - $bottom + 22),
        "</svg>\n",
    );
    utf8::encode($svg);
    return $svg;
}

1;
