package PVE::Cluster;

# Stands in for Proxmox VE's module of this name when a test runs the real qemu-server without a cluster. The
# cluster consists of this node only, and its file system is the directory /etc/pve.

use v5.36;

use Exporter qw(import);
use File::Basename qw(dirname);
use File::Path qw(make_path);

use PVE::INotify;
use PVE::Tools;

our @EXPORT_OK = qw(cfs_read_file cfs_write_file cfs_register_file cfs_lock_file);

my $root = '/etc/pve';
my %kinds;

sub cfs_register_file ($name, $parser = undef, $writer = undef) {
    $kinds{$name} = { parser => $parser, writer => $writer };
    return;
}

# Guests' files are registered by the name of their directory.
sub _kind ($name) {
    my ($directory) = $name =~ m!(/[^/]+/)[^/]+\z!;
    return $kinds{$name} // $kinds{ $directory // '' } // die "no file '$name' is registered\n";
}

sub cfs_read_file ($name) {
    my $text = -e "$root/$name" ? PVE::Tools::file_get_contents("$root/$name") : undef;
    return _kind($name)->{parser}->("$root/$name", $text);
}

sub cfs_write_file ($name, $data, @) {
    make_path(dirname("$root/$name"));
    my $text = _kind($name)->{writer}->("$root/$name", $data);
    PVE::Tools::file_set_contents("$root/$name", $text);
    return;
}

# Like the real module, leaves the code's error in $@.
sub _locked ($code, @arguments) {
    my $result = eval { $code->(@arguments) };
    return $result;
}

sub cfs_lock_file ($name, $timeout, $code, @arguments) { return _locked($code, @arguments) }

sub cfs_lock_storage ($storage, $timeout, $code, @arguments) { return _locked($code, @arguments) }

sub cfs_update (@) { return }
sub check_cfs_quorum (@) { return 1 }
sub check_cfs_is_mounted (@) { return 1 }
sub get_nodelist () { return [PVE::INotify::nodename()] }
sub get_node_kv (@) { return {} }

sub get_vmlist () {
    my $node = PVE::INotify::nodename();
    my @files = glob("$root/nodes/$node/qemu-server/*.conf");
    my %ids = map { m!/(\d+)\.conf\z! ? ($1 => { node => $node, type => 'qemu' }) : () } @files;
    return { ids => \%ids };
}

1;
