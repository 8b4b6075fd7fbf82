package Example::RawImages;

# A small backup provider: an archive is a directory with a raw image of each device.

use v5.36;
use parent 'PVE::BackupProvider::Plugin::Base';

use File::Copy qw(copy);
use File::Glob qw(bsd_glob);
use File::Path qw(make_path remove_tree);
use PVE::BackupAccess::Volume;

sub new ($class, $storage_plugin, $scfg, $storeid, $log) {
    return bless({ dir => $scfg->{path}, log => $log, archives => {} }, $class);
}

sub provider_name ($self) { return 'raw images' }
sub job_init ($self, $start_time) { die "$self->{dir} does not exist\n" if !-d $self->{dir} }
sub job_cleanup ($self) { }

# ---- backup ----

sub backup_init ($self, $vmid, $vmtype, $start_time) {
    my $name = "$vmid/$start_time";
    $name = "$vmid/" . ++$start_time while -e "$self->{dir}/$name";
    $self->{archives}{$vmid} = "$self->{dir}/$name";
    return { 'archive-name' => $name };
}

sub backup_get_mechanism ($self, $vmid, $vmtype) { return $vmtype eq 'qemu' ? 'nbd' : undef }

# The bitmaps record what changed since the archive that the file 'base' names. Proxmox VE runs Perl with
# -T: text that was read from a file must be checked before it becomes part of a path.
sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    my ($time) = (read_file("$self->{dir}/$vmid/base") // '') =~ m!/([0-9]+)\z!;
    my $base = $self->{base} = "$self->{dir}/$vmid/" . ($time // 'none');
    my $id = read_file("$base/id") // '';
    return { map { $_ => mode_for("$base/$_.raw", $id, $volumes->{$_}) } keys $volumes->%* };
}

# If the caller says which backup the bitmap is relative to, it needs the ID of the image's backup.
sub mode_for ($file, $id, $volume) {
    my $mode = is_image($file, $volume->{size});
    return $mode if !exists($volume->{base});
    return $mode eq 'use' && $id ne '' ? { 'bitmap-mode' => 'use', base => $id } : 'new';
}

sub is_image ($file, $size) { return -e $file && -s $file == $size ? 'use' : 'new' }

# The archive gets its name only once all of it is on disk. Only then does it become the base of the next
# backup. Other users have no access: it is as confidential as the disks, and may contain a password.
sub backup_vm ($self, $vmid, $guest_config, $volumes, $info) {
    my $archive = $self->{archives}{$vmid};
    make_path("$archive.part", { mode => 0700 });
    write_file("$archive.part/guest.conf", $guest_config);
    write_file("$archive.part/firewall.conf", $info->{'firewall-config'} // '');
    write_file("$archive.part/id", $info->{'backup-id'} // '');
    for my $device (sort keys $volumes->%*) {
        $self->store($device, $volumes->{$device}, "$archive.part/$device.raw", $info);
    }
    sync_dir("$archive.part");
    rename("$archive.part", $archive) or die "$archive: $!\n";
    sync_dir("$self->{dir}/$vmid");
    write_file("$self->{dir}/$vmid/base", $archive);
    sync_dir("$self->{dir}/$vmid");
}

# Unless everything is dirty, the dirty regions go on top of a copy of the base's image.
sub store ($self, $device, $volume, $image, $info) {
    if ($volume->{'bitmap-mode'} eq 'reuse') {
        system('cp', '--sparse=always', "$self->{base}/$device.raw", $image) == 0
            or die "cp failed\n";
    }
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    my $statistics = $reader->copy(to => $image, 'bandwidth-limit' => $info->{'bandwidth-limit'});
    $self->{log}->('info', "$device: $statistics->{'bytes-read'} bytes");
}

sub backup_cleanup ($self, $vmid, $vmtype, $success, $info) {
    my $archive = $self->{archives}{$vmid} // return {};
    if ($success) {
        my $size = 0;
        $size += 512 * (stat($_))[12] for bsd_glob("$archive/*");
        return { stats => { 'archive-size' => $size } };
    }
    remove_tree("$archive.part", $archive);
    return {};
}

# Proxmox VE calls this even if it failed before backup_init. If this dies, no other guest is backed up.
sub backup_handle_log_file ($self, $vmid, $file) {
    my $archive = $self->{archives}{$vmid} // return;
    copy($file, "$archive/backup.log") if -d $archive;
}

# ---- restore ----

# Proxmox VE puts 'backup/' before the name of the archive.
sub archive ($self, $volname) {
    my ($name) = $volname =~ m!\A(?:backup/)?([0-9]+/[0-9]+)\z! or die "no archive '$volname'\n";
    return "$self->{dir}/$name";
}

sub restore_get_mechanism ($self, $volname, @) { return ('qemu-img', 'qemu') }

sub archive_get_guest_config ($self, $volname, @) {
    return read_file($self->archive($volname) . '/guest.conf') // die "no archive '$volname'\n";
}

sub archive_get_firewall_config ($self, $volname, @) {
    return read_file($self->archive($volname) . '/firewall.conf') || undef;
}

sub restore_vm_init ($self, $volname, @) {
    my $dir = $self->archive($volname);
    my @devices = map { m!([^/]+)\.raw\z! } bsd_glob("$dir/*");
    return { map { $_ => { size => -s "$dir/$_.raw" } } @devices };
}

sub restore_vm_volume_init ($self, $volname, $device, $info) {
    return { 'qemu-img-path' => $self->archive($volname) . "/$device.raw" };
}

sub restore_vm_volume_cleanup ($self, $volname, $device, $info) { }
sub restore_vm_cleanup ($self, $volname, @) { }

# ---- files ----

sub read_file ($file) {
    open(my $fh, '<:raw', $file) or return undef;
    local $/ = undef;
    return <$fh> // '';
}

sub write_file ($file, $text) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print {$fh} $text;
    $fh->flush && $fh->sync && close($fh) or die "$file: $!\n";
}

# Makes it durable that files were created or renamed in the directory.
sub sync_dir ($dir) {
    open(my $fh, '<', $dir) or die "$dir: $!\n";
    $fh->sync or die "$dir: $!\n";
}

1;
