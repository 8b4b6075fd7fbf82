package PBA::Test::Libvirt;

# A libvirtd of the test's own, in a mount namespace in which libvirt's directories and the user libvirt-qemu
# are private, so the machine's libvirt, if there is one, is not affected. As 'system', its QEMUs run as
# libvirt-qemu; as 'session', it is the libvirtd of an ordinary user.
#
# Each object is a separate host with its own name and UUID, so that a domain can be migrated between two of
# them.
#
#   my $libvirt = PBA::Test::Libvirt->start('system');   # skips the test if libvirt cannot be started
#   $libvirt->add_disk('vda', bus => 'virtio', size => 32 << 20, format => 'qcow2');
#   $libvirt->start_domain;
#   $libvirt->virsh('domstate', 'web1');                  # { status, text }

use v5.36;

use File::Path qw(make_path);
use File::Temp ();
use POSIX ();
use Test::More;
use Time::HiRes ();

use PVE::BackupAccess::Libvirt;

my $qemu_id = 64_055;
my $session_id = 64_001;
my $seconds = 60;
my $hosts = 0;
my %system_dirs = map { $_ => $_ =~ tr{/}{-}r } qw(/etc/libvirt /run/libvirt /var/lib/libvirt
    /var/cache/libvirt /var/log/libvirt);

my sub write_file ($file, $text) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} $text and close($fh) or die "$file: $!\n";
    return;
}

my sub read_file ($file) {
    open(my $fh, '<', $file) or return '';
    local $/ = undef;
    return <$fh> // '';
}

# The reason to skip; undef if there is none.
sub problem ($class) {
    return 'needs root' if $> != 0;
    for my $program (qw(libvirtd virsh unshare)) {
        return 'no libvirt' if !grep { -x "$_/$program" } split(m/:/, $ENV{PATH}), '/usr/sbin';
    }
    return 'no mount namespaces' if system('unshare', '-m', 'true') != 0;
    return;
}

sub start ($class, $mode) {
    my $dir = File::Temp->newdir('pba-lv-XXXXXX', TMPDIR => 1);
    chmod(0711, $dir);
    my $self
        = bless({ tmp => $dir, dir => "$dir", mode => $mode, owner => $$, disks => [] }, $class);
    mkdir("$dir/images") && chmod(0777, "$dir/images") or die "$dir/images: $!\n";
    $mode eq 'system' ? $self->_start_system : $self->_start_session;
    my $deadline = time + $seconds;
    until (-S $self->{socket} && $self->virsh('list')->{status} == 0) {
        die "libvirtd does not come up: " . read_file("$dir/log") if time > $deadline;
        Time::HiRes::sleep(0.1);
    }
    return $self;
}

sub _spawn ($self, $code) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        delete($ENV{LD_PRELOAD});
        open(STDIN, '<', '/dev/null')
            && open(STDOUT, '>', "$self->{dir}/log")
            && open(STDERR, '>&', \*STDOUT)
            or POSIX::_exit(126);
        $code->();
        POSIX::_exit(127);
    }
    $self->{pid} = $pid;
    return;
}

# Shell commands that add a user, for its mount namespace only.
sub _with_user ($self, $name, $id) {
    my %lines = (passwd => "x:$id:${id}::/:/bin/false", group => "x:$id:");
    for my $file (sort keys %lines) {
        my $others = read_file("/etc/$file") =~ s/^\Q$name\E:.*\n//mr;
        write_file("$self->{dir}/$file", "${others}$name:$lines{$file}\n");
    }
    return map { "mount --bind $self->{dir}/$_ /etc/$_" } sort keys %lines;
}

sub _start_system ($self) {
    my $dir = $self->{dir};
    my $host = 'host' . ++$hosts;
    my $uuid = read_file('/proc/sys/kernel/random/uuid') =~ s/\n//r;
    my @mounts = ('mount --make-rprivate /');
    for my $target (sort keys %system_dirs) {
        make_path("$dir/$system_dirs{$target}", $target);
        push(@mounts, "mount --bind $dir/$system_dirs{$target} $target");
    }
    push(@mounts, $self->_with_user('libvirt-qemu', $qemu_id));
    write_file("$dir/-etc-libvirt/qemu.conf",
        qq(security_driver = "none"\nnamespaces = []\ncgroup_controllers = []\nstdio_handler = "file"\n)
    );
    write_file(
        "$dir/-etc-libvirt/libvirtd.conf",
        join("\n",
            'auth_unix_rw = "none"',
            'unix_sock_rw_perms = "0700"',
            qq(host_uuid = "$uuid"), '')
    );
    $self->{socket} = "$dir/-run-libvirt/libvirt-sock";
    my $script = join(' && ',
        @mounts,
        "hostname $host",
        "exec libvirtd -f /etc/libvirt/libvirtd.conf -p $dir/pid");
    $self->_spawn(sub { exec('unshare', '-m', '-u', 'sh', '-c', $script) });
    return;
}

# The environment of the processes of an ordinary user.
sub session_environment ($self) {
    my $home = "$self->{dir}/home";
    return (
        HOME => $home,
        XDG_RUNTIME_DIR => "$home/run",
        XDG_CONFIG_HOME => "$home/config",
        XDG_CACHE_HOME => "$home/cache"
    );
}

