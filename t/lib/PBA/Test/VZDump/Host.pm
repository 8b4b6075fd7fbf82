package PBA::Test::VZDump::Host;

# The environment of qemu-server on a Proxmox host, created in mount namespaces of our own: /etc/pve, /run and
# the directory of the log. Modules of the cluster, HA, the firewall and similar parts are stand-ins.

use v5.36;

use Exporter qw(import);
use File::Path qw(make_path);
use FindBin;
use IO::Socket::UNIX;
use Socket qw(SOMAXCONN);

our @EXPORT_OK = qw(empty_modules enter_own_mounts load_tree prepare_host write_file);

# Cluster, HA and firewall are always stand-ins. The sources lack modules that are not written in Perl. These
# tests call neither.
my $stand_in = qr{\APVE/(?:IPCC\.pm|HA/|Firewall)};
my $absent = qr{\A(?:Proxmox/RS/|PVE/(?:RS/|RADOS\.pm|Network/SDN|APIClient/))};

# Requires root. Starts this test again in mounts of its own, and returns in that process.
sub enter_own_mounts () {
    if (!$ENV{PBA_OWN_MOUNTS}) {
        local $ENV{PBA_OWN_MOUNTS} = 1;
        my @perl = ($^X, (map { "-I$_" } @INC), "$FindBin::Bin/$FindBin::Script");
        exec(qw(unshare --mount --propagation private), @perl) or die "unshare: $!\n";
    }
    _run(qw(mount -t tmpfs tmpfs /run));
    make_path('/run/etc', '/run/work');
    my $overlay = 'lowerdir=/etc,upperdir=/run/etc,workdir=/run/work';
    _run(qw(mount -t overlay -o), $overlay, qw(overlay /etc));
    _run(qw(mount -t tmpfs tmpfs /var/log));
    make_path(qw(/run/lock/qemu-server /run/qemu-server /var/log/vzdump));
    return;
}

sub _run (@command) {
    system(@command) == 0 or die "'@command' failed: status $?\n";
    return;
}

# The module directories of a tree: sources, with each repository in a directory of its own, or an installed
# host.
sub _libraries ($tree) {
    my @places = map { ($_, "$_/src", "$_/usr/share/perl5") } $tree, glob("$tree/*");
    return grep { -d "$_/PVE" } @places;
}

# Says why the tree cannot be loaded; nothing if it can. Modules that are loaded later come from the tree first.
sub load_tree ($tree) {
    unshift(@INC, empty_modules($stand_in), "$FindBin::Bin/lib/Cluster", _libraries($tree));
    push(@INC, empty_modules($absent));
    my $ok = eval { require PVE::VZDump; require PVE::QemuServer; 1 };
    return $ok ? undef : ($@ =~ m/\A(.*?)(?: \(\@INC| at |$)/m)[0];
}

# For @INC: modules with these names in which every function exists and returns nothing.
sub empty_modules ($names) {
    return sub ($, $file) {
        return if $file !~ $names;
        my $package = $file =~ s!/!::!gr =~ s/\.pm\z//r;
        my $text = "package $package; our \$AUTOLOAD; sub AUTOLOAD { return } 1;";
        open(my $fh, '<', \$text) or die "$file: $!\n";
        return $fh;
    };
}

sub write_file ($file, $text) {
    make_path($file =~ s!/[^/]*\z!!r);
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} $text;
    close($fh) or die "$file: $!\n";
    return;
}

# A guest with this number and configuration, whose images are below a directory, and the sockets of its QEMU
# and its agent.
sub prepare_host ($vmid, $config, $vm, $agent, $store) {
    my $node = PVE::INotify::nodename();
    write_file("/etc/pve/nodes/$node/qemu-server/$vmid.conf", $config);
    write_file("/etc/pve/firewall/$vmid.fw", "[OPTIONS]\nenable: 1\n");
    write_file('/etc/pve/storage.cfg', "dir: images\n\tpath $store\n\tcontent images\n\n");
    symlink($vm->qmp_path, "/run/qemu-server/$vmid.qmp") or die "symlink: $!\n";
    symlink($agent->socket_path, "/run/qemu-server/$vmid.qga") or die "symlink: $!\n";
    make_path('/run/bin', '/etc/pve/priv', '/etc/pve/local/priv');
    _run('install', "$FindBin::Bin/lib/PBA/Test/VZDump/qm", '/run/bin/qm');
    $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin:/run/bin";

    # Accepts connections, but never answers.
    return IO::Socket::UNIX->new(Local => '/run/qmeventd.sock', Listen => SOMAXCONN)
        // die "/run/qmeventd.sock: $!\n";
}

1;
