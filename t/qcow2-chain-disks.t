# How Qcow2Chain recognizes disks: a disk continues its chain under any name, another disk with the same name
# does not, and two guests with the same number are independent.

# One QEMU is enough: a provider sees NBD, not QEMU.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use File::Temp ();
use Test::More;

use PVE::BackupAccess;
use PVE::BackupAccess::File qw(read_file write_file);
use PVE::BackupAccess::Provider::Qcow2Chain;

use PBA::Test::BitmapDisk;
use PBA::Test::Manifest qw(forget_identities);
use PBA::Test::QemuNbd;

my $tmp = File::Temp->newdir('pba-disks-XXXXXXXX', TMPDIR => 1);
my $size = 1 << 20;
my $time = 1_795_000_000;
my (%expected, @log);

sub provider ($store) {
    mkdir("$tmp/$store");
    my $scfg = { path => "$tmp/$store", 'state-dir' => "$tmp/state" };
    return PVE::BackupAccess::Provider::Qcow2Chain->new(undef, $scfg, 'test',
        sub ($level, $message) { push(@log, "$level: $message") });
}

# A guest with two disks and no machine: { uuid, disks => [{ disk, identity, id and name of the last backup }] }
sub guest ($uuid) {
    my @disks;
    for my $number (0, 1) {
        my $dir = "$tmp/$uuid-$number";
        mkdir($dir);
        my $disk = PBA::Test::BitmapDisk->new(dir => $dir, device => 'disk', size => $size);
        $disk->write([0, $size, 1 + ord($uuid) % 100 + $number]);
        push(@disks, { disk => $disk, identity => "device /machine/peripheral/virtio$number" });
    }
    return { uuid => $uuid, disks => \@disks };
}

# What a task tells the provider about a disk under that name.
sub told ($disk, $name, %opt) {
    my $is_alias = ($disk->{name} // $name) ne $name;
    my %about = (size => $size, base => $is_alias ? undef : $disk->{id});
    return \%about if $opt{blind};
    $about{'alias-base'} = $disk->{id} if $is_alias;
    return { %about, identity => $disk->{identity}, node => $opt{node}{$name} };
}

# The mode that an access derives from a provider's answer.
sub mode_of ($disk, $name, $answer) {
    return $answer if !ref($answer);
    my $is_found
        = defined($answer->{identity})
        ? $answer->{identity} eq $disk->{identity}
        : $name eq $disk->{name};
    return $is_found && $answer->{base} eq $disk->{id} ? 'use' : 'new';
}

# Backs up a guest's disks under these names. Returns the modes and the archive's name.
sub backup ($store, $guest, $names, %opt) {
    my $provider = provider($store);
    my %disk = map { $names->[$_] => $guest->{disks}[$_] } grep { $names->[$_] } 0, 1;
    $_->{disk}->write([65536 * int(rand(15)), 70000, 1 + int(rand(255))]) for values %disk;
    my $volname = $provider->backup_init(100, 'qemu', $time += 60)->{'archive-name'};
    my $answer = $provider->backup_vm_query_incremental(100,
        { map { $_ => told($disk{$_}, $_, %opt) } keys %disk });
    $opt{then}->() if $opt{then};
    my (%volumes, %modes);
    for my $name (keys %disk) {
        $disk{$name}{disk}{device} = $name;
        $volumes{$name} = $disk{$name}{disk}->open(mode_of($disk{$name}, $name, $answer->{$name}));
        $volumes{$name}{identity} = $disk{$name}{identity} if !$opt{blind};
        $modes{$name} = $volumes{$name}{'bitmap-mode'};
    }
    my $id = PVE::BackupAccess->new_id;
    $provider->backup_vm(100, '', \%volumes,
        { 'backup-id' => $id, 'guest-uuid' => $guest->{uuid} });
    $provider->backup_cleanup(100, 'qemu', 1, {});
    for my $name (keys %disk) {
        $disk{$name}{disk}->close(1);
        $disk{$name}->@{qw(id name)} = ($id, $name);
        $expected{$store}{$volname}{$name} = $disk{$name}{disk}->content;
    }
    return (\%modes, $volname);
}

sub restored ($provider, $volname, $device) {
    my $from = $provider->restore_vm_volume_init($volname, $device, {})->{'qemu-img-path'};
    PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $from, "$tmp/restored.raw");
    $provider->restore_vm_volume_cleanup($volname, $device, {});
    return read_file("$tmp/restored.raw");
}

# Each archive in the store must equal the disks at its time.
sub check ($store, $text) {
    my $provider = provider($store);
    my @wrong;
    for my $volname (map { $_->{volname} } $provider->list(100)->@*) {
        my %content = $expected{$store}{$volname}->%*;
        push(@wrong,
            map { "$volname $_" }
            grep { restored($provider, $volname, $_) ne $content{$_} } sort keys %content);
        push(@wrong, $provider->verify($volname)->@*);
    }
    is_deeply(\@wrong, [], "$text: each archive equals its disks");
    return;
}

