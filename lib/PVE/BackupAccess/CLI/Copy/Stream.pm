package PVE::BackupAccess::CLI::Copy::Stream;

# Writes a copy as a stream of frames, which doc/any-language.md describes. A truncated stream has no end
# frame, and the end frame has a digest of all earlier headers, so the receiver detects any missing frame.

use v5.36;

use Digest::SHA ();
use List::Util qw(min);

use PVE::BackupAccess::CLI::Output qw(write_all);

my $header = 'a8 Q> Q> a32';    # kind, offset, length, SHA-256 of the data
my $digest_size = 32;
my $version = 1;
my $where = 'standard output';

# Each frame ends at a multiple of $block and has the digests of its blocks.
sub new ($class, $fh, $size, $block, $is_increment) {
    my $self = bless(
        {
            fh => $fh,
            block => $block,
            zeroes => "\0" x $block,
            headers => Digest::SHA->new(256),
            frames => 0,
            bytes => 0,
        },
        $class
    );
    write_all($fh, $where, $self->_header($is_increment ? 'part' : 'full', $version, $size, ''));
    return $self;
}

sub _header ($self, $kind, $offset, $length, $digest) {
    my $bytes = pack($header, $kind, $offset, $length, $digest);
    $self->{headers}->add($bytes);
    return $bytes;
}

# The copy reports the digests of some blocks right before their data.
sub digests ($self, $offset, $digests) {
    $self->@{qw(told digests)} = ($offset, $digests);
    return;
}

sub _digest_at ($self, $offset) {
    my $index = ($offset - $self->{told}) / $self->{block};
    my $digest = substr($self->{digests}, $index * $digest_size, $digest_size);
    die "internal error: no digest for offset $offset\n"
        if $index != int($index) || $index < 0 || length($digest) != $digest_size;
    return $digest;
}

sub data ($self, $offset, $data) {
    my $frames = '';
    for (my $at = 0; $at < length($data); $at += $self->{block}) {
        my $length = min($self->{block}, length($data) - $at);
        my $bytes = substr($data, $at, $length);
        my $is_zero = $bytes eq substr($self->{zeroes}, 0, $length);
        my $digest = $self->_digest_at($offset + $at);
        $frames .= $self->_header($is_zero ? 'zero' : 'data', $offset + $at, $length, $digest);
        $frames .= $bytes if !$is_zero;
        $self->{frames}++;
        $self->{bytes} += $length;
    }
    write_all($self->{fh}, $where, $frames);
    return;
}

# Writes the end frame. Call this only after the copy has succeeded.
sub finish ($self) {
    my $digest = $self->{headers}->clone->digest;
    write_all($self->{fh}, $where, $self->_header('end', $self->@{qw(frames bytes)}, $digest));
    return;
}

1;
