package PVE::BackupAccess::Format;

# Numbers for people.

use v5.36;

use Exporter qw(import);

our @EXPORT_OK = qw(bytes);

my @units = qw(B KiB MiB GiB TiB PiB EiB);

# 4194304 is 4.0 MiB.
sub bytes ($count) {
    my $unit = 0;
    while ($count >= 1024 && $unit < $#units) {
        $count /= 1024;
        $unit++;
    }
    return $unit ? sprintf('%.1f %s', $count, $units[$unit]) : "$count B";
}

1;
