package PVE::BackupAccess::CLI::Copy::Source;

# Opens a volume that another process describes in JSON: the hash that backup_vm() got for one device. With the
# mechanism file-handle, the JSON has the numbers of two descriptors: the file handle, and a stream of lines,
# which are the dirty regions.

use v5.36;

use Exporter qw(import);
use JSON::PP ();

use PVE::BackupAccess::CLI qw(untainted usage_error);
use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::Try qw(attempt_any);
use PVE::BackupAccess::Volume;
use PVE::BackupAccess::Wait qw(next_line read_some);

our @EXPORT_OK = qw(descriptor open_source);

my $json = JSON::PP->new->utf8;
my $max_line = 4096;    # bytes; a longer line is not a region, but something else, such as the disk
my $max_volume = 1 << 20;    # of standard input

# An open descriptor of this number, as a handle.
sub descriptor ($name, $number, $mode) {
    usage_error("$name must be the number of a file descriptor, not '$number'")
        if ref($number) || $number !~ m/\A(?:0|[1-9][0-9]{0,8})\z/;
    open(my $fh, "$mode&=", untainted($number))
        or usage_error("$name: descriptor $number cannot be used - $!");
    binmode($fh);
    return $fh;
}

my sub parse ($text) {
    my $volume;
    my $error = attempt_any { $volume = $json->decode($text) };
    usage_error('--volume is not JSON: ' . $error =~ s/ at \S+ line \d+\.?\s*\z//r)
        if defined($error);
    usage_error("--volume must be the JSON object of one device, such as"
            . ' {"size":1048576,"bitmap-mode":"none","nbd-path":"/run/nbd.sock"}')
        if ref($volume) ne 'HASH';
    my @devices = grep { ref($volume->{$_}) eq 'HASH' } sort keys $volume->%*;
    @devices = () if grep { exists($volume->{$_}) } qw(size nbd-path file-handle);
    usage_error(
        "--volume has the volumes of several devices - give the JSON object of one of them: @devices"
    ) if @devices;
    return $volume;
}

# The JSON from standard input.
my sub read_volume () {
    usage_error('--volume: standard input is closed') if !stat(STDIN);
    my ($text, $got) = ('', 1);
    $got = read_some(\*STDIN, \$text, 65536) while $got && length($text) <= $max_volume;
    usage_error("--volume: standard input cannot be read - $!") if !defined($got);
    usage_error("--volume: standard input has more than $max_volume bytes")
        if length($text) > $max_volume;
    return untainted($text);
}

my sub read_region ($line) {
    return ($1, $2, 0)
        if $line =~ m/\A\s*\{\s*"offset"\s*:\s*([0-9]+)\s*,\s*"length"\s*:\s*([0-9]+)\s*\}\s*\n\z/;
    return (0, 0, 1) if $line =~ m/\A\s*\{\s*"end"\s*:\s*true\b.*\}\s*\n\z/;
    return;
}

# A code ref that returns one region per call, as the API requires. It dies if the stream has no end mark, because
# then regions may be missing.
my sub region_reader ($fh) {
    my ($count, $is_over, $text) = (0, 0, '');
    return sub () {
        return if $is_over;
        my $line = next_line($fh, \$text, $max_line);
        die
            "the regions end after $count, without an end mark - the program that writes them has failed\n"
            if !defined($line);
        my ($offset, $length, $is_end) = read_region($line)
            or die "line "
            . ($count + 1)
            . " of the regions is not valid - write lines such as"
            . qq( {"offset":0,"length":65536}, and at last {"end":true}\n);
        $count++;
        $is_over = $is_end;
        return $is_end ? () : ($offset, $length);
    };
}

# The volume that the options describe, and whether only its changed parts are read.
sub open_source ($opt) {
    my $given = $opt->{volume};
    my $volume = parse($given eq '-' ? read_volume() : $given);
    delete($volume->{'file-handle'}) if !defined($volume->{'file-handle'});
    if (exists($volume->{'file-handle'})) {
        $volume->{'file-handle'}
            = descriptor(q('file-handle' of --volume), $volume->{'file-handle'}, '+<');
        my $regions = descriptor(q('next-dirty-region' of --volume),
            $volume->{'next-dirty-region'} // '', '<');
        $volume->{'next-dirty-region'} = region_reader($regions);
    }
    $volume->{$_} = untainted($volume->{$_})
        for grep { !ref($volume->{$_}) && defined($volume->{$_}) } keys $volume->%*;
    my $opened = PVE::BackupAccess::Volume->open(text($opt->{device}), $volume);
    return ($opened, ($volume->{'bitmap-mode'} // 'none') eq 'reuse');
}

1;
