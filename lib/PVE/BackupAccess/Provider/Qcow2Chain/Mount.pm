package PVE::BackupAccess::Provider::Qcow2Chain::Mount;

# Options of network mounts that a store should not have.

use v5.36;

use Exporter qw(import);

use PVE::BackupAccess::File qw(file_system_of);

our @EXPORT_OK = qw(mount_warning);

my $locks = 'other hosts do not see its locks, so only this host may use the archives';
my $errors = 'a pause of the server looks like damage';

# For each type of file system: [options, the consequence, what to use instead].
my @nfs = (
    [qr/nolock|local_lock=(?:flock|all)/, $locks, q('local_lock=none')],
    [qr/soft|softerr/, $errors, q('hard')],
);
my @cifs = ([qr/nobrl/, $locks, q('brl')]);
my %unwanted = (nfs => \@nfs, nfs4 => \@nfs, cifs => \@cifs, smb3 => \@cifs);

# What to warn of, or undef. A single host uses such a store safely, so it is not refused.
sub mount_warning ($dir) {
    my ($type, $options) = file_system_of($dir);
    for my $unwanted (($unwanted{$type} // [])->@*) {
        my ($pattern, $consequence, $instead) = $unwanted->@*;
        my ($option) = grep { m/\A$pattern\z/ } split(m/,/, $options) or next;
        return "$dir is on a file system of type $type that is mounted with '$option':"
            . " $consequence - mount it with $instead";
    }
    return undef;
}

1;
