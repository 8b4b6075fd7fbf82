package PVE::BackupAccess::Volume;

use v5.36;

use Hash::Util::FieldHash ();

use PVE::BackupAccess;
use PVE::BackupAccess::Argument
    qw(bad_argument check_bytes check_code check_filled_text check_flag check_hash check_positive check_text given_options);
use PVE::BackupAccess::Try qw(attempt_any);

my $max_regions = 1_000_000;

# Volumes that may be no snapshot of an access: discarding would destroy what they hold.
Hash::Util::FieldHash::fieldhash(my %is_bare);

# Volumes that have only what changed.
Hash::Util::FieldHash::fieldhash(my %is_increment);

my %volume_keys = (
    size => \&check_bytes,
    'bitmap-mode' => \&check_text,
    'nbd-path' => \&check_filled_text,
    'bitmap-name' => \&check_filled_text,
);

# -1 if it is none, or not open.
my sub fd_of ($handle) {
    my $fd;
    attempt_any { $fd = fileno($handle) };
    return $fd // -1;
}

my sub check_handle ($name, $value) {
    bad_argument("$name must be an open file handle")
        if !ref($value) || fd_of($value) < 0;
}

my %handle_keys = (
    size => \&check_bytes,
    'bitmap-mode' => \&check_text,
    'file-handle' => \&check_handle,
    'next-dirty-region' => \&check_code,
);

my sub fail ($device, $message) {
    bad_argument("device $device: $message", device => $device);
}

my sub check_mode ($device, $mode) {
    fail($device, "unknown bitmap-mode '$mode' - must be one of none, new, reuse")
        if $mode !~ m/\A(?:none|new|reuse)\z/;
}

# The bitmap's mode, and the name of the one to read, undef for the whole volume. A bare URI may come
# without a mode.
my sub bitmap ($device, $volume) {
    my $name = $volume->{'bitmap-name'};
    my $mode = $volume->{'bitmap-mode'} // (defined($name) ? 'reuse' : 'none');
    check_mode($device, $mode);
    fail($device, "bitmap-mode '$mode' needs a 'bitmap-name'")
        if $mode ne 'none' && !defined($name);
    return ($mode, $mode eq 'none' ? undef : $name);
}

# What a provider is given may have keys that are not known here: the API may grow.
my sub check_volume ($device, $volume, $keys) {
    my %known = map { $_ => $volume->{$_} } grep { exists($volume->{$_}) } keys $keys->%*;
    check_hash("the volume of device $device", \%known, $keys);
}

# What tells whether a range is dirty is the code ref, whatever the bitmap's mode.
my sub open_handle ($class, $device, $volume) {
    check_volume($device, $volume, \%handle_keys);
    for my $key (sort keys %handle_keys) {
        fail($device, "its volume lacks '$key'") if !defined($volume->{$key});
    }
    check_mode($device, $volume->{'bitmap-mode'});
    my $self = $class->_open_handle(
        $device, fileno($volume->{'file-handle'}),
        $volume->{size}, $volume->{'next-dirty-region'}
    );
    $is_increment{$self} = 1 if $volume->{'bitmap-mode'} eq 'reuse';
    return $self;
}

sub open ($class, $device, $volume) {
    check_filled_text('device', $device);
    fail($device, 'its volume must be a hash') if ref($volume) ne 'HASH';

    # Proxmox VE has a bitmap-name of undef where there is no bitmap.
    $volume = { $volume->%* };
    delete($volume->{'bitmap-name'}) if !defined($volume->{'bitmap-name'});
    return open_handle($class, $device, $volume) if exists($volume->{'file-handle'});
    check_volume($device, $volume, \%volume_keys);
    fail($device, "its volume lacks 'nbd-path'") if !defined($volume->{'nbd-path'});
    utf8::decode($volume->{'nbd-path'});    # text for the core, also from a file name's bytes
    my ($mode, $bitmap) = bitmap($device, $volume);
    my $self = $class->_open($device, $volume->{'nbd-path'}, $bitmap, $volume->{size});
    $is_increment{$self} = 1 if $mode eq 'reuse';
    $is_bare{$self} = 1 if !exists($volume->{'bitmap-mode'});
    return $self;
}

