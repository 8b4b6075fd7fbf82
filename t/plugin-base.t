# Plugins that derive from Proxmox VE's class can be loaded without it, and use it if it is installed.

use v5.36;

use File::Path qw(make_path);
use File::Temp ();
use FindBin;
use Test::More;

my $dir = File::Temp->newdir('pba-plugin.XXXXXX', TMPDIR => 1);

sub write_file ($file, $text) {
    make_path("$dir/" . $file =~ s!/[^/]*\z!!r);
    open(my $fh, '>', "$dir/$file") or die "$file: $!\n";
    print {$fh} $text;
    close($fh) or die "$file: $!\n";
}

write_file('plugins/My/Plugin.pm', <<'PERL');
package My::Plugin;
use base qw(PVE::BackupProvider::Plugin::Base);
sub new { return bless({}, shift) }
1;
PERL
write_file('proxmox/PVE/BackupProvider/Plugin/Base.pm', <<'PERL');
package PVE::BackupProvider::Plugin::Base;
sub provider_name { return 'the real one' }
1;
PERL

sub perl ($code, @options) {
    my @command = ($^X, (map { "-I$_" } @INC), @options, '-e', $code);
    my $text = join(' ', map { "'" . s/'/'\\''/gr . "'" } @command);
    return qx($text 2>&1);
}

my $plugins = "use lib '$dir/plugins'; use PVE::BackupAccess::Task; use My::Plugin;";
my $name = 'print My::Plugin->new->provider_name';

SKIP: {
    skip('libpve-storage-perl is installed', 2)
        if eval { require PVE::BackupProvider::Plugin::Base; 1 };
    is(
        perl("$plugins $name"),
        "the backup provider My::Plugin has no method provider_name\n",
        'a method that the plugin lacks'
    );
    is(perl("$plugins print My::Plugin->can('backup_vm') ? 1 : 0"), '1', 'it is such a class');
}
is(perl("$plugins $name", "-I$dir/proxmox"), 'the real one', "Proxmox VE's class comes first");
is(perl("use PVE::BackupAccess::Task; use lib '$dir/proxmox'; $plugins $name"),
    'the real one', "Proxmox VE's class comes first even if its directory was added later");

done_testing;
