package PVE::BackupAccess::Volume;

use v5.36;

use PVE::BackupAccess;
use PVE::BackupAccess::Error;

my %known_key = map { $_ => 1 } qw(size bitmap-mode nbd-path bitmap-name);
my $max_regions = 1_000_000;

my sub argument_error ($device, $message) {
    PVE::BackupAccess::Error->throw('ArgumentError', "device $device: $message", device => $device);
}

my sub check_number ($name, $value) {
    PVE::BackupAccess::argument_error(
        "$name must be a whole number of bytes, not '" . ($value // 'undef') . "'")
        if !defined($value) || ref($value) || $value !~ m/\A(?:0|[1-9][0-9]{0,18})\z/;
}

my sub check_volume ($device, $volume) {
    argument_error($device, 'its volume must be a hash') if ref($volume) ne 'HASH';
    for my $key (sort keys $volume->%*) {
        argument_error($device, "unknown key '$key' in its volume") if !$known_key{$key};
        argument_error($device, "'$key' in its volume must be a plain value")
            if !defined($volume->{$key}) || ref($volume->{$key});
    }
    argument_error($device, "its volume lacks 'nbd-path'") if ($volume->{'nbd-path'} // '') eq '';
    check_number("size of device $device", $volume->{size}) if exists($volume->{size});
}

# With a bitmap only its name makes the difference, so a mode that contradicts it is refused.
my sub bitmap_name ($device, $volume) {
    my $name = $volume->{'bitmap-name'};
    my $mode = $volume->{'bitmap-mode'} // (defined($name) ? 'reuse' : 'none');
    argument_error($device, "unknown bitmap-mode '$mode' - must be one of none, new, reuse")
        if $mode !~ m/\A(?:none|new|reuse)\z/;
    argument_error($device, "bitmap-mode '$mode' needs a 'bitmap-name'")
        if $mode ne 'none' && ($name // '') eq '';
    return $mode eq 'none' ? undef : $name;
}

sub open ($class, $device, $volume) {
    PVE::BackupAccess::argument_error('device must be a string')
        if !defined($device) || ref($device) || $device eq '';
    check_volume($device, $volume);
    return $class->_open($device, $volume->{'nbd-path'}, bitmap_name($device, $volume),
        $volume->{size});
}

sub dirty_regions ($self, $max) {
    PVE::BackupAccess::argument_error("max must be a number from 1 to $max_regions")
        if !defined($max)
        || ref($max)
        || $max !~ m/\A[1-9][0-9]{0,6}\z/
        || $max > $max_regions;
    return $self->_dirty_regions($max);
}

sub pread ($self, $offset, $length) {
    check_number('offset', $offset);
    check_number('length', $length);
    return $self->_pread($offset, $length);
}

sub discard ($self, $offset, $length) {
    check_number('offset', $offset);
    check_number('length', $length);
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