sub names ($store) {
    return map { $_->{volname} } provider($store)->list(100)->@*;
}

sub is_modes ($got, $expected, $text) { return is_deeply($got, $expected, $text) }

subtest 'the names of disks change' => sub {
    my $guest = guest('a');
    my ($modes, $first) = backup('names', $guest, ['x', 'y']);
    is_modes($modes, { x => 'new', y => 'new' }, 'a full backup');
    ($modes) = backup('names', $guest, ['x2', 'y2']);
    is_modes($modes, { x2 => 'reuse', y2 => 'reuse' }, 'other names: incremental');
    ($modes, my $swapped) = backup('names', $guest, ['y', 'x']);
    is_modes($modes, { x => 'reuse', y => 'reuse' }, 'exchanged names: incremental');
    ($modes) = backup('names', $guest, ['y', 'x']);
    is_modes($modes, { x => 'reuse', y => 'reuse' }, 'the next backup is incremental, too');
    check('names', 'a chain of many names');
    my ($entry) = grep { $_->{volname} eq $swapped } provider('names')->list(100)->@*;
    is($entry->{devices}{y}{identity}, $guest->{disks}[0]{identity}, 'list tells the disk');
    provider('names')->remove((names('names'))[1]);
    check('names', 'an archive from the middle was removed');
    provider('names')->remove($first);
    check('names', 'the first one was removed');
    is(scalar(provider('names')->prune(100, 1)->@*), 1, 'prune counts the names of a disk as one');
    check('names', 'pruned');
    ($modes) = backup('names', $guest, ['x', 'y']);
    is_modes($modes, { x => 'reuse', y => 'reuse' }, 'incremental after that');
    check('names', 'another backup was made');
};

subtest 'a name that moves to another disk' => sub {
    my $guest = guest('b');
    backup('other', $guest, ['x', 'y']);
    $guest->{disks}[0]{identity} = 'drive new';
    @log = ();
    my ($modes) = backup('other', $guest, ['x', 'y']);
    is_modes($modes, { x => 'new', y => 'reuse' }, 'only the replaced disk is backed up in full');
    like(
        "@log",
        qr{x: full backup - x is another disk in archive \w+: device /machine/peripheral/virtio0, not drive new},
        'the log says why'
    );
    check('other', 'another disk');
    ($modes) = backup('other', $guest, ['y', 'x'], blind => 1);
    is_modes($modes, { x => 'new', y => 'new' }, 'exchanged names without identities: full');
    check('other', 'exchanged');
};

# QEMU numbers devices without an ID anew at each start: after a device is added before them, the second disk has
# the path that the first one had.
subtest 'guest devices without an ID' => sub {
    my $guest = guest('g');
    my $number = sub ($first) {
        $guest->{disks}[$_]{identity}
            = 'device /machine/peripheral-anon/device[' . ($first + $_) . ']/virtio-backend'
            for 0, 1;
    };
    my %node = (x => 'x', y => 'y');
    $number->(0);
    my (undef, $only) = backup('anonymous', $guest, [undef, 'y'], node => \%node);
    $number->(1);
    my ($modes, $first) = backup('anonymous', $guest, ['x', undef], node => \%node);
    is_modes($modes, { x => 'new' }, 'the first disk has the path of the second one: full');
    my ($entry) = grep { $_->{volname} eq $first } provider('anonymous')->list(100)->@*;
    is($entry->{devices}{x}{parent}, undef, 'it does not build on the other disk');
    ($modes) = backup('anonymous', $guest, ['x', undef], node => \%node);
    is_modes($modes, { x => 'reuse' }, 'the next one builds on it');
    my @removed = provider('anonymous')->prune(100, 1)->@*;
    is(scalar(grep { $_ eq $only } @removed), 0, 'prune keeps the only archive of the second one');
    is(scalar(@removed), 1, 'and one of the two archives of the first one');
    check('anonymous', 'pruned');
};

# Between the question and the instant, another disk gets the name.
subtest 'a name that moves during a backup' => sub {
    my $guest = guest('h');
    my $one = $guest->{disks}[0];
    backup('moves', $guest, ['x', 'y']);
    my ($modes, $moved)
        = backup('moves', $guest, ['x', undef], then => sub { $one->{identity} = 'drive new' });
    is_modes($modes, { x => 'new' }, 'full');
    my ($entry) = grep { $_->{volname} eq $moved } provider('moves')->list(100)->@*;
    is($entry->{devices}{x}{identity}, 'drive new', 'the archive has the identity of its data');
    check('moves', 'moved');
};

