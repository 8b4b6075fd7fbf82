# Backs up a guest with two disks while it runs and writes: a full backup, an incremental one, one
# that fails, and two more incremental ones. Then restores them and checks that no data is missing.
#
#     perl -Mblib examples/demo.pl
#
# The first part of this file shows what a backup program needs. The guest is in lib/Demo/Guest.pm.
# The checks are in lib/Demo/Check.pm; lib/Demo/Provider.pm records the data that they need.

use v5.36;

use FindBin ();
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../t/lib";

use File::Path qw(make_path);
use File::Temp ();

use Demo::Check qw(
    check_archive check_contained check_data check_equal check_files check_modes
    check_surroundings sum_of surroundings
);
use Demo::Guest;
use Demo::Provider;
use Demo::Screen qw(heading milliseconds now run step);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Task;
use PVE::BackupAccess::Try qw(attempt_any);

# ---- how to make a backup ----

# Backs up all disks as of one instant to an archive of qcow2 images. A real program would freeze and
# thaw the guest's file systems through its agent in the hooks.
sub back_up ($demo, $backup) {
    my $guest = $demo->{guest};
    my $task = PVE::BackupAccess::Task->new(
        $demo->{options}->%*,
        vmid => 100,
        provider => provider($demo, $backup),
        qmp => $guest->qmp_path,
        'target-id' => 'demo',
        devices => [$guest->devices],
        'guest-config' => "name: demo\n",
        'state-dir' => "$demo->{dir}/notes",
        freeze => sub { $guest->before_setup($backup) },
        thaw => sub { $guest->after_setup($backup) },
        log => sub ($level, $message) { warn "$message\n" if $level eq 'warn' },
    );
    $backup->{archive} = $task->run_job->{'archive-name'};
    return;
}

sub provider ($demo, $backup) {
    my $provider = Demo::Provider->new(undef, { path => $demo->{store} }, 'demo');
    $provider->note_in($backup);
    $provider->on_progress(sub (@) { die "the store is full\n" }) if $backup->{fails};
    return $provider;
}

# Restores a disk as Proxmox VE does: the provider returns the path from which qemu-img reads.
sub restore_device ($provider, $archive, $device, $image) {
    my $info = $provider->restore_vm_volume_init($archive, $device, {});
    run(qw(qemu-img convert -f raw -O raw), $info->{'qemu-img-path'}, $image);
    $provider->restore_vm_volume_cleanup($archive, $device, {});
    return;
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
    my $backup = { name => $name, %how };
    push $demo->{backups}->@*, $backup;
    my $before = surroundings_of($demo);
    my $work = sub {
        my $began = now();
        my $error = attempt_any { back_up($demo, $backup) };
        die $error if defined($error) && !($how{fails} && $error eq "the store is full\n");
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
    check_modes($backup);
    my ($previous) = ($demo->{backups}->@*)[-2];
    check_contained($previous, $backup) if $previous->{fails};
    return;
}

sub make_backups ($demo) {
    heading('Backups');
    do_backup($demo, 'full');
    let_write($demo);
    do_backup($demo, 'incremental');
    let_write($demo);
    do_backup($demo, 'failed', fails => 1);
    let_write($demo);
    do_backup($demo, 'retried');
    let_write($demo);
    step('the guest stops writing, and unmounts', sub { $demo->{guest}->stop_writing; return });
    do_backup($demo, 'last');
    return;
}

sub restore_disk ($demo, $provider, $backup, $device) {
    my $guest = $demo->{guest};
    my $disk = $guest->disk_of($device);
    my $image = "$demo->{dir}/restored-$disk.raw";
    my $check = { data => \&check_data, files => \&check_files }->{$disk};
    my $label = sprintf('%-12s %-6s', $backup->{name}, $disk);
    step(
        $label,
        sub {
            restore_device($provider, $backup->{archive}, $device, $image);
            my $result = $check->($guest, $backup, $image);
            return (-s $image, "$label $result");
        },
    );
    return;
}

# Restores and checks each backup, then compares the last one with the guest's disks.
sub restore ($demo) {
    heading('Restored');
    for my $backup (grep { !$_->{fails} } $demo->{backups}->@*) {
        my $provider = provider($demo, $backup);
        my $label = sprintf('%-12s archive  checksums, qemu-img check', $backup->{name});
        step($label, sub { check_archive($provider, $backup); return });
        my $devices = $provider->restore_vm_init($backup->{archive});
        restore_disk($demo, $provider, $backup, $_) for sort keys $devices->%*;
        $provider->restore_vm_cleanup($backup->{archive});
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
            print_row($name, $disk, $device->{'bitmap-mode'},
                bytes($bytes), $share, scalar($device->{regions}->@*), @times);
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

# Runs the demo in a temporary directory, which is removed at the end.
sub demo () {
    my $tmp = File::Temp->newdir('pba-demo.XXXXXX', TMPDIR => 1);
    my %options = map { $_ => "$tmp/$_" } qw(run-dir fleecing-dir);
    make_path(values %options, "$tmp/store");
    my $demo = {
        guest => Demo::Guest->new("$tmp"),
        dir => "$tmp",
        store => "$tmp/store",
        options => \%options,
        backups => [],
    };
    prepare($demo);
    make_backups($demo);
    restore($demo);
    print_summary($demo);
    return;
}

exit(Demo::Screen::main(\&demo));
