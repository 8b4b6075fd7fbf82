package PVE::BackupAccess::Provider::Qcow2Chain::Image;

# qcow2 images, by qemu-img.

use v5.36;

use Exporter qw(import);
use JSON::PP ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(move open_if_there sync);
use PVE::BackupAccess::Program qw(how_ended is_of_system run_program run_program_to_file);

our @EXPORT_OK
    = qw($cluster_size bytes_to_separate check_opening commit_image create_image extents image_header image_problem separate);

my $Error = 'PVE::BackupAccess::Error';
my $json = JSON::PP->new->latin1->canonical;    # of bytes, which stay as they are

our $qemu_img = 'qemu-img';

# The image without its backing file, for qemu-img. The bytes of the name stay as they are.
my sub alone ($file) {
    utf8::encode($file) if utf8::is_utf8($file);
    my %file = (driver => 'file', filename => $file);
    return $json->encode({ driver => 'qcow2', backing => undef, file => \%file });
}

# Runs qemu-img; returns its exit status and what it printed. A reference to the name of an image stands for that image without
# its backing file.
sub run (@arguments) {
    my @files = map { ref ? $_->$* : m!/! ? $_ : () } @arguments;
    my ($status, $out, $message)
        = run_program($qemu_img, map { ref ? 'json:' . alone($_->$*) : $_ } @arguments);
    chomp($message);
    $message =~ s/json:\{.*\}/$files[-1]/g;
    $Error->throw('SystemError', "$qemu_img $arguments[0] of $files[-1] " . how_ended($status))
        if $status & 127;
    return ($status, $out, $message);
}

# The same, but dies with an error of this class if qemu-img fails.
my sub wanted ($class, @arguments) {
    my ($status, $out, $message) = run(@arguments);
    return $out if $status == 0;
    $class = 'SystemError' if is_of_system($status, $message);
    $message = 'status ' . ($status >> 8) if $message eq '';
    $Error->throw($class, "$qemu_img $arguments[0] failed - $message");
}

sub img (@arguments) { return wanted('SystemError', @arguments) }

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

my $data_in_other_file = 4;    # a bit of a header's incompatible features

# What the header of an image says: { size, backing, has-data-file }. ArchiveError: this is no header.
sub image_header ($file) {
    my $fh = open_if_there($file) // $Error->throw('ArchiveError', "$file is missing");
    sysread($fh, my $bytes, $cluster_size)
        // $Error->throw('SystemError', "cannot read $file - $!");
    my ($magic, $version, $at, $length, $size, $features)
        = unpack('a4 N Q> N x4 Q> x40 Q>', $bytes);
    $Error->throw('ArchiveError', "$file is damaged - its header is not that of a qcow2 image")
        if !defined($features) || $magic ne "QFI\xfb" || $at + $length > length($bytes);
    return {
        size => $size,
        backing => $at ? substr($bytes, $at, $length) : undef,
        'has-data-file' => $version > 2 && $features & $data_in_other_file,
    };
}

# Dies if qemu-img cannot open the image and those that it builds on. ArchiveError: one of them is damaged. The headers must
# be checked before: if one names a FIFO, QEMU waits for its writer.
sub check_opening ($file) {
    wanted('ArchiveError', 'info', '-U', '--backing-chain', '-f', 'qcow2', $file);
    return;
}

# What is wrong with the image's own metadata, or undef. Its header must have been checked. Leaked clusters are not an error: they only waste space. Dies if
# that cannot be determined.
sub image_problem ($file) {
    my ($status, undef, $message) = run('check', '-q', '-U', \$file);
    my $code = $status >> 8;
    return undef if $status == 0 || $code == 3;
    $Error->throw('SystemError', "$qemu_img check failed - " . $message =~ s/\n.*//sr)
        if $code != 2 && is_of_system($status, $message);
    return $message =~ s/\n.*//sr if $message ne '';
    return $code == 2 ? 'the image is corrupt' : "qemu-img check ended with status $code";
}

# Returns a function that goes through the ranges of an image, without its backing file. For each range it returns the
# end, whether the image holds the range, and whether it holds zeroes there.
sub extents ($file) {
    my ($status, $map, $message)
        = run_program_to_file($qemu_img, qw(map -U --output=json), 'json:' . alone($file));
    $Error->throw('SystemError', "$qemu_img map failed - " . $message =~ s/\n.*//sr)
        if $status != 0;
    my $last = '';
    return sub () {
        while (my $line = <$map>) {
            $last = $line;
            my ($offset, $length) = $line =~ m/"start": ([0-9]+), "length": ([0-9]+),/ or next;
            return ($offset + $length, map { $line =~ m/"$_": true/ ? 1 : 0 } qw(present zero));
        }
        return if $last =~ m/\]\s*\z/;
        $Error->throw('SystemError',
            "what $qemu_img map prints about $file is cut off - is the directory for temporary files full?"
        );
    };
}

# Whether the file has other names: hard links, by which a copy of the store may have been made (cp -al).
my sub is_shared ($file) { return ((stat($file))[3] // 1) > 1 }

# The space that separate takes.
sub bytes_to_separate ($file) { return is_shared($file) ? 512 * (stat($file))[12] : 0 }

# Before the file is changed, gives it data of its own, so that what its other names show stays the same.
sub separate ($file) {
    return if !is_shared($file);
    my ($status, undef, $message)
        = run_program('cp', '--sparse=always', '--remove-destination', '-p', '--', $file,
        "$file.new");
    $Error->throw('SystemError',
        "cannot copy $file, which has hard links - " . $message =~ s/\n.*//sr)
        if $status != 0;
    sync("$file.new");
    move("$file.new", $file);
    return;
}

# Writes the image's own data into its backing file. The content seen through the image does not change.
sub commit_image ($file) {
    img('commit', '-q', '-d', '-f', 'qcow2', $file);
    return;
}

1;
