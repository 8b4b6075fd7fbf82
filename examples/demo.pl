# Backs up a guest with two disks while it runs and writes: a full backup, an incremental one, one
# that fails, two more incremental ones. Then restores them, and checks that nothing is missing.
#
#     perl -Mblib examples/demo.pl
#
# What a backup program needs is in the first part of this file. The guest is in lib/Demo/Guest.pm,
# what is checked, and how, in lib/Demo/Check.pm.

use v5.36;

use FindBin ();
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use Fcntl qw(O_CREAT O_RDWR SEEK_SET);
use File::Path qw(make_path);
use File::Temp ();

use Demo::Check qw(
    check_actions check_contained check_data check_equal check_files check_surroundings sum_of
    surroundings
);
use Demo::Guest;
use Demo::Screen qw(heading human milliseconds now step);
use PVE::BackupAccess;

my $PIECE = 4 * 1024 * 1024;

# ---- how a backup is done ----

# All disks as of one instant, each device to a file in $backup->{dir}.
sub back_up ($guest, $options, $backup) {
    my $access = PVE::BackupAccess->new(
        qmp => $guest->qmp_path,
        'target-id' => 'demo',
        $options->%*,
    );
    my @devices = map { { device => $_, 'bitmap-mode' => $backup->{mode} } } $guest->devices;
    my $infos = $guest->watch_setup($backup, sub { $access->setup(\@devices) });
    my $ok = eval {
        push $backup->{stored}->@*, store_device($access, $_, $backup->{dir}) for $infos->@*;
        die "the store is full\n" if $backup->{fails};
        1;
    };
    my $error = $@;
    $access->teardown($ok);
    die $error if !$ok;
    return;
}

# The dirty regions of a device. What is stored is discarded, which frees its fleecing space.
sub store_device ($access, $info, $dir) {
    my $file = "$dir/$info->{device}.backup";
    my $volume = $access->volume($info->{device});
    my @regions;

    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    while (my ($offset, $length) = $volume->next_dirty_region) {
        store_region($volume, $fh, $offset, $length);
        push @regions, [$offset, $length];
    }
    print {$fh} pack('Q>Q>', $volume->size, 0) or die "$file: $!\n";
    close($fh) or die "$file: $!\n";
    $volume->close;
    return { $info->%*, file => $file, regions => \@regions };
}

# A backup file is a row of offset, length, data. The disk's size and a length of 0 end it.
sub store_region ($volume, $fh, $offset, $length) {
    my $end = $offset + $length;
    for (my $at = $offset; $at < $end; $at += $PIECE) {
        my $n = $end - $at < $PIECE ? $end - $at : $PIECE;
        print {$fh} pack('Q>Q>', $at, $n), $volume->pread($at, $n) or die "write: $!\n";
        $volume->discard($at, $n);
    }
    return;
}

# Brings a restored image from the state of the backup before to the state of this one.
sub apply ($file, $image) {
    open(my $in, '<:raw', $file) or die "$file: $!\n";
    sysopen(my $out, $image, O_RDWR | O_CREAT) or die "$image: $!\n";
    binmode($out);
    my ($offset, $length);
    while (($offset, $length) = unpack('Q>Q>', read_exactly($in, 16)) and $length) {
        seek($out, $offset, SEEK_SET) or die "$image: $!\n";
        print {$out} read_exactly($in, $length) or die "$image: $!\n";
    }
    truncate($out, $offset) or die "$image: $!\n";
    close($out) or die "$image: $!\n";
    return;
}

sub read_exactly ($fh, $length) {
    my $n = read($fh, my $data, $length) // die "read: $!\n";
    die "a backup file ends too early\n" if $n != $length;
    return $data;
}

# ---- what happens in the demo ----

sub prepare ($demo) {
    my $guest = $demo->{guest};
    my $kernel = sub { (undef, 'Linux ' . $guest->kernel_version . ', from Debian') };
    my $disk = sub {
        my ($count, $bytes) = $guest->collect_files;
        $guest->make_file_system;
        return ($bytes, "ext4 disk with $count files of /usr/share");
    };
    my $boot = sub { $guest->boot; (undef, 'booted in QEMU ' . $guest->qemu_version) };

    heading('A guest with two disks');
    step('Linux, from Debian', $kernel);
    step('ext4 disk with files', $disk);
    step('booting', $boot);
    $guest->start_writing;
    let_write($demo);
    return;
}

sub let_write ($demo) {
    step('the guest writes to both disks', sub { $demo->{guest}->write_on; return });
    return;
}