subtest 'archives without identities of disks' => sub {
    my $guest = guest('c');
    backup('old', $guest, ['libvirt-1-format', 'libvirt-2-format']) for 1, 2;
    forget_identities(glob("$tmp/old/vm/100/*/manifest.json"));
    my ($modes) = backup('old', $guest, ['libvirt-1-format', 'libvirt-2-format']);
    is_modes(
        $modes,
        { map { ("libvirt-$_-format" => 'reuse') } 1, 2 },
        'the chain continues by name'
    );
    forget_identities(glob("$tmp/old/vm/100/*/manifest.json"));
    my %node = (virtio0 => 'libvirt-1-format', virtio1 => 'libvirt-2-format');
    @log = ();
    ($modes, my $new) = backup('old', $guest, ['virtio0', 'virtio1'], node => \%node);
    is_modes($modes, { virtio0 => 'new', virtio1 => 'new' }, 'other names: full');
    like(
        "@log",
        qr/virtio0: full backup - archive \w+ does not have the disk virtio0/,
        'the log says why'
    );
    like("@log", qr/virtio0: storing what differs from/, 'compared with what has the node\'s name');
    check('old', 'old and new names');
    my ($old) = names('old');
    my $provider = provider('old');
    is($provider->device_called($new, 'libvirt-1-format'), 'virtio0', 'a disk by its node');
    is($provider->device_called($new, 'virtio0'), 'virtio0', 'a disk by its own name');
    ok(!eval { $provider->device_called($old, 'virtio0') }, 'an old archive does not identify it');
    like(
        $@,
        qr/archive \w+ has no device virtio0 - it has .*; according to other archives, virtio0 is probably libvirt-1-format here/,
        'the error names the probable device'
    );
    ok(!eval { $provider->device_called($new, 'none') }, 'an unknown disk');
    is(scalar($provider->prune(100, 2)->@*), 2, 'prune counts old and new names as one disk');
    check('old', 'pruned');
};

subtest 'another name in a damaged manifest' => sub {
    my (undef, $name)
        = backup('odd', guest('g'), ['virtio0'], node => { virtio0 => 'libvirt-1-format' });
    my $manifest = "$tmp/odd/$name/manifest.json";
    my $text = read_file($manifest);
    my $provider = provider('odd');
    is($provider->device_called($name, 'libvirt-1-format'), 'virtio0', 'before');
    write_file($manifest, $text =~ s/libvirt-1-format/libvirt-3-format/r);
    ok(!eval { $provider->device_called($name, 'libvirt-3-format') }, 'is not used');
    like(
        $@,
        qr/other names are unknown - the manifest of archive .* is damaged/,
        'the error says why'
    );
};

subtest 'two guests with the same number' => sub {
    my ($one, $two) = map { guest($_) } qw(d e);
    backup('two', $_, ['x', 'y']) for $one, $two;
    for my $guest ($one, $two, $two, $one) {
        my ($modes) = backup('two', $guest, ['x', 'y']);
        is_modes($modes, { x => 'reuse', y => 'reuse' }, 'each guest continues its own chain');
    }
    my %guest_of = map { $_->{volname} => $_->{guest} } provider('two')->list(100)->@*;
    is(join('', map { $guest_of{$_} } sort keys %guest_of), 'dedeed', 'list tells whose each is');
    delete($one->{disks}[0]{id});
    @log = ();
    backup('two', $one, ['x', undef]);
    like(
        "@log",
        qr/x: storing what differs from/,
        'after a lost bitmap, the disk is compared with its own archive'
    );
    check('two', 'two guests');
    is_deeply([map { $guest_of{$_} } provider('two')->prune(100, 1)->@*],
        [qw(d e d e)], 'prune keeps the newest of each');
    check('two', 'pruned');
    my ($modes) = backup('two', $two, ['x', 'y']);
    is_modes($modes, { x => 'reuse', y => 'reuse' }, 'the next backup is incremental');
    check('two', 'another backup was made');
};

subtest 'stores in turn' => sub {
    my $guest = guest('f');
    backup('turn-a', $guest, ['x', 'y']);
    system('cp', '-a', "$tmp/turn-a", "$tmp/turn-b") == 0 or die "cp: $?\n";
    $expected{'turn-b'} = { $expected{'turn-a'}->%* };
    my ($modes) = backup('turn-b', $guest, ['x', 'y']);
    is_modes($modes, { x => 'reuse', y => 'reuse' }, 'a copy that has the base: incremental');
    ($modes) = backup('turn-a', $guest, ['x', 'y']);
    is_modes($modes, { x => 'new', y => 'new' }, 'the original store lacks the base: full');
    ($modes) = backup('turn-b', $guest, ['x', 'y']);
    is_modes($modes, { x => 'new', y => 'new' }, 'and back: full');
    check($_, 'in turn') for qw(turn-a turn-b);
};

done_testing;
