package PBA::Test::StoreLife::Guest;

# A guest of PBA::Test::StoreLife: its disks, with the bitmaps that QEMU would have. Backups read the data
# through file handles.

use v5.36;

my $block = 65536;
my %sizes = (
    'drive-efidisk0' => 5 * $block + 512,
    'drive-scsi0' => 12 * $block,
    'drive-tpmstate0' => 4608,
);

# dir: for the data that is read; vmid; uuid; is_aware: whether the caller ties bitmaps to backups, as
# PVE::BackupAccess::Task does; devices: which of the disks it has, by default all.
sub new ($class, %options) {
    my $self = bless({%options}, $class);
    for my $device (sort(($options{devices} // [keys %sizes])->@*)) {
        my $size = $sizes{$device};
        $self->{disks}{$device} = { size => $size, content => "\0" x $size, dirty => {} };
    }
    return $self;
}

sub vmid ($self) { return $self->{vmid} }
sub uuid ($self) { return $self->{uuid} }
sub is_aware ($self) { return $self->{is_aware} }
sub devices ($self) { return sort keys $self->{disks}->%* }
sub content ($self, $device) { return $self->{disks}{$device}{content} }

my sub blocks ($disk) { return 0 .. int(($disk->{size} - 1) / $block) }

# New data, or sometimes the old data again, or zeroes.
my sub data_for ($disk, $at, $length) {
    my $kind = rand();
    return "\0" x $length if $kind < 0.15;
    return substr($disk->{content}, $at, $length) if $kind < 0.3;
    return pack('N', int(rand(1 << 32))) x ($length / 4);
}

sub write_random ($self, $count) {
    for my $disk (map { $self->{disks}{$_} } $self->devices) {
        for (1 .. int(rand($count + 1))) {
            my $at = 512 * int(rand($disk->{size} / 512));
            my $length = 512 * (1 + int(rand(200)));
            $length = $disk->{size} - $at if $at + $length > $disk->{size};
            substr($disk->{content}, $at, $length) = data_for($disk, $at, $length);
            $disk->{dirty}{$_} = 1 for int($at / $block) .. int(($at + $length - 1) / $block);
        }
    }
    return;
}

# As with QEMU, the bitmap is lost with the old size.
sub resize ($self, $device) {
    my $disk = $self->{disks}{$device};
    my $size = $disk->{size} + ($disk->{size} > 14 * $block ? -1 : 1) * $block;
    $size = $sizes{$device} if $size <= 0;
    $disk->{content} = substr($disk->{content}, 0, $size);
    $disk->{content} .= "\0" x ($size - length($disk->{content}));
    $disk->{size} = $size;
    $self->lose_bitmap($device);
    return;
}

sub lose_bitmap ($self, $device) {
    delete($self->{disks}{$device}->@{qw(base bitmap)});
    return;
}

# The volumes about which a provider is asked.
sub asked ($self, @devices) {
    my $disks = $self->{disks};
    return {
        map {
            $_ => {
                size => $disks->{$_}{size},
                $self->{is_aware} ? (base => $disks->{$_}{base}) : ()
            }
        } @devices
    };
}

# QEMU's reaction to the answer: { device => new or reuse }.
sub statuses ($self, $modes) {
    my %status;
    for my $device (sort keys $modes->%*) {
        my ($mode, $disk) = ($modes->{$device}, $self->{disks}{$device});
        my $is_used
            = ref($mode)
            ? $mode->{'bitmap-mode'} eq 'use' && ($disk->{base} // '') eq $mode->{base}
            : $mode eq 'use' && $disk->{bitmap};
        $status{$device} = $is_used ? 'reuse' : 'new';
    }
    return \%status;
}

# A new bitmap has every bit set, and is not yet relative to any backup.
sub begin ($self, $statuses) {
    for my $device (grep { $statuses->{$_} eq 'new' } keys $statuses->%*) {
        my $disk = $self->{disks}{$device};
        $disk->{dirty} = { map { $_ => 1 } blocks($disk) };
        delete($disk->{base});
        $disk->{bitmap} = 1;
    }
    return;
}

# Ends a successful backup. After a failure, everything stays as it was at its beginning.
sub succeed ($self, $id, @devices) {
    for my $disk (map { $self->{disks}{$_} } @devices) {
        $disk->{dirty} = {};
        $disk->{base} = $id;
        $disk->{bitmap} = 1;
    }
    return;
}

my sub next_region ($disk) {
    my @blocks = grep { $disk->{dirty}{$_} } blocks($disk);
    return sub () {
        my $first = shift(@blocks) // return;
        my $last = $first;
        $last = shift(@blocks) while @blocks && $blocks[0] == $last + 1;
        my $end = ($last + 1) * $block;
        $end = $disk->{size} if $end > $disk->{size};
        return ($first * $block, $end - $first * $block);
    };
}

# The volumes of backup_vm(), on copies of the disks, because data that has been read is discarded.
sub volumes ($self, $statuses) {
    my %volumes;
    for my $device (sort keys $statuses->%*) {
        my $disk = $self->{disks}{$device};
        my $path = "$self->{dir}/read-$self->{vmid}-$device-$$";
        open(my $fh, '+>:raw', $path) or die "$path: $!\n";
        syswrite($fh, $disk->{content});
        unlink($path);
        $volumes{$device} = {
            size => $disk->{size},
            'bitmap-mode' => $statuses->{$device},
            'file-handle' => $fh,
            'next-dirty-region' => next_region($disk),
        };
    }
    return \%volumes;
}

1;
