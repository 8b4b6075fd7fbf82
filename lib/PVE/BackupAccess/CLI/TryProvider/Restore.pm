package PVE::BackupAccess::CLI::TryProvider::Restore;

# Restores archives as Proxmox VE does, and compares them with copies of the disks made at the
# instants of the backups.

use v5.36;

use File::Temp ();

use PVE::BackupAccess::Program qw(run_program);
use PVE::BackupAccess::Try qw(attempt_any);

my $piece = 1 << 20;

# is_strict: the provider gets a storage plugin, as on Proxmox VE, and must meet Proxmox VE's requirements.
sub new ($class, $is_strict) {
    my $dir = File::Temp->newdir('pve-backup-access-restored.XXXXXX', TMPDIR => 1);
    return bless({ dir => $dir, count => 0, 'is strict' => $is_strict }, $class);
}

my sub run_or_die (@command) {
    my ($status, $out, $message) = run_program(@command);
    die "$command[0] failed: $out$message\n" if $status;
    return;
}

# Copies the disks in their current state, while nothing writes to them. Returns { device => file }.
sub keep_disks ($self, $machine) {
    my %copies;
    my $number = ++$self->{count};
    for my $device ($machine->devices) {
        $copies{$device} = "$self->{dir}/$number-$device.kept";
        run_or_die('cp', '--sparse=always', $machine->file($device), $copies{$device});
    }
    return \%copies;
}

my sub open_file ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    return $fh;
}

# Says where a restored image differs from the disk; returns nothing if it does not.
my sub difference ($restored, $kept) {
    my ($size, $wanted) = (-s $restored, -s $kept);
    return "it has $size bytes, the disk had $wanted" if $size != $wanted;
    my ($restored_file, $kept_file) = (open_file($restored), open_file($kept));
    for (my $at = 0; $at < $size; $at += $piece) {
        read($restored_file, my $has, $piece);
        read($kept_file, my $had, $piece);
        next if $has eq $had;
        ($has ^. $had) =~ m/[^\0]/;
        my $offset = $at + $-[0];
        return sprintf('at offset %d it has the byte 0x%02x, the disk had 0x%02x',
            $offset, map { ord(substr($_, $-[0], 1)) } $has, $had);
    }
    return;
}

my sub restore_volume ($self, $watch, $volname, $device, $kept) {
    my $target = "$self->{dir}/restored.raw";
    my $problem;
    my $error = attempt_any {
        my $info = $watch->restore_vm_volume_init($volname, $device, {});
        my $path = ref($info) eq 'HASH' && $info->{'qemu-img-path'};
        die "the provider returned no 'qemu-img-path'\n" if !$path;
        die "'qemu-img-path' must be the path of a file or a block device, not '$path'\n"
            if $self->{'is strict'} && !-f $path && !-b $path;
        my ($image) = $path =~ m/\A(.+)\z/s;
        run_or_die($ENV{PBA_QEMU_IMG} // 'qemu-img', 'convert', qw(-f raw -O raw), $image, $target);
        $problem = difference($target, $kept);
    };
    $problem = "it could not be restored: $error" if defined($error);
    attempt_any { $watch->restore_vm_volume_cleanup($volname, $device, {}) };
    unlink($target);
    return $problem;
}

# Proxmox VE also passes the storage's name when it shows a configuration, and when a container restore checks the type
# of the archive: each time as the only call to a new provider. @watches are three of these.
sub show ($self, $volname, $storeid, @watches) {
    attempt_any { my @mechanism = $watches[0]->restore_get_mechanism($volname, $storeid) };
    attempt_any { $watches[1]->archive_get_guest_config($volname, $storeid) };
    attempt_any { $watches[2]->archive_get_firewall_config($volname, $storeid) };
    return;
}

# Restores an archive; $watch records what each method did. Returns { device => problem }.
sub run ($self, $watch, $volname, $disks) {
    my %problems;
    attempt_any { my @mechanism = $watch->restore_get_mechanism($volname) };
    my $error = attempt_any { $watch->restore_vm_init($volname) };
    attempt_any { $watch->archive_get_guest_config($volname) };
    attempt_any { $watch->archive_get_firewall_config($volname) };
    for my $device (sort keys $disks->%*) {
        $problems{$device}
            = defined($error)
            ? "it could not be restored: $error"
            : restore_volume($self, $watch, $volname, $device, $disks->{$device});
    }
    attempt_any { $watch->restore_vm_cleanup($volname) };
    return \%problems;
}

1;
