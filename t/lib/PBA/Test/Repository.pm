package PBA::Test::Repository;

# Backups of a machine's disks as a careful provider keeps them: one image per disk with the state of the last
# good backup. Uses only the module's public interface.

use v5.36;

use File::Copy ();

my $PIECE = 1024 * 1024;

# The content of an image before the first backup, so that a gap does not look like zeroes.
my $UNSEEN = "\xee";

sub new ($class, $backend) {
    my $dir = $backend->work_dir('repository');
    return bless({ backend => $backend, dir => $dir, good => {} }, $class);
}

sub image ($self, $id) { return "$self->{dir}/$id.good" }
sub candidate ($self, $id) { return "$self->{dir}/$id.new" }

# Makes one backup of these disks in one access. mode => for all or { id => mode }, success => 0 or 1, options
# => for the access, during => code that runs while the access is active, mechanism => the default is nbd, open
# => replaces PVE::BackupAccess::Volume->open. A failed backup stops in the middle of the data. Returns { id =>
# { action, status, regions, bytes } }.
sub backup ($self, %opt) {
    my $backend = $self->{backend};
    my @ids = ($opt{disks} // [$backend->vm->disk_ids])->@*;
    my $modes = ref($opt{mode}) ? $opt{mode} : { map { $_ => $opt{mode} } @ids };
    my $access = $backend->access(($opt{options} // {})->%*);
    my $infos = $access->setup([$self->requests($access, $modes, @ids)]);
    my $volumes = $access->volumes($opt{mechanism} // 'nbd');
    my $open = $opt{open} // sub (@volume) { PVE::BackupAccess::Volume->open(@volume) };

    my %result;
    for my $i (0 .. $#ids) {
        my $id = $ids[$i];
        my $device = $backend->device($id);
        $opt{during}->($id) if $opt{during};
        $result{$id} = $self->_read_disk($id, $open->($device, $volumes->{$device}),
            $volumes->{$device}, $opt{success});
        $result{$id}{action} = $infos->[$i]{'bitmap-action'} // 'none';
    }
    $self->finish($access, $opt{success}, @ids);
    return \%result;
}

# The requests to setup.
sub requests ($self, $access, $modes, @ids) {
    return map { $self->{backend}->devices($modes->{$_}, $_)->@* } @ids;
}

sub finish ($self, $access, $success, @ids) {
    $access->teardown($success);
    $self->take_good(@ids) if $success;
    return;
}

# Replaces the images by the existing candidates of a backup that QEMU considers a success.
sub take_good ($self, @ids) {
    for my $id (grep { -e $self->candidate($_) } @ids) {
        rename($self->candidate($id), $self->image($id)) or die "rename: $!\n";
    }
    return;
}

sub _read_disk ($self, $id, $reader, $volume, $success) {
    my $fh = $self->_open_candidate($id, $volume);
    my ($regions, $bytes) = (0, 0);
    while (my ($offset, $length) = $reader->next_dirty_region) {
        $regions++;
        $bytes += $length;
        next if !$success && $bytes > $volume->{size} / 4;
        _copy_region($reader, $fh, $offset, $length);
    }
    close($fh) or die "cannot write the candidate: $!\n";
    $reader->close;
    return { status => $volume->{'bitmap-mode'}, regions => $regions, bytes => $bytes };
}

# Only if the bitmap is reused does the candidate continue from the last good state.
sub _open_candidate ($self, $id, $volume) {
    my $file = $self->candidate($id);
    if ($volume->{'bitmap-mode'} eq 'reuse' && -e $self->image($id)) {
        File::Copy::copy($self->image($id), $file) or die "cannot copy $file: $!\n";
    }
    else {
        open(my $new, '>:raw', $file) or die "$file: $!\n";
        for (my $left = $volume->{size}; $left > 0; $left -= $PIECE) {
            print {$new} $UNSEEN x ($left < $PIECE ? $left : $PIECE);
        }
        close($new) or die "$file: $!\n";
    }
    open(my $fh, '+<:raw', $file) or die "$file: $!\n";
    return $fh;
}

sub _copy_region ($reader, $fh, $offset, $length) {
    my $end = $offset + $length;
    for (my $at = $offset; $at < $end; $at += $PIECE) {
        my $size = $end - $at < $PIECE ? $end - $at : $PIECE;
        seek($fh, $at, 0) or die "seek: $!\n";
        print {$fh} $reader->pread($at, $size);
        $reader->discard($at, $size);
    }
    return;
}

1;
