package PBA::Test::Manifest;

# Changes the manifest of an archive as its program would have written it, with a matching digest.

use v5.36;

use Digest::SHA qw(sha256_hex);
use Exporter qw(import);
use JSON::PP ();

use PVE::BackupAccess::File qw(read_file write_file);

our @EXPORT_OK = qw(change_manifest forget_identities);

my $json = JSON::PP->new->utf8->canonical->pretty;

sub change_manifest ($file, $code) {
    my $manifest = $json->decode(read_file($file));
    delete($manifest->{sha256});
    $code->($manifest);
    my $text = $json->encode($manifest);
    my $digest = sha256_hex($text);
    write_file($file, $text =~ s/\A\{\n/{\n   "sha256" : "$digest",\n/r);
    return;
}

# Makes archives look like those from before manifests contained identities of disks.
sub forget_identities (@files) {
    my $forget = sub ($manifest) {
        delete($_->@{qw(identity node)}) for values $manifest->{devices}->%*;
    };
    change_manifest($_, $forget) for @files;
    return;
}

1;
