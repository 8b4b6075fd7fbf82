package PBA::Test::VZDump::Host;

# What the real qemu-server finds on a Proxmox host, made in mount namespaces of our own: /etc/pve, /run and
# the log's directory. Modules that belong to cluster, HA, firewall and the like are stand-ins.

use v5.36;

use Exporter qw(import);
use File::Path qw(make_path);
use FindBin;
use IO::Socket::UNIX;
use Socket qw(SOMAXCONN);

our @EXPORT_OK = qw(empty_modules enter_own_mounts load_tree prepare_host write_file);

# Cluster, HA and firewall are never the real ones; sources lack modules that are not of Perl. Nothing is
# asked of either in these tests.
my $stand_in = qr{\APVE/(?:IPCC\.pm|HA/|Firewall)};
my $absent = qr{\A(?:Proxmox/RS/|PVE/(?:RS/|RADOS\.pm|Network/SDN|APIClient/))};

# As root. Starts this test again, with mounts of its own; returns in that process.
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

# Directories with modules of a tree: one of sources, each repository in a directory of its own, or an
# installed host's.
sub _libraries ($tree) {
    my @places = map { ($_, "$_/src", "$_/usr/share/perl5") } $tree, glob("$tree/*");
    return grep { -d "$_/PVE" } @places;
}

# Why the tree cannot be loaded, or nothing. Whatever is loaded later comes from it first.
sub load_tree ($tree) {
    unshift(@INC, empty_modules($stand_in), "$FindBin::Bin/lib/Cluster", _libraries($tree));
    push(@INC, empty_modules($absent));
    my $ok = eval { require PVE::VZDump; require PVE::QemuServer; 1 };
    return $ok ? undef : ($@ =~ m/\A(.*?)(?: \(\@INC| at |$)/m)[0];
}

# For @INC: modules with such names that have whatever function is called, which returns nothing.
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

# A guest by its number with such a configuration, whose images are below a directory, and the sockets of
# its QEMU and its agent.
sub prepare_host ($vmid, $config, $vm, $agent, $store) {
    my $node = PVE::INotify::nodename();
    write_file("/etc/pve/nodes/$node/qemu-server/$vmid.conf", $config);
    write_file("/etc/pve/firewall/$vmid.fw", "[OPTIONS]\nenable: 1\n");
    write_file('/etc/pve/storage.cfg', "dir: images\n\tpath $store\n\tcontent images\n\n");
    symlink($vm->qmp_path, "/run/qemu-server/$vmid.qmp") or die "symlink: $!\n";
    symlink($agent->socket_path, "/run/qemu-server/$vmid.qga") or die "symlink: $!\n";
    make_path('/run/bin', '/etc/pve/priv');
    _run('install', "$FindBin::Bin/lib/PBA/Test/VZDump/qm", '/run/bin/qm');
    $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin:/run/bin";

    # Takes connections, and says nothing.
    return IO::Socket::UNIX->new(Local => '/run/qmeventd.sock', Listen => SOMAXCONN)
        // die "/run/qmeventd.sock: $!\n";
}

1;
