package PBA::Test::Life::Chain;

# A provider of PBA::Test::Life that supports IDs: Qcow2Chain.

use v5.36;

use parent qw(PBA::Test::Life::Strike PVE::BackupAccess::Provider::Qcow2Chain);

# A file with the device's content.
sub content_of ($self, $archive, $device) {
    utf8::encode(my $bytes = $device);
    my $file = $bytes =~ s/([^A-Za-z0-9._-])/sprintf('%%%02X', ord($1))/ger;
    return ('qcow2', "$self->{path}/$archive/$file.qcow2");
}

sub newest ($self) {
    my @list = $self->list(100)->@*;
    return @list ? $list[-1]{volname} : undef;
}

1;
