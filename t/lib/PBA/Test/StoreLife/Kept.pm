package PBA::Test::StoreLife::Kept;

# Contents of disks in files, each once, with their digests as names. So this process stays small: a fork costs time
# in proportion to the memory of a process, and a life forks hundreds of times.

use v5.36;

use Digest::MD5 ();
use Exporter qw(import);

our @EXPORT_OK = qw(digest keep keep_in kept slurp);

my $dir;

sub slurp ($path) {
    open(my $fh, '<:raw', $path) or die "$path: $!\n";
    sysread($fh, my $content, -s $fh || 65536) // die "$path: $!\n";
    return $content;
}

# From now on, keeps contents in this directory, which must be empty.
sub keep_in ($path) {
    $dir = $path;
    return;
}

sub digest ($content) { return Digest::MD5::md5_hex($content) }

# Returns the digest.
sub keep ($content) {
    my $digest = digest($content);
    my $path = "$dir/$digest";
    return $digest if -e $path;
    open(my $fh, '>:raw', "$path.new") or die "$path: $!\n";
    print {$fh} $content or die "$path: $!\n";
    close($fh) or die "$path: $!\n";
    rename("$path.new", $path) or die "$path: $!\n";
    return $digest;
}

sub kept ($digest) { return slurp("$dir/$digest") }

1;
