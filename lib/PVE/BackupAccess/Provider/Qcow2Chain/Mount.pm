package PVE::BackupAccess::Provider::Qcow2Chain::Mount;

# Options of network mounts that a store should not have.

use v5.36;

use Exporter qw(import);

our @EXPORT_OK = qw(mount_warning);

our $mountinfo = '/proc/self/mountinfo';    # see proc(5)

my $locks = 'other hosts do not see its locks, so only this host may use the archives';
my $errors = 'a pause of the server looks like damage';

# For each type of file system: [options, the consequence, what to use instead].
my @nfs = (
    [qr/nolock|local_lock=(?:flock|all)/, $locks, q('local_lock=none')],
    [qr/soft|softerr/, $errors, q('hard')],
);
my @cifs = ([qr/nobrl/, $locks, q('brl')]);
my %unwanted = (nfs => \@nfs, nfs4 => \@nfs, cifs => \@cifs, smb3 => \@cifs);

# The type and the options of the file system with that device number, both empty if the table does not have it.
my sub options_of ($dev) {
    my $number = ($dev >> 8 & 0xfff) . ':' . ($dev & 0xff | $dev >> 12 & 0xfff00);
    open(my $fh, '<', $mountinfo) or return ('', '');
    my @found = ('', '');
    while (my $line = <$fh>) {
        my ($device, $type, $options) = $line =~ m/\A\d+ \d+ (\d+:\d+) .* - (\S+) \S* ?(\S+)\s*\z/
            or next;
        @found = ($type, $options) if $device eq $number;
    }
    return @found;
}

# What to warn of, or undef. A single host uses such a store safely, so it is not refused.
sub mount_warning ($dir) {
    my ($dev) = stat($dir) or return undef;
    my ($type, $options) = options_of($dev);
    for my $unwanted (($unwanted{$type} // [])->@*) {
        my ($pattern, $consequence, $instead) = $unwanted->@*;
        my ($option) = grep { m/\A$pattern\z/ } split(m/,/, $options) or next;
        return "$dir is on a file system of type $type that is mounted with '$option':"
            . " $consequence - mount it with $instead";
    }
    return undef;
}

1;
