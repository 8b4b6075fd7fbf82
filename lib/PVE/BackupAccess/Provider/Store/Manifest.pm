package PVE::BackupAccess::Provider::Store::Manifest;

# The text of an archive's manifest: JSON with a digest of itself. This file checks what the manifests of all stores have
# in common.

use v5.36;

use Digest::SHA qw(sha256_hex);
use Exporter qw(import);
use JSON::PP ();
use Storable qw(dclone);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(attempt_any);

our @EXPORT_OK = qw($name_pattern decode_manifest device_fault encode_manifest has_its_digest
    is_hash is_text manifest_fault new_id refuse_newer safe_name);

# An archive's name is its time. The order of names is that of times. Whatever else lies in a store is not an archive.
our $name_pattern
    = qr/((?:19|2[0-9])[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])T(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]Z)/;

my $json = JSON::PP->new->utf8->canonical->pretty;

# Text => what it decodes to. A prune reads the manifests of a chain of 100 archives 5,000 times, and JSON::PP takes 2 ms
# for each.
my (%decoded, $decoded_bytes);
my $most_bytes = 4 << 20;

my sub fail ($class, $message) { PVE::BackupAccess::Error->throw($class, $message) }

sub is_text ($value) { return defined($value) && !ref($value) }
sub is_hash ($value) { return ref($value) eq 'HASH' }

# A unique ID of an archive.
sub new_id () {
    my $bytes = '';
    my $is_open = open(my $fh, '<:raw', '/dev/urandom');
    fail('SystemError', "cannot read /dev/urandom - $!")
        if !$is_open || (read($fh, $bytes, 16) // 0) != 16;
    return unpack('H*', $bytes);
}

# A device's name as a part of a file's name: the same in every archive, safe for any name, and without taint.
sub safe_name ($device) {
    utf8::encode(my $bytes = $device);
    my ($safe) = $bytes =~ s/([^A-Za-z0-9._-])/sprintf('%%%02X', ord($1))/ger =~ m/\A(.*)\z/s;
    return $safe;
}

# The second line of the text is a digest of all the others. Format 1 of Qcow2Chain has no digest.
sub encode_manifest ($manifest, $with_digest = 1) {
    my %all = $manifest->%*;
    delete($all{sha256});
    my $text = $json->encode(\%all);
    return $text if !$with_digest;
    my $sha256 = sha256_hex($text);
    return $text =~ s/\A\{\n/{\n   "sha256" : "$sha256",\n/r;
}

sub has_its_digest ($text) {
    return $text =~ s/\A\{\n   "sha256" : "([0-9a-f]{64})",\n/{\n/ && $1 eq sha256_hex($text);
}

# Returns undef if the text is not JSON.
sub decode_manifest ($text) {
    my $manifest = $decoded{$text};
    return dclone($manifest) if $manifest;
    attempt_any { $manifest = $json->decode($text) };
    return $manifest if !ref($manifest);
    (%decoded, $decoded_bytes) = () if ($decoded_bytes += length($text)) > $most_bytes;
    $decoded{$text} = dclone($manifest) if length($text) < $most_bytes;
    return $manifest;
}

# Dies if a manifest is of a later format than the newest known one. That is no damage. what: the archive.
sub refuse_newer ($what, $manifest, $newest) {
    my $format = is_hash($manifest) ? $manifest->{format} // '' : '';
    fail('UnsupportedError',
        "$what was made by a newer version of this program - its format is $format, and this version reads"
            . " formats up to $newest")
        if $format =~ m/\A[1-9][0-9]{0,8}\z/ && $format > $newest;
    return;
}

# Why a manifest is not valid, or undef. formats: a pattern of the store's formats.
sub manifest_fault ($manifest, $formats) {
    return 'it is not a JSON object' if !is_hash($manifest);
    return 'its format is unknown'
        if !is_text($manifest->{format}) || $manifest->{format} !~ m/\A$formats\z/;
    return 'its ID is missing' if !is_text($manifest->{id});
    return 'its guest is not a text' if exists($manifest->{guest}) && !is_text($manifest->{guest});
    return 'its devices or files are missing'
        if grep { !is_hash($manifest->{$_}) } qw(devices files);
    return 'the entry of one of its files is not valid'
        if grep { !is_hash($_) || ($_->{size} // 0) !~ m/\A[0-9]{1,19}\z/ }
        values $manifest->{files}->%*;
    return undef;
}

# The same for the entry of a device. Removes the taint from the parent's name.
sub device_fault ($device, $entry) {
    return "the entry of device $device is not an object" if !is_hash($entry);
    return "device $device has no size" if ($entry->{size} // '') !~ m/\A[0-9]{1,19}\z/;
    return "the parent of device $device is not the name of an archive"
        if defined($entry->{parent}) && $entry->{parent} !~ m/\A$name_pattern\z/;
    $entry->{parent} = $1 if defined($entry->{parent});
    for my $key (qw(identity node parent-device)) {
        return "the $key of device $device is not a text"
            if exists($entry->{$key}) && !is_text($entry->{$key});
    }
    return undef;
}

1;
