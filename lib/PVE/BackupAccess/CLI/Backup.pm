package PVE::BackupAccess::CLI::Backup;

# The subcommand backup.

use v5.36;

use Cwd ();
use Digest::SHA ();
use Fcntl qw(O_CREAT O_RDWR);
use File::Basename ();
use IO::Handle ();
use List::Util qw(sum uniq);
use Scalar::Util qw(weaken);

use PVE::BackupAccess::CLI qw(usage_error);
use PVE::BackupAccess::CLI::Access qw(access_options text);
use PVE::BackupAccess::CLI::ArchivePath qw(refuse_guest);
use PVE::BackupAccess::CLI::Disks qw(choose_disks);
use PVE::BackupAccess::CLI::Monitor qw(ask);
use PVE::BackupAccess::CLI::Output qw(parse_bytes read_file say_error say_json say_out);
use PVE::BackupAccess::CLI::Progress;
use PVE::BackupAccess::CLI::Store
    qw(check_store provider_in store_id store_number_for store_numbers);
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(check_name);
use PVE::BackupAccess::Reply qw(hashes);
use PVE::BackupAccess::Task;
use PVE::BackupAccess::Try qw(attempt ensure);
use PVE::BackupAccess::Wait qw(wait_for_lock);

my $id_file = '.backup-id';

# The number of the guest, from the options or from the socket's name as on Proxmox VE; undef if a
# name is used instead.
my sub vmid_of ($opt) {
    usage_error('--vmid and --guest exclude each other')
        if defined($opt->{vmid}) && defined($opt->{guest});
    return $opt->{vmid} if defined($opt->{vmid});
    return if defined($opt->{guest});
    $opt->{guest} = $opt->{domain}{name} if $opt->{domain};
    return if defined($opt->{guest});
    return $1
        if !ref($opt->{qmp})
        && File::Basename::basename($opt->{qmp}) =~ m/\A([1-9][0-9]{2,8})[.]qmp\z/;
    usage_error(
        '--vmid or --guest is missing - give the guest a number or a name, which its archives will have'
    );
}

