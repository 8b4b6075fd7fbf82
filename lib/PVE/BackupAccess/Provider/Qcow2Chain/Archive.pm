package PVE::BackupAccess::Provider::Qcow2Chain::Archive;

# One archive: a directory with an image for each device, the guest's configuration, and a manifest that lists them. A
# directory without a manifest is not an archive.

use v5.36;

use Digest::SHA qw(sha256_hex);
use Time::HiRes ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File
    qw(file_exists fingerprint move read_file read_if_there replace_file sha256 sync write_file);
use PVE::BackupAccess::Provider::Qcow2Chain::Image
    qw($cluster_size create_image image_header image_problem);
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Provider::Store::Digests qw(has_header);
use PVE::BackupAccess::Provider::Store::DirectoryArchive qw($manifest_name $tree);
use PVE::BackupAccess::Provider::Store::Manifest
    qw(decode_manifest device_fault encode_manifest has_its_digest is_hash manifest_fault refuse_newer safe_name);
use PVE::BackupAccess::Provider::Store::Tar qw(stream_problem);
use PVE::BackupAccess::Try qw(attempt_any);

use parent
    qw(PVE::BackupAccess::Provider::Qcow2Chain::Merge PVE::BackupAccess::Provider::Store::DirectoryArchive);

# Format 2 has digests of the data that was read. Format 1, of version 0.1, has the SHA-256 of each image. A program of
# version 0.1 refuses format 2.
my $format = 2;
my $digest_block = 65536;
my $largest_manifest = 16 << 20;

my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

my $removed_name = 'removed.json';    # the manifest of an archive whose removal has begun

my sub fail ($message, %context) {
    PVE::BackupAccess::Error->throw('ArchiveError', $message, %context);
}

sub manifest_format ($class) { return $format }

# ---- making one ----

sub add_file ($self, $name, $content) {
    utf8::encode($content) if utf8::is_utf8($content);
    write_file("$self->{dir}/$name", $content);
    $self->{manifest}{files}{$name} = { sha256 => sha256_hex($content) };
    return;
}

# Creates an empty image for the device and returns its path. With a parent, which must answer to the device's name, the
# parent's image is the backing file.
sub add_device ($self, $device, $about, $parent = undef) {
    my $file = _file_of($device);
    my $entry = $self->{manifest}{devices}{$device} = { $about->%*, file => $file };
    if ($parent) {
        $entry->@{qw(parent parent-id)} = ($parent->name, $parent->id);
        my $there = $parent->own($device);
        $entry->{'parent-device'} = $there if $there ne $device;
    }
    my $digests = _digests_of($device);

    # Otherwise two devices would share an image.
    fail(
        "device $device: another device already has the file $self->{dir}/$file - the store needs a file system that"
            . ' distinguishes upper and lower case',
        device => $device
    ) if file_exists("$self->{dir}/$file");
    $entry->{digests} = { file => $digests, algorithm => 'SHA-256', block => $digest_block };
    create_image("$self->{dir}/$file", $about->{size}, $self->_backing($device),
        $about->{compressed});
    $self->{manifest}{files}{$_} = {} for $file, $digests;
    return "$self->{dir}/$file";
}

sub add_container ($self, $fill) {
    $self->SUPER::add_container($fill);
    $self->{manifest}{files}{$tree} = {};
    return;
}

sub _file_of ($device) { return safe_name($device) . '.qcow2' }
sub _digests_of ($device) { return _file_of($device) =~ s/qcow2\z/digests/r }

sub _backing ($self, $own) {
    my ($parent, $there) = $self->parent_of($own) or return undef;
    return "../$parent/" . _file_of($there);
}

# Makes all files durable and writes the manifest. Only the rename remains. Dies if load would refuse the archive.
sub seal ($self) {
    for my $file (sort keys $self->{manifest}{files}->%*) {
        sync("$self->{dir}/$file");
        $self->_note_file($file, is_new => 1);
    }
    replace_file("$self->{dir}/$manifest_name", $self->_manifest_text);
    my $problem = _manifest_problem(decode_manifest(read_file("$self->{dir}/$manifest_name")));
    fail("the manifest of the new archive $self->{dir} is not valid - $problem")
        if defined($problem);
    return;
}

