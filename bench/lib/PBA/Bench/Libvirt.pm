package PBA::Bench::Libvirt;

# A virtual machine of the system's libvirt, and its backups by virtnbdbackup: the same job with other tools.
# Available if both are installed and libvirt answers.
#
#   if (PBA::Bench::Libvirt->available) {
#       my $vm = PBA::Bench::Libvirt->start(dir => $directory, image => $raw_image);
#       $vm->backup('full');         # then 'inc' any number of times; 'full' starts again
#       $vm->write_blocks($byte, [$offset, $length], ...);
#   }

use v5.36;

use File::Path qw(remove_tree);

my $uri = 'qemu:///system';

sub available ($class) {
    return 0 if !grep { -x "$_/virtnbdbackup" } split(/:/, $ENV{PATH});
    return system("virsh -q -c $uri list >/dev/null 2>&1") == 0;
}

sub start ($class, %options) {
    my $self = bless { %options, name => "pba-bench-$$", owner => $$ }, $class;
    my $image = "$self->{dir}/libvirt.qcow2";
    my @convert = (qw(convert -U -f raw -O qcow2), $self->{image}, $image);
    system('qemu-img', @convert) == 0 or die "qemu-img failed\n";
    my $xml = "$self->{dir}/libvirt.xml";
    open(my $fh, '>', $xml) or die "$xml: $!\n";
    print {$fh} $self->_domain($image);
    close($fh) or die "$xml: $!\n";
    $self->_virsh('define', $xml);
    $self->_virsh('start', $self->{name});
    return $self;
}

# Backups with checkpoints need a qcow2 image.
sub _domain ($self, $image) {
    return <<"END";
<domain type='qemu'>
  <name>$self->{name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='$image'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
END
}

sub _virsh ($self, @command) {
    system('virsh', '-q', '-c', $uri, @command) == 0 or die "virsh @command failed\n";
    return;
}

# Writes as a guest would.
sub write_blocks ($self, $byte, @ranges) {
    open(my $fh, '|-', "virsh -q -c $uri >/dev/null") or die "cannot run virsh: $!\n";
    for my $range (@ranges) {
        my ($offset, $length) = @$range;
        print {$fh} "qemu-monitor-command $self->{name} --hmp 'qemu-io -d"
            . qq( /machine/peripheral/virtio-disk0/virtio-backend "write -P $byte $offset $length"'\n);
    }
    close($fh) or die "virsh ended with status $?\n";
    return;
}

sub remove_backups ($self) {
    remove_tree("$self->{dir}/virtnbdbackup");
    return;
}

sub backup ($self, $level) {
    my @command = ('virtnbdbackup', '--noprogress', '-U', $uri, '-d', $self->{name}, '-l', $level);
    push @command, '-o', "$self->{dir}/virtnbdbackup", '--scratchdir', $self->{dir};
    my $log = "$self->{dir}/virtnbdbackup.log";
    system("@command >$log 2>&1") == 0 or die "virtnbdbackup failed: see $log\n";
    return;
}

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    local $?;
    system('virsh', '-q', '-c', $uri, 'destroy', $self->{name});
    system('virsh', '-q', '-c', $uri, 'undefine', '--checkpoints-metadata', $self->{name});
    return;
}

1;