sub dirty_regions ($self, $max) {
    check_positive('max', $max);
    bad_argument("max must be at most $max_regions, not $max")
        if $max > $max_regions;
    return $self->_dirty_regions($max);
}

sub pread ($self, $offset, $length) {
    check_bytes('offset', $offset);
    check_bytes('length', $length);
    return $self->_pread($offset, $length);
}

sub discard ($self, $offset, $length) {
    check_bytes('offset', $offset);
    check_bytes('length', $length);
    return $self->_discard($offset, $length);
}

my sub count_in ($min, $max) {
    return sub ($name, $value) {
        check_bytes($name, $value);
        bad_argument("$name must be from $min to $max, not $value")
            if $value < $min || $value > $max;
    };
}

my sub request_size ($name, $value) {
    count_in(4096, 8 << 20)->($name, $value);
    bad_argument("$name must be a multiple of 4096, not $value")
        if $value % 4096;
}

my sub cluster_size ($name, $value) {
    count_in(65536, 8 << 20)->($name, $value);
    bad_argument("$name must be a power of 2, not $value")
        if $value & ($value - 1);
}

my sub digest_block ($name, $value) {
    count_in(4096, 8 << 20)->($name, $value);
    bad_argument("$name must be a power of 2, not $value")
        if $value & ($value - 1);
}

my sub check_digests ($name, $value) {
    ref($value) eq 'CODE' || check_filled_text($name, $value);
}

my sub check_files ($name, $value) {
    bad_argument("$name must be a list of files, not empty")
        if ref($value) ne 'ARRAY' || !$value->@*;
    check_filled_text($name, $_) for $value->@*;
}

my %check_options = (
    expected => \&check_files,
    damaged => \&check_code,
    progress => \&check_code,
    connections => count_in(1, 16),
    'bandwidth-limit' => count_in(0, 1 << 62),
    'shared-limit' => \&check_handle,
    'only-known' => \&check_flag,
);

my %copy_options = (
    %check_options,
    digests => \&check_digests,
    'digest-block' => \&digest_block,
    to => sub ($name, $value) { },
    'request-size' => \&request_size,
    'cluster-size' => \&cluster_size,
    discard => \&check_flag,
    unchanged => \&check_files,
    'without-base' => \&check_flag,
);

# Paths of this process' own descriptors: in a process of the copy's own they would be others.
my %standard = (stdin => 0, stdout => 1, stderr => 2);

my sub fd_in_path ($path) {
    return $1 if $path =~ m!\A/(?:dev|proc/self)/fd/([0-9]{1,9})\z!;
    return $path =~ m!\A/dev/(\w+)\z! ? $standard{$1} : undef;
}

my sub file_bytes ($path) {
    utf8::encode($path) if !utf8::downgrade($path, 1);
    return $path;
}

# What 'to' says, as the core wants to have it.
my sub target ($to) {
    return (write => $to) if ref($to) eq 'CODE';
    if (ref($to) || ref(\$to) eq 'GLOB') {
        my $fd = fd_of($to);
        bad_argument('to must be an open file, not this handle') if $fd < 0;
        attempt_any { $to->flush };    # what Perl still holds goes before
        return (fd => $fd);
    }
    check_filled_text('to', $to);
    return (fd => $to) if $to =~ m/\A(?:0|[1-9][0-9]{0,8})\z/;
    return (uri => $to) if $to =~ m!\Anbds?(?:\+\w+)?://!;
    my $fd = fd_in_path($to);
    return (fd => $fd) if defined($fd);
    return (path => file_bytes($to));
}

# The options about digests, as the core wants to have them.
my sub digest_options ($options, $is_increment) {
    my ($digests, $expected, $unchanged) = $options->@{qw(digests expected unchanged)};
    bad_argument('unchanged and expected exclude each other')
        if defined($expected) && defined($unchanged);
    bad_argument('digest-block is of no use without digests')
        if $options->{'digest-block'} && !defined($digests);
    for my $name ('damaged', 'only-known') {
        bad_argument("$name is of no use without expected")
            if $options->{$name} && !defined($expected);
    }
    return (
        defined($expected) ? (expected => [map { file_bytes($_) } $expected->@*]) : (),
        defined($unchanged)
        ? (expected => [map { file_bytes($_) } $unchanged->@*], 'skip-expected' => 1)
        : (),
        defined($digests)
            && !ref($digests) ? (digests => undef, 'digest-file' => file_bytes($digests))
        : (),
        'digests-increment' => $is_increment,
    );
}

