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

# The same, where only success will do.
sub img (@arguments) {
    my ($status, $out, $message) = run(@arguments);
    return $out if $status == 0;
    $message = 'status ' . ($status >> 8) if $message eq '';
    PVE::BackupAccess::Error->throw('SystemError', "$qemu_img $arguments[0] failed - $message");
}

# What copies to them have to know; see copy() of PVE::BackupAccess::Volume.
our $cluster_size = 65536;

# An empty image; with a backing file, which is named relative to it; for data that Server compresses.
sub create_image ($file, $size, $backing = undef, $is_compressed = 0) {
    my @backing = defined($backing) ? ('-F', 'qcow2', '-b', $backing) : ();
    my $compression = $is_compressed ? ',compression_type=zstd' : '';
    my @options = ('-f', 'qcow2', '-o', "cluster_size=$cluster_size$compression");
    img('create', '-q', @options, @backing, $file, $size);
    return;
}

# What the headers of an image and of those it builds on say: { size, backing, data-file } of each.
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

# What is wrong in the image's own metadata, or undef. Leaked clusters only waste space.
sub image_problem ($file) {
    my ($status, undef, $message) = run('check', '-q', '-U', '-f', 'qcow2', $file);
    my $code = $status >> 8;
    return undef if $status == 0 || $code == 3;
    return $message =~ s/\n.*//sr if $message ne '';
    return $code == 2 ? 'the image is corrupt' : "qemu-img check ended with status $code";
}

# Puts what an image has itself into its backing file, whose content as seen through the image does
# not change by that.
sub commit_image ($file) {
    img('commit', '-q', '-d', '-f', 'qcow2', $file);
    return;
}

1;
