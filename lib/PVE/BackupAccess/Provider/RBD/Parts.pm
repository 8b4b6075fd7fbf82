package PVE::BackupAccess::Provider::RBD::Parts;

# Stores a file as several objects, because the size of an object is limited. Parts with only zeroes get no object.

use v5.36;

use Exporter qw(import);
use Fcntl qw(SEEK_SET);
use List::Util qw(min);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(write_file);

our @EXPORT_OK = qw(get_parts part_names put_parts);

my $part_size = 16 << 20;

my sub fail ($path) {
    PVE::BackupAccess::Error->throw('SystemError', "cannot read or write $path - $!");
}

# The names of the objects for a file of that size.
sub part_names ($object, $size) {
    return map { "$object.$_" } 0 .. int(($size - 1) / $part_size);
}

sub put_parts ($ceph, $object, $path) {
    open(my $fh, '<:raw', $path) or fail($path);
    for my $name (part_names($object, -s $fh)) {
        read($fh, my $data, $part_size) // fail($path);
        next if $data !~ m/[^\0]/;
        write_file("$path.part", $data);
        $ceph->put($name, "$path.part");
    }
    return;
}

# A missing object counts as zeroes. A lost object is detected by the caller's digest of the whole file.
sub get_parts ($ceph, $object, $size, $path) {
    open(my $fh, '+>:raw', $path) or fail($path);
    truncate($fh, $size) or fail($path);
    my $at = 0;
    for my $name (part_names($object, $size)) {
        if ($ceph->get($name, "$path.part")) {
            open(my $part, '<:raw', "$path.part") or fail($path);
            read($part, my $data, $part_size) // fail($path);
            seek($fh, $at, SEEK_SET) or fail($path);
            print {$fh} substr($data, 0, min($part_size, $size - $at)) or fail($path);
        }
        $at += $part_size;
    }
    close($fh) or fail($path);
    return;
}

1;