# A domain's name may contain characters that are not allowed in the name of a guest.
my sub guest_name ($opt) {
    my $name;
    my $error = attempt { $name = check_name($opt->{guest}) };
    return $name if !$error;
    die $error if ($opt->{domain}{name} // '') ne $opt->{guest};
    usage_error(
        "$error" =~ s/\s+\z//r . ' - give another one with --guest, or a number with --vmid');
}

# The ID of this directory. It differs from that of another directory that is mounted at the same
# place. If several first backups begin at once, one of them creates the ID, and all use it.
sub identity_of ($directory) {
    my $file = "$directory/$id_file";
    sysopen(my $fh, $file, O_RDWR | O_CREAT, 0600) or die "cannot write to $directory - $!\n";
    wait_for_lock($fh, $file);
    if (!-s $fh) {
        print {$fh} unpack('H*', read_file('/dev/urandom', 16)), "\n";
        $fh->flush && $fh->sync or die "cannot write $file - $!\n";
    }
    return read_file($file);
}

# The target with this label that has bitmaps in the images. A guest without a UUID was identified
# by its QMP socket while it ran, so the target cannot be computed from the images. Whether the
# bitmaps match the archives is checked later, as for every backup.
my sub target_in_images ($opt, $label) {
    my @bitmaps = map { ($_->{'dirty-bitmaps'} // [])->@* }
        hashes('query-named-block-nodes', ask($opt->{qmp}, 'query-named-block-nodes'));
    my @targets
        = uniq(map { $_->{name} =~ m/\Apba-tied:(\Q$label\E@[0-9a-f]{12})\z/ ? $1 : () } @bitmaps);
    return @targets == 1 ? $targets[0] : undef;
}

# A bitmap contains what changed since one archive, so the target belongs to one guest in one
# directory: if two shared a bitmap, each would lack the changes that the other one has stored.
my sub target_of ($opt, $directory, $vmid) {
    my $guest = ask($opt->{qmp}, 'query-uuid')->{UUID};
    my $label = $opt->{'target-id'} // File::Basename::basename($directory);
    if ($guest =~ m/\A[0-]+\z/) {
        my $known = $opt->{images} && target_in_images($opt, $label);
        return $known if $known;
        $guest = ref($opt->{qmp}) ? '' : Cwd::realpath($opt->{qmp});
    }
    my $digest = Digest::SHA::sha256_hex(
        join(
            "\0", store_id($opt, $directory) // identity_of($directory), $directory, $vmid, $guest
        )
    );
    return text($label) . '@' . substr($digest, 0, 12);
}

my sub limit_of ($opt) {
    my $text = $opt->{'bandwidth-limit'} // return undef;
    return parse_bytes($text)
        || usage_error("--bandwidth-limit must be bytes per second, such as 50M, not '$text'");
}

my sub audit_of ($opt) {
    my $every = $opt->{'audit-every'};
    usage_error('--audit and --audit-every exclude --full, which compares nothing')
        if $opt->{full} && ($opt->{audit} || defined($every));
    usage_error("--audit-every must be a number, such as 30, not '$every'")
        if defined($every) && $every !~ m/\A[1-9][0-9]{0,5}\z/;
    return $opt->{audit} ? 1 : $every // 0;
}

my sub jobs_of ($opt) {
    my $jobs = $opt->{jobs} // 2;
    usage_error("--jobs must be a number from 1 to 16, not '$jobs'")
        if $jobs !~ m/\A[1-9][0-9]?\z/ || $jobs > 16;
    return $jobs;
}

my sub agent_hooks ($opt, $log) {
    my $socket = $opt->{'guest-agent'} // return ();
    require PVE::BackupAccess::GuestAgent;
    return PVE::BackupAccess::GuestAgent->new(socket => $socket, log => $log)->hooks;
}

my sub print_result ($opt, $directory, $result) {
    my $path = "$directory/$result->{'archive-name'}";
    if ($opt->{json}) {
        say_json({ $result->%*, archive => text($path) });
    }
    elsif (!$opt->{quiet}) {
        say_out($path);
    }
}

# The disks to back up, and a line about each disk that is left out.
my sub devices_of ($opt) {
    my ($named, $excluded) = map {
        [map { text($_) } ($_ // [])->@*]
    } $opt->@{qw(device exclude)};
    usage_error('--exclude and --device exclude each other')
        if $named->@* && $excluded->@*;
    return ($named, []) if $named->@*;
    my ($devices, $left_out) = choose_disks($opt->{qmp}, $excluded->@*);
    die join('; ', 'the guest has no disk that can be backed up', $left_out->@*) . "\n"
        if !$devices->@*;
    return ($devices, $left_out);
}

# While a guest is off, only its archives tell which drive or guest device a disk is when it runs.
my sub identify_images ($opt, $directory, $vmid) {
    my $guest = ask($opt->{qmp}, 'query-uuid')->{UUID};
    my %identities;
    my $archives = provider_in($opt, $directory, 'none', sub { })->list($vmid);
    for my $archive (grep { ($_->{guest} // $guest) eq $guest } reverse($archives->@*)) {
        my $devices = $archive->{devices} // {};
        push($identities{$_}->@*, $devices->{$_}{identity} // ()) for keys $devices->%*;
    }
    $opt->{images}->_identify(\%identities);
    return;
}

# Makes all checks that are possible before the backup begins, and returns the plan.
my sub plan ($opt, $directory) {
    my $vmid = vmid_of($opt);
    my $name = defined($opt->{guest}) ? guest_name($opt) : undef;
    my $limit = limit_of($opt);
    my $audit = audit_of($opt);
    refuse_guest($opt, $directory);
    $directory = check_store($opt, $directory);
    my ($devices, $left_out) = devices_of($opt);
    my %plan = (
        'bandwidth-limit' => $limit,
        audit => $audit,
        jobs => jobs_of($opt),
        directory => $directory,
        devices => $devices,
        'left-out' => $left_out,
        'guest-config' => defined($opt->{'guest-config'}) ? read_file($opt->{'guest-config'}) : '',
    );
    my @known = store_numbers($opt, $directory);
    $vmid //= store_number_for($opt, $directory, $name);
    identify_images($opt, $directory, $vmid) if $opt->{images};
    $plan{vmid} = $vmid;
    $plan{'target-id'} = target_of($opt, $directory, $vmid);
    $plan{'new guest'} = defined($name) ? "'$name' (vm/$vmid)" : "vm/$vmid"
        if @known && !grep { $_ == $vmid } @known;
    return \%plan;
}

# The name or number of a known guest may be misspelt. Then the backup is full, and its bitmaps stay in QEMU.
my sub warn_of_new ($plan, $task) {
    my $guest = $plan->{'new guest'} // return;
    $task->log(warn =>
            "new guest $guest - if this is a mistake, remove its archives, $plan->{directory}/vm/$plan->{vmid}, and its"
            . " bitmaps: pve-backup-access forget --target-id '$plan->{'target-id'}', with this command's options for"
            . ' the guest');
    return;
}

# Log lines go to the progress display. The error that ends the task is not logged here, because the
# caller reports it.
my sub logger ($progress) {
    return sub ($level, $message) {
        return if $level eq 'debug' || $level eq 'err';
        return $level eq 'info' ? $progress->tell($message) : $progress->warn("$level: $message");
    };
}

# One progress display for disks that are copied in parallel. How much there is to copy of a disk is known when it begins.
my sub progress_of ($plan, $progress) {
    my $count = $plan->{devices}->@*;
    return sub (@state) { $progress->update(@state) }
        if $plan->{jobs} == 1 || $count == 1;
    my (%done, %all);
    return sub ($device, $done, $all) {
        ($done{$device}, $all{$device}) = ($done, $all);
        my $begun = keys %all;
        my $which = $begun < $count ? "$begun of $count disks" : "$count disks";
        $progress->update($which, sum(values %done), sum(values %all));
    };
}

# The provider's lines go through the task to the log file that is stored with the archive.
my sub task ($opt, $plan, $progress) {
    my $task;
    my $log = sub ($level, $message) {
        push($plan->{findings}->@*, $message) if $level eq 'err';
        $task->log($level, $message) if $task;
    };
    my $provider = provider_in($opt, $plan->{directory}, $plan->{'target-id'}, $log);
    $provider->on_progress(progress_of($plan, $progress));
    $provider->make_full($opt->{full});
    $provider->audit_every($plan->{audit});
    $provider->wait_for_others($opt->{wait} // 0);
    my $made = PVE::BackupAccess::Task->new(
        access_options($opt),
        agent_hooks($opt, $log),
        (map { $_ => $plan->{$_} } qw(vmid target-id devices guest-config bandwidth-limit jobs)),
        provider => $provider,
        persistent => $opt->{persistent},
        'allow-shared' => $opt->{'allow-shared'},
        'load-note' => sub (@) { return undef },    # the provider stores IDs
        'store-note' => sub (@) { },
        log => logger($progress),
    );
    weaken($task = $made);
    return ($made, $provider);
}

sub run ($opt, $directory) {
    my $plan = plan($opt, $directory);
    my $progress = PVE::BackupAccess::CLI::Progress->new($opt->{quiet});
    my ($task, $provider) = task($opt, $plan, $progress);
    my $result;
    $task->log(info => $_) for $plan->{'left-out'}->@*;
    warn_of_new($plan, $task);
    my $end = sub ($died) {
        $progress->end;
        say_error(map { "pve-backup-access backup: $_" } $plan->{findings}->@*) if $died;
    };
    ensure(sub { $result = $task->run_job }, $end);
    $result->{audit} = $provider->audit_findings if $plan->{audit};
    print_result($opt, $plan->{directory}, $result);
    die join("\n", map { $_->{text} } $result->{audit}->@*) . "\n" if ($result->{audit} // [])->@*;
    return 0;
}

1;
