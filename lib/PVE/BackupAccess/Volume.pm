package PVE::BackupAccess::Volume;

use v5.36;

use Hash::Util::FieldHash ();

use PVE::BackupAccess;
use PVE::BackupAccess::Argument
    qw(bad_argument check_bytes check_code check_filled_text check_flag check_hash check_positive check_text given_options);
use PVE::BackupAccess::Try qw(attempt_any);

my $max_regions = 1_000_000;

# Volumes that may not be snapshots of an access: discarding would destroy their content.
Hash::Util::FieldHash::fieldhash(my %is_bare);

# Volumes that only have what changed.
Hash::Util::FieldHash::fieldhash(my %is_increment);

my %volume_keys = (
    size => \&check_bytes,
    'bitmap-mode' => \&check_text,
    'nbd-path' => \&check_filled_text,
    'bitmap-name' => \&check_filled_text,
);

# -1 if it is not a handle, or not open.
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

# A provider's volume may have keys that are not known here, because the API may grow.
my sub check_volume ($device, $volume, $keys) {
    my %known = map { $_ => $volume->{$_} } grep { exists($volume->{$_}) } keys $keys->%*;
    check_hash("the volume of device $device", \%known, $keys);
}

# The code ref decides whether a range is dirty, whatever the bitmap's mode.
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
    unreadable => \&check_code,
    progress => \&check_code,
    connections => count_in(1, 16),
    'bandwidth-limit' => count_in(0, 1 << 62),
    'shared-limit' => \&check_handle,
    'only-known' => \&check_flag,
    'request-size' => \&request_size,
);

my %copy_options = (
    %check_options,
    digests => \&check_digests,
    'digest-block' => \&digest_block,
    to => sub ($name, $value) { },
    'cluster-size' => \&cluster_size,
    check => \&check_flag,
    discard => \&check_flag,
    unchanged => \&check_files,
    'without-base' => \&check_flag,
);

# Paths of this process' own descriptors. In a process that a copy starts, they would mean others.
my %standard = (stdin => 0, stdout => 1, stderr => 2);

my sub fd_in_path ($path) {
    return $1 if $path =~ m!\A/(?:dev|proc/self)/fd/([0-9]{1,9})\z!;
    return $path =~ m!\A/dev/(\w+)\z! ? $standard{$1} : undef;
}

my sub file_bytes ($path) {
    utf8::encode($path) if !utf8::downgrade($path, 1);
    return $path;
}

