package Demo::Check;

# The demo's checks: each backup contains the data that it must, restored images are the guest's
# disks as of the instant of the backup, and nothing is left behind. These checks do not read through
# the module.

use v5.36;

use Exporter qw(import);
use File::Find ();
use File::Path qw(make_path remove_tree);

use Demo::Screen qw(output_of problem run);

our @EXPORT_OK = qw(
    check_archive check_contained check_data check_equal check_files check_modes
    check_surroundings sum_of surroundings
);

sub sum_of ($regions) {
    my $sum = 0;
    $sum += $_->[1] for $regions->@*;
    return $sum;
}

# ---- a backup ----

# The first backup must be full, the others must not.
sub check_modes ($backup) {
    my $expected = $backup->{name} eq 'full' ? 'new' : 'reuse';
    for my $device ($backup->{stored}->@*) {
        my $what = "$backup->{name} backup: $device->{device}";
        my $mode = $device->{'bitmap-mode'};
        problem("$what: bitmap '$mode', not '$expected'") if $mode ne $expected;
        my $whole = sum_of($device->{regions}) == $device->{size};
        problem("$what: the whole disk") if $whole && $expected eq 'reuse';
        problem("$what: not the whole disk") if !$whole && $expected eq 'new';
    }
    return;
}

# Checks the archive and those that it builds on, by their checksums and by qemu-img.
sub check_archive ($provider, $backup) {
    problem("$backup->{name} backup: archive: $_") for $provider->verify($backup->{archive})->@*;
    return;
}

# Every region of a failed backup must be in the next one.
sub check_contained ($failed, $next) {
    my %next = map { $_->{device} => $_->{regions} } $next->{stored}->@*;
    for my $device ($failed->{stored}->@*) {
        my $name = $device->{device};
        my ($lost) = grep { !is_within($_, $next{$name}) } $device->{regions}->@*;
        problem(  "$next->{name} backup: $name: lacks $lost->[1] bytes at $lost->[0],"
                . " which the $failed->{name} one had")
            if $lost;
    }
    return;
}

sub is_within ($region, $regions) {
    my ($offset, $end) = ($region->[0], $region->[0] + $region->[1]);
    return grep { $_->[0] <= $offset && $end <= $_->[0] + $_->[1] } $regions->@*;
}

# ---- a restored image ----

# The image itself shows which write was the last one; it must be a write at the instant of the backup.
sub check_data ($guest, $backup, $image) {
    my ($n, $at) = $guest->model->check_image('data', $image);
    my $what = "$backup->{name} backup: data disk";
    problem("$what: differs at $at from the disk after write $n") if defined($at);
    problem("$what: ends with write $n, not one of $backup->{from} to $backup->{to}")
        if $n < $backup->{from} || $n > $backup->{to};
    return "as of the guest's write $n";
}

# The file system is as after a power failure: once the journal has been replayed, on a copy, it must have
# no errors.
sub check_files ($guest, $backup, $image) {
    my ($copy, $what) = ("$image.copy", "$backup->{name} backup: file system");
    run('cp', '--sparse=always', $image, $copy);
    my ($status, $text) = output_of('e2fsck', '-p', $copy);
    ($status, $text) = output_of('e2fsck', '-fn', $copy) if $status <= 1;
    problem("$what: e2fsck: $text") if $status != 0;
    check_content($guest, $what, $copy) if $status == 0;
    unlink $copy;
    return $status == 0 ? 'e2fsck clean, old files equal' : 'is damaged';
}

# The guest does not write to the files that were copied to the file system when it was created.
sub check_content ($guest, $what, $image) {
    my $dir = "$image.files";
    make_path($dir);
    output_of('debugfs', '-R', qq(rdump /usr "$dir"), $image);
    my ($status, $text) = output_of('diff', '-rq', $guest->content . '/usr', "$dir/usr");
    problem("$what: $text") if $status != 0;
    remove_tree($dir);
    return;
}

# The guest has stopped writing, so the image must equal the guest's disk.
sub check_equal ($guest, $disk, $image) {
    my ($status, $text) = output_of('cmp', $image, $guest->image_of($disk));
    problem("last backup: $disk disk is not the guest's: $text") if $status != 0;
    return;
}

# ---- leftovers ----

# Everything that a backup must leave unchanged: { what => [texts] }.
sub surroundings ($guest, @dirs) {
    my $vm = $guest->vm;
    my $graph = $vm->graph;
    return {
        'block nodes' => $graph->{nodes},
        'block graph' => $graph->{edges},
        'block exports' => [map { $_->{id} } $vm->exports->@*],
        'NBD server' => [$vm->qmp_try('nbd-server-stop')->{error}{desc} // 'was running'],
        'open files' => [sort grep { defined } map { readlink } glob '/proc/self/fd/*'],
        processes => [own_processes()],
        files => [map { files_below($_) } @dirs],
    };
}

sub files_below ($dir) {
    my @found;
    File::Find::find({ wanted => sub { push @found, $_ if $_ ne $dir }, no_chdir => 1 }, $dir);
    return sort @found;
}

sub own_processes () {
    my @children;
    for my $stat (glob '/proc/[0-9]*/stat') {
        open(my $fh, '<', $stat) or next;
        my ($pid, $parent) = (<$fh> // next) =~ /\A(\d+) \(.*\) \S (\d+)/s;
        push @children, $pid if $parent == $$;
    }
    return sort @children;
}

sub changes ($before, $after) {
    my %count;
    $count{$_}-- for $before->@*;
    $count{$_}++ for $after->@*;
    my @changed = grep { $count{$_} } sort keys %count;
    return join(', ', map { ($count{$_} > 0 ? 'new ' : 'gone ') . $_ } @changed);
}

# Everything must be as before, except for two bitmaps per device: one records what the guest writes, the other
# names the backup.
sub check_surroundings ($backup, $before, $after, $bitmaps) {
    for my $what (sort keys $after->%*) {
        my $changed = changes($before->{$what}, $after->{$what});
        problem("after the $backup->{name} backup: $what: $changed") if $changed ne '';
    }
    my %wanted;
    $wanted{ $_->{'bitmap-name'} }++ for $backup->{stored}->@*;
    for my $node (sort keys $bitmaps->%*) {
        my $companions = 0;
        for my $name (sort keys $bitmaps->{$node}->%*) {
            next if $bitmaps->{$node}{$name}{recording} && $wanted{$name}-- > 0;
            next if $name =~ m/\Apba-id:/ && !$companions++;
            problem("after the $backup->{name} backup: left-over or dead bitmap $name of $node");
        }
    }
    problem("after the $backup->{name} backup: no bitmap $_")
        for grep { $wanted{$_} > 0 } sort keys %wanted;
    return;
}

1;
