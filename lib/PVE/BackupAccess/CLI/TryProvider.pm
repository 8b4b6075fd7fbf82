package PVE::BackupAccess::CLI::TryProvider;

# Runs a backup provider through everything Proxmox VE does with one, on a QEMU of its own, and says
# in TAP what was right and what was not. As there, every job and every restore gets a new object.

use v5.36;

use File::Temp ();

use PVE::BackupAccess::CLI::TryProvider::Machine;
use PVE::BackupAccess::CLI::TryProvider::Restore;
use PVE::BackupAccess::CLI::TryProvider::Rules;
use PVE::BackupAccess::CLI::TryProvider::TAP;
use PVE::BackupAccess::CLI::TryProvider::Watch;
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Task;
use PVE::BackupAccess::Try qw(attempt_any);

my $machine_class = 'PVE::BackupAccess::CLI::TryProvider::Machine';
my $vmid = 999_999_999;    # the last one there is: nobody's archives are found by it
my $guest_config = "name: try-provider\nscsi0: store:vm-$vmid-disk-0,size=32M\n";
my $firewall_config = "[OPTIONS]\nenable: 1\n";
my $kib = 1024;
my $mib = 1024 * 1024;

# The jobs: what the guest writes before the instant of the backup and after it, as device, offset,
# length and byte. In the second one a disk is unchanged, and data becomes zeroes.
my @jobs = (
    {
        name => 'full backup',
        before => [
            ['drive-scsi0', 0, 4 * $mib, 0x11],
            ['drive-scsi0', 10 * $mib, 4 * $mib, 0x12],
            ['drive-efidisk0', 0, 528 * $kib, 0x13],
        ],
        after => [['drive-scsi0', 0, $mib, 0x91], ['drive-scsi0', 13 * $mib, 64 * $kib, 0x92]],
    },
    {
        name => 'incremental backup',
        before => [
            ['drive-scsi0', 11 * $mib, $mib, 0],
            ['drive-scsi0', 17 * $mib + 4 * $kib, 4 * $kib, 0x21],
            ['drive-scsi0', 24 * $mib, 2 * $mib, 0x22],
        ],
        after => [['drive-scsi0', 24 * $mib, $mib, 0xa1], ['drive-efidisk0', 0, 64 * $kib, 0xa2]],
    },
    {
        name => 'failing backup',
        fails => 1,
        before => [
            ['drive-scsi0', 8 * $mib, 64 * $kib, 0x31],
            ['drive-scsi0', $machine_class->trap, 64 * $kib, 0x32],
        ],
        after => [
            ['drive-scsi0', 8 * $mib, 64 * $kib, 0xb1],
            ['drive-scsi0', $machine_class->trap, 64 * $kib, 0xb2],
        ],
    },
    {
        name => 'incremental backup after the failure',
        before => [['drive-efidisk0', 512 * $kib, 16 * $kib, 0x41]],
        after => [['drive-scsi0', 17 * $mib, 64 * $kib, 0xc1]],
    },
);

# ---- reporting ----

my sub report ($trial, $name, $problem = undef) {
    return $trial->{tap}->result($name, $problem);
}

# One line for each method, in the order of the API; a method may be called once per device.
my sub report_calls ($trial, $name, $watch, $expected, @methods) {
    for my $method (@methods) {
        my @calls = $watch->calls($method);
        if (!@calls) {
            $trial->{tap}->skip("$name: $method", 'not reached');
            next;
        }
        my ($problem)
            = map { PVE::BackupAccess::CLI::TryProvider::Rules::problem($_, $expected) } @calls;
        report($trial, "$name: $method", $problem);
    }
}

my sub expected ($trial, $job) {
    return {
        sizes => { map { $_ => $machine_class->size_of($_) } $machine_class->devices },
        'guest-config' => $guest_config,
        'firewall-config' => $firewall_config,
        fails => $job->{fails},
    };
}

# ---- the provider ----

my sub load ($class) {
    return 'is not the name of a Perl class' if $class !~ m/\A[A-Za-z_]\w*(?:::\w+)*\z/;
    my $file = $class =~ s!::!/!gr . '.pm';
    my $error = attempt_any { require $file };
    return undef if !defined($error);
    return "there is no $file in Perl's path - name the directory of your modules with -I"
        if $error =~ m/\ACan't locate \Q$file\E /;
    return $error;
}

my sub new_provider ($trial) {
    my $log = sub ($level, $message) { push($trial->{log}->@*, "$level: $message") };
    my $provider = $trial->{class}->new($trial->@{qw(storage-plugin scfg storeid)}, $log);
    return PVE::BackupAccess::CLI::TryProvider::Watch->new($provider);
}