# The option 'to' in the core's form.
my sub target ($to) {
    return (write => $to) if ref($to) eq 'CODE';
    if (ref($to) || ref(\$to) eq 'GLOB') {
        my $fd = fd_of($to);
        bad_argument('to must be a handle that is open, or a path, a URI or a code ref') if $fd < 0;
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

# The options about digests in the core's form.
my sub digest_options ($options, $is_increment) {
    my ($digests, $expected, $unchanged) = $options->@{qw(digests expected unchanged)};
    bad_argument('unchanged and expected exclude each other')
        if defined($expected) && defined($unchanged);
    bad_argument('digest-block needs digests')
        if $options->{'digest-block'} && !defined($digests);
    bad_argument('check needs digests')
        if $options->{check} && !defined($digests);
    for my $name ('damaged', 'only-known') {
        bad_argument("$name needs expected")
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
    my %target = target($options->{to});
    bad_argument("check needs an NBD URI as the target 'to'")
        if $options->{check} && !defined($target{uri});
    return $self->_copy({ %all, @digests, limit_option($options), %target });
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

PVE::BackupAccess::Volume - the data of one device: dirty regions, reading, discarding, copying

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

A volume reads one device of an access, over NBD or through a file handle. A backup provider opens it from the hash that
C<backup_vm()> gets. L<PVE::BackupAccess/volume> also returns one.

All offsets, lengths and sizes are bytes.

=head1 ERRORS

All methods die with a L<PVE::BackupAccess::Error>. The message names the device. What your own signal handlers and
callbacks die with is passed on unchanged. Every method can die with

=over

=item C<ArgumentError> - an argument is missing, unknown or wrong

=item C<NbdError> - a request failed: the server refused it, or the connection was lost

=item C<SystemError> - the same for a file handle, or a system call failed

=item C<StateError> - the volume was opened by another process, such as the parent of a fork

=back

=head1 IN A BACKUP PROVIDER

The following two examples show the data path of a C<backup_vm()> of a provider of Proxmox VE; F<doc/providers.md> has a
whole provider, which also keeps the configuration of the guest. If C<backup_vm()> dies, the backup
has failed: the bitmaps keep what was to be copied, and the next backup contains it.

With mechanism nbd: one image per disk, which each increment brings to the next state. The images replace the old ones when
all of them are complete. L</copy> keeps many requests in flight and discards what the image has received.

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
            my $statistics = $volume->copy(
                to => "$image.new",
                'bandwidth-limit' => $info->{'bandwidth-limit'},    # undef: none
            );
            $volume->close;
            print "$device: $statistics->{'bytes-read'} bytes were to be copied\n";
        }
        for my $image (map { "$self->{dir}/vm-$vmid-$_.raw" } keys $volumes->%*) {
            rename("$image.new", $image) or die "cannot rename $image.new - $!\n";
        }
    }

With mechanism file-handle: pieces for a store of the provider's own. The file handle can also be read and punched
without this module, as described in L<PVE::BackupAccess/volumes>.

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

Both examples work with both mechanisms.

=head1 METHODS

=head2 open

=for run volume

    use PVE::BackupAccess::Volume;

    my $volumes = $access->volumes('nbd');
    my $volume = PVE::BackupAccess::Volume->open('drive-scsi0', $volumes->{'drive-scsi0'});
    $volume->close;

Takes the name of the device and the hash that C<backup_vm()> gets for it. Connects and returns the volume. The keys of
the hash are, for mechanism nbd:

=over

=item C<nbd-path> - required: a Unix socket on which the export has the name of the device, or an NBD URI. L</copy> lists
the URI schemes that are accepted.

=item C<size> - the size that the server must report; without it, the server's size is used

=item C<bitmap-mode>, C<bitmap-name> - C<none>, C<new> or C<reuse>, and the bitmap, which the server must export

=back

and for mechanism file-handle, all of them required:

=over

=item C<file-handle> - the data is read from this file

=item C<next-dirty-region> - a code ref that returns the dirty regions. It returns each region only once, so open
only one volume from such a hash.

=item C<size>, C<bitmap-mode> - as above; C<size> must be the size of the file

=back

All other keys are ignored, so Proxmox VE may add keys.

The volume obeys the block sizes that the server advertises: a read of a part of the minimum block reads the whole block,
and long reads are split. Advertised block sizes that violate the NBD protocol are ignored.

Errors: C<NbdError> if the connection fails, if the size of the export differs, or if it is not a multiple of the
minimum block (no request could then reach the end); C<IncompleteError> if the server does not export the bitmap.

=head2 size

=for run volume

    say $volume->size;

Returns the size of the volume. Takes no arguments.

=head2 next_dirty_region

=for run volume

    while (my ($offset, $length) = $volume->next_dirty_region) {
        say "$offset: $length bytes";
    }

Returns offset and length of the next dirty region, in ascending order, and the empty list after the last one. Adjacent
regions are joined. Without a bitmap, the whole volume is one region. Takes no arguments.

Errors: C<IncompleteError> or C<NbdError> if the server's answer ends early or cannot be right. Such an answer is never
taken for the end of the map. The volume cannot be used after that.

=head2 dirty_regions

=for run volume

    while (my @regions = $volume->dirty_regions(1000)) {
        while (my ($offset, $length) = splice(@regions, 0, 2)) {
            say "$offset: $length bytes";
        }
    }

Takes a number, at most 1,000,000. Returns up to this number of dirty regions as a flat list (offset, length, offset,
length, ...), and the empty list after the last one. This is faster than L</next_dirty_region>.

Errors: those of L</next_dirty_region>.

=head2 pread

=for run volume

    my $data = $volume->pread(0, 65536);

Takes an offset and a length from 1 byte to 32 MiB. Returns exactly that range. With a bitmap, only dirty regions can be
read, and only until they are discarded; QEMU answers all other reads with an error. A read must not cross the
edge of a region.

A QEMU before 9.2 aborts, and ends the guest, if it gets a read of a range that it is still reading, even for a client that
has disconnected. So let only one volume of a disk read there at a time. If a signal handler ends a call, and a QEMU before
10.0 does not answer the open requests within half a second, all volumes of that disk in this process die from then on: tear
the access down and set it up again.

Errors: C<ArgumentError> if the range is too long or ends beyond the volume; C<NbdError> or C<SystemError> if
the read fails.

=head2 discard

=for run volume

    my $data = $volume->pread(0, 65536);
    $volume->discard(0, 65536);

Takes an offset and a length. Tells QEMU that this range has been read and is no longer needed, which frees its fleecing
space. Only whole clusters are discarded; parts of a cluster at the edges of the range are not. A cluster has 64 KiB, or
more if the fleecing image has larger clusters.

Errors: C<NbdError> or C<SystemError> if the discard fails.

=head2 copy

=for run volume

    my $statistics = $volume->copy(
        to => "$dir/disk.raw",
        digests => "$dir/disk.digests",
        progress => sub ($done, $total) { say "$done of $total bytes" },
    );
    say "$statistics->{'bytes-written'} bytes written";

Copies all dirty regions, or without a bitmap the whole volume, with many requests in flight. It does not depend on the
position of L</next_dirty_region>, and does not change it. Nothing outside the regions is read or
written. Zeroes that the server or a hole of the file reports, as in a thin disk, are not read.

The option C<to> is required. It is one of these targets:

=over

=item a path - of a raw image file, or of a block device of at least the volume's size. The file gets the volume's
size. A file that does not exist is created with mode 0600, because it is as secret as the disk. Zeroes become holes where
possible.

With bitmap-mode C<reuse>, the volume is an increment: it holds only what changed, and the rest is in the image of the
previous backup. So the file must already exist and have the volume's size. Otherwise copy dies with
C<ArgumentError>, unless C<without-base> allows an incomplete image.

=item a file handle, the number of a file descriptor, or the path of one, such as C</dev/stdout> - the same, opened by
the caller for writing. The position of the handle is ignored.

=item an NBD URI - of a writable export at least as large as the volume, such as C<qemu-nbd> with a
qcow2 image. The schemes are C<nbd:>, C<nbd+unix:>, C<nbd+vsock:> and, for TLS, C<nbds:>, C<nbds+unix:> and
C<nbds+vsock:>. The parameters are C<socket> and, for TLS, C<tls-psk-file>, C<tls-certificates>,
C<tls-hostname>, C<tls-username> and C<tls-verify-peer>, if libnbd supports them. Everything else is an C<ArgumentError>.
So is a key or certificate that is not a regular file or is larger than 16 MiB. If the server does not offer flush, no
flush is sent, and copy cannot ensure that the data is on disk.

=item a code ref - called with offset and data, in ascending order, including zeroes. Each call has the data of one
request. If the code ref dies, copy dies with the same exception.

=back

Files and devices are written by processes that belong to the copy. The caller's C<wait> does not return them, and they
cause no C<SIGCHLD>. If a target hangs, only these processes hang. They are killed when the copy ends. If the kernel
does not let such a process end, it is left behind until the target answers; the call that it is in may still take effect
then. If the caller opened the handle, and the target is a FUSE file whose server hangs, the kernel cannot end any
process that has the handle.

An option that is undef counts as not given. The other options are:

=over

=item C<discard> - whether to discard what was copied, as L</discard> does: when the target has taken it,
or when the code ref has returned. The default is true for volumes of an access, and false for a bare NBD
URI without C<bitmap-mode>, which may be a disk in use. If the server cannot discard, nothing is discarded.

=item C<progress> - a code ref that is called with the bytes copied and the total of dirty bytes, a few times a second
and at the end. The map is read before the copy for this.

=item C<bandwidth-limit> - bytes read per second; 0 is no limit. Data that need not be read does not count.

=item C<shared-limit> - a file handle, open for reading and writing, of a file of 8 zero bytes. All copies that are
given the same file share C<bandwidth-limit>, also copies in different processes. All must have the same
C<bandwidth-limit>.

=item C<connections> - the number of connections, if the server allows several, at most 16. The default is 2, or 1
to a QEMU before 10.0, so that the guest's I/O does not wait behind the reads of the backup. To an NBD target it is 4.

=item C<request-size> - the maximum size of reads and writes in bytes, from 4096 to 8388608, a multiple of 4096. The
default is 1048576 for the snapshot of a guest, 262144 for other volumes, or C<cluster-size> if that is larger.
Regions are never joined. The server's maximum request lowers the size, its minimum block raises it.

=item C<cluster-size> - the cluster size in bytes of the image behind an NBD target: a power of 2 from 65536 (the
default) to 8388608. Set it if the image has larger clusters, because an NBD server does not report it. Zeroes are written
as zeroes in whole clusters only; parts of a cluster are written as data. No cluster is written by two requests at a
time, because some QEMUs (11.0.0 with the fix "qcow2: Fix corruption on discard during write with COW") lose a
write that runs next to a zero write in the same cluster. With a smaller C<request-size> or a low C<bandwidth-limit>,
requests are parts of a cluster, and zeroes are written as data.

=item C<without-base> - 1 allows an increment to be copied to a file that does not exist or has another size. The file
then holds what changed, and elsewhere zeroes or its old content: it is not an image of the disk.

=item C<digests> - a code ref or a file name, for the SHA-256 digest (by libcrypto) of every block that is copied. Threads
compute the digests of the data that is read anyway; zeroes cost nothing. The code ref is called with an
offset and the digests of consecutive blocks from there on, 32 bytes each. It gets each block once, in any order; if
C<to> is a code ref, immediately before the data of the same blocks. A file name names one of the L</FILES OF DIGESTS>.
With bitmap-mode C<reuse>, the file keeps its digests of blocks that are not copied; otherwise it is written anew.
If the last block of the volume is short, its digest covers the bytes that exist.

=item C<digest-block> - the bytes that one digest covers: a power of 2 from 4096 to 8388608. The default is 65536. Dirty
regions must consist of whole blocks, so the value must not exceed the granularity of the bitmap: 65536 for bitmaps that
L<PVE::BackupAccess/setup> creates on a stock QEMU, 4194304 on Proxmox VE. A region with a part of a block is an
C<ArgumentError>. Requests are at least as long as a block.

=item C<check> - 1 reads back what is written, during the copy, and compares its digests with those of what was read. It
needs C<digests> and an NBD URI. Each range is read back when the target has acknowledged it, over a connection of its own if
the server allows several, and is discarded from the volume only when it is right. Large zeroes that the target reports as
such are not read. The first range that differs is a C<ContentError>, and a file of digests is then not valid. This proves
what the server answers at that time. It does not prove that later writes to other ranges, or the closing of the image, leave
the range alone, nor that the disk below the server's cache is good. What is C<unchanged> was not written, and is not read.

=item C<unchanged> - an array ref of L</FILES OF DIGESTS>, the newest first, that describe what the target already has. For
each block, the first file that knows it counts. A block with the same digest is read but not written, and a code ref is
not called with it. Whole blocks are written. Zeroes are compared like other data. The target and its content must exist,
as for an increment; the content is not checked. With C<digests>, a code ref gets the digests of all blocks; a file
keeps its old digests, and gets those of blocks that are written. Excludes C<expected>.

=item C<expected>, C<damaged>, C<unreadable>, C<only-known> - as for L</check>. Damaged blocks are copied all the same.
C<unreadable> needs no C<expected>; what cannot be read is zeroes in the target.

=back

Files, devices and NBD exports are flushed at the end. Memory use is bounded, whatever the sizes.
Returns C<$statistics>, a hash:

=over

=item C<bytes-read> - everything that was dirty

=item C<bytes-written>, C<bytes-zero> - the part of it that was written as data, and that was written as zeroes

=item C<bytes-unchanged> - the part of it that was not written because of C<unchanged>

=item C<bytes-checked> - what was read back, and is right

=item C<bytes-discarded> - whole clusters of the fleecing image, of 64 KiB at least

=item C<bytes-damaged>, C<bytes-unknown> - by C<expected>: what differs from its digest, and what has no digest

=item C<regions>, C<seconds>

=back

Errors: copy dies at the first request of source or target that fails, and the message names the offset. The target then
holds a part of the data. C<NbdError> is for NBD, C<SystemError> for files, C<UnsupportedError> for an NBD target that
lacks a feature. C<IncompleteError> means that the map or the data ended early, C<ContentError> that a file of digests is
damaged, or with C<check> that the target lacks what was written to it.

=head2 check

=for run volume

    $volume->copy(to => "$dir/disk.raw", digests => "$dir/disk.digests", discard => 0);
    my $statistics = $volume->check(
        expected => ["$dir/disk.digests"],
        damaged => sub ($offset, $length) { say "damaged: $length bytes at $offset" },
    );

Reads the volume and compares it with digests that were taken earlier. Takes C<progress>, C<bandwidth-limit>,
C<shared-limit>, C<request-size> and C<connections>, as L</copy> does, and these options:

=over

=item C<expected> - required: an array ref of L</FILES OF DIGESTS>, the newest first. For each block, the first file that
knows it counts. All files must have the same block size and be of a volume of this size.

=item C<damaged> - a code ref that is called with offset and length of each range that differs or cannot be read (a
range that cannot be read is a whole request). Without it, the first such range is an error.

=item C<unreadable> - a code ref that is called instead of C<damaged> for a range that cannot be read. The next try may
succeed.

=item C<only-known> - 1 reads only those blocks that the first file of C<expected> knows.

=back

Returns the same C<$statistics> as L</copy>.

Errors: those of L</copy>; C<ContentError> for the first damaged range, if there is no C<damaged>, and for a damaged file
of digests.

=head2 close

=for run volume

    $volume->close;

Closes the connection. Takes no arguments. A second call does nothing.

=head1 FILES OF DIGESTS

A file of digests has a header of 4096 bytes, then 32 bytes for each block of the volume, in order. If the 32 bytes of
a block are all zero, the digest is unknown. In a complete file, such as that of a copy of a whole volume, such a block
consists of zeroes. So the file is sparse where the volume is. The header is written when everything else is on
disk, so the file of a failed copy is not valid. The header is

    offset  length
         0      12  "PBA-DIGESTS\n"
        12       4  version: "1", filled up with NUL
        16      16  "SHA-256", filled up with NUL
        32       8  size of the volume in bytes, big-endian
        40       4  size of a block, big-endian
        44       4  1 for a complete file, else 0, big-endian

Files are created with mode 0600. A file of digests reveals nothing about the data, except to confirm a guess of
what a block contains.

=cut
