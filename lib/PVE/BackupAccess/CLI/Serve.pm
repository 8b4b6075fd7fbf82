package PVE::BackupAccess::CLI::Serve;

# The subcommands serve and mount: offer an archive's disks over NBD or as raw files, without copying
# them, until a signal ends the command.

use v5.36;

use POSIX qw(SIGALRM SIGCHLD SIGHUP SIGINT SIGTERM);

use PVE::BackupAccess::CLI qw(absolute);
use PVE::BackupAccess::CLI::Access qw(text);
use PVE::BackupAccess::CLI::ArchivePath qw(archive_at chosen_devices file_of provider_for);
use PVE::BackupAccess::CLI::Output qw(say_json say_out);
use PVE::BackupAccess::Program qw(block_signals);
use PVE::BackupAccess::Provider::Store::RawFile;
use PVE::BackupAccess::Try qw(attempt ensure rethrow);

my $look_again = 5;    # seconds: no signal tells that a lock was lost

# Whether a signal that ends the command has arrived, but is still blocked.
my sub is_told_to_end () {
    my $pending = POSIX::SigSet->new;
    POSIX::sigpending($pending);
    return grep { $pending->ismember($_) } SIGINT, SIGTERM, SIGHUP;
}

# Returns when a signal arrives. Dies if one of the processes ends, which are { text => process }.
my sub wait_for_signal ($mask, $processes) {
    my $is_over = 0;
    my @ends = grep { ($SIG{$_} // '') ne 'IGNORE' } qw(INT TERM HUP);
    local @SIG{@ends} = (sub { $is_over = 1 }) x @ends;
    local @SIG{qw(ALRM CHLD)} = (sub { }) x 2;
    while (!$is_over) {
        for my $text (sort keys $processes->%*) {
            my $is_running;
            my $error = attempt { $is_running = $processes->{$text}->is_running };
            next if $is_running;

            # systemd ends the processes of a service together with the command.
            return if is_told_to_end();
            rethrow($error) if $error;
            die "$text has ended unexpectedly - start the command again\n";
        }
        alarm($look_again);
        POSIX::sigsuspend($mask);
    }
}

# Opens the chosen devices with $open, which returns the place of the device and, if a process besides
# its server is needed, that process. Prints the places when all exist.
my sub offer ($opt, $path, $open) {
    my ($directory, $volname) = archive_at($opt, $path);
    my $provider = provider_for($directory, $opt);
    my $chosen = defined($opt->{device}) ? text($opt->{device}) : undef;
    my (%place, %processes, @files);
    my $work = sub {
        my $volumes = $provider->restore_vm_init($volname);
        $chosen = $provider->device_called($volname, $chosen) if defined($chosen);
        for my $device (chosen_devices($volumes, $chosen)) {
            ($place{$device}, my $file)
                = $open->($provider, $volname, $device, $volumes->{$device}{size});
            $processes{"device $device: its server"} = $provider->server($volname, $device);
            $processes{"device $device: its raw file"} = $file if $file;
            push(@files, $file // ());
        }

        # From here on, a signal is the regular end: a program that reads the lines may send one
        # at once. They stay blocked until the wait, so that none is lost, and after it, because the
        # command ends.
        my $mask = block_signals(SIGINT, SIGTERM, SIGHUP, SIGCHLD, SIGALRM);
        my @devices = sort keys %place;
        $opt->{json}
            ? say_json({ devices => { map { $_ => text($place{$_}) } @devices } })
            : say_out(map { "$_ " . text($place{$_}) } @devices);
        STDOUT->flush or die "cannot write to standard output: $!\n";
        wait_for_signal($mask, \%processes);
    };
    my $end = sub (@) {
        $_->stop for @files;
        $provider->restore_vm_cleanup($volname);
    };
    ensure($work, $end);
    return 0;
}

sub run ($opt, $path) {
    my $dir = $opt->{'socket-dir'};
    die "$dir is not a directory - create it first\n" if defined($dir) && !-d $dir;
    return offer(
        $opt, $path,
        sub ($provider, $volname, $device, $size) {
            my %socket
                = defined($dir) ? (socket => absolute($dir) . '/' . file_of($device, 'sock')) : ();
            return $provider->restore_vm_volume_init($volname, $device, \%socket)
                ->{'qemu-img-path'};
        }
    );
}

sub mount ($opt, $path, $directory) {
    die "$directory is not a directory - create it first\n" if !-d $directory;
    return offer(
        $opt, $path,
        sub ($provider, $volname, $device, $size) {
            $provider->restore_vm_volume_init($volname, $device, {});
            my $server = $provider->server($volname, $device);
            my $file = PVE::BackupAccess::Provider::Store::RawFile->start($server, $size,
                absolute($directory) . '/' . file_of($device, 'raw'));
            return ($file->path, $file);
        }
    );
}

1;
