package PBA::Test::VM::CommandLine;

# The command line of QEMU for a PBA::Test::VM: disks, guest, and the channels to both.

use v5.36;

use Exporter qw(import);
use JSON::PP ();

use PBA::Test::Cache;

our @EXPORT_OK = qw(command_line drive_args);

my $JSON = JSON::PP->new->utf8->canonical;

my sub true ($value) {
    return $value ? JSON::PP::true : JSON::PP::false;
}

my sub blockdev_args ($disk) {
    my ($id, $throttle) = $disk->@{qw(id throttle)};
    my $cache = { direct => true($disk->{cache} eq 'none'), 'no-flush' => true(0) };
    my $read_only = true($disk->{readonly});
    my %file = (
        driver => 'file',
        'node-name' => "$id-file",
        filename => $disk->{file},
        discard => 'unmap',
        cache => $cache,
        'read-only' => $read_only,
    );
    my %format = (
        driver => $disk->{format},
        'node-name' => $throttle ? "$id-format" : $disk->{device},
        discard => 'unmap',
        cache => $cache,
        'read-only' => $read_only,
        file => \%file,
    );
    return ('-blockdev', $JSON->encode(\%format)) if !$throttle;

    # As on Proxmox VE, the throttle filter is the node that has the disk's name.
    my %filter = (
        driver => 'throttle',
        'node-name' => $disk->{device},
        'throttle-group' => "throttle-$id",
        discard => 'unmap',
        file => \%format,
    );
    return ('-object', "throttle-group,id=throttle-$id", '-blockdev', $JSON->encode(\%filter));
}

sub drive_args ($disk) {
    my @values = (
        "id=drive-$disk->{id}", 'if=none',
        "format=$disk->{format}", "cache=$disk->{cache}",
        'discard=on', 'file=' . $disk->{file} =~ s/,/,,/gr,
    );
    push @values, 'readonly=on' if $disk->{readonly};
    push @values, 'throttling.bps-total=17179869184' if $disk->{throttle};
    return ('-drive', join ',', @values);
}

# The arguments for a disk and its guest device.
my sub device_args ($disk, $drive) {
    my $id = $disk->{id};
    my @args;
    my $iothread = $disk->{iothread} ? ",iothread=iothread-$id" : '';
    push @args, '-object', "iothread,id=iothread-$id" if $iothread;

    my $common = "drive=$drive,serial=$id";
    $common .= ",id=$disk->{qdev_id}" if !$disk->{anonymous};
    $common .= ",$disk->{device_args}" if $disk->{device_args};
    if ($disk->{bus} eq 'scsi') {
        push @args, '-device', "virtio-scsi-pci,id=scsihw-$id$iothread";
        push @args, '-device', "scsi-hd,bus=scsihw-$id.0,$common";
    }
    else {
        push @args, '-device', "virtio-blk-pci,$common$iothread";
    }
    return @args;
}

my sub cdrom_args ($vm) {
    return () if !$vm->{opt}{empty_cdrom};
    my ($first) = map { $_->{shape} } values $vm->{disks}->%*;
    return ('-device', 'ide-cd,bus=ide.1,id=ide2') if ($first // '') ne 'drive';
    return (
        '-drive', 'if=none,id=drive-ide2,media=cdrom',
        '-device', 'ide-cd,bus=ide.1,drive=drive-ide2,id=ide2',
    );
}

my sub guest_args ($vm) {
    return () if !$vm->{opt}{guest};
    my @disks = values $vm->{disks}->%*;
    my $scsi = grep { $_->{bus} eq 'scsi' } @disks;

    # Disables kernel features that cost time under emulation and that the tests do not need.
    my @kernel = (
        'console=ttyS0', 'quiet',
        'panic=-1', 'mitigations=off',
        'nokaslr', 'no_timer_check',
        'random.trust_cpu=on', 'pba.disks=' . @disks,
        'cryptomgr.notests', 'lsm=',
        'init_on_alloc=0', 'noreplace-smp',
        'ipv6.disable=1',
        'initcall_blacklist=cubictcp_register,init_kprobe_trace,load_system_certificate_list',
        ('pba.scsi=1') x !!$scsi,
    );
    return (
        '-kernel', PBA::Test::Cache->kernel->{image},
        '-initrd', PBA::Test::Cache->initramfs,
        '-append', join(' ', @kernel),
    );
}

my sub channel_args ($vm) {
    my $dir = $vm->{dir};
    my @args = ('-serial', "file:$dir/console.log");
    push @args, '-chardev', "socket,id=agent,path=$dir/agent,server=on,wait=off";
    push @args, '-serial', 'chardev:agent';
    for my $name (qw(qmp qmp2)) {
        push @args, '-chardev', "socket,id=$name,path=$dir/$name,server=on,wait=off";
        push @args, '-mon', "chardev=$name,mode=control";
    }
    return @args;
}

sub command_line ($vm) {
    my @more = split ' ', $ENV{PBA_QEMU_ARGS} // '';
    my $accel = grep { /\A--?(?:accel|enable-kvm)\z/ } @more;
    my @disks = map { $vm->disk($_) } $vm->disk_ids;
    return (
        $vm->qemu,
        ($accel ? () : qw(-accel tcg)),
        '-machine',
        $vm->{opt}{machine},
        '-m',
        $vm->{opt}{memory},
        qw(-nodefaults -display none -no-reboot -S),
        channel_args($vm),
        guest_args($vm),
        (map { $_->{shape} eq 'drive' ? drive_args($_) : blockdev_args($_) } @disks),
        (map { device_args($_, $vm->disk($_->{plugged} // $_->{id})->{device}) } @disks),
        cdrom_args($vm),
        ($vm->{opt}{args} // [])->@*,
        ($vm->{once} // [])->@*,
        @more,
    );
}

1;
