package PBA::Test::OddProvider;

# Providers that store disks in unusual, but correct ways. 'kind' in the storage's configuration is 'tar', a stream
# of all disks; 'single', one file with all disks one after the other; or 'gzip', a compressed file for each disk.
# None uses a bitmap.

use v5.36;

use parent 'PVE::BackupProvider::Plugin::Base';

use File::Path ();
use IO::Compress::Gzip ();
use IO::Uncompress::Gunzip ();
use JSON::PP ();
use Time::HiRes qw(sleep time);

use PVE::BackupAccess::Volume;

my $json = JSON::PP->new->utf8->canonical;
my $mib = 1 << 20;

sub new ($class, $storage_plugin, $scfg, $storeid, $log) {
    my ($path) = $scfg->{path} =~ m/\A(.*)\z/s;
    return bless({ path => $path, kind => $scfg->{kind} }, $class);
}

sub provider_name ($self) { return "odd $self->{kind}" }
sub job_init ($self, $start_time) { return }
sub job_cleanup ($self) { return }

# ---- backup ----

sub backup_init ($self, $vmid, $vmtype, $start_time) {
    $self->{archive} = "$self->{path}/$start_time";
    $self->{vmid} = $vmid;
    File::Path::make_path($self->{archive});
    return { 'archive-name' => "odd/$start_time" };
}

sub backup_get_mechanism ($self, $vmid, $vmtype) { return 'nbd' }
sub backup_vm_query_incremental ($self, $vmid, $volumes) { return }

my sub create ($file) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    return $fh;
}

# Passes the data of a device on in order, and keeps the limit.
my sub stream ($device, $volume, $limit, $write) {
    my $reader = PVE::BackupAccess::Volume->open($device, $volume);
    my $began = time();
    while (my ($offset, $length) = $reader->next_dirty_region) {
        for (my $at = $offset; $at < $offset + $length; $at += $mib) {
            my $left = $offset + $length - $at;
            $write->($reader->pread($at, $left < $mib ? $left : $mib));
            my $early = $limit ? $began + $at / $limit - time() : 0;
            sleep($early) if $early > 0;
        }
    }
    $reader->close;
    return;
}

# POSIX: pax, "ustar Interchange Format".
my sub tar_header ($name, $size) {
    my @head = (
        pack('a100', $name),
        sprintf("%07o\0", 0600),
        ("0000000\0") x 2,
        sprintf("%011o\0", $size),
        sprintf("%011o\0", time())
    );
    my @tail = ('0', "\0" x 100, "ustar\0", '00', "\0" x 247);
    my $sum = unpack('%32C*', join('', @head, ' ' x 8, @tail));
    return join('', @head, sprintf("%06o\0 ", $sum), @tail);
}

my %store = (
    tar => sub ($self, $volumes, $limit) {
        my $fh = create("$self->{archive}/all.tar");
        for my $device (reverse sort keys $volumes->%*) {
            my $size = $volumes->{$device}{size};
            print {$fh} tar_header($device, $size);
            stream($device, $volumes->{$device}, $limit, sub ($data) { print {$fh} $data });
            print {$fh} "\0" x (-$size % 512);
        }
        print {$fh} "\0" x 1024;
        close($fh) or die "all.tar: $!\n";
    },
    single => sub ($self, $volumes, $limit) {
        my $fh = create("$self->{archive}/all");
        for my $device (sort keys $volumes->%*) {
            $self->{starts}{$device} = tell($fh);
            stream($device, $volumes->{$device}, $limit, sub ($data) { print {$fh} $data });
        }
        close($fh) or die "all: $!\n";
    },
    gzip => sub ($self, $volumes, $limit) {
        for my $device (sort keys $volumes->%*) {
            my $gzip = IO::Compress::Gzip->new("$self->{archive}/$device.gz")
                or die "$device.gz: $!\n";
            stream($device, $volumes->{$device}, $limit, sub ($data) { $gzip->print($data) });
            $gzip->close or die "$device.gz: $!\n";
        }
    },
);

sub backup_vm ($self, $vmid, $config, $volumes, $info) {
    $store{ $self->{kind} }->($self, $volumes, $info->{'bandwidth-limit'});
    my $fh = create("$self->{archive}/index");
    print {$fh} $json->encode(
        {
            config => $config,
            firewall => $info->{'firewall-config'},
            sizes => { map { $_ => $volumes->{$_}{size} } keys $volumes->%* },
            starts => $self->{starts},
        }
    );
    close($fh) or die "index: $!\n";
    return;
}

sub backup_cleanup ($self, $vmid, $vmtype, $success, $info) {
    return {} if $vmid != ($self->{vmid} // 0);
    File::Path::remove_tree($self->{archive}) if !$success;
    return { stats => { 'archive-size' => 0 } };
}

sub backup_handle_log_file ($self, $vmid, $filename) { return }

# ---- restore ----

my sub open_archive ($self, $volname) {
    my ($time) = $volname =~ m!\Abackup/odd/([0-9]+)\z! or die "no archive '$volname'\n";
    my $dir = "$self->{path}/$time";
    open(my $fh, '<:raw', "$dir/index") or die "no archive '$volname'\n";
    local $/ = undef;
    return { dir => $dir, $json->decode(<$fh>)->%* };
}

sub restore_get_mechanism ($self, $volname, @) {
    open_archive($self, $volname);
    return ('qemu-img', 'qemu');
}

sub archive_get_guest_config ($self, $volname, @) { return open_archive($self, $volname)->{config} }

sub archive_get_firewall_config ($self, $volname, @) {
    return open_archive($self, $volname)->{firewall};
}

sub restore_vm_init ($self, $volname, @) {
    my $sizes = open_archive($self, $volname)->{sizes};
    return { map { $_ => { size => $sizes->{$_} =~ m/\A([0-9]+)\z/ ? $1 : die } } keys $sizes->%* };
}

# Copies a part of a file that is as large as the device.
my sub extract ($from, $start, $size, $to) {
    open(my $fh, '<:raw', $from) or die "$from: $!\n";
    seek($fh, $start, 0);
    my $out = create($to);
    for (my $left = $size; $left > 0; $left -= $mib) {
        read($fh, my $data, $left < $mib ? $left : $mib);
        print {$out} $data;
    }
    close($out) or die "$to: $!\n";
    return;
}

my %extract = (
    tar => sub ($archive, $device, $file) {
        local %ENV = (PATH => '/usr/bin:/bin');
        my ($name) = $device =~ m/\A([\w-]+)\z/ or die "no device '$device'\n";
        system("tar -xOf $archive->{dir}/all.tar $name > $file") == 0 or die "tar failed\n";
    },
    single => sub ($archive, $device, $file) {
        extract(
            "$archive->{dir}/all",
            $archive->{starts}{$device},
            $archive->{sizes}{$device}, $file
        );
    },
    gzip => sub ($archive, $device, $file) {
        IO::Uncompress::Gunzip::gunzip("$archive->{dir}/$device.gz", $file)
            or die "gunzip failed\n";
    },
);

sub restore_vm_volume_init ($self, $volname, $device, $info) {
    my $archive = open_archive($self, $volname);
    my $file = $self->{restored}{$device} = "$archive->{dir}/restored";
    $extract{ $self->{kind} }->($archive, $device, $file);
    return { 'qemu-img-path' => $file };
}

sub restore_vm_volume_cleanup ($self, $volname, $device, $info) {
    unlink(delete($self->{restored}{$device}) // return);
    return;
}

sub restore_vm_cleanup ($self, $volname, @) { return }

1;