sub _start_session ($self) {
    my %environment = $self->session_environment;
    make_path(values %environment, "$self->{dir}/home/config/libvirt");
    write_file("$self->{dir}/home/config/libvirt/qemu.conf", qq(stdio_handler = "file"\n));
    system('chown', '-R', "$session_id:$session_id", "$self->{dir}/home", "$self->{dir}/images");
    $self->{socket} = "$environment{XDG_RUNTIME_DIR}/libvirt/libvirt-sock";

    # libvirt requires its host's name to be resolvable.
    my $script = join(' && ',
        'mount --make-rprivate /',
        $self->_with_user('pba-session', $session_id),
        "exec setpriv --reuid $session_id --regid $session_id --clear-groups"
            . " libvirtd -p $self->{dir}/home/pid");
    $self->_spawn(
        sub {
            @ENV{ keys %environment } = values %environment;
            exec('unshare', '-m', 'sh', '-c', $script);
        }
    );
    return;
}

# Changes the user of this process permanently.
sub as_user ($self, $code) {
    my %environment = $self->session_environment;
    @ENV{ keys %environment } = values %environment;
    POSIX::setgid($session_id);
    $) = "$session_id $session_id";
    POSIX::setuid($session_id);
    return $code->();
}

sub dir ($self) { return $self->{dir} }
sub uri ($self) { return "qemu:///$self->{mode}?socket=$self->{socket}" }

sub virsh ($self, @arguments) {
    my $pid = open(my $pipe, '-|') // die "fork: $!\n";
    if (!$pid) {
        open(STDERR, '>&', \*STDOUT) or POSIX::_exit(126);
        exec('virsh', '-q', '-c', $self->uri, @arguments) or POSIX::_exit(127);
    }
    my $text = do { local $/ = undef; <$pipe> }
        // '';
    close($pipe);
    return { status => $? >> 8, text => $text };
}

# The same, but dies on failure.
sub must ($self, @arguments) {
    my $run = $self->virsh(@arguments);
    die "virsh @arguments: $run->{text}" if $run->{status};
    return $run->{text};
}

sub image ($self, $target) { return "$self->{dir}/images/$target.img" }

sub add_disk ($self, $target, %disk) {
    my $image = $self->image($target);
    system($ENV{PBA_QEMU_IMG} // 'qemu-img',
        'create', '-q', '-f', $disk{format}, $image, $disk{size}) == 0
        or die "qemu-img failed\n";
    chmod(0666, $image);
    chown($session_id, $session_id, $image) if $self->{mode} eq 'session';
    push($self->{disks}->@*, { %disk, target => $target, image => $image });
    return;
}

my sub disk_xml ($disk) {
    my $label
        = $disk->{label}
        ? "<seclabel model='dac' relabel='yes'><label>$disk->{label}</label></seclabel>"
        : '';
    my ($kind, $more) = $disk->{cdrom} ? ('cdrom', '<readonly/>') : ('disk', '');
    return
        "<disk type='file' device='$kind'><driver name='qemu' type='$disk->{format}' discard='unmap'/>"
        . "<source file='$disk->{image}'>$label</source><target dev='$disk->{target}' bus='$disk->{bus}'/>$more</disk>";
}

sub start_domain ($self, $name = 'web1') {
    my $emulator = $ENV{PBA_QEMU} // '/usr/bin/qemu-system-x86_64';
    my $disks = join("\n", map { disk_xml($_) } $self->{disks}->@*);
    $self->{name} = $name;
    write_file("$self->{dir}/domain.xml", <<"END");
<domain type='qemu'>
  <name>$name</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>$emulator</emulator>
    <controller type='scsi' model='virtio-scsi'/>
    $disks
  </devices>
</domain>
END
    $self->must('define', "$self->{dir}/domain.xml");
    $self->must('start', $name);
    return;
}

sub qemu_pid ($self) {
    for my $file (glob('/proc/[0-9]*/cmdline')) {
        my $text = read_file($file) =~ tr/\0/ /r;
        return $file =~ s{\D}{}gr
            if $text =~ m/guest=\Q$self->{name}\E,/ && $text =~ m/\Q$self->{dir}\E/;
    }
    die "the domain has no process\n";
}

sub name ($self) { return $self->{name} }
sub qmp ($self) { return PVE::BackupAccess::Libvirt->qmp($self->{name}, connect => $self->uri) }

# Writes to the disk as the guest would, that is to the image that is active at that time.
sub write ($self, $device, $byte, $offset, $length) {
    my ($bus) = $device =~ m/\A(virtio|usb)/;
    my %inside = (virtio => '/virtio-backend', usb => "/$device.0/legacy[0]");
    my $path = "/machine/peripheral/$device" . ($inside{ $bus // '' } // '');
    my $line = qq(qemu-io -d $path "write -P $byte $offset $length");
    my $said = $self->qmp->('human-monitor-command', { 'command-line' => $line });
    die "QEMU did not write: $said" if $said =~ m/error|failed|invalid/i;
    return;
}

# The domain's current image for that target, and its format.
sub active_image ($self, $target) {
    my ($disk)
        = grep { $_->{target} eq $target }
        PVE::BackupAccess::Libvirt->domain($self->{name}, connect => $self->uri)->{disks}->@*;
    return $disk->@{qw(file format)};
}

sub stop ($self) {
    $self->virsh('destroy', $self->{name}) if defined($self->{name});
    $self->virsh('undefine', '--snapshots-metadata', '--checkpoints-metadata', '--managed-save',
        $self->{name})
        if defined($self->{name});
    my $pid = delete($self->{pid}) // return;
    kill(TERM => $pid);
    waitpid($pid, 0);
    return;
}

sub DESTROY ($self) {
    local ($?, $!, $@);
    $self->stop if $self->{owner} == $$;
    return;
}

1;