my sub limit_option ($options) {
    my $shared = $options->{'shared-limit'};
    return defined($shared) ? ('limit-fd' => fileno($shared)) : ();
}

sub copy ($self, @options) {
    my $options = given_options('copy', \@options, \%copy_options, 'to');
    my $is_part = $is_increment{$self} || defined($options->{unchanged});
    my $increment = $is_part && !$options->{'without-base'};
    my %all = (discard => !$is_bare{$self}, $options->%*, increment => $increment);
    my @digests = digest_options($options, $is_part);
    return $self->_copy({ %all, @digests, limit_option($options), target($options->{to}) });
}

sub check ($self, @options) {
    my $options = given_options('check', \@options, \%check_options, 'expected');
    return $self->_copy(
        { $options->%*, digest_options($options, 0), limit_option($options), discard => 0 });
}

sub CLONE_SKIP { return 1 }

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Volume - one device's data: dirty regions, reading, discarding

=head1 SYNOPSIS

=for run proxmox

    use PVE::BackupAccess::Volume;

    sub backup_vm ($self, $vmid, $guest_config, $volumes, $info) {
        for my $device (sort keys $volumes->%*) {
            my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
            my $image = $self->image($device, $volumes->{$device}{'bitmap-mode'});
            my $statistics = $volume->copy(to => $image);
            $volume->close;
        }
    }

=head1 DESCRIPTION

A volume reads one device of an access, over NBD or a file handle. It is what a backup provider makes of the hash that
it is given, and what L<PVE::BackupAccess/volume> returns.

All offsets, lengths and sizes are bytes. All methods die with a L<PVE::BackupAccess::Error>.

=head1 IN A BACKUP PROVIDER

What a provider of Proxmox VE does with the C<$volumes> that C<backup_vm()> gets, in full. When it dies, the backup
has failed: the bitmaps keep what was to be copied, and the next backup brings it again.

With mechanism nbd, an image for each disk, of which an increment makes the next state. L</copy> keeps many requests in
flight and discards what the image has got:

=for run provider nbd

    sub backup_vm ($self, $vmid, $guest_config, $volumes, $info) {
        for my $device (sort keys $volumes->%*) {
            my $image = "$self->{dir}/vm-$vmid-$device.raw";
            unlink("$image.new");
            if ($volumes->{$device}{'bitmap-mode'} eq 'reuse') {
                system('cp', '--reflink=auto', $image, "$image.new") == 0
                    or die "cannot copy $image\n";
            }
            my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
            my $statistics = $volume->copy(to => "$image.new");
            $volume->close;
            rename("$image.new", $image) or die "cannot rename $image.new - $!\n";
            print "$device: $statistics->{'bytes-read'} bytes were to be copied\n";
        }
    }

With mechanism file-handle, pieces for a store of the provider's own. The data comes through the file handle, which can
be read and punched without this module, too, as L<PVE::BackupAccess/volumes> says:

=for run provider file-handle

    sub backup_vm ($self, $vmid, $guest_config, $volumes, $info) {
        my $max = 4 << 20;
        for my $device (sort keys $volumes->%*) {
            my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
            $self->begin($vmid, $device, $volume->size, $volumes->{$device}{'bitmap-mode'});
            while (my ($offset, $length) = $volume->next_dirty_region) {
                for (my $end = $offset + $length; $offset < $end; $offset += $max) {
                    my $piece = $end - $offset < $max ? $end - $offset : $max;
                    $self->store($offset, $volume->pread($offset, $piece));
                    $volume->discard($offset, $piece);
                }
            }
            $volume->close;
        }
        $self->commit($vmid);
    }

Either works with both mechanisms.

=head1 METHODS

=head2 open

    my $volume = PVE::BackupAccess::Volume->open($device, \%volume);

Connects. C<%volume> is what C<backup_vm()> gets for the device: C<nbd-path> (a Unix socket, where the
export has the name of the device, or an NBD URI), C<size>, C<bitmap-mode> and C<bitmap-name>. The
size must be what the server says; without one the server's is taken. With a bitmap the server must
offer it. A URI is one of those that L</copy> takes.