sub do_backup ($demo, $name, %how) {
    my $number = $demo->{backups}->@*;
    my $backup = { name => $name, %how, dir => "$demo->{dir}/$number" };
    make_path($backup->{dir});
    push $demo->{backups}->@*, $backup;
    my $before = surroundings_of($demo);
    my $work = sub {
        my $began = now();
        my $ok = eval { back_up($demo->@{qw(guest options)}, $backup); 1 };
        die $@ if !$ok && !($how{fails} && $@ eq "the store is full\n");
        my $bytes = sum_of([map { $_->{regions}->@* } $backup->{stored}->@*]);
        return ($bytes, undef, now() - $began - $backup->{waited});
    };
    step("$name backup", $work, sub { check_backup($demo, $backup, $before) });
    return;
}

sub surroundings_of ($demo) {
    return surroundings($demo->{guest}, values $demo->{options}->%*);
}

sub check_backup ($demo, $backup, $before) {
    my $bitmaps = $demo->{guest}->vm->bitmaps;
    check_surroundings($backup, $before, surroundings_of($demo), $bitmaps);
    check_actions($backup);
    my ($previous) = ($demo->{backups}->@*)[-2];
    check_contained($previous, $backup) if $previous->{fails};
    return;
}

sub make_backups ($demo) {
    heading('Backups');
    do_backup($demo, 'full', mode => 'new');
    let_write($demo);
    do_backup($demo, 'incremental', mode => 'use');
    let_write($demo);
    do_backup($demo, 'failed', mode => 'use', fails => 1);
    let_write($demo);
    do_backup($demo, 'retried', mode => 'use');
    let_write($demo);
    step('the guest stops writing, and unmounts', sub { $demo->{guest}->stop_writing; return });
    do_backup($demo, 'last', mode => 'use');
    return;
}

sub restore_device ($demo, $backup, $device) {
    my $guest = $demo->{guest};
    my $disk = $guest->disk_of($device->{device});
    my $image = "$demo->{dir}/restored-$disk.raw";
    my $check = { data => \&check_data, files => \&check_files }->{$disk};
    my $label = sprintf('%-12s %-6s', $backup->{name}, $disk);
    step(
        $label,
        sub {
            apply($device->{file}, $image);
            my $result = $check->($guest, $backup, $image);
            return (-s $image, "$label $result");
        },
    );
    return;
}

# Each backup on those before it, then the last one against the guest's disks themselves.
sub restore ($demo) {
    heading('Restored');
    for my $backup (grep { !$_->{fails} } $demo->{backups}->@*) {
        restore_device($demo, $backup, $_) for $backup->{stored}->@*;
    }
    for my $disk (qw(data files)) {
        my $image = "$demo->{dir}/restored-$disk.raw";
        my $label = sprintf("%-12s %-6s the guest's, byte by byte", 'last', $disk);
        step($label, sub { check_equal($demo->{guest}, $disk, $image); -s $image });
    }
    return;
}

# ---- the summary ----

sub print_summary ($demo) {
    heading('Summary (ms for setup, and for the longest guest write during setup and before)');
    print_row(qw(backup disk bitmap bytes of regions setup during before));
    for my $backup ($demo->{backups}->@*) {
        my $name = $backup->{name};
        my @times = map { milliseconds($_) }
            $backup->@{ 'setup seconds', 'write during', 'write before' };
        for my $device ($backup->{stored}->@*) {
            my $bytes = sum_of($device->{regions});
            my $share = sprintf('%.0f %%', 100 * $bytes / $device->{size});
            my $disk = $demo->{guest}->disk_of($device->{device});
            print_row($name, $disk, $device->{'bitmap-action'},
                human($bytes), $share, scalar($device->{regions}->@*), @times);
            ($name, @times) = ('') x 4;
        }
    }
    return;
}

sub print_row (@columns) {
    my $row = sprintf('  %-12s %-6s %-6s %10s %6s %8s %7s %7s %7s', @columns);
    say $row =~ s/\s+\z//r;
    return;
}

# Everything it made is gone when this returns.
sub demo () {
    my $tmp = File::Temp->newdir('pba-demo.XXXXXX', TMPDIR => 1);
    my %options = map { $_ => "$tmp/$_" } qw(run-dir fleecing-dir);
    make_path(values %options);
    my $guest = Demo::Guest->new("$tmp");
    my $demo = { guest => $guest, dir => "$tmp", options => \%options, backups => [] };
    prepare($demo);
    make_backups($demo);
    restore($demo);
    print_summary($demo);
    return;
}

exit(Demo::Screen::main(\&demo));