# how: path, where the file is now; is_new, whether it belongs to a new archive.
sub _note_file ($self, $file, %how) {
    my $path = $how{path} // "$self->{dir}/$file";
    my $fingerprint = fingerprint($path);
    my $is_proven = $self->_has_digests($file) || $self->_is_tree($file);
    my %sha256 = $is_proven ? () : (sha256 => sha256($path));

    # The digest of a file that was given as a text was computed from the text. The file must still match it.
    my $given = $self->{manifest}{files}{$file}{sha256};
    fail("$path does not contain what was written to it: its SHA-256 differs")
        if $how{is_new} && $given && $given ne $sha256{sha256};
    $self->{manifest}{files}{$file} = { $fingerprint->%*, %sha256 };
    return;
}

# Whether the file is an image whose content is proven by digests.
sub _has_digests ($self, $file) {
    return grep { $_->{file} eq $file && $_->{digests} } values $self->{manifest}{devices}->%*;
}

# The device whose image the file is, by its own name; undef if it is no image.
sub _device_of ($self, $file) {
    my ($own) = grep { _file_of($_) eq $file } $self->devices;
    return $own;
}

# Whether the file is a container's tree, whose stream has a digest.
sub _is_tree ($self, $file) { return $file eq $tree && $self->container }

# A manifest that was damaged when it was read is not written again, because it would then count as intact.
sub _manifest_text ($self) {
    fail($self->manifest_problem) if defined($self->manifest_problem);
    return encode_manifest($self->{manifest}, $self->{manifest}{format} == $format);
}

# ---- one that is there ----

# Whether the archive's removal has begun.
sub is_half_removed ($class, $guest_dir, $name) {
    return file_exists("$guest_dir/$name/$removed_name")
        && !file_exists("$guest_dir/$name/$manifest_name");
}

# The text of a manifest, undef if there is none. What is much larger than any manifest is not read.
my sub text_of ($path) {
    my $size = -s $path // 0;
    fail("the manifest $path is damaged - it has $size bytes") if $size > $largest_manifest;
    return read_if_there($path);
}

sub load ($class, $guest_dir, $name) {
    my $dir = "$guest_dir/$name";
    my $listed = text_of("$dir/$manifest_name");
    my $content = $listed // text_of("$dir/$removed_name") // fail("there is no archive $dir");
    my $manifest = decode_manifest($content);
    refuse_newer("archive $dir", $manifest, $format);
    my $problem = _manifest_problem($manifest);
    fail("the manifest of archive $dir is damaged - $problem") if defined($problem);
    my $self
        = bless({ guest => $guest_dir, name => $name, dir => $dir, manifest => $manifest }, $class);
    $self->{'is damaged'} = 1 if _lacks_digest($manifest, $content);
    $self->{'is being removed'} = 1 if !defined($listed);
    $self->_follow_merge($_) for $self->devices;
    return $self;
}

sub _lacks_digest ($manifest, $content) {
    return $manifest->{format} == $format && !has_its_digest($content);
}

# If a merge was killed after its image had moved here, takes the manifest that it wrote before: see absorb.
sub _follow_merge ($self, $own) {
    my ($parent, $there) = $self->parent_of($own) or return;
    my $content = text_of($self->_merged_manifest($own)) // return;
    my $manifest = decode_manifest($content);
    return if defined(_manifest_problem($manifest)) || _lacks_digest($manifest, $content);
    return if $manifest->{id} ne $self->id;
    return if file_exists("$self->{guest}/$parent/" . _file_of($there));
    $self->{manifest} = $manifest;
    $self->{'is damaged'} = 0;
    $self->{merged}{$own} = [$parent, $there];
    return;
}

# Whether its removal has begun, so that its images may have got a part of the data of those that build on them. These show
# the same content as before.
sub is_being_removed ($self) { return $self->{'is being removed'} }

# Why the manifest differs from what was written, or undef. The disks can still be restored, because their digests prove
# them; but no archive builds on this one, and it is not merged.
sub manifest_problem ($self) {
    return undef if !$self->{'is damaged'};
    return "the manifest of archive $self->{dir} is damaged - its SHA-256 differs";
}

sub _manifest_problem ($manifest) {
    my $common = manifest_fault($manifest, qr/[12]/);
    return $common if defined($common);
    return 'its container is not valid'
        if exists($manifest->{container}) && !_check_container($manifest);
    for my $device (sort keys $manifest->{devices}->%*) {
        my $entry = $manifest->{devices}{$device};
        my $problem = device_fault($device, $entry);
        return $problem if defined($problem);
        return "the image of device $device is not among its files"
            if !is_hash($manifest->{files}{ _file_of($device) });
        $entry->{file} = _file_of($device);
        return "device $device has no valid digests"
            if $manifest->{format} == $format && !_check_digests($manifest, $device);
    }
    for my $file (sort keys $manifest->{files}->%*) {
        return 'the name of one of its files is not valid'
            if $file !~ m/\A[A-Za-z0-9._%-]+\z/ || $file =~ m/\A[.]{1,2}\z/;
    }
    return undef;
}