A server's block sizes are kept to: reads of parts of its smallest block read whole blocks, and long ones are cut. A
size of the export that is no multiple of the smallest block is an error, since no request could reach the end. Block
sizes that break the NBD protocol are passed over.

Or, of the mechanism file-handle, C<size>, C<bitmap-mode>, C<file-handle> and C<next-dirty-region>.
Reads then go through the file, and regions come from the code ref. It gives each region once, so that
such a hash is for one volume only. The size must be the file's, too.

Other keys are ignored, so that Proxmox VE may add some.

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
clusters are discarded; parts of one at the edges of the range are not. A cluster has 64 KiB, or more where the
fleecing image has larger ones.

=head2 copy

    my $statistics = $volume->copy(to => $target);

Copies all dirty regions, or without a bitmap the whole volume, with many requests in flight. Where
L</next_dirty_region> is does not matter and does not change. Nothing outside the regions is read or
written. What the server, or a hole of the file, says is zero, as in a thin disk, is not read. The target is one of these:

=over

=item a path - of a raw image file, or of a block device of at least the volume's size. The file gets the volume's
size. If there is none it is made, with mode 0600, as it is as secret as the disk. Zeroes become holes where they can.

With bitmap-mode C<reuse> the volume is an increment: it has only what changed, and the rest is in the image of the
backup before. So the file has to be there already and of the volume's size; any other is an
C<ArgumentError>, unless C<without-base> says that an incomplete image is wanted.

=item a handle, or the number of a descriptor, or its path, such as C</dev/stdout> - the same, opened by
the caller for writing. Its position does not matter.

=item an NBD URI - of a writable export at least as large as the volume, such as C<qemu-nbd> over a
qcow2 image. C<nbd:>, C<nbd+unix:>, C<nbd+vsock:> and, for TLS, C<nbds:>, C<nbds+unix:> and
C<nbds+vsock:> are taken, with the parameter C<socket>; with TLS also C<tls-psk-file>, C<tls-certificates>,
C<tls-hostname>, C<tls-username> and C<tls-verify-peer>, as far as libnbd knows them. All else is an C<ArgumentError>,
and so are keys and certificates that are no regular files or have more than 16 MiB. A server that offers
no flush has none: what it answers is all there is to know of its data.

=item a code ref - called with offset and data, in ascending order, zeroes included.

=back

Any other answer than success, of source or target, dies with an error that names the offset; so does
what the code refs and signal handlers die with, which comes through as it is. The target then has part
of the data.

Files and devices are written to by processes of the copy's own, which the caller's C<wait> does not find and no
C<SIGCHLD> tells about. A target that hangs, hangs them alone: they are killed when the copy ends, and one
that the kernel does not let end is left behind until the target answers. A call that it is in may then still
take effect. A handle that the caller opened is the caller's own: where the target is a FUSE file whose
server hangs, the kernel ends no process that has such a handle. The options are these;
undef counts as not given:

=over

=item C<discard> - whether to discard what was copied, as by L</discard>: when the target has taken it,
or for a code ref, when it has returned. By default so for volumes of an access, and not for a bare NBD
URI without C<bitmap-mode>, which may be a disk in use. What the server cannot discard is left.

=item C<progress> - a code ref, called with the bytes copied and all dirty bytes, a few times a second
and at the end. The map is read for that before.

=item C<bandwidth-limit> - bytes read per second; 0 is no limit. What need not be read does not count.

=item C<shared-limit> - a handle, open for reading and writing, of a file with 8 bytes, zeroes at first. Copies that have
one keep C<bandwidth-limit>, the same for each, together, also if they are made by several processes at once.

=item C<connections> - to use where the server allows several, at most 16. By default 4, or 1
to a QEMU before 10.0, so that the guest does not wait for its disk behind our reads.

=item C<request-size> - of reads and writes at most, in bytes, from 4096 to 8388608, a multiple of 4096.
By default 262144, or C<cluster-size> if that is more. Regions are never joined. A server's largest request makes
them smaller, its smallest block larger.

