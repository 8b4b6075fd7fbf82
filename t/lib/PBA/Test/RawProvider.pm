package PBA::Test::RawProvider;

# The simplest possible provider: an archive is a directory with raw images, each a copy of the previous one
# with the changes written to it. 'faults' in its storage configuration, a list separated by commas, makes it
# misbehave in the ways below. Each job and each restore creates a new object.

use v5.36;

use parent 'PVE::BackupProvider::Plugin::Base';

use File::Copy ();
use File::Path ();
use POSIX ();
use Time::HiRes ();

use PVE::BackupAccess::Clock qw(now);
use PVE::BackupAccess::Volume;

sub new ($class, $storage_plugin, $scfg, $storeid, $log) {
    my $dir = $storage_plugin ? $storage_plugin->get_subdir($scfg, 'backup') : $scfg->{path};
    my ($path) = $dir =~ m/\A(.*)\z/s;
    my %faults = map { $_ => 1 } split(m/,/, $scfg->{faults} // '');
    die "the server is down\n" if $faults{'new dies'};
    my $mechanism = $scfg->{mechanism} // 'nbd';
    return bless({ path => $path, faults => \%faults, mechanism => $mechanism }, $class);
}

sub provider_name ($self) { return 'raw images' }

# ---- backup ----

sub job_cleanup ($self) { return }

# The numbers of the complete archives. 'by second' numbers them by their time.
my sub archives ($self) {
    return sort { $a <=> $b }
        map { m!/([0-9]+)/complete\z! ? $1 : () } glob("$self->{path}/*/complete");
}

# A slow server: the first backup does not begin in the second in which its job begins.
sub job_init ($self, $start_time) {
    my $is_slow = $self->{faults}{'slow start'} && !archives($self);
    Time::HiRes::sleep(0.01) while $is_slow && time == $start_time;
    return;
}

# What a faulty provider never releases.
my @kept;

sub backup_init ($self, $vmid, $vmtype, $start_time) {
    $self->{vmid} = $vmid;
    ($self->{base}) = reverse(archives($self));
    $self->{number} = $self->{faults}{'by second'} ? $start_time : ($self->{base} // 0) + 1;
    die "there is an archive of that second\n" if ($self->{base} // 0) == $self->{number};
    File::Path::remove_tree("$self->{path}/$self->{number}");
    File::Path::make_path("$self->{path}/$self->{number}");
    my $taint = $self->{faults}{'tainted name'} ? substr($0, 0, 0) : '';
    return { 'archive-name' => "raw/a+b=c:d/$self->{number}$taint" };
}

sub backup_get_mechanism ($self, $vmid, $vmtype) { return $self->{mechanism} }

sub backup_vm_query_incremental ($self, $vmid, $volumes) {
    if ($self->{faults}{'full only'}) {
        return $self->{base} ? { map { $_ => 'none' } keys $volumes->%* } : ();
    }
    my %modes;
    for my $device (keys $volumes->%*) {
        my $size = $self->{base} ? -s "$self->{path}/$self->{base}/$device.raw" : 0;
        my $fits = $size == $volumes->{$device}{size} || $size && $self->{faults}{'ignores sizes'};
        $modes{$device} = $fits ? 'use' : 'new';
    }
    return \%modes;
}

my sub write_file ($file, $content) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} $content;
    close($fh) or die "$file: $!\n";
}

# Reads whole pieces of 1 MiB that are dirty at least in part.
my sub read_pieces ($reader) {
    my $mib = 1 << 20;
    while (my ($offset) = $reader->next_dirty_region) {
        my $begin = $offset - $offset % $mib;
        my $left = $reader->size - $begin;
        $reader->pread($begin, $left < $mib ? $left : $mib);
    }
}

my sub copy_volume ($self, $device, $volume, $file, $limit) {
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    if ($self->{faults}{'one region only'}) {
        my ($offset, $length) = $reader->next_dirty_region or return;
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        seek($fh, $offset, 0);
        print {$fh} $reader->pread($offset, $length);
        close($fh);
    }
    elsif ($self->{faults}{'reads beyond'}) {
        read_pieces($reader);
    }
    elsif ($self->{faults}{'no map'}) {
        my %whole = ($volume->%*, 'bitmap-mode' => 'none');
        delete($whole{'bitmap-name'});
        PVE::BackupAccess::Volume->open($device, \%whole)->copy(to => $file);
    }
    elsif ($self->{faults}{'cuts regions'}) {
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        while (my ($offset) = $reader->next_dirty_region) {
            my $left = $reader->size - $offset;
            sysseek($fh, $offset, 0);
            syswrite($fh, $reader->pread($offset, $left < 65536 ? $left : 65536));
        }
    }
    else {
        my %limit = $limit && !$self->{faults}{'no limit'} ? ('bandwidth-limit' => $limit) : ();
        my %size = $self->{faults}{'ignores sizes'} ? ('without-base' => 1) : ();
        my $ok = eval { $reader->copy(to => $file, %limit, %size); 1 };
        die $@ if !$ok && !$self->{faults}{'errors ignored'};
    }
    $reader->close;
}

# Makes the backup appear instantaneous: on a slow machine, it might otherwise seem to respect the limit.
my sub stop_clock () {
    my $now = now();
    no warnings 'redefine';
    *PVE::BackupAccess::CLI::TryProvider::Watch::now = sub () { return $now };
}

# Until this process ends.
my sub leave_child () {
    my $parent = $$;
    return if fork() // die "fork: $!\n";
    Time::HiRes::sleep(0.05) while getppid() == $parent;
    POSIX::_exit(0);
}

my sub change_process ($self) {
    leave_child() if $self->{faults}{'leaves a child'};
    return if !$self->{faults}{'changes the process'};
    chdir('/');
    umask(0);
    $SIG{TERM} = 'IGNORE';
    $/ = undef;
    alarm(1000);
    close($_) for *STDIN, *STDOUT;
    state $other;
    open($other, '<', '/dev/null') or die "/dev/null: $!\n";    # gets descriptor 0
}

sub backup_vm ($self, @arguments) {
    change_process($self);
    return if $self->{faults}{'child returns'} && !fork();
    stop_clock() if $self->{faults}{'no limit'};
    exit(0) if $self->{faults}{'exits'};
    my $ok = eval { $self->store(@arguments); 1 };
    die "cannot store: $@" if !$ok && $self->{faults}{'other text'};
    die $@ if !$ok && !($self->{faults}{'signals ignored'} && $@ =~ m/by signal/);
    return;
}

sub store ($self, $vmid, $config, $volumes, $info) {
    my $dir = "$self->{path}/$self->{number}";
    write_file("$dir/guest.conf", $config);
    die "there is no firewall\n"
        if !defined($info->{'firewall-config'}) && $self->{faults}{'needs a firewall'};
    write_file("$dir/firewall.conf", $info->{'firewall-config'} // '');
    for my $device (sort keys $volumes->%*) {
        my ($file, $volume) = ("$dir/$device.raw", $volumes->{$device});
        if ($volume->{'bitmap-mode'} eq 'reuse') {
            File::Copy::copy("$self->{path}/$self->{base}/$device.raw", $file) or die "$file: $!\n";
        }
        else {
            write_file($file, '');
            truncate($file, $volume->{size});
        }
        die "there is no bitmap\n"
            if $self->{base}
            && $volume->{'bitmap-mode'} ne 'reuse'
            && $self->{faults}{'insists on use'};
        copy_volume($self, $device, $volume, $file, $info->{'bandwidth-limit'});
        truncate($file, -s "$self->{path}/$self->{base}/$device.raw")
            if $self->{base} && $self->{faults}{'ignores sizes'};
    }
    push(@kept, $volumes) if $self->{faults}{'keeps volumes'};
    write_file("$dir/complete", '') if !$self->{faults}{'never complete'};
    return;
}

sub backup_cleanup ($self, $vmid, $vmtype, $success, $info) {
    return if $vmid != ($self->{vmid} // 0) && !$self->{faults}{'one name for all guests'};
    my $dir = "$self->{path}/$self->{number}";

    # The bitmaps may already be relative to it.
    my $is_stored = $vmid == $self->{vmid} && -e "$dir/complete";
    File::Path::remove_tree($dir)
        if !$success && (!$is_stored || $self->{faults}{'removes what is stored'});
    File::Path::remove_tree("$self->{path}/$self->{base}")
        if !$success && $self->{faults}{'removes the last archive'};
    my $size = $self->{faults}{'size zero'} ? 0 : -s "$dir/drive-scsi0.raw";
    $size = '32 MiB' if $self->{faults}{'size as text'};
    return { stats => { 'archive-size' => $size } } if $success;
    return;
}

sub backup_handle_log_file ($self, $vmid, $filename) { return }

# ---- restore ----

my sub dir_of ($self, $volname) {
    my ($number) = $volname =~ m!\Abackup/raw/a\+b=c:d/([0-9]+)\z! or die "no archive '$volname'\n";
    die "archive '$volname' is not complete\n" if !-e "$self->{path}/$number/complete";
    return "$self->{path}/$number";
}

my sub content ($file) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    local $/ = undef;
    return <$fh>;
}

my sub taint_of ($self, $dir) {
    return $self->{faults}{'tainted answers'} ? substr(content("$dir/guest.conf"), 0, 0) : '';
}

sub restore_get_mechanism ($self, $volname, $storeid = undef) {
    $self->{restored} = $volname;
    return ('qemu-img', 'qemu');
}

sub archive_get_guest_config ($self, $volname, $storeid = undef) {
    die "a restore gives no storage\n" if $storeid && $self->{faults}{'not to be shown'};
    my ($newest) = reverse(archives($self));
    return content("$self->{path}/$newest/guest.conf") if $self->{faults}{'newest configuration'};
    return content(dir_of($self, $volname) . '/guest.conf');
}

sub archive_get_firewall_config ($self, $volname, $storeid = undef) {
    return if $self->{faults}{'only restores'} && !$self->{restored};
    return content(dir_of($self, $volname) . '/firewall.conf');
}

sub restore_vm_init ($self, $volname) {
    my $dir = dir_of($self, $volname);
    my $taint = taint_of($self, $dir);
    my @devices = map { m!/([^/]+)\.raw\z! } glob("$dir/*.raw");
    return { map { $_ => { size => (-s "$dir/$_.raw") . $taint } } @devices };
}

sub restore_vm_volume_init ($self, $volname, $device, $info) {
    my $file = dir_of($self, $volname) . "/$device.raw";
    if ($self->{faults}{'one wrong byte'} && $device eq 'drive-scsi0') {
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        seek($fh, 1_234_567, 0);
        print {$fh} '3';
        close($fh);
    }
    if ($self->{faults}{'swaps devices'}) {
        my %other = ('drive-scsi0' => 'drive-scsi1', 'drive-scsi1' => 'drive-scsi0');
        $file =~ s/($device)\.raw\z/($other{$1} \/\/ $1) . '.raw'/e;
    }
    truncate($file, (-s $file) + 4096) if $self->{faults}{'longer images'};
    return { 'qemu-img-path' => 'nbd+unix:///disk?socket=/nowhere' }
        if $self->{faults}{'serves NBD'};
    return { 'qemu-img-path' => $file . taint_of($self, dir_of($self, $volname)) };
}

sub restore_vm_volume_cleanup ($self, $volname, $device, $info) { return }
sub restore_vm_cleanup ($self, $volname) { return }

# ---- faults of any method: 'METHOD dies', 'METHOD lies' ----

for my $method (
    qw(provider_name job_init job_cleanup backup_init backup_get_mechanism backup_vm
    backup_vm_query_incremental backup_cleanup backup_handle_log_file restore_get_mechanism
    archive_get_guest_config archive_get_firewall_config restore_vm_init restore_vm_volume_init
    restore_vm_volume_cleanup restore_vm_cleanup)
    )
{
    no strict 'refs';
    no warnings 'redefine';
    my $right = \&{$method};
    *{$method} = sub ($self, @arguments) {
        die "$method says no\n" if $self->{faults}{"$method dies"};
        return \'nonsense' if $self->{faults}{"$method lies"};
        return $right->($self, @arguments);
    };
}

1;