sub _check_digests ($manifest, $device) {
    my $digests = $manifest->{devices}{$device}{digests};
    my $file = _digests_of($device);
    return 0 if !is_hash($digests) || !is_hash($manifest->{files}{$file});
    return 0 if ($digests->{algorithm} // '') ne 'SHA-256';
    my ($block) = ($digests->{block} // '') =~ m/\A([1-9][0-9]{3,6})\z/ or return 0;
    $digests->@{qw(file block)} = ($file, 0 + $block);
    return 1;
}

sub _check_container ($manifest) {
    my $container = $manifest->{container};
    return 0 if !is_hash($container) || !is_hash($manifest->{files}{$tree});
    return 0 if ($container->{size} // '') !~ m/\A[0-9]{1,19}\z/;
    return ($container->{sha256} // '') =~ m/\A[0-9a-f]{64}\z/;
}

# Differs after another archive was merged into this one, so that what was known before does not count any more.
sub revision ($self) { return "$self->{dir} " . ($self->{manifest}{sha256} // '') }

# For a device by its own name: (the archive that it builds on, the device's name there), or nothing.
sub parent_of ($self, $own) {
    my $entry = $self->{manifest}{devices}{$own} // {};
    return defined($entry->{parent}) ? ($entry->{parent}, $entry->{'parent-device'} // $own) : ();
}

# The same as the files say: also the archive that a killed merge has already merged into this one.
sub merges ($self, $own) {
    my $merged = ($self->{merged} // {})->{$own};
    return $merged ? $merged->@* : $self->parent_of($own);
}

# The file with the digests of the archive's own data of the device; undef for an archive of version 0.1.
sub digests ($self, $device) {
    return $self->device($device)->{digests}
        ? $self->_path_of(_digests_of($self->own($device)))
        : undef;
}

# Whether the digests are of blocks as in new archives, with which they can be compared.
sub has_usual_blocks ($self, $device) {
    return ($self->device($device)->{digests} // { block => 0 })->{block} == $digest_block;
}

# Where a file is. A killed merge may not have moved the digests to their place.
sub _path_of ($self, $file) {
    for my $own (keys(($self->{merged} // {})->%*)) {
        my $joined = $self->_joined_digests($own);
        return $joined if $file eq _digests_of($own) && file_exists($joined);
    }
    return "$self->{dir}/$file";
}

# A file with the noted size and time is not read.
sub tree_problem ($self) { return $self->file_problem($tree, 0) }

# options: those of the server.
sub serve ($self, $device, %options) { return $Server->start($self->image($device), %options) }

sub open_to_write ($self, $device) {
    return $Server->start(
        $self->image($device),
        writable => 1,
        compress => $self->device($device)->{compressed}
    );
}

sub cluster_size ($self) { return $cluster_size }

sub image ($self, $device) { return "$self->{dir}/" . _file_of($self->own($device)) }

sub is_readable ($self, $device) {
    return !attempt_any { sha256($self->image($device)) };
}

# The size of the archive's files, or of a device's image.
sub file_size ($self, $device = undef) {
    my $files = $self->{manifest}{files};
    my $size = 0;
    $size += $_->{size} // 0
        for defined($device) ? $files->{ _file_of($self->own($device)) } : values $files->%*;
    return $size;
}

# The content of one of the archive's files, undef if there is no such file.
sub content ($self, $name) {
    fail($self->manifest_problem) if defined($self->manifest_problem);
    return undef if !$self->{manifest}{files}{$name};
    my $problem = $self->file_problem($name, 1);
    fail($problem) if defined($problem);
    return read_file("$self->{dir}/$name");
}

# ---- is it whole? ----

# Why a file does not match the manifest, or undef. Without read_all, a file with the noted size and time is not hashed
# again. For an image with digests, only the size is compared. Dies if the file cannot be read now.
sub file_problem ($self, $file, $read_all) {
    my $path = $self->_path_of($file);
    my $noted = $self->{manifest}{files}{$file};
    my $found = fingerprint($path) // return "$path is missing";
    return undef if $self->{'is being removed'} && defined($self->_device_of($file));
    return "$path is damaged - it has $found->{size} bytes, not $noted->{size}"
        if $found->{size} ne ($noted->{size} // '');
    return undef if $self->_has_digests($file);
    return undef if !$read_all && $found->{mtime} eq ($noted->{mtime} // '');
    return stream_problem($path, $self->container) if $self->_is_tree($file);
    return sha256($path) eq ($noted->{sha256} // '')
        ? undef
        : "$path is damaged - its SHA-256 differs";
}

# The same for the device's files. Files with the noted size and time are not read.
sub device_problem ($self, $device) {
    return $self->manifest_problem if defined($self->manifest_problem);
    my ($problem) = map { $self->file_problem($_, 0) // () } $self->files_of($device);
    return $problem // $self->_digests_header_problem($device);
}

# A changed header may claim that the digests are complete: then a new block of zeroes would count as stored.
sub _digests_header_problem ($self, $device) {
    my $path = $self->digests($device) // return undef;
    my ($entry, $is_increment) = ($self->device($device), $self->parent_of($self->own($device)));
    my $is_right = has_header($path, $entry->{size}, $entry->{digests}{block}, !$is_increment);
    return $is_right ? undef : "$path is damaged - its header is not that of the device's digests";
}

# Whether the time of an image with digests differs from the noted one.
sub is_touched ($self, $device) {
    return 0 if $self->{'is being removed'};
    my $noted = $self->{manifest}{files}{ _file_of($self->own($device)) };
    my $found = fingerprint($self->image($device));
    return defined($self->digests($device)) && ($found // {})->{mtime} ne ($noted->{mtime} // '');
}

# Gives the device's files, whose content is intact, the noted times. Otherwise, each backup to a copied store whose files have
# new times would read all of it.
sub put_times_back ($self, $device) {
    for my $file ($self->files_of($device)) {
        my ($path, $noted) = ($self->_path_of($file), $self->{manifest}{files}{$file}{mtime});
        my ($time) = ($noted // '') =~ m/\A([0-9]+[.][0-9]+)\z/ or next;
        Time::HiRes::utime((Time::HiRes::stat($path))[8], $time, $path);
    }
    return;
}

sub digests_problem ($self, $device) {
    return $self->file_problem(_digests_of($self->own($device)), 1);
}

# Why the header of the device's image does not match the manifest, or undef. The device is given by its own name.
sub header_problem ($self, $own) {
    my $path = "$self->{dir}/" . _file_of($own);
    my ($size, $backing) = ($self->{manifest}{devices}{$own}{size}, $self->_backing($own));
    my $header = image_header($path);
    return "$path is an image of $header->{size} bytes, not $size" if $header->{size} != $size;
    return "$path has a different backing file or data file than the manifest says"
        if ($header->{backing} // '') ne ($backing // '') || $header->{'has-data-file'};
    return undef;
}

sub files ($self) { return sort keys $self->{manifest}{files}->%* }

# The files of a device.
sub files_of ($self, $device) {
    my $own = $self->own($device);
    return (_file_of($own), defined($self->digests($device)) ? _digests_of($own) : ());
}

# What is wrong with a file, as texts. Reads the whole file.
sub problems ($self, $file) {
    my $problem = $self->file_problem($file, 1);
    return $problem if defined($problem);
    my $own = $self->_device_of($file) // return;
    my $header = $self->header_problem($own);
    return $header if defined($header);
    my $image = "$self->{dir}/$file";
    my $text = image_problem($image);
    return defined($text) ? "$image is damaged - $text" : ();
}

# ---- removal ----

# From here on this is not an archive any more, but its images may still be backing files of others.
sub mark_removed ($self) {
    my $file = "$self->{dir}/$manifest_name";
    move($file, "$self->{dir}/$removed_name")
        if file_exists($file);
    return;
}

# ---- merges: see Merge.pm ----

# The names of devices' files may be as long as the file system permits, and these are not longer.
sub _joined_digests ($self, $own) {
    return "$self->{dir}/" . _file_of($own) =~ s/qcow2\z/joined/r;
}

sub _merged_manifest ($self, $own) {
    return "$self->{dir}/" . _file_of($own) =~ s/qcow2\z/merged/r;
}

sub names_of ($self, $own) { return (_file_of($own), _digests_of($own)) }

1;
