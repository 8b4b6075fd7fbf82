package PBA::Test::Chain;

# A guest with two disks, but without a machine (PBA::Test::BitmapDisk), its backups by Qcow2Chain, and the
# expected content of each archive.
#
#   my $chain = PBA::Test::Chain->new;
#   $chain->write_random; my $volname = $chain->backup; $chain->check('after the first');

use v5.36;

use Exporter qw(import);
use File::Temp ();
use JSON::PP ();
use Test::More;
use Time::HiRes ();

use PBA::Test::BitmapDisk;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Provider::Qcow2Chain;

our @EXPORT_OK = qw(problems rot said_of_block with_entries with_three_archives write_and_back_up);

my %sizes = ('drive-scsi0' => 4 * 1024 * 1024, 'drive-efidisk0' => 528 * 1024 + 512);
my $vmid = 100;

# store: the directory to use.
sub new ($class, %options) {
    my $tmp = File::Temp->newdir('pba-chain-XXXXXXXX', TMPDIR => 1);
    my $self = bless(
        {
            tmp => $tmp,
            store => $options{store} // "$tmp/store",
            time => 1_795_000_000,
            log => [],
            expected => {},
        },
        $class
    );
    for my $device (sort keys %sizes) {
        $self->{disks}{$device} = PBA::Test::BitmapDisk->new(
            dir => "$tmp",
            device => $device,
            size => $sizes{$device},
        );
    }
    mkdir($self->{store});
    $self->use_store($self->{store});
    return $self;
}

# Makes that many backups, each after random writes. Returns the object.
sub add_archives ($self, $count, @writes) {
    for (1 .. $count) {
        $self->write_random(@writes);
        $self->backup or die $self->error;
    }
    return $self;
}

# Uses the store as another process would: only the directory is kept.
sub use_store ($self, $store, $storeid = 'test') {
    $self->{store} = $store;
    my $scfg = { path => $store, 'state-dir' => $self->state_dir };
    $self->{provider} = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, $scfg, $storeid,
        sub ($level, $message) { push($self->{log}->@*, "$level: $message") });
    return;
}

sub provider ($self) { return $self->{provider} }
sub store ($self) { return $self->{store} }
sub guest_dir ($self) { return "$self->{store}/vm/$vmid" }

