package PBA::Bench::HandMade;

# An access made by hand with stock QEMU's own commands: the minimal commands for a snapshot of all disks at
# one instant, with bitmaps. Nothing is checked, and only a successful access is undone.
#
#   my $access = PBA::Bench::HandMade->new(
#       execute => sub ($command, %arguments) { ... },      # over any connection
#       disks => [$vm->disk('disk0'), ...],                 # of PBA::Test::VM
#       dir => $directory, bitmap => $name,
#   );
#   $access->setup; $access->export; ...; $access->teardown;

use v5.36;

use JSON::PP ();

use PBA::Test::QMP;

my $granularity = 64 * 1024;

# Keeps one connection for all commands.
sub one_connection ($path) {
    my $qmp = PBA::Test::QMP->new(path => $path);
    return sub ($command, %arguments) { return $qmp->execute($command, %arguments) };
}

# A connection for each command, as qemu-server's mon_cmd makes it.
sub connection_per_command ($path) {
    return sub ($command, %arguments) {
        my $qmp = PBA::Test::QMP->new(path => $path);
        my $value = $qmp->execute($command, %arguments);
        $qmp->close;
        return $value;
    };
}

sub new ($class, %options) {
    return bless { %options, socket => "$options{dir}/nbd" }, $class;
}

sub uri ($self, $disk) { return "nbd+unix:///$disk->{id}?socket=$self->{socket}" }
sub context ($self) { return "qemu:dirty-bitmap:$self->{bitmap}" }

sub _do ($self, $command, %arguments) { return $self->{execute}->($command, %arguments) }

sub _each ($self, $step) {
    $self->$step($_) for $self->{disks}->@*;
    return;
}

sub _node ($self, $what, $disk) { return "bench-$what-$disk->{id}" }

# ---- setup ----

# The target's bitmap must exist: see add_bitmaps.
sub setup ($self, @) {
    $self->_each($_) for qw(_add_fleecing _insert_raw _add_background _add_filter);
    $self->_reopen('filter');
    $self->_transaction('block-dirty-bitmap-disable');
    $self->_each('_add_snapshot');
    return;
}

sub add_bitmaps ($self) {
    for my $disk ($self->{disks}->@*) {
        $self->_do(
            'block-dirty-bitmap-add',
            node => $disk->{id},
            name => $self->{bitmap},
            granularity => $granularity,
        );
    }
    return;
}

sub _add_fleecing ($self, $disk) {
    my $file = $self->{dir} . '/' . $self->_node('fleecing', $disk);
    open(my $fh, '>', $file) or die "$file: $!\n";
    truncate($fh, $disk->{size}) or die "$file: $!\n";
    close($fh) or die "$file: $!\n";
    $self->_do(
        'blockdev-add',
        driver => 'file',
        'node-name' => $self->_node('fleecing', $disk),
        filename => $file,
        discard => 'unmap',
    );
    unlink($file);
    return;
}

sub _raw ($self, $disk, $file) {
    return (
        driver => 'raw',
        'node-name' => $self->_node('raw', $disk),
        file => $file,
        size => $disk->{size},
        discard => 'unmap',
    );
}

sub _insert_raw ($self, $disk) {
    $self->_do('blockdev-add', $self->_raw($disk, $disk->{id}));
    $self->_set_drive($disk, $self->_node('raw', $disk));
    return;
}

sub _set_drive ($self, $disk, $node) {
    $self->_do(
        'qom-set',
        path => $disk->{qom_path},
        property => 'drive',
        value => $node,
    );
    return;
}

sub _add_background ($self, $disk) {
    $self->_do(
        'block-dirty-bitmap-add',
        node => $disk->{id},
        name => "$self->{bitmap}-background",
        granularity => $granularity,
    );
    return;
}

sub _add_filter ($self, $disk) {
    $self->_do(
        'blockdev-add',
        driver => 'copy-before-write',
        'node-name' => $self->_node('filter', $disk),
        file => $disk->{id},
        target => $self->_node('fleecing', $disk),
        'on-cbw-error' => 'break-snapshot',
        discard => 'unmap',
    );
    return;
}

# All at one instant.
sub _reopen ($self, $onto) {
    my @options = map {
        { $self->_raw($_, $onto eq 'root' ? $_->{id} : $self->_node($onto, $_)) }
    } $self->{disks}->@*;
    $self->_do('blockdev-reopen', options => \@options);
    return;
}

sub _transaction ($self, @types) {
    my @actions;
    for my $disk ($self->{disks}->@*) {
        for my $type (@types) {
            push @actions, { type => $type, data => $self->_bitmap_of_action($type, $disk) };
        }
    }
    $self->_do('transaction', actions => \@actions);
    return;
}

sub _bitmap_of_action ($self, $type, $disk) {
    my ($node, $name) = ($disk->{id}, $self->{bitmap});
    my $background = "$name-background";
    return { node => $node, target => $name, bitmaps => [$background] } if $type =~ /merge\z/;
    return { node => $node, name => $type =~ /remove\z/ ? $background : $name };
}

sub _add_snapshot ($self, $disk) {
    $self->_do(
        'blockdev-add',
        driver => 'snapshot-access',
        'node-name' => $self->_node('snapshot', $disk),
        file => $self->_node('filter', $disk),
        discard => 'unmap',
    );
    return;
}

# ---- export ----

# with_bitmaps: not for a full backup, in which everything is dirty.
sub export ($self, %options) {
    $self->_do('nbd-server-start', addr => { type => 'unix', data => { path => $self->{socket} } });
    for my $disk ($self->{disks}->@*) {
        my @bitmaps
            = $options{with_bitmaps}
            ? (bitmaps => [{ node => $disk->{id}, name => $self->{bitmap} }])
            : ();
        $self->_do(
            'block-export-add',
            type => 'nbd',
            id => $self->_node('export', $disk),
            name => $disk->{id},
            'node-name' => $self->_node('snapshot', $disk),
            writable => JSON::PP::true,
            @bitmaps,
        );
    }
    return;
}

# ---- teardown, as after a success ----

sub teardown ($self) {
    $self->_do('nbd-server-stop');
    $self->_each('_remove_snapshot');
    $self->_reopen('root');
    $self->_each('_remove_others');
    $self->_transaction(map { "block-dirty-bitmap-$_" } qw(enable clear merge remove));
    return;
}

sub _remove ($self, $what, $disk) {
    $self->_do('blockdev-del', 'node-name' => $self->_node($what, $disk));
    return;
}

sub _remove_snapshot ($self, $disk) { return $self->_remove('snapshot', $disk) }

sub _remove_others ($self, $disk) {
    $self->_set_drive($disk, $disk->{id});
    $self->_remove($_, $disk) for qw(raw filter fleecing);
    return;
}

1;
