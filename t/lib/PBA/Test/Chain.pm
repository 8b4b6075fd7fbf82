package PBA::Test::Chain;

# A guest of two disks without a machine (PBA::Test::BitmapDisk), its backups by Qcow2Chain, and what
# each archive must hold.
#
#   my $chain = PBA::Test::Chain->new;
#   $chain->write_random; my $volname = $chain->backup; $chain->check('after the first');

use v5.36;

use File::Temp ();
use JSON::PP ();
use Test::More;
use Time::HiRes ();

use PBA::Test::BitmapDisk;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Provider::Qcow2Chain;

my %sizes = ('drive-scsi0' => 4 * 1024 * 1024, 'drive-efidisk0' => 528 * 1024 + 512);
my $vmid = 100;

# store => directory to use.
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

# As another process would find it: nothing is kept but the directory.
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

# What this host knows of its last backups.
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

# One backup in the order of the API. during => called when the volumes are there; late => 1: it
# fails after the bitmaps were cleared, and the archive stays; then => called before backup_cleanup; run => is given
# backup_vm to be called in another process, which is to be killed. Returns the archive's name,
# undef if it failed.
sub backup ($self, %options) {
    my ($provider, $disks) = $self->@{qw(provider disks)};
    my ($name, %volumes);
    my $run = $options{run} // sub ($backup_vm) { $backup_vm->() };
    my $done = eval {
        $provider->job_init($self->{time});
        $name = $provider->backup_init($vmid, 'qemu', $self->{time} += 60)->{'archive-name'};
        my $modes = $provider->backup_vm_query_incremental($vmid,
            { map { $_ => { size => $disks->{$_}->size } } keys $disks->%* });
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

# What the next backup would be: { device => use or new }.
sub next_modes ($self) {
    my $provider = $self->{provider};
    $provider->backup_init($vmid, 'qemu', $self->{time} + 60);
    my $modes = $provider->backup_vm_query_incremental($vmid,
        { map { $_ => { size => $self->disk($_)->size } } $self->devices });
    $provider->backup_cleanup($vmid, 'qemu', 0, { error => 'only asked' });
    return $modes;
}

# The archive holds what the disks hold now.
sub expect ($self, $name) {
    $self->{expected}{$name} = { map { $_ => $self->disk($_)->content } $self->devices };
    return;
}

# These archives are expected to be gone.
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

# A device's content as it is restored.
sub restored ($self, $name, $device) {
    my $file = "$self->{tmp}/restored.raw";
    my $from = $self->{provider}->restore_vm_volume_init($name, $device, {})->{'qemu-img-path'};
    PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $from, $file);
    $self->{provider}->restore_vm_volume_cleanup($name, $device, {});
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

# What is wrong with an archive, as text.
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

# All archives that should be there are, each holds what it must, and nothing else is there.
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

# Flips a bit of the guest's data at an offset; time and size stay, as when a disk rots.
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

# Goes on in a copy of a directory. No backups can be made there if one is made elsewhere: the bitmaps
# are relative to that.
sub use_copy ($self, $store) {
    my $copy = "$self->{tmp}/copy-" . ++$self->{copies};
    system('cp', '-a', $store, $copy) == 0 or die "cp: $?\n";
    $self->use_store($copy);
    $self->log;
    return $copy;
}

1;
