package PBA::Test::VZDump::Guest;

# A guest of the real PVE::VZDump on a real Proxmox QEMU, from the sources or the Proxmox host that PBA_QEMU_SERVER names, and
# checks of its backups. HACKING.md describes the required tree.
#
#   my $guest = PBA::Test::VZDump::Guest->start;    # skips the test if something is missing
#   $guest->backup('one object', 'nbd');            # see PBA::Test::VZDump

use v5.36;

use File::Path qw(make_path);
use File::Temp ();
use Test::More;

use PBA::Test::AgentPeer;
use PBA::Test::VM;
use PBA::Test::VZDump;
use PBA::Test::VZDump::Host qw(enter_own_mounts load_tree prepare_host);

my $VM = 'PBA::Test::VM';
my $vmid = 100;
my $mib = 1 << 20;
my %disks = (
    scsi0 => { format => 'raw', size => 32 * $mib },
    scsi1 => { format => 'qcow2', size => 16 * $mib },
);
my $config = <<"END";
agent: 1
name: test
scsi0: images:$vmid/vm-$vmid-disk-0.raw,size=32M
scsi1: images:$vmid/vm-$vmid-disk-1.qcow2,size=16M
tpmstate0: images:$vmid/vm-$vmid-disk-2.raw,size=4M,version=v2.0
END

# In the mounts of prepare_host.
sub start ($class) {
    my $tree = $ENV{PBA_QEMU_SERVER};
    plan(skip_all => 'needs PBA_QEMU_SERVER, and a Proxmox QEMU') if !$tree;
    plan(skip_all => 'needs root') if $>;
    plan(skip_all => "needs a QEMU with Proxmox' commands (PBA_QEMU)") if !$VM->is_proxmox;
    my @programs = qw(fusermount nbdfuse nbdinfo unshare);
    my ($missing) = grep {
        my $name = $_;
        !grep { -x "$_/$name" } split(m/:/, $ENV{PATH})
    } @programs;
    plan(skip_all => "needs $missing, as qemu-server does") if $missing;
    enter_own_mounts();
    my $lacks = load_tree($tree);
    plan(skip_all => "needs what qemu-server needs: $lacks") if $lacks;

    my $dir = File::Temp->newdir('pba-vzdump-XXXXXXXX', TMPDIR => 1);
    make_path("$dir/made");
    my $self = bless({ dir => $dir, vmid => $vmid }, $class);
    $self->{vm} = $self->_start_vm;
    my %replies = ('guest-fsfreeze-status' => { return => 'thawed' });
    $self->{agent} = PBA::Test::AgentPeer->start(replies => \%replies);
    $self->{qmeventd} = prepare_host($vmid, $config, $self->@{qw(vm agent)}, "$dir/store");
    $self->{vzdump} = PBA::Test::VZDump->new(dir => "$dir/made", vmid => $vmid);
    return $self;
}

my sub create ($file, $format, $size) {
    system($VM->qemu_img, qw(create -q -f), $format, $file, $size) == 0
        or die "qemu-img failed\n";
    return $file;
}

sub _start_vm ($self) {
    my $images = "$self->{dir}/store/images/$vmid";
    make_path($images);
    my @disks;
    for my $id (sort keys %disks) {
        my ($disk, $number) = ($disks{$id}, $id =~ m/(\d+)\z/);
        my $file = "$images/vm-$vmid-disk-$number.$disk->{format}";
        create($file, $disk->@{qw(format size)});
        my %shape = (shape => 'proxmox', throttle => 1, bus => 'scsi');
        push(@disks, { id => $id, file => $file, %shape, %$disk });
    }
    create("$images/vm-$vmid-disk-2.raw", 'raw', 4 * $mib);
    return $VM->start(disks => \@disks, args => ['-pidfile', "/var/run/qemu-server/$vmid.pid"]);
}

sub vm ($self) { return $self->{vm} }
sub agent ($self) { return $self->{agent} }
sub vzdump ($self) { return $self->{vzdump} }
sub dir ($self) { return "$self->{dir}" }
sub vmid ($self) { return $vmid }

sub backup ($self, @how) { return $self->{vzdump}->backup(@how) }

# What qm unlock does. VZDump unlocks the guest before it cleans up.
sub unlock ($self) {
    PVE::QemuConfig->remove_lock($vmid, 'backup') if PVE::QemuConfig->load_config($vmid)->{lock};
    return;
}

# Writes to both disks.
sub spoil ($self, $byte) {
    my $guest = $self->{vm}->guest;
    $guest->write('scsi0', 20 * $mib, $mib, $byte);
    $guest->write('scsi1', 3 * $mib, $mib, $byte);
    return;
}

# ---- checks ----

# The provider must have stored the content of the guest's disks.
sub stored_all ($self, $form, $mechanism, $what) {
    for my $id (sort keys %disks) {
        my $image = $self->{vzdump}->image($form, $mechanism, "drive-$id");
        my $same = system('cmp', '-s', $image, $self->{vm}->raw_image($id)) == 0;
        ok($same, "$what: the archive has each byte of $id");
    }
    return;
}

# No node with a name like that is left.
sub is_outside ($self, $what, $names = qr/fleecing|tpmstate|snapshot|pba/) {
    is_deeply($self->{vm}->exports, [], "$what: no export is left");
    my @nodes = map { $_->{'node-name'} } $self->{vm}->qmp('query-named-block-nodes')->@*;
    is(join(' ', grep { $_ =~ $names } @nodes), '', "$what: no node is left");
    return;
}

# Warnings and errors.
sub told ($self, $made) {
    return grep { !m/\A\S+ \S+ INFO: / } ($made->{log} // [])->@*;
}

1;
