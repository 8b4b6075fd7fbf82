package PBA::Test::Life::Others;

# The events of a PBA::Test::Life that others cause: users of QMP or qemu-img, programs that do not support IDs,
# a copy of the guest, a disk that damages notes.

use v5.36;

use JSON::PP ();

use PBA::Test::Manifest qw(forget_identities);
use PBA::Test::QemuNbd qw(img);

my $step = 4 * 1024 * 1024;
my $target = 'pba-tied:snapshot-access:test';
my $some_id = '0123456789abcdef' x 2;
my $granularity = 65536;
my $other_uuid = '99999999-2222-3333-4444-555555555555';
my @odd_names = qw(pba-id: pba-id:x pba-tied: pba-background+ pba-background-0:x pba:);
my @odd_notes
    = ('', '{', '[]', '{"disk0":12}', qq({"disk0":"$some_id"}), '{"disk0":"x","disk1":{}}');

# ---- bitmaps ----

# For the node of the first slot's disk: (node, names of its companions).
sub _tied ($self) {
    my $bitmaps = $self->_vm->bitmaps;
    my $id = $self->_vm->disk('disk0')->{plugged} // 'disk0';
    my ($node) = grep { exists($bitmaps->{$_}{$target}) } $id, sort keys $bitmaps->%*;
    return if !defined($node) || $bitmaps->{$node}{$target}{inconsistent};
    return ($node, grep { m/\Apba-id:/ } sort keys $bitmaps->{$node}->%*);
}

# Runs a user's commands on the bitmaps of a node.
sub _with ($self, $node) {
    return sub ($command, $name, %more) {
        $self->_vm->qmp("block-dirty-bitmap-$command", node => $node, name => $name, %more);
    };
}

sub _merge ($self, $node, $into, $from) {
    my %bitmaps = (target => $into, bitmaps => [$from]);
    $self->_vm->qmp('block-dirty-bitmap-merge', node => $node, %bitmaps);
    return;
}

# Renames a bitmap while another bitmap records in its place.
sub _rename ($self, $node, $do) {
    $do->('add', 'renamed', granularity => $granularity);
    $self->_merge($node, 'renamed', $target);
    $do->('remove', $target);
    $self->_write;
    $do->('add', $target, granularity => $granularity);
    $self->_merge($node, $target, 'renamed');
    $do->('remove', 'renamed');
    return;
}

sub _second_companion ($self, $node, $do, $companion, @) {
    my $name = $companion =~ s/[^:]*\z/$some_id/r;
    my $info = $self->_vm->bitmaps->{$node};
    return if $info->{$name};
    my %like = (granularity => $info->{$companion}{granularity}, disabled => JSON::PP::true);
    $do->('add', $name, %like);
    $self->_merge($node, $name, $companion);
    return;
}

my %hands = (
    remove => sub ($self, $node, $do, @) { $do->('remove', $target) },
    disable => sub ($self, $node, $do, @) { $do->('disable', $target) },
    untie => sub ($self, $node, $do, @companions) { $do->('remove', $_) for @companions },
    record => sub ($self, $node, $do, @companions) { $do->('enable', $_) for @companions },
    'second-companion' => \&_second_companion,
    rename => sub ($self, $node, $do, @) { $self->_rename($node, $do) },
    'odd-names' => sub ($self, $node, $do, @) {
        $self->_vm->qmp_try('block-dirty-bitmap-add', node => $node, name => $_) for @odd_names;
    },
);

sub _hand ($self, $how) {
    $self->_recover;
    my ($node, @companions) = $self->_tied;
    $hands{$how}->($self, $node, $self->_with($node), @companions) if @companions;
    return;
}

# ---- disks ----

# Whether the first disk can move to another node: backups must name it by its device.
sub _has_own_name ($self) {
    return $self->{naming} eq 'qdev' && $self->{backend}->name eq 'upstream';
}

sub _add_node ($self, $name, $file, @backing) {
    my %file = (driver => 'file', filename => $file);
    $self->_vm->qmp(
        'blockdev-add',
        driver => 'qcow2',
        'node-name' => $name,
        file => \%file,
        @backing
    );
    return;
}

sub _end_job ($self, $command, %job) {
    my $vm = $self->_vm;
    $vm->clear_events;
    $vm->qmp($command, 'job-id' => 'job', %job);
    $vm->wait_event('BLOCK_JOB_READY');
    $self->_write;
    $vm->qmp('job-complete', id => 'job');
    $vm->wait_event('BLOCK_JOB_COMPLETED');
    return;
}

