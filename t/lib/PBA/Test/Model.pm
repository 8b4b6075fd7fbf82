package PBA::Test::Model;

# The content that the disks must have while the guest's churn writer runs (see t/guest/agent.c): write number s
# = 1, 2, ... goes to disk (s - 1) % disks, to a block chosen by a generator, and repeats s and its own offset.
# So an image itself shows which instant it is of.

use v5.36;

my $BLOCK = 4096;
my $CHUNK = 1024 * 1024;

# seed => number, disks => [{ id, size, base => content | base_file => raw image }] in the churn's order, blocks
# => limit as given to the churn. Without a base, the disk is initially all zeroes.
sub new ($class, %opt) {
    my $self = bless { x => ($opt{seed} // 1) & 0x7fffffff, disks => [], index => {} }, $class;
    for my $disk ($opt{disks}->@*) {
        my $blocks = int($disk->{size} / $BLOCK);
        $blocks = $opt{blocks} if $opt{blocks} && $opt{blocks} < $blocks;
        $self->{index}{ $disk->{id} } = $self->{disks}->@*;
        push $self->{disks}->@*, { $disk->%*, blocks => $blocks };
    }

    # $self->{block}[$s - 1] is the block of write $s; the list is extended on demand.
    $self->{block} = [];
    return $self;
}

sub _index ($self, $id) {
    return $self->{index}{$id} // die "no disk '$id' in the model\n";
}

# Runs the generator up to write $n.
sub _extend ($self, $n) {
    my ($x, $block, $disks) = $self->@{qw(x block disks)};
    my @blocks = map { $_->{blocks} } $disks->@*;
    my $count = @blocks;
    for my $s (@$block + 1 .. $n) {
        $x = ($x * 1103515245 + 12345) & 0x7fffffff;
        push @$block, ($x >> 8) % $blocks[($s - 1) % $count];
    }
    $self->{x} = $x;
    return;
}

# The disk and the offset of write $s.
sub target ($self, $s) {
    $self->_extend($s);
    my $disk = $self->{disks}[($s - 1) % $self->{disks}->@*];
    return ($disk->{id}, $self->{block}[$s - 1] * $BLOCK);
}

# { block => last write to it }, of the disk's writes up to $n.
sub last_writes ($self, $id, $n) {
    $self->_extend($n);
    my ($block, %last) = $self->{block};
    my $step = $self->{disks}->@*;
    for (my $s = $self->_index($id) + 1; $s <= $n; $s += $step) {
        $last{ $block->[$s - 1] } = $s;
    }
    return \%last;
}

# The blocks of the disk's writes $from .. $to, as sorted and joined ranges [offset, length].
sub written_ranges ($self, $id, $from, $to) {
    $self->_extend($to);
    my $step = $self->{disks}->@*;
    my $index = $self->_index($id);
    my %touched;
    for my $s ($from .. $to) {
        $touched{ $self->{block}[$s - 1] } = 1 if ($s - 1) % $step == $index;
    }
    my @ranges;
    for my $block (sort { $a <=> $b } keys %touched) {
        if (@ranges && $ranges[-1][0] + $ranges[-1][1] == $block * $BLOCK) {
            $ranges[-1][1] += $BLOCK;
        }
        else {
            push @ranges, [$block * $BLOCK, $BLOCK];
        }
    }
    return @ranges;
}

sub record ($s, $offset) {
    return pack('Q>Q>', $s, $offset) x ($BLOCK / 16);
}

# ---- the disk's content by chunks ----

# Returns a code reference that returns the next $length bytes of the base, from the disk's start.
sub _base_reader ($self, $disk) {
    my $at = 0;
    if (defined $disk->{base_file}) {
        open(my $fh, '<:raw', $disk->{base_file}) or die "$disk->{base_file}: $!\n";
        return sub ($length) {
            my $data = _read_exactly($fh, $length);
            return $data . "\0" x ($length - length $data);
        };
    }
    my $base = $disk->{base} // '';
    return sub ($length) {
        my $data = $at < length $base ? substr($base, $at, $length) : '';
        $at += $length;
        return $data . "\0" x ($length - length $data);
    };
}

# Reads $length bytes; fewer only at the end of the file.
sub _read_exactly ($fh, $length) {
    my $data = '';
    while (length $data < $length) {
        my $n = sysread($fh, $data, $length - length $data, length $data);
        die "read: $!\n" if !defined $n;
        last if !$n;
    }
    return $data;
}

# Calls $each->($offset, $expected) for the disk as of write $n, chunk by chunk, until it returns false.
sub _each_chunk ($self, $id, $n, $each) {
    my $disk = $self->{disks}[$self->_index($id)];
    my $read = $self->_base_reader($disk);
    my $last = $self->last_writes($id, $n);
    my %in_chunk;
    push $in_chunk{ int($_ * $BLOCK / $CHUNK) }->@*, $_ for keys %$last;

    for (my $offset = 0; $offset < $disk->{size}; $offset += $CHUNK) {
        my $left = $disk->{size} - $offset;
        my $data = $read->($left < $CHUNK ? $left : $CHUNK);
        for my $block (($in_chunk{ $offset / $CHUNK } // [])->@*) {
            my $to = $block * $BLOCK;
            substr($data, $to - $offset, $BLOCK, record($last->{$block}, $to));
        }
        return if !$each->($offset, $data);
    }
    return;
}

# The disk's whole content after all writes up to $n.
sub state ($self, $id, $n) {
    my $content = '';
    $self->_each_chunk($id, $n, sub ($offset, $data) { $content .= $data; 1 });
    return $content;
}

# Writes the same to a file.
sub write_state ($self, $id, $n, $file) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    $self->_each_chunk($id, $n, sub ($offset, $data) { print {$fh} $data });
    close($fh) or die "$file: $!\n";
    return;
}

# ---- checks of images ----

# The number of the last churn write in a raw image, 0 if there is none. Blocks that are unchanged from the base
# do not count, because the base may contain the records of an earlier churn.
sub highest_seq ($self, $id, $image) {
    my $index = $self->_index($id);
    my $disk = $self->{disks}[$index];
    my $read = $self->_base_reader($disk);
    open(my $fh, '<:raw', $image) or die "$image: $!\n";

    my %claimed;
    my $end = $disk->{blocks} * $BLOCK;
    for (my $offset = 0; $offset < $end; $offset += $CHUNK) {
        my $length = $end - $offset < $CHUNK ? $end - $offset : $CHUNK;
        my $data = _read_exactly($fh, $length);
        my $base = $read->($length);
        next if $data eq $base;
        _claims(\%claimed, $data, $base, $offset);
    }
    return $self->_verify_claims($index, \%claimed);
}

# Notes block => s for the blocks that start with a record of their own offset.
sub _claims ($claimed, $data, $base, $offset) {
    my @words = unpack '(Q>Q>x4080)*', substr($data, 0, length($data) & ~($BLOCK - 1));
    for my $i (0 .. $#words / 2) {
        my ($s, $own) = @words[2 * $i, 2 * $i + 1];
        my $at = $i * $BLOCK;
        next if !$s || $own != $offset + $at;
        next if substr($data, $at, $BLOCK) eq substr($base, $at, $BLOCK);
        $claimed->{ $own / $BLOCK } = $s;
    }
    return;
}

# The highest claim that this churn could have written: the disk and the block are right.
sub _verify_claims ($self, $index, $claimed) {
    my $count = $self->{disks}->@*;
    for my $block (sort { $claimed->{$b} <=> $claimed->{$a} } keys %$claimed) {
        my $s = $claimed->{$block};
        next if $s > 100_000_000 || ($s - 1) % $count != $index;
        $self->_extend($s);
        return $s if $self->{block}[$s - 1] == $block;
    }
    return 0;
}

# Compares an image with the disk as of write $n. Returns undef if they are equal, otherwise the first offset
# that differs (or the smaller size, if one is longer).
sub first_difference ($self, $id, $image, $n) {
    open(my $fh, '<:raw', $image) or die "$image: $!\n";
    my $at;
    $self->_each_chunk(
        $id, $n,
        sub ($offset, $expected) {
            my $data = _read_exactly($fh, length $expected);
            return 1 if $data eq $expected;
            $at = $offset + _first_byte($data, $expected);
            return 0;
        },
    );
    return $at if defined $at;
    return length(_read_exactly($fh, 1)) ? $self->{disks}[$self->_index($id)]{size} : undef;
}

sub _first_byte ($data, $expected) {
    my $length = length $data < length $expected ? length $data : length $expected;
    my $xor = substr($data, 0, $length) ^. substr($expected, 0, $length);
    return $xor =~ /[^\0]/ ? $-[0] : $length;
}

# The image must be the disk as of some write. Returns the number of the last write in it and undef, or, if it
# is not, the first offset that differs.
sub check_image ($self, $id, $image) {
    my $n = $self->highest_seq($id, $image);
    return ($n, $self->first_difference($id, $image, $n));
}

# Images of all disks ({ id => file }) must show the same instant. Returns the number of the last write in them
# and undef, or a text that says what is wrong.
sub check_images ($self, $images) {
    my ($last, %seq) = 0;
    for my $id (sort keys %$images) {
        my ($n, $at) = $self->check_image($id, $images->{$id});
        return ($n, "$id is not as of write $n: differs at $at") if defined $at;
        $seq{$id} = $n;
        $last = $n if $n > $last;
    }
    for my $id (sort keys %seq) {
        my $expected = $self->_last_of_disk($id, $last);
        next if $seq{$id} >= $expected;
        return ($last, "$id is as of write $seq{$id}, but write $last is there: not one instant");
    }
    return ($last, undef);
}

# The number of the disk's last write that is not later than $n.
sub _last_of_disk ($self, $id, $n) {
    my $count = $self->{disks}->@*;
    my $index = $self->_index($id);
    my $s = $n - ($n - 1 - $index) % $count;
    return $s > 0 ? $s : 0;
}

1;
