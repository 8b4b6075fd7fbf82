package PVE::BackupAccess::CLI::TryProvider;

# The subcommand try-provider: makes all calls that Proxmox VE makes to a backup provider, with a
# private QEMU, and reports in TAP which results are right. As in Proxmox VE, every job and every
# restore gets a new provider object.

use v5.36;

use File::Temp ();
use List::Util qw(sum0);
use POSIX ();
use Scalar::Util ();
use Time::HiRes ();

use PVE::BackupAccess::CLI qw(absolute untainted usage_error);
use PVE::BackupAccess::CLI::TryProvider::DirPlugin;
use PVE::BackupAccess::CLI::TryProvider::Machine;
use PVE::BackupAccess::CLI::TryProvider::Process;
use PVE::BackupAccess::CLI::TryProvider::Restore;
use PVE::BackupAccess::CLI::TryProvider::Rules;
use PVE::BackupAccess::CLI::TryProvider::TAP;
use PVE::BackupAccess::CLI::TryProvider::Watch qw(@backup_methods @restore_methods);
use PVE::BackupAccess::Format qw(bytes);
use PVE::BackupAccess::Program qw(new_pipe);
use PVE::BackupAccess::Task;
use PVE::BackupAccess::Try qw(attempt_any deaths_of rethrow);
use PVE::BackupAccess::Wait qw(read_some wait_for_child);

my $Machine = 'PVE::BackupAccess::CLI::TryProvider::Machine';
my $Base = 'PVE::BackupProvider::Plugin::Base';
my $DirPlugin = 'PVE::Storage::DirPlugin';
my $StandIn = 'PVE::BackupAccess::CLI::TryProvider::DirPlugin';
my $Process = 'PVE::BackupAccess::CLI::TryProvider::Process';
my $Restore = 'PVE::BackupAccess::CLI::TryProvider::Restore';
my $TAP = 'PVE::BackupAccess::CLI::TryProvider::TAP';
my $Watch = 'PVE::BackupAccess::CLI::TryProvider::Watch';
my $vmid = 999_999_999;    # the highest number: no archives of a real guest have it
my $other_vmid = $vmid - 1;
my $drive = "scsi0: store:vm-$vmid-disk-0,size=32M";
my $firewall_config = "[OPTIONS]\nenable: 1\n";
my $kib = 1024;
my $mib = 1024 * 1024;
my $until_signal = 0.3;    # seconds; with its limit, the backup takes longer

