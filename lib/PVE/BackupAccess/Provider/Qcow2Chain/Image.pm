package PVE::BackupAccess::Provider::Qcow2Chain::Image;

# qcow2 images, by qemu-img.

use v5.36;

use Exporter qw(import);
use File::Temp ();
use IPC::Open3 ();
use JSON::PP ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(attempt_any);

our @EXPORT_OK
    = qw($cluster_size commit_image create_image image_chain image_problem program_environment);

# Where the programs are; nothing else of the caller's environment is given to them.
our $path = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
our $qemu_img = 'qemu-img';

# The environment that QEMU's programs run in.
sub program_environment () {
    return (PATH => $path, LC_ALL => 'C');
}

my sub read_all ($fh) {
    seek($fh, 0, 0);
    local $/ = undef;
    return <$fh> // '';
}

my sub wait_for ($pid) {
    while (waitpid($pid, 0) < 0) {
        return 255 << 8 if !$!{EINTR};
    }
    return $?;
}

# Runs qemu-img; returns its exit status and what it printed.
sub run (@arguments) {
    my ($out, $err) = (File::Temp->new, File::Temp->new);
    local %ENV = program_environment();
    local $SIG{CHLD} = 'DEFAULT';
    local $?;
    open(my $in, '<', '/dev/null') or die "/dev/null: $!\n";
    my $pid;
    my $error = attempt_any {
        $pid = IPC::Open3::open3(
            '<&' . fileno($in),
            '>&' . fileno($out),
            '>&' . fileno($err),
            $qemu_img, @arguments
        );
    };
    PVE::BackupAccess::Error->throw('UnsupportedError', "cannot run $qemu_img - $!") if $error;
    my $status = wait_for($pid);
    my $message = read_all($err);
    chomp($message);
    return ($status, read_all($out), $message);
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

# An empty image; with a backing file, which is named relative to it.
sub create_image ($file, $size, $backing = undef) {
    my @backing = defined($backing) ? ('-F', 'qcow2', '-b', $backing) : ();
    my @options = ('-f', 'qcow2', '-o', "cluster_size=$cluster_size");
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

# What is wrong in the image's own structure, or undef. Clusters that leak waste space, no more.
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
