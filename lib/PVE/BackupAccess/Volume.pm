package PVE::BackupAccess::Volume;

use v5.36;

use PVE::BackupAccess;
use PVE::BackupAccess::Argument;

my $max_regions = 1_000_000;

my %volume_keys = (
    size => \&PVE::BackupAccess::Argument::bytes,
    'bitmap-mode' => \&PVE::BackupAccess::Argument::text,
    'nbd-path' => \&PVE::BackupAccess::Argument::filled_text,
    'bitmap-name' => \&PVE::BackupAccess::Argument::filled_text,
);

my sub fail ($device, $message) {
    PVE::BackupAccess::Argument::fail("device $device: $message", device => $device);
}

# The name of the bitmap to read, undef for the whole volume. A bare URI may come without a mode.
my sub bitmap_name ($device, $volume) {
    my $name = $volume->{'bitmap-name'};
    my $mode = $volume->{'bitmap-mode'} // (defined($name) ? 'reuse' : 'none');
    fail($device, "unknown bitmap-mode '$mode' - must be one of none, new, reuse")
        if $mode !~ m/\A(?:none|new|reuse)\z/;
    fail($device, "bitmap-mode '$mode' needs a 'bitmap-name'") if $mode ne 'none' && !defined($name);
    return $mode eq 'none' ? undef : $name;
}

sub open ($class, $device, $volume) {
    PVE::BackupAccess::Argument::filled_text('device', $device);
    fail($device, 'its volume must be a hash') if ref($volume) ne 'HASH';
    PVE::BackupAccess::Argument::hash("the volume of device $device", $volume, \%volume_keys);
    fail($device, "its volume lacks 'nbd-path'") if !defined($volume->{'nbd-path'});
    return $class->_open($device, $volume->{'nbd-path'}, bitmap_name($device, $volume),
        $volume->{size});
}

sub dirty_regions ($self, $max) {
    PVE::BackupAccess::Argument::positive('max', $max);
    PVE::BackupAccess::Argument::fail("max must be at most $max_regions, not $max")
        if $max > $max_regions;
    return $self->_dirty_regions($max);
}

sub pread ($self, $offset, $length) {
    PVE::BackupAccess::Argument::bytes('offset', $offset);
    PVE::BackupAccess::Argument::bytes('length', $length);
    return $self->_pread($offset, $length);
}

sub discard ($self, $offset, $length) {
    PVE::BackupAccess::Argument::bytes('offset', $offset);
    PVE::BackupAccess::Argument::bytes('length', $length);
    return $self->_discard($offset, $length);
}

sub CLONE_SKIP { return 1 }

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Volume - one device's data: dirty regions, reading, discarding

=head1 SYNOPSIS

    use PVE::BackupAccess::Volume;

    sub backup_vm ($self, $vmid, $guest_config, $volumes, $info) {
        for my $device (sort keys $volumes->%*) {
            my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
            while (my ($offset, $length) = $volume->next_dirty_region) {
                $self->store($device, $offset, $volume->pread($offset, $length));
                $volume->discard($offset, $length);
            }
            $volume->close;
        }
    }

=head1 DESCRIPTION

A volume reads one device of an access over NBD. It is what a backup provider makes of the hash that
it is given, and what L<PVE::BackupAccess/volume> returns.

All offsets, lengths and sizes are bytes. All methods die with a L<PVE::BackupAccess::Error>.

=head1 METHODS

=head2 open

    my $volume = PVE::BackupAccess::Volume->open($device, \%volume);

Connects. C<%volume> is what C<backup_vm()> gets for the device: C<nbd-path> (a Unix socket, where the
export has the name of the device, or an NBD URI), C<size>, C<bitmap-mode> and C<bitmap-name>. The
size must be what the server says; without one the server's is taken. With a bitmap the server must
offer it.

=head2 size

The size of the volume.

=head2 next_dirty_region

    while (my ($offset, $length) = $volume->next_dirty_region) { ... }

The next dirty region, in ascending order, neighbours joined; the empty list after the last one.
Without a bitmap the whole volume is one region. An answer of the server that stops early, or that
cannot be right, dies: it is never taken for the end of the map. After that the volume is of no more
use.

=head2 dirty_regions

    my @regions = $volume->dirty_regions(1000);    # offset, length, offset, length, ...

Up to so many next dirty regions (at most 1,000,000) as a flat list, which is faster than one by one;
the empty list after the last one.

=head2 pread

    my $data = $volume->pread($offset, $length);

Exactly that range; at least 1 byte, at most 32 MiB. With a bitmap only dirty regions can be read, and
only until they are discarded: QEMU answers everything else with an error. A read must not cross the
edge of a region.

=head2 discard

    $volume->discard($offset, $length);

Says that this range has been read and is not needed any more, which frees its fleecing space. Whole
clusters of 64 KiB are discarded; parts of one at the edges of the range are not.

=head2 close

Closes the connection. Closing twice does no harm.

=cut
