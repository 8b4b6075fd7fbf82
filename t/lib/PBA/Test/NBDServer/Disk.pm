package PBA::Test::NBDServer::Disk;

# The disk of a PBA::Test::NBDServer with keep => 1: stores what is written in a file, and loses it if told to.

use v5.36;

use List::Util qw(max min);

sub make ($file, $size) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print {$fh} "\xee" x $size;
    close($fh) or die "$file: $!\n";
    return;
}

# options: those of the server.
sub new ($class, $options) {
    my $file = "$options->{dir}/content";
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    return bless({ fh => $fh, file => $file, options => $options }, $class);
}

my sub part_of ($range, $offset, $length) {
    my ($begin, $end)
        = (max($range->[0], $offset), min($range->[0] + $range->[1], $offset + $length));
    return $begin < $end ? ($begin, $end - $begin) : ();
}

sub read ($self, $offset, $length) {
    sysseek($self->{fh}, $offset, 0) // die "$self->{file}: $!\n";
    my $got = sysread($self->{fh}, my $data, $length) // die "$self->{file}: $!\n";
    die "$self->{file}: $got bytes at $offset\n" if $got != $length;
    for my $range (($self->{options}{returns_wrong} // [])->@*) {
        my ($begin, $bytes) = part_of($range, $offset, $length) or next;
        substr($data, $begin - $offset, $bytes) ^.= "\x01" x $bytes;
    }
    return $data;
}

sub write ($self, $offset, $data) {
    for my $range (($self->{options}{loses} // [])->@*) {
        my ($begin, $bytes) = part_of($range, $offset, length($data)) or next;
        substr($data, $begin - $offset, $bytes) = $self->read($begin, $bytes);
    }
    sysseek($self->{fh}, $offset, 0) // die "$self->{file}: $!\n";
    syswrite($self->{fh}, $data) == length($data) or die "$self->{file}: $!\n";
    return;
}

1;