# The jobs: what happens to the guest after the previous one (change), and what the guest writes
# before and after the instant of the backup, as device, offset, length and byte. In the second job,
# two disks are unchanged, and data becomes zeroes. 'fails' is a backup whose source cannot be read, 'refused' one that
# is stored when VZDump fails, 'interrupted' one that a signal ends.
my @jobs;
@jobs = (
    {
        name => 'full backup',
        'other guest' => 1,
        before => [
            ['drive-scsi0', 0, 4 * $mib, 0x11],
            ['drive-scsi0', 10 * $mib, 4 * $mib, 0x12],
            ['drive-scsi1', 12 * $mib, 4 * $kib, 0x14],
            ['drive-efidisk0', 0, 528 * $kib, 0x13],
            ['drive-tpmstate0-backup', 0, 4608, 0x15],
        ],
        after => [['drive-scsi0', 0, $mib, 0x91], ['drive-scsi0', 13 * $mib, 64 * $kib, 0x92]],
    },
    {
        name => 'incremental backup',
        'bandwidth-limit' => $mib,
        before => [
            ['drive-scsi0', 11 * $mib, $mib, 0],
            ['drive-scsi0', 17 * $mib + 4 * $kib, 4 * $kib, 0x21],
            ['drive-scsi0', 24 * $mib, 2 * $mib, 0x22],
            ['drive-tpmstate0-backup', 512, 512, 0x23],
        ],
        after => [['drive-scsi0', 24 * $mib, $mib, 0xa1], ['drive-efidisk0', 0, 64 * $kib, 0xa2]],
    },
    {
        name => 'failing backup',
        fails => 1,
        before => [
            ['drive-scsi0', 8 * $mib, 64 * $kib, 0x31],
            ['drive-scsi0', $Machine->trap, 64 * $kib, 0x32],
        ],
        after => [
            ['drive-scsi0', 8 * $mib, 64 * $kib, 0xb1],
            ['drive-scsi0', $Machine->trap, 64 * $kib, 0xb2],
        ],
    },
    {
        name => 'backup that VZDump fails when it is stored',
        refused => 1,
        before => [['drive-scsi0', 6 * $mib, 64 * $kib, 0x33]],
        after => [['drive-scsi0', 7 * $mib, 64 * $kib, 0xb3]],
    },
    {
        name => 'interrupted backup',
        interrupted => 1,
        'bandwidth-limit' => $mib,
        before => [['drive-scsi0', 2 * $mib, 4 * $mib, 0x34]],
        after => [['drive-scsi0', 3 * $mib, 64 * $kib, 0xb4]],
    },
    {
        name => 'incremental backup after the failure',
        'no firewall' => 1,
        before => [['drive-efidisk0', 512 * $kib, 16 * $kib, 0x41]],
        after => [['drive-scsi0', 17 * $mib, 64 * $kib, 0xc1]],
    },
    {
        name => 'backup after a rollback',
        change => sub ($machine) { $machine->roll_back($jobs[0]{disks}) },
        before => [['drive-scsi0', 20 * $mib, 64 * $kib, 0x51]],
        after => [['drive-scsi0', 20 * $mib, 64 * $kib, 0xd1]],
    },
    {
        name => 'backup after a bitmap was lost',
        change => sub ($machine) { $machine->lose_bitmap('drive-scsi0') },
        before => [['drive-scsi0', 5 * $mib, 64 * $kib, 0x61]],
        after => [['drive-scsi1', 0, 64 * $kib, 0xe1]],
    },
    {
        name => 'backup of a resized disk',
        change => sub ($machine) { $machine->resize('drive-scsi1', 16 * $mib) },
        before => [['drive-scsi1', 14 * $mib, 64 * $kib, 0x71]],
        after => [['drive-scsi1', 15 * $mib, $mib, 0xf1]],
    },
);

# ---- reporting ----

my sub report ($trial, $name, $problem = undef) {
    return $trial->{tap}->result($name, $problem);
}

# One line for each method, in the order of the API; a method may be called once per device.
my sub report_calls ($trial, $name, $watches, $expected, @methods) {
    for my $method (@methods) {
        my @calls = map { $_->calls($method) } $watches->@*;
        if (!@calls) {
            $trial->{tap}->skip("$name: $method", 'not reached');
            next;
        }
        my ($problem)
            = map { PVE::BackupAccess::CLI::TryProvider::Rules::problem($_, $expected) } @calls;
        report($trial, "$name: $method", $problem);
    }
}

# Each job has configurations of its own, and one guest has no firewall. VZDump reads them from files, so they are tainted.
my sub configs_of ($job) {
    my $taint = substr($0, 0, 0);
    return (
        'guest-config' => "#$job->{name}\nname: try-provider\n$drive\n$taint",
        'firewall-config' => $job->{'no firewall'}
        ? undef
        : "$firewall_config#$job->{name}\n$taint",
    );
}

my sub expected ($trial, $job) {
    return {
        sizes => { map { $_ => $trial->{machine}->size_of($_) } $Machine->devices },
        configs_of($job),
        $job->%{qw(fails interrupted)},
    };
}

# ---- the provider ----

my sub load ($class) {
    return 'is not the name of a Perl class' if $class !~ m/\A[A-Za-z_]\w*(?:::\w+)*\z/;
    return undef if $class->can('new');    # the storage plugin's file may contain it
    my $file = $class =~ s!::!/!gr . '.pm';
    my $error = attempt_any { require $file };
    return undef if !defined($error);
    return "there is no $file in Perl's path - name the directory of your modules with -I"
        if $error =~ m/\ACan't locate \Q$file\E /;
    return $error;
}

my sub new_object ($trial) {
    my $log = sub ($level, $message) { push($trial->{log}->@*, "$level: $message") };
    my ($class, $plugin) = $trial->@{qw(class storage-plugin)};
    return $class->new($trial->@{qw(usual-plugin scfg storeid)}, $log) if !defined($plugin);
    my $provider = $plugin->new_backup_provider($trial->@{qw(scfg storeid)}, $log);
    return $provider if Scalar::Util::blessed($provider) && $provider->isa($class);
    die "new_backup_provider of $plugin returned no $class\n";
}