# The directory with this host's notes about its last backups.
sub state_dir ($self) { return $self->{state_dir} // "$self->{tmp}/state" }
sub tmp ($self) { return "$self->{tmp}" }
sub disk ($self, $device) { return $self->{disks}{$device} }
sub devices ($self) { return sort keys $self->{disks}->%* }
sub error ($self) { return $self->{error} }
sub result ($self) { return $self->{result} }

# { device => bitmap status } of the last backup.
sub modes ($self) { return $self->{modes} }

sub log ($self) { return join("\n", splice($self->{log}->@*)) }

sub write_random ($self, $count = 6) {
    for my $disk (map { $self->disk($_) } $self->devices) {
        my $blocks = int($disk->size / 512);
        my @writes;
        for (1 .. $count) {
            my ($at, $length) = (int(rand($blocks)), 1 + int(rand(200)));
            $length = $blocks - $at if $at + $length > $blocks;
            push(@writes, [$at * 512, $length * 512, rand() < 0.2 ? 0 : 1 + int(rand(255))]);
        }
        $disk->write(@writes);
    }
    return;
}

# Makes one backup with the calls in the API's order. base: the ID of the archive that the bitmaps are said to be
# relative to. during: code that is called when the volumes exist. late => 1: the backup fails after the bitmaps
# were cleared, and the archive stays. then: code that is called before backup_cleanup. run: code that gets
# backup_vm as a function and calls it in another process, which is to be killed. Returns the archive's name, or
# undef if the backup failed.
sub backup ($self, %options) {
    my ($provider, $disks) = $self->@{qw(provider disks)};
    my ($name, %volumes);
    my $run = $options{run} // sub ($backup_vm) { $backup_vm->() };
    my $done = eval {
        $provider->job_init($self->{time});
        $name = $provider->backup_init($vmid, 'qemu', $self->{time} += 60)->{'archive-name'};
        my $modes = $self->_modes_for($options{base});
        $volumes{$_} = $disks->{$_}->open($modes->{$_}) for $self->devices;
        $options{during}->() if $options{during};
        $run->(
            sub () {
                my %info = ('firewall-config' => "[OPTIONS]\n", ($options{info} // {})->%*);
                $provider->backup_vm($vmid, "name: $name\n", \%volumes, \%info);
            }
        );
        1;
    };
    $self->{error} = $@;
    $disks->{$_}->close($done && !$options{run}) for sort keys %volumes;
    if ($options{run}) {
        undef($provider);
        $self->use_store($self->{store});
        $self->expect($name) if grep { $_ eq $name } $self->names;
        return undef;
    }
    $options{then}->() if $options{then};
    my $success = $done && !$options{late};
    $self->{result} = $provider->backup_cleanup($vmid, 'qemu', $success,
        $success ? {} : { error => $self->{error} });
    $self->{modes} = { map { $_ => $volumes{$_}{'bitmap-mode'} } keys %volumes };
    return undef if !$done;
    $self->expect($name);
    return $success ? $name : undef;
}

# The modes of the backup that has begun: { device => use or new }.
sub _modes_for ($self, $base) {
    my %base = defined($base) ? (base => $base) : ();
    my $modes = $self->{provider}->backup_vm_query_incremental($vmid,
        { map { $_ => { size => $self->disk($_)->size, %base } } $self->devices });
    return {
        map { $_ => ref($modes->{$_}) ? $modes->{$_}{'bitmap-mode'} : $modes->{$_} }
            keys $modes->%*
    };
}

# Those of the next backup.
sub next_modes ($self) {
    my $provider = $self->{provider};
    $provider->backup_init($vmid, 'qemu', $self->{time} + 60);
    my $modes = $self->_modes_for(undef);
    $provider->backup_cleanup($vmid, 'qemu', 0, { error => 'only asked' });
    return $modes;
}

# Expects the archive to hold the current content of the disks.
sub expect ($self, $name) {
    $self->{expected}{$name} = { map { $_ => $self->disk($_)->content } $self->devices };
    return;
}

# Expects these archives to be gone.
sub forget ($self, @names) {
    delete($self->{expected}->@{@names});
    return;
}

sub names ($self) {
    return grep { m{\Avm/} } map { $_->{volname} } $self->{provider}->list($vmid)->@*;
}

sub path_of ($self, $name, $file = undef) {
    return "$self->{store}/$name" . (defined($file) ? "/$file" : '');
}

# The content of a device, restored from the archive.
sub restored ($self, $name, $device) {
    my $file = "$self->{tmp}/restored.raw";
    my $from = $self->{provider}->restore_vm_volume_init($name, $device, {})->{'qemu-img-path'};
    PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $from, $file);
    $self->{provider}->restore_vm_volume_cleanup($name, $device, {});
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

# The same by the command: its exit status, what it prints, and the content.
sub restored_by_command ($self, $name, $device, %options) {
    require PVE::BackupAccess::CLI::Restore;
    my $file = "$self->{tmp}/by-command.raw";
    unlink($file);
    open(my $err, '>', \my $said) or die "open: $!\n";
    local *STDERR = $err;
    my $status = PVE::BackupAccess::CLI::Restore::run({ %options, quiet => 1, device => $device },
        $self->path_of($name), $file);
    open(my $fh, '<:raw', $file) or return ($status, $said // '', '');
    local $/ = undef;
    return ($status, $said // '', scalar(<$fh>));
}

# Says what is wrong with an archive.
sub problem ($self, $name) {
    my ($provider, $expected) = ($self->{provider}, $self->{expected}{$name});
    my $sizes = $provider->restore_vm_init($name);
    my @wrong;
    for my $device ($self->devices) {
        my $content = $expected->{$device};
        push(@wrong, "$device: size") if ($sizes->{$device}{size} // -1) != length($content);
        push(@wrong, "$device: data") if $self->restored($name, $device) ne $content;
    }
    push(@wrong, 'configuration') if $provider->archive_get_guest_config($name) ne "name: $name\n";
    push(@wrong, 'firewall') if $provider->archive_get_firewall_config($name) ne "[OPTIONS]\n";
    $provider->restore_vm_cleanup($name);
    return join(', ', @wrong);
}

# Checks that all expected archives exist with the expected content, and that nothing else exists.
sub check ($self, $text) {
    my @names = $self->names;
    is_deeply(\@names, [sort keys $self->{expected}->%*], "$text: the archives");
    my %problems = map { $_ => $self->problem($_) } @names;
    is_deeply(\%problems, { map { $_ => '' } @names }, "$text: each restored");
    is_deeply($self->{provider}->verify($names[-1]), [], "$text: the last is in order") if @names;
    my %known = map { m{([^/]+)\z} => 1 } @names;
    my @left
        = grep { !$known{$_} && !m/\A(?:\.\.?|\.lock|\.reading)\z/ } entries($self->guest_dir);
    is_deeply(\@left, [], "$text: nothing is left over");
    return;
}

sub entries ($dir) {
    opendir(my $dh, $dir) or die "$dir: $!\n";
    return sort readdir($dh);
}

# ---- damage of one disk ----

my $KiB = 1 << 10;
my $damaged = 'drive-scsi0';

# Returns the name of the new archive.
sub write_and_back_up ($self, @writes) {
    $self->disk($damaged)->write(@writes);
    return $self->backup // die $self->error;
}

# Three archives: data at 256 KiB, 1 MiB; other data at 1 MiB; data at 2 MiB.
sub with_three_archives () {
    my $self = __PACKAGE__->new;
    my @names = (
        $self->write_and_back_up([256 * $KiB, 128 * $KiB, 0x11], [1024 * $KiB, 64 * $KiB, 0x12]),
        $self->write_and_back_up([1024 * $KiB, 64 * $KiB, 0x22]),
        $self->write_and_back_up([2048 * $KiB, 64 * $KiB, 0x33]),
    );
    return ($self, @names);
}

sub problems ($self, $name) { return join("\n", $self->provider->verify($name)->@*) }

# What verify says of a damaged block.
sub said_of_block ($offset) {
    return
        qr/\A$damaged: 65536 bytes differ from what was read from the guest: 65536 at offset $offset /;
}

# Flips a bit of the guest's data at an offset without changing the file's time and size, like a disk that rots.
sub rot ($image, $offset) {
    my @times = (Time::HiRes::stat($image))[8, 9];
    my $map = JSON::PP->new->utf8->decode(
        PBA::Test::QemuNbd::output_of('map', '-U', '--output=json', $image));
    my ($part) = grep {
               $_->{data}
            && $_->{depth} == 0
            && $_->{start} <= $offset
            && $offset < $_->{start}
            + $_->{length}
    } $map->@*;
    open(my $fh, '+<:raw', $image) or die "$image: $!\n";
    seek($fh, $part->{offset} + $offset - $part->{start}, 0);
    read($fh, my $byte, 1);
    seek($fh, -1, 1);
    print {$fh} chr(ord($byte) ^ 4);
    close($fh) or die "$image: $!\n";
    Time::HiRes::utime($times[0], $times[1], $image);
    return;
}

# Changes the entries of an image's first L2 table (QEMU: docs/interop/qcow2).
sub with_entries ($image, $code) {
    open(my $fh, '+<:raw', $image) or die "$image: $!\n";
    my $get = sub ($at, $count) {
        seek($fh, $at, 0);
        read($fh, my $bytes, 8 * $count) == 8 * $count or die "$image: $!\n";
        return unpack('Q>*', $bytes);
    };
    my ($first) = $get->($get->(40, 1), 1);
    my $table = $first & ((1 << 56) - 512);
    my @entries = $get->($table, 64);
    $code->(\@entries);
    seek($fh, $table, 0);
    print {$fh} pack('Q>*', @entries);
    close($fh) or die "$image: $!\n";
    return;
}

# Continues in a copy of a directory. If backups are made in the original, none can be made in the copy, because
# the bitmaps are relative to the original's archives.
sub use_copy ($self, $store) {
    my $copy = "$self->{tmp}/copy-" . ++$self->{copies};
    system('cp', '-a', $store, $copy) == 0 or die "cp: $?\n";
    $self->use_store($copy);
    $self->log;
    return $copy;
}

1;