# Moves the disk to another file, backs it up there, and moves it back.
sub _move_disk ($self) {
    return if !$self->_has_own_name;
    $self->_recover;
    my $node = $self->_vm->disk('disk0')->{plugged} // 'disk0';
    my $file = "$self->{store}/moved.qcow2";
    img(qw(create -q -f qcow2), $file, length($self->{content}{ $self->_file_in('disk0') }));
    $self->_add_node('elsewhere', $file);
    $self->_end_job('blockdev-mirror', device => $node, target => 'elsewhere', sync => 'full');
    $self->_write;
    $self->_backup;
    return if $self->{problem};
    $self->_end_job('blockdev-mirror', device => 'elsewhere', target => $node, sync => 'full');
    $self->_vm->qmp('blockdev-del', 'node-name' => 'elsewhere');
    return;
}

# Adds an overlay, backs it up, and commits it.
sub _overlay ($self) {
    return if !$self->_has_own_name;
    $self->_recover;
    my $node = $self->_vm->disk('disk0')->{plugged} // 'disk0';
    my $base = $self->_file_in('disk0');
    my $file = "$self->{store}/overlay.qcow2";
    my @backing = ('-b', $base, qw(-F qcow2 -u));
    img(qw(create -q -f qcow2), @backing, $file, length($self->{content}{$base}));
    $self->_add_node('above', $file, backing => undef);
    $self->_vm->qmp('blockdev-snapshot', node => $node, overlay => 'above');
    $self->_write;
    $self->_backup;
    return if $self->{problem};
    $self->_write;
    $self->_end_job('block-commit', device => 'above');
    $self->_vm->qmp('blockdev-del', 'node-name' => 'above');
    return;
}

# Resizes while the machine is off. False if qemu-img refuses.
sub _resize_offline ($self, $by) {
    my $vm = $self->_vm;
    my $file = $vm->disk('disk0')->{file};
    my $content = $self->{content}{$file};
    my $new = length($content) + $by;
    return 0 if $new < 2 * $step || $new > 6 * $step;
    $vm->quit;
    my @how = $by < 0 ? '--shrink' : ();
    my $done = eval { img(qw(resize -q -f qcow2), @how, $file, $new); 1 };
    $self->{content}{$file}
        = $by < 0 ? substr($content, 0, $new) : $content . "\0" x ($new - length($content))
        if $done;
    $self->_restart;
    return $done;
}

# While the guest is off, another program writes to the image of the first disk, or to an overlay that it then commits.
sub _change_image ($self, $through_overlay) {
    $self->_vm->quit;
    my $file = $self->_file_in('disk0');
    my $changed = $through_overlay ? "$self->{store}/overlay.qcow2" : $file;
    img(qw(create -q -f qcow2 -F qcow2 -b), $file, $changed) if $through_overlay;
    my ($offset, $byte) = ($granularity * int(rand(8)), 1 + $self->{writes}++ % 255);
    my @write = ('-c', "write -P $byte $offset $granularity");
    system("qemu-io -f qcow2 @{[map { qq('$_') } @write]} '$changed' >/dev/null") == 0
        or die "qemu-io: $?\n";
    img(qw(commit -q -f qcow2), $changed) if $through_overlay;
    substr($self->{content}{$file}, $offset, $granularity, chr($byte) x $granularity);
    return $self->_restart;
}

# ---- guests ----

# Creates another machine that is a copy of this one, with the same UUID, number, disks and bitmaps. Both
# continue independently.
sub _twin ($self) {
    $self->_vm->quit;
    my $other = $self->{twin};
    $self->{twin} = $self->_take_disks('twin' . ($self->{twins}++ % 2));
    $self->_put_disks_back($other) if $other;
    return $self->_restart;
}

# A guest with another UUID and disks of its own, but the same number and disk names, is backed up to the same store.
sub _stranger ($self) {
    $self->_vm->quit;
    my $mine = $self->_take_disks('mine');
    $self->_put_disks_back($self->{stranger}) if $self->{stranger};
    $self->_restart('-uuid', $other_uuid);
    $self->_write;
    $self->_backup;
    return if $self->{problem};
    $self->_vm->quit;
    $self->{stranger} = $self->_take_disks('stranger');
    $self->_put_disks_back($mine);
    return $self->_restart;
}

# The guest itself has another UUID for a while.
sub _other_guest ($self) {
    $self->_vm->quit;
    $self->_restart('-uuid', $other_uuid);
    $self->_write;
    $self->_backup;
    return if $self->{problem};
    $self->_vm->quit;
    return $self->_restart;
}

sub _forget_identities ($self) {
    forget_identities(glob("$self->{store}/*/vm/100/*/manifest.json"));
    return;
}

sub _spoil_notes ($self) {
    my @files = map { glob("$_/*") } $self->{backend}->work_dir('state-a'), "$self->{store}/notes";
    for my $file (@files) {
        open(my $fh, '>', $file) or die "$file: $!\n";
        print {$fh} $odd_notes[rand(@odd_notes)];
        close($fh);
    }
    return;
}

1;