=item C<cluster-size> - of the image behind an NBD target, in bytes: a power of 2 from 65536, the
default, to 8388608. Give it where the image has larger clusters: an NBD server does not tell. Zeroes are made in
whole clusters only, parts of one are written as data, and no cluster is written to by two requests at a
time: some QEMUs (11.0.0 with the fix "qcow2: Fix corruption on discard during write with COW") lose a
write beside zeroes in the same cluster. With a smaller C<request-size> or a low C<bandwidth-limit>,
whose requests are parts of a cluster, zeroes are written as data.

=item C<without-base> - 1 lets an increment be copied to a file that is not there or has another size. The file then
has what changed, and zeroes or whatever it had elsewhere: it is no image of the disk.

=item C<digests> - a code ref or the name of a file, for the digest of every block that is copied: SHA-256, by
libcrypto. Threads compute it of the data that was read anyway; zeroes cost nothing. The code ref is called with an
offset and the digests of consecutive blocks from there on, 32 bytes each, each block once, in any order; but where
C<to> is a code ref, right before the data of the same blocks. A file is one of those in L</FILES OF DIGESTS>. With
bitmap-mode C<reuse> it keeps the digests that it has of blocks that are not copied; in all other cases it is begun anew.
The last block of the volume may be short; its digest is of the bytes that are there.

=item C<digest-block> - bytes that one digest is of: a power of 2 from 4096 to 8388608, by default 65536. Dirty
regions have to be made of whole blocks, so it is at most the granularity of the bitmap: 65536 for those that
L<PVE::BackupAccess/setup> makes on a stock QEMU, 4194304 on Proxmox VE. A region with a part of a block is an
C<ArgumentError>. Requests are at least as long as a block.

=item C<unchanged> - names of L</FILES OF DIGESTS>, the newest first, that say what the target has already: the first
one that knows a block is right about it. A block that has its digest is read, but not written, and a code ref is
not called with it. What is written are whole blocks; zeroes are compared as all else is. The target has to be there, as for
an increment, and so has its content: it is not looked at. C<digests> tells a code ref all blocks; a file goes on with
the digests that it has, and only blocks that are written come to it. Excludes C<expected>.

=item C<expected>, C<damaged>, C<only-known> - as in L</check>; what is damaged is copied all the same.

=back

Files, devices and NBD exports are flushed at the end. Memory is bounded, whatever the sizes.
C<$statistics> is a hash:

=over

=item C<bytes-read> - all that was dirty

=item C<bytes-written>, C<bytes-zero> - of it, what was written as data, and what was made zero without

=item C<bytes-unchanged> - of it, what was not written because of C<unchanged>

=item C<bytes-discarded> - whole clusters of the fleecing image, of 64 KiB at least

=item C<bytes-damaged>, C<bytes-unknown> - by C<expected>: what was not as it should be, and of what it says nothing

=item C<regions>, C<seconds>

=back

=head2 check

    my $statistics = $volume->check(expected => \@files, %options);

Reads the volume and compares it with digests that were taken before. The options are C<progress>, C<bandwidth-limit>,
C<shared-limit> and C<connections>, which are those of L</copy>, and these:

=over

=item C<expected> - names of files, see L</FILES OF DIGESTS>, the newest first: the first one that knows a block is right
about it. All have the same block size, and are of a volume of this one's size.

=item C<damaged> - a code ref, called with offset and length of what is not as expected, or cannot be read (then it
is a whole request). Without it the first such range is a C<ContentError>.

=item C<only-known> - 1 has only those blocks read that the first file of C<expected> knows.

=back

C<$statistics> are those of L</copy>.

=head2 close

Closes the connection. Closing twice does no harm.

=head1 FILES OF DIGESTS

A header of 4096 bytes, then 32 bytes for each block of the volume, in order. Of a block whose 32 bytes are all zero
nothing is known; in a complete file, as of a copy of all of a volume, such a block is zeroes. So the file is sparse where the
volume is. The header is written when all else is on disk: the file of a copy that failed is none. It has

    offset  length
         0      12  "PBA-DIGESTS\n"
        12       4  version: "1", filled up with NUL
        16      16  "SHA-256", filled up with NUL
        32       8  size of the volume in bytes, big-endian
        40       4  size of a block, big-endian
        44       4  1 for a complete file, else 0, big-endian

Files are made with mode 0600. They say nothing of the data, but whether it is what is known already.

=cut