my sub check_class ($trial) {
    my $class = $trial->{class};
    report($trial, "$class can be loaded", load($class)) or return;
    my @lacks = grep { !$class->can($_) } (
        'new', 'provider_name',
        @PVE::BackupAccess::CLI::TryProvider::Watch::backup_methods,
        @PVE::BackupAccess::CLI::TryProvider::Watch::restore_methods,
    );
    report($trial, "$class has every method of the API", @lacks ? "it lacks @lacks" : undef);
    my $watch;
    my $error = attempt_any { $watch = new_provider($trial) };
    report($trial, 'new', defined($error) ? "died: $error" : undef) or return;
    attempt_any { $watch->provider_name };
    report_calls($trial, 'provider', $watch, {}, 'provider_name');
    return 1;
}

# ---- backups ----

my sub write_all ($trial, $writes) {
    $trial->{machine}->write($_->@*) for $writes->@*;
}

# Returns what the task died with, undef if it did not.
my sub run_task ($trial, $job, $watch) {
    my $task = PVE::BackupAccess::Task->new(
        vmid => $vmid,
        provider => $watch,
        'target-id' => 'try-provider',
        devices => [$machine_class->devices],
        'guest-config' => $guest_config,
        'firewall-config' => $firewall_config,
        thaw => sub { write_all($trial, $job->{after}) },
        log => sub ($level, $message) { push($trial->{log}->@*, "$level: $message") },
        $trial->{machine}->access_options,
    );
    my $result;
    my $error = attempt_any { $result = $task->run_job };
    return $error if defined($error);
    my $devices = $result->{devices};
    for my $device (sort keys $devices->%*) {
        my $about = $devices->{$device};
        $trial->{tap}->note("$job->{name}: $device: bitmap $about->{'bitmap-mode'}, "
                . bytes($about->{dirty}) . ' of '
                . bytes($about->{size})
                . ' to be read');
    }
    return undef;
}

my sub back_up ($trial, $job) {
    write_all($trial, $job->{before});
    $job->{disks} = $trial->{restore}->keep_disks($trial->{machine});
    my $watch = new_provider($trial);
    $trial->{log} = [];
    my $error = run_task($trial, $job, $watch);
    report_calls(
        $trial, $job->{name}, $watch,
        expected($trial, $job),
        @PVE::BackupAccess::CLI::TryProvider::Watch::backup_methods
    );
    my ($init) = $watch->calls('backup_init');
    my $failed = defined($error);
    $job->{archive} = !$failed && $init && $init->{result}[0]{'archive-name'};
    return if !$failed || $job->{fails};
    $trial->{tap}->explain("the backup failed: $error", $trial->{log}->@*);
}

# ---- restores ----

my sub check_archive ($trial, $job, $name) {
    if (!$job->{archive}) {
        $trial->{tap}->skip($name, 'there is no archive');
        return;
    }
    my $watch = new_provider($trial);
    my $volname = "backup/$job->{archive}";
    my $problems = $trial->{restore}->run($watch, $volname, $trial->{storeid}, $job->{disks});
    report_calls(
        $trial, $name, $watch,
        expected($trial, $job),
        @PVE::BackupAccess::CLI::TryProvider::Watch::restore_methods
    );
    report($trial, "$name: $_ is the disk as of the backup", $problems->{$_})
        for $machine_class->devices;
}

# ---- the command ----

my sub run_trial ($trial) {
    check_class($trial) or return;
    $trial->{machine} = $machine_class->start;
    $trial->{restore} = PVE::BackupAccess::CLI::TryProvider::Restore->new;
    for my $job (@jobs) {
        back_up($trial, $job);
        check_archive($trial, $job, "restore of the $job->{name}") if !$job->{fails};
    }
    check_archive($trial, $jobs[0], "restore of the $jobs[0]{name}, at the end");
}

my sub scfg_of ($opt) {
    my %scfg;
    for my $setting (($opt->{scfg} // [])->@*) {
        my ($key, $value) = split(m/=/, $setting, 2);
        PVE::BackupAccess::CLI::usage_error("--scfg wants KEY=VALUE, not '$setting'")
            if !defined($value);
        $scfg{$key} = $value;
    }
    return \%scfg;
}

my sub load_storage_plugin ($class) {
    my $problem = load($class);
    die "the storage plugin $class cannot be loaded: $problem\n" if defined($problem);
}

sub run ($opt, $class) {
    unshift(@INC, map { PVE::BackupAccess::CLI::absolute($_) } ($opt->{include} // [])->@*);
    load_storage_plugin($opt->{'storage-plugin'}) if defined($opt->{'storage-plugin'});
    my $store = File::Temp->newdir('pve-backup-access-store.XXXXXX', TMPDIR => 1);
    my $trial = {
        class => $class,
        tap => PVE::BackupAccess::CLI::TryProvider::TAP->new,
        scfg => { path => "$store", scfg_of($opt)->%* },
        storeid => 'try-provider',
        'storage-plugin' => $opt->{'storage-plugin'},
        log => [],
    };
    run_trial($trial);
    return $trial->{tap}->finish ? 0 : 1;
}

1;
