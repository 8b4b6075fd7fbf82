package PVE::BackupAccess::CLI::Restore;

# An archive's disks as raw images.

use v5.36;

use Fcntl qw(O_CREAT O_EXCL O_WRONLY);

use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::ArchivePath qw(archive_at provider_for without_slash);
use PVE::BackupAccess::CLI::Output qw(say_error say_json say_out);
use PVE::BackupAccess::CLI::Progress;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Provider::Qcow2Chain::Content qw(describe joined);
use PVE::BackupAccess::Try qw(attempt ensure);
use PVE::BackupAccess::Volume;

my sub image_name ($device) {
    utf8::encode($device);
    return $device =~ s!/!%2F!gr . '.raw';
}

# { device => file } of what is to be restored. Nothing that is there is overwritten but a block
# device, which the user has named.
my sub targets ($volumes, $target, $device) {
    my @devices = defined($device) ? ($device) : sort keys $volumes->%*;
    die "the archive has no device $device - it has " . join(', ', sort keys $volumes->%*) . "\n"
        if defined($device) && !$volumes->{$device};
    my %files;
    if (-d $target) {
        $target = without_slash($target);
        %files = map { $_ => "$target/" . image_name($_) } @devices;
    }
    elsif ($target =~ m!/\z!) {
        die "$target is not a directory - make it first\n";
    }
    elsif (@devices == 1) {
        %files = ($devices[0] => $target);
    }
    else {
        die "$target is not a directory, and the archive has several devices - choose one with"
            . ' --device: '
            . join(', ', @devices) . "\n";
    }
    for my $file (sort values %files) {
        die "$file exists already - it is not overwritten\n" if -e $file && !-b $file;
    }
    return \%files;
}

# Not what others have put there. Like the archive it is its owner's alone.
my sub open_new ($file) {
    sysopen(my $fh, $file, O_WRONLY | O_CREAT | O_EXCL, 0600) or die "cannot make $file: $!\n";
    return $fh;
}

# Has a new file filled, which is complete or not there.
my sub make_file ($file, $fill, $end = sub (@) { }) {
    my $part = "$file.part";
    unlink($part);    # of a restore that was killed
    my $make = sub {
        $fill->(open_new($part));
        rename($part, $file) or die "cannot rename $part to $file: $!\n";
    };
    ensure($make, sub (@) { unlink($part); $end->() });
}

# What the data has to fit. Where that cannot be told the device is restored, as well as can be, but
# not in silence.
my sub expected ($job, $device) {
    return if $job->{'no-verify'};
    my $digests = [];
    my $error = attempt { $digests = $job->{provider}->digests($job->{volname}, $device) };
    push($job->{problems}->@*, "$error") if $error;
    $job->{progress}->say("$device: has no digests of what was read, so it is not verified")
        if !$error && !$digests->@*;
    return $digests->@* ? (expected => $digests) : ();
}

my sub copy ($job, $device, $size, $file) {
    my ($provider, $volname, $progress) = $job->@{qw(provider volname progress)};
    my @damage;
    my $restore = sub ($to) {
        my %expected = expected($job, $device);
        my $info = $provider->restore_vm_volume_init($volname, $device, {});
        my $volume = PVE::BackupAccess::Volume->open($device,
            { 'nbd-path' => $info->{'qemu-img-path'}, size => $size });
        $volume->copy(
            to => $to,
            progress => sub ($done, $total) { $progress->update($device, $done, $total) },
            %expected,
            %expected ? (damaged => sub (@range) { push(@damage, [@range]) }) : (),
        );
        $volume->close;
    };
    my $end = sub (@) {
        $progress->end;
        $provider->restore_vm_volume_cleanup($volname, $device, {});
    };
    -b $file ? ensure(sub { $restore->($file) }, $end) : make_file($file, $restore, $end);
    return joined(@damage);
}

# All that can be restored is. A device of which nothing can be is not there.
my sub restore_all ($job, $volumes, $files) {
    for my $device (sort keys $files->%*) {
        my ($size, $file) = ($volumes->{$device}{size}, $files->{$device});
        $job->{progress}->tell("$device: restoring " . bytes($size) . ' to ' . text($file));
        my @damage;
        my $error = attempt { @damage = copy($job, $device, $size, $file) };
        push($job->{problems}->@*, "$error") if $error;
        push($job->{problems}->@*, "$device: " . describe(@damage) . '; the rest is restored')
            if @damage;
        $job->{damaged}{$device} = \@damage if @damage;
        delete($files->{$device}) if $error;
    }
}

# Beside the disks, where there is one and the target is a directory.
my sub restore_config ($provider, $volname, $target) {
    my $config = $provider->archive_get_guest_config($volname);
    return if !-d $target || ($config // '') eq '';
    my $file = "$target/guest.conf";
    die "$file exists already - it is not overwritten\n" if -e $file;
    make_file($file, sub ($fh) { print {$fh} $config and close($fh) or die "$file: $!\n" });
    return $file;
}

my sub show ($opt, $files, $config, $damaged) {
    return if $opt->{quiet} && !$opt->{json};
    return say_out(map { $files->{$_} } sort keys $files->%*) if !$opt->{json};
    say_json(
        {
            devices => { map { $_ => text($files->{$_}) } keys $files->%* },
            'guest-config' => defined($config) ? text($config) : undef,
            damaged => $damaged,
        }
    );
}

sub run ($opt, $path, $target) {
    my ($directory, $volname) = archive_at($path);
    my $provider = provider_for($directory);
    my $volumes = $provider->restore_vm_init($volname);
    my $device = defined($opt->{device}) ? text($opt->{device}) : undef;
    my $files = targets($volumes, $target, $device);
    my $config = defined($device) ? undef : restore_config($provider, $volname, $target);
    my $job = {
        provider => $provider,
        volname => $volname,
        progress => PVE::BackupAccess::CLI::Progress->new($opt->{quiet}),
        'no-verify' => $opt->{'no-verify'},
        problems => [],
        damaged => {},
    };
    restore_all($job, $volumes, $files);
    $provider->restore_vm_cleanup($volname);
    show($opt, $files, $config, $job->{damaged});
    say_error("pve-backup-access restore: $_") for $job->{problems}->@*;
    return $job->{problems}->@* ? 1 : 0;
}

1;