my sub new_provider ($trial) {
    return $Watch->new(new_object($trial));
}

# The methods of the base class only die.
my sub has_method ($class, $method) {
    my $own = $class->can($method) // return 0;
    return $own != ($Base->can($method) // 0);
}

my sub check_class ($trial) {
    my $class = $trial->{class};
    report($trial, "$class can be loaded", load($class)) or return;
    my @lacks = grep { !has_method($class, $_) }
        ('new', 'provider_name', @backup_methods, $trial->{'backup-only'} ? () : @restore_methods,);
    report($trial, "$class has every method of the API", @lacks ? "it lacks @lacks" : undef);
    my $watch;
    my $error = attempt_any { $watch = new_provider($trial) };
    report($trial, 'new', defined($error) ? "died: $error" : undef) or return;
    attempt_any { $watch->provider_name };
    report_calls($trial, 'provider', [$watch], {}, 'provider_name');
    return 1;
}

# ---- backups ----

my sub write_all ($trial, $writes) {
    $trial->{machine}->write($_->@*) for $writes->@*;
}

# Most providers name an archive after the second in which its backup began.
my sub wait_for_next_second ($trial) {
    Time::HiRes::sleep(0.05)
        while time() == ($trial->{second} // 0);    ## wall clock: names the archive
    return;
}

my sub note_devices ($trial, $job, $devices) {
    for my $device (sort keys $devices->%*) {
        my $about = $devices->{$device};
        $trial->{tap}->note("$job->{name}: $device: bitmap $about->{'bitmap-mode'}, "
                . bytes($about->{dirty}) . ' of '
                . bytes($about->{size})
                . ' to be read');
    }
    return;
}

# The job of a guest if a later step of VZDump fails, such as pruning: then the bitmaps have already been cleared.
my sub run_refused ($task, $watch) {
    my $time = time();    ## wall clock: names the archive
    my $log_file = File::Temp->new;
    $watch->job_init($time);
    my $result;
    my $error = attempt_any {
        $watch->backup_init($vmid, 'qemu', $time);
        $result = $task->run;
    };
    attempt_any {
        $watch->backup_cleanup($vmid, 'qemu', 0, { error => $error // 'cannot prune' });
    };
    attempt_any { $watch->backup_handle_log_file($vmid, "$log_file") };
    attempt_any { $watch->job_cleanup };
    rethrow($error) if defined($error);
    return $result;
}

# Sends SIGTERM to this process a while later, then a byte. The sender is no child: a provider may wait for its own.
my sub send_signal ($to) {
    my $here = $$;
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        POSIX::_exit(0) if fork();
        Time::HiRes::sleep($until_signal);
        kill('TERM', $here);
        syswrite($to, '.');
        POSIX::_exit(0);
    }
    wait_for_child($pid);
    return 1;
}

# Runs the code. A signal comes in the middle of backup_vm, as if a user stopped the backup.
my sub run_interrupted ($watch, $code) {
    local $SIG{TERM} = sub {
        my ($call) = $watch->calls('backup_vm');
        return if defined($call->{seconds});    # it has returned
        $call->{interrupted} = 1;
        die "interrupted by signal\n";
    };
    my ($from, $to) = new_pipe();
    my $is_sent;
    $watch->before('backup_vm', sub ($provider) { $is_sent = send_signal($to) });
    my ($death) = deaths_of($code);
    my $byte = '';
    read_some($from, \$byte, 1) if $is_sent;    # while the handler is in place
    die $death->[0] if $death;
    return;
}

# Runs the task. Returns its exception, or undef. Prints nothing before the process is as it was.
my sub run_task ($trial, $job, $watch, $process) {
    wait_for_next_second($trial);
    $job->{'bandwidth-limit'} *= 16 if $job->{'bandwidth-limit'} && $trial->{'reads all'};
    my $limit = $job->{'bandwidth-limit'};
    my $task = PVE::BackupAccess::Task->new(
        vmid => $vmid,
        provider => $watch,
        'target-id' => 'try-provider',
        devices => [$Machine->devices],
        configs_of($job),
        thaw => sub { write_all($trial, $job->{after}) },
        log => sub ($level, $message) { push($trial->{log}->@*, "$level: $message") },
        'load-note' => sub ($key) { return $trial->{note} },
        'store-note' => sub ($key, $text) { $trial->{note} = $text },
        $limit ? ('bandwidth-limit' => $limit) : (),
        $trial->{machine}->access_options,
    );
    my $result;
    my $run = sub { $result = $job->{refused} ? run_refused($task, $watch) : $task->run_job };
    my $error = attempt_any { $job->{interrupted} ? run_interrupted($watch, $run) : $run->() };
    $job->{left} = $process->problem;
    my ($init) = $watch->calls('backup_init');
    $trial->{second} = $init->{arguments}[2] if $init;
    return $error if defined($error);
    note_devices($trial, $job, $result->{devices});
    $trial->{'reads all'} = !!grep { $_->{'bitmap-mode'} eq 'none' } values $result->{devices}->%*;
    $job->{read} = sum0(map { $_->{dirty} } values $result->{devices}->%*);
    return undef;
}

# The limit permits a burst at the beginning, so half of the time is enough.
my sub check_limit ($trial, $job, $watch) {
    my $limit = $job->{'bandwidth-limit'} // return;
    my ($call) = $watch->calls('backup_vm');
    my $least = $job->{read} / $limit / 2;
    report(
        $trial,
        "$job->{name}: the bandwidth limit is kept",
        $call->{seconds} < $least
        ? sprintf(
            '%s were read in %.2f s, with a limit of %s a second',
            bytes($job->{read}),
            $call->{seconds}, bytes($limit)
            )
        : undef
    );
    return;
}

my sub check_kept ($trial, $job, $watch) {
    my @kept = $watch->kept_files;
    report(
        $trial,
        "$job->{name}: the volumes are let go",
        @kept ? "the provider still has the file handle of @kept after the job" : undef
    );
    return;
}

# left: what the provider has left behind.
my sub check_process ($trial, $name, $watch, $left) {
    my @returned = $watch->returned;
    my $problem
        = @returned
        ? "a forked child returned from @returned: it must end with exit or POSIX::_exit"
        : $left;
    report($trial, "$name: this process is left as it was", $problem);
    return;
}

# The name of the job's archive. It exists as soon as the provider has been told of the success,
# whatever happens later.
my sub archive_of ($watch) {
    my ($init) = $watch->calls('backup_init');
    my ($kept)
        = grep { $_->{arguments}[2] && !defined($_->{error}) } $watch->calls('backup_cleanup');
    return $init && $kept && $init->{result}[0]{'archive-name'};
}

# Makes the calls that VZDump makes for guests whose backup cannot begin, in the same job as a successful backup:
# for one guest that does not exist, and for one that VZDump cannot lock.
my sub fail_other_guests ($provider) {
    my $log_file = File::Temp->new;
    return attempt_any {
        $provider->backup_cleanup($other_vmid, undef, 0, { error => 'no such guest' });
        $provider->backup_cleanup($other_vmid, 'qemu', 0, { error => 'is locked' });
        $provider->backup_handle_log_file($other_vmid, "$log_file");
    };
}

my sub check_other_guest ($trial, $job, $error) {
    my $problem = defined($error) ? "died: $error" : undef;
    if (!defined($problem) && $job->{archive} && !$trial->{'backup-only'}) {
        my $provider = new_object($trial);
        my $volname = 'backup/' . untainted($job->{archive});
        my $gone = attempt_any { $provider->restore_vm_init($volname) };
        attempt_any { $provider->restore_vm_cleanup($volname) };
        $problem = "the archive of the guest before it is gone: $gone" if defined($gone);
    }
    report($trial, "$job->{name}: another guest fails before backup_init", $problem);
}

my sub back_up ($trial, $job) {
    $job->{change}->($trial->{machine}) if $job->{change};
    write_all($trial, $job->{before});
    $job->{disks} = $trial->{restore}->keep_disks($trial->{machine});
    my $process = $Process->new;
    my $watch = new_provider($trial);
    $trial->{log} = [];
    my $other;
    $watch->before('job_cleanup', sub ($provider) { $other = fail_other_guests($provider) })
        if $job->{'other guest'};
    my $error = run_task($trial, $job, $watch, $process);
    $job->{log} = $trial->{log};
    $trial->{tap}->note("$job->{name}: $_") for $job->{log}->@*;
    report_calls($trial, $job->{name}, [$watch], expected($trial, $job), @backup_methods);
    check_kept($trial, $job, $watch);
    check_process($trial, $job->{name}, $watch, $job->{left});
    check_limit($trial, $job, $watch) if !defined($error) && !$job->{interrupted};
    $job->{archive} = archive_of($watch);
    $job->{expected} = expected($trial, $job);
    check_other_guest($trial, $job, $other) if $job->{'other guest'};
    return if !defined($error) || $job->{fails} || $job->{interrupted};
    $trial->{tap}->explain("the backup failed: $error", $trial->{log}->@*);
}

# ---- restores ----

my sub check_archive ($trial, $job, $name) {
    if (!$job->{archive}) {
        $trial->{tap}->skip($name, 'there is no archive');
        return;
    }
    my $process = $Process->new;
    my $watch = new_provider($trial);
    my $volname = 'backup/' . untainted($job->{archive});    # as an argument of a restore
    my @shown = map { new_provider($trial) } 1 .. 3;
    $trial->{restore}->show($volname, $trial->{storeid}, @shown);
    my $problems = $trial->{restore}->run($watch, $volname, $job->{disks});
    my $left = $process->problem;
    report_calls($trial, $name, [@shown, $watch], $job->{expected}, @restore_methods);
    check_process($trial, $name, $watch, $left);
    my @same = map { report($trial, "$name: $_ is the disk as of the backup", $problems->{$_}) }
        $Machine->devices;

    # A stock QEMU before 8.0 returns wrong data for some kinds of reads; the log says so.
    $trial->{tap}->explain("log of the $job->{name}:", $job->{log}->@*) if grep { !$_ } @same;
}

# ---- the command ----

my sub run_trial ($trial) {
    check_class($trial) or return;
    $trial->{machine} = $Machine->start;
    $trial->{restore}
        = $Restore->new($trial->{'storage-plugin'} // $trial->{'usual-plugin'});
    my $restores = !$trial->{'backup-only'};
    for my $job (@jobs) {
        back_up($trial, $job);
        check_archive($trial, $job, "restore of the $job->{name}")
            if $restores && !grep { $job->{$_} } qw(fails refused interrupted);
    }

    # The second one came before the failing job, which must not remove it.
    for my $job ($restores ? @jobs[0, 1] : ()) {
        check_archive($trial, $job, "restore of the $job->{name}, at the end");
    }
    $trial->{tap}->note('no archive was restored, so their content was not checked') if !$restores;
}

my sub scfg_of ($opt) {
    my %scfg;
    for my $setting (($opt->{scfg} // [])->@*) {
        my ($key, $value) = split(m/=/, $setting, 2);
        usage_error("--scfg must be KEY=VALUE, not '$setting'")
            if !defined($value);
        $scfg{$key} = $value;
    }
    return \%scfg;
}

# On Proxmox VE, a provider always gets a storage plugin, and may ask it where the archives are. If the real
# plugin cannot be loaded, because it needs parts of a cluster that are not installed, a substitute takes its
# place. With a plugin, Qcow2Chain and RBD show disks as files, which requires FUSE. So without FUSE, there is no
# substitute.
my sub usual_plugin () {
    return $DirPlugin if !defined(load($DirPlugin));
    return -e '/dev/fuse' ? $StandIn : undef;
}

my sub load_storage_plugin ($class) {
    my $problem = load($class);
    die "the storage plugin $class cannot be loaded: $problem\n" if defined($problem);
}

sub run ($opt, $class) {
    unshift(@INC, map { absolute($_) } ($opt->{include} // [])->@*);
    load_storage_plugin($opt->{'storage-plugin'}) if defined($opt->{'storage-plugin'});
    my $store = File::Temp->newdir('pve-backup-access-store.XXXXXX', TMPDIR => 1);
    my $trial = {
        class => $class,
        tap => $TAP->new,
        scfg => { path => "$store", scfg_of($opt)->%* },
        storeid => 'try-provider',
        'storage-plugin' => $opt->{'storage-plugin'},
        'usual-plugin' => usual_plugin(),
        'backup-only' => $opt->{'backup-only'},
        log => [],
    };
    run_trial($trial);
    return $trial->{tap}->finish ? 0 : 1;
}

1;
