package PVE::BackupAccess::CLI::Disks;

# Chooses the disks that a backup includes if the user names none, and says why it omits the others.

use v5.36;

use Exporter qw(import);
use List::Util qw(any uniq);

use PVE::BackupAccess;
use PVE::BackupAccess::CLI::Monitor qw(ask);
use PVE::BackupAccess::Provider::Store::Disks qw(guest_device);
use PVE::BackupAccess::Reply qw(edges_of hashes is_refusal);
use PVE::BackupAccess::Try qw(attempt);

our @EXPORT_OK = qw(choose_disks names_of_disk);

my $scsi_passes_by
    = q(it passes SCSI commands through, so QEMU's dirty bitmaps do not record its writes);

# Types of guest devices whose data does not go through QEMU's block layer, or for which the guest can bypass it.
my @passes_by = (
    [qr/\Ascsi-(?:block|generic)\z/, $scsi_passes_by],
    [qr/\Avhost-scsi\b/, 'the kernel serves it, and QEMU does not see its data'],
    [qr/\Avhost-user-(?:blk|scsi)\b/, 'another process serves it, and QEMU does not see its data'],
);

# { name of a node => that of the node below it }
my sub nodes_below ($path) {
    return map { $_->{parent} => $_->{child} }
        grep { $_->{name} eq 'file' } edges_of(ask($path, 'x-debug-query-block-graph'));
}

# The disk's own node. The nodes above it are ours, if a killed process left an access active, or are
# filters of jobs, whose names QEMU generates.
my sub named_node ($path, $name) {
    return $name if $name !~ m/\A(?:pba-|#)/;
    my %below = nodes_below($path);
    $name = delete($below{$name}) while defined($name) && $name =~ m/\A(?:pba-|#)/;
    return $name;
}

# A permanent name, by which archives identify a disk. The node name does not suffice with libvirt,
# which renumbers its nodes at each snapshot and start.
my sub lasting_name ($node, $device) {
    return $device->{id}
        if defined($device->{id}) && (!defined($node) || $node =~ m/\Alibvirt-[0-9]+-/);
    return $node // $device->{path};
}

# { id, path, names } of the guest device in query-block's reply: its ID, if it has one, its QOM
# path, and all names.
my sub device_of ($qdev) {
    return { names => [] } if $qdev eq '';
    my $shown = $qdev =~ m{/} ? $qdev : "/machine/peripheral/$qdev";
    my ($id, $path) = guest_device($shown);
    return { id => $id, path => $path, names => [grep { defined } $id, $path, $shown] };
}

# { name, names, why } of each guest device whose data QEMU does not see, by its QOM path.
my sub passing_by ($path) {
    my %found;
    for my $parent (map { "/machine/$_" } qw(peripheral peripheral-anon)) {
        for my $object (hashes('qom-list', ask($path, 'qom-list', path => $parent))) {
            my ($type) = ($object->{type} // '') =~ m/\Achild<(.*)>\z/ or next;
            my ($why) = map { $_->[1] } grep { $type =~ $_->[0] } @passes_by;
            my $device = device_of("$parent/" . ($object->{name} // ''));
            $found{ $device->{path} }
                = { name => $device->{names}[0], names => $device->{names}, why => $why }
                if defined($why);
        }
    }
    return \%found;
}

my sub has_flag ($path, $device, $property) {
    my $is_on;
    my $error = attempt { $is_on = ask($path, 'qom-get', path => $device, property => $property) };
    die $error if $error && !is_refusal($error);
    return $is_on;
}

# Whether the guest sends SCSI commands to a device of the host by a virtio disk (QEMU before 9.1): setup refuses it,
# see check_passed_through in src/access/company.c.
my sub sends_scsi ($path, $disk) {
    return 0 if !defined($disk->{path}) || !has_flag($path, $disk->{path}, 'scsi');
    my $command = 'query-named-block-nodes';
    my %driver
        = map { ($_->{'node-name'} // '') => $_->{drv} } hashes($command, ask($path, $command));
    my %below = nodes_below($path);
    for (my $node = $disk->{node}; defined($node); $node = delete($below{$node})) {
        return 1 if ($driver{$node} // '') =~ m/\A(?:host_device|iscsi)\z/;
    }
    return 0;
}

# { name, node, id, path, names, why } of each drive. why: the reason to omit it, or undef. An empty drive has
# is_empty instead: it is no disk, but its names may be those of a disk.
my sub look_at ($path, $disk) {
    my $device = device_of($disk->{qdev} // '');
    my @names = ((grep { $_ ne '' } $disk->{device} // ''), $device->{names}->@*);
    return { name => $names[-1], names => \@names, is_empty => 1 }
        if @names && !$disk->{inserted};
    my ($medium) = hashes('query-block', [$disk->{inserted} // return]);
    my $node = $medium->{'node-name'} // return;

    # The images of a guest that is off have names that the user gave.
    my $name = $disk->{'given-name'} // $disk->{device} // '';
    $name = lasting_name(named_node($path, $node), $device) // return if $name eq '';
    my $why
        = !defined($disk->{qdev}) ? 'no device of the guest uses it'
        : $disk->{removable} ? 'it is removable'
        : $medium->{ro} ? 'it is read-only'
        : undef;
    return {
        $device->%{qw(id path)},
        name => $name,
        node => $node,
        names => [uniq($name, $node, @names)],
        why => $why,
    };
}

my sub has_name ($disk, $name) {
    return any { $_ eq $name } $disk->{names}->@*;
}

# Gives each disk a name that no other disk has. Guest devices with the same name share one disk.
my sub name_clearly (@disks) {
    for my $disk (grep { defined($_->{path}) } @disks) {
        my ($name, $path) = $disk->@{qw(name path)};
        $disk->{clear} = $path if any { $_->{name} ne $name && has_name($_, $name) } @disks;
    }
    $_->{name} = $_->{clear} // $_->{name} for @disks;
    return;
}

# Removes fleecing images from the list, which only a Proxmox QEMU identifies by their names.
my sub without_fleecing ($path, @disks) {
    my sub is_fleecing ($disk) { $disk->{name} =~ m/-fleecing\z/ }
    return @disks if !any { is_fleecing($_) } @disks;
    my $capabilities = PVE::BackupAccess->capabilities(qmp => $path);
    return $capabilities->{backend} eq 'pve' ? grep { !is_fleecing($_) } @disks : @disks;
}

my sub leave_out ($disks, @names) {
    for my $name (@names) {
        my @found = grep { has_name($_, $name) } $disks->@*;
        die "--exclude: the guest has no disk '$name' - it has "
            . join(', ', sort(uniq(map { $_->{name} } grep { !$_->{is_empty} } $disks->@*))) . "\n"
            if !@found;
        my @meant = uniq(map { $_->{name} } @found);
        die "--exclude: '$name' is the name of several disks - give another name: "
            . join(', ', @meant) . "\n"
            if @meant > 1;
        $_->{why} //= '--exclude names it' for @found;
    }
    return;
}

# All names of the disk that has this name; nothing if there is none.
sub names_of_disk ($path, $name) {
    my $command = 'query-block';
    my @disks = map { look_at($path, $_) } hashes($command, ask($path, $command));
    name_clearly(@disks);
    my @found = grep { has_name($_, $name) } @disks;
    my @meant = uniq(map { $_->{name} } @found);
    die "device $name: is the name of several disks - give another name: @{[join(', ', @meant)]}\n"
        if @meant > 1;
    return uniq(map { $_->{names}->@* } @found);
}

# (names, lines): the names of the disks, and a line for each disk that is omitted, by --exclude or for another reason.
sub choose_disks ($path, @excluded) {
    my $command = 'query-block';
    my @disks = without_fleecing($path,
        map { look_at($path, $_) } hashes($command, ask($path, $command)));
    name_clearly(@disks);
    my $passing = @disks ? passing_by($path) : {};
    for my $disk (@disks) {
        my $same = delete($passing->{ $disk->{path} // '' });
        $disk->{why} //= $same->{why} if $same;
    }
    for my $disk (grep { !defined($_->{why}) && !$_->{is_empty} } @disks) {
        $disk->{why} = $scsi_passes_by if sends_scsi($path, $disk);
    }
    push(@disks, $passing->@{ sort keys $passing->%* });
    leave_out(\@disks, @excluded);
    @disks = grep { !$_->{is_empty} } @disks;
    return (
        [uniq(map { $_->{name} } grep { !defined($_->{why}) } @disks)],
        [map { "$_->{name} is left out: $_->{why}" } grep { defined($_->{why}) } @disks],
    );
}

1;
