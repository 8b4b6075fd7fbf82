package PVE::BackupAccess::Provider::Qcow2Chain::Image;

# qcow2 images, by qemu-img.

use v5.36;

use Exporter qw(import);
use JSON::PP ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Program qw(run_program);

our @EXPORT_OK = qw($cluster_size commit_image create_image image_chain image_problem);

our $qemu_img = 'qemu-img';

# Runs qemu-img; returns its exit status and what it printed.
sub run (@arguments) {
    my ($status, $out, $message) = run_program($qemu_img, @arguments);
    chomp($message);
    PVE::BackupAccess::Error->throw('SystemError',
        "$qemu_img $arguments[0] was ended by signal " . ($status & 127))
        if $status & 127;
    return ($status, $out, $message);
}

# The same, but dies if qemu-img fails.
sub img (@arguments) {
    my ($status, $out, $message) = run(@arguments);
    return $out if $status == 0;
    $message = 'status ' . ($status >> 8) if $message eq '';
    PVE::BackupAccess::Error->throw('SystemError', "$qemu_img $arguments[0] failed - $message");
}

# For copies to such images; see copy() of PVE::BackupAccess::Volume.
our $cluster_size = 65536;

# Creates an empty image. The path of the backing file is relative to the image. is_compressed: Server will compress.
sub create_image ($file, $size, $backing = undef, $is_compressed = 0) {
    my @backing = defined($backing) ? ('-F', 'qcow2', '-b', $backing) : ();
    my $compression = $is_compressed ? ',compression_type=zstd' : '';
    my @options = ('-f', 'qcow2', '-o', "cluster_size=$cluster_size$compression");
    img('create', '-q', @options, @backing, $file, $size);
    return;
}

# The headers of an image and of its backing files: { size, backing, data-file } of each.
sub image_chain ($file) {
    my $out = img('info', '-U', '--backing-chain', '-f', 'qcow2', '--output=json', $file);
    return map {
        +{
            size => $_->{'virtual-size'},
            backing => $_->{'backing-filename'},
            'data-file' => $_->{'format-specific'}{data}{'data-file'},
        }
    } JSON::PP->new->utf8->decode($out)->@*;
}

# What is wrong with the image's own metadata, or undef. Leaked clusters are not an error: they only waste space.
sub image_problem ($file) {
    my ($status, undef, $message) = run('check', '-q', '-U', '-f', 'qcow2', $file);
    my $code = $status >> 8;
    return undef if $status == 0 || $code == 3;
    return $message =~ s/\n.*//sr if $message ne '';
    return $code == 2 ? 'the image is corrupt' : "qemu-img check ended with status $code";
}

# Writes the image's own data into its backing file. The content seen through the image does not change.
sub commit_image ($file) {
    img('commit', '-q', '-d', '-f', 'qcow2', $file);
    return;
}

1;
