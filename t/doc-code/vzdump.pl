# The block defines archive_external and cleanup of a VZDump plugin for a guest as on Proxmox VE with the disk
# drive-scsi0. They are called as VZDump does; the fixture contains what stays in qemu-server. It makes a full
# backup, a failing one and incremental ones, with both mechanisms, and lets each step fail in turn.

use v5.36;

use PBA::Test::Backend;
use PBA::Test::DocCode qw(check_same run_perl);
use PBA::Test::Provider;
use PBA::Test::QMPProxy;

my $mib = 1024 * 1024;

my %notes;
my $proxy;    # between the code and QEMU

package PBA::Test::VZDumpPlugin {

    # The steps that can fail are named after calls.
    sub note ($self, $name) {
        push($self->{calls}->@*, $name);
        die "$name failed\n" if ($self->{fails} // '') eq $name;
    }

    sub start_external ($self, $vmid) { $self->note('start') }

    sub attach_external ($self, $task, $vmid) {
        $self->note('attach');
        $task->{disks} = [{ qmdevice => 'drive-scsi0' }];
    }

    sub guest_config ($self, $task) { return "name: test\n" }
    sub firewall_config ($self, $task) { return $self->{firewall} // () }

    # A signal may come after the guest has been frozen, before this returns.
    sub qga_fs_freeze ($self, $task, $vmid) {
        $self->note('freeze');
        kill('TERM', $$) if $self->{'signal in'} eq 'freeze';
        return 1;
    }

    # qemu-server's thaw catches every exception, also that of a signal that comes before the agent has the command.
    sub qga_fs_thaw ($self, $vmid) {
        return $self->note('thaw') if $self->{'signal in'} ne 'thaw';
        $self->{'signal in'} = '';
        return eval { kill('TERM', $$); 1 };
    }

    # If this is to fail, it fails only the first time, in the hook.
    sub resume_vm_after_job_start ($self, $task, $vmid) {
        $self->note('resume');
        delete($self->{fails}) if ($self->{fails} // '') eq 'resume';
    }

    sub restore_vm_power_state ($self, $vmid) { $self->note('power') }
    sub detach_external ($self, $task, $vmid) { $self->note('detach') }
    sub load_note ($self, $key) { return $notes{$key} }

    # The note about the backup is stored before the provider has any data.
    sub store_note ($self, $key, $text) {
        $notes{$key} = $text;
        kill('TERM', $$) if $self->{'signal in'} eq 'note';
    }

    sub log ($self, $level, $message) { push($self->{log}->@*, "$level: $message") }
    sub loginfo ($self, $message) { $self->log('info', $message) }
    sub logerr ($self, $message) { $self->log('err', $message) }
}

# Makes one backup with a new plugin, in which a call or a QMP command fails. Returns the plugin. Dies unless
# the backup died exactly if it had to.
sub vzdump ($package, $state, $mechanism, %opt) {
    my $provider = PBA::Test::Provider->new(mechanism => $mechanism);
    $provider->{on}{ $opt{provider} } = sub (@) { die "$opt{provider} failed\n" }
        if $opt{provider};
    $provider->{on}{backup_vm} = sub (@) { kill('TERM', $$); select(undef, undef, undef, 5) }
        if $opt{signal};
    my %opts = (storage => 'test', $opt{bwlimit} ? (bwlimit => $opt{bwlimit}) : ());
    my $plugin = bless(
        {
            vzdump => { opts => \%opts, 'backup-provider' => $provider },
            vm_was_running => !$opt{started},
            firewall => $opt{firewall},
            fails => $opt{call},
            'signal in' => $opt{in} // '',
            calls => $provider->{calls},
            provider => $provider,
        },
        $package
    );
    {
        no strict 'refs';
        @{"${package}::ISA"} = 'PBA::Test::VZDumpPlugin';
    }
    undef($proxy);
    $proxy = PBA::Test::QMPProxy->start(
        $state->{proxy}->%*,
        refuse => $opt{command},
        terminate => $opt{terminate}
    );
    my $task = {};
    local @SIG{qw(INT TERM QUIT HUP PIPE)}
        = (sub { die "interrupted by signal\n" }) x 5;    # the job's handlers
    my $ok = eval { $plugin->archive_external($task, 100); 1 };
    my $error = $@;
    $plugin->cleanup($task, 100);
    die "VZDump and the provider would get an object: $error" if ref($error);
    die "it is '$error' that it died with\n" if !$ok && $error !~ ($opt{error} // qr/\A\z/);
    die "it did not die\n" if $ok && $opt{error};
    return $plugin;
}

sub names ($plugin) {
    return join(' ', map { ref ? $_->[0] : $_ } $plugin->{calls}->@*);
}

sub check_good ($plugin, %opt) {
    my $provider = $plugin->{provider};
    my ($query, $vm) = map {
        my $name = $_;
        grep { ref && $_->[0] eq $name } $plugin->{calls}->@*
    } qw(backup_vm_query_incremental backup_vm);
    my $names = names($plugin);
    die "the calls were: $names\n"
        if $names ne 'provider_name start attach backup_get_mechanism backup_vm_query_incremental'
        . ' freeze thaw resume backup_vm power detach';
    delete($query->[2]{'drive-scsi0'}->@{qw(base identity node)});
    delete($vm->[4]->@{qw(backup-id guest-uuid)});
    check_same({ 'drive-scsi0' => { size => 16 * $mib } }, $query->[2]);
    my %options;
    $options{'bandwidth-limit'} = $opt{bwlimit} * 1024 if $opt{bwlimit};
    $options{'firewall-config'} = $plugin->{firewall} if defined($plugin->{firewall});
    check_same(\%options, $vm->[4]);
    my @lines = (
        qr/starting external backup via test/,
        qr/backup mechanism:? '?(?:nbd|file-handle)/,
        qr/setting up \S+ ?access/,
        qr/drive-scsi0: dirty-bitmap status: /,
        qr/tearing down backup.access/,
    );

    for my $line (@lines) {
        my $count = grep { $_ =~ $line } $plugin->{log}->@*;
        die "$count lines like $line in the log: $plugin->{log}->@*\n" if $count != 1;
    }
    my @warnings = grep { m/\A(?:warn|err)/ } $plugin->{log}->@*;
    die "warnings: @warnings\n" if @warnings;
    return ($provider->{regions}{'drive-scsi0'} // [])->[1];
}

my %failures = (
    start => { call => 'start', error => qr/\Astart failed$/ },
    recover => { command => 'query-named-block-nodes', error => qr/not today/ },
    prepare => { call => 'attach', error => qr/\Aattach failed$/ },
    mechanism =>
        { provider => 'backup_get_mechanism', error => qr/\Abackup_get_mechanism failed$/ },
    query => { provider => 'backup_vm_query_incremental', error => qr/incremental failed$/ },
    freeze => { call => 'freeze', error => qr/\Afreeze failed$/ },
    'signal after freeze' => { in => 'freeze', error => qr/\Ainterrupted by signal$/ },
    setup => { command => 'backup-access-setup', error => qr/backup-access-setup.*not today/ },
    thaw => { call => 'thaw', error => qr/\Athaw failed$/ },
    hook => { call => 'resume', error => qr/\Aresume failed$/ },
    volumes => { command => 'block-export-add', error => qr/not today/ },
    'signal in the note' => { in => 'note', error => qr/\Ainterrupted by signal$/ },
    backup_vm => { provider => 'backup_vm', error => qr/\Abackup_vm failed$/ },
    signal => { signal => 1, error => qr/\Ainterrupted by signal$/ },
    teardown => { command => 'backup-access-teardown' },
);

# Whatever fails, the guest is resumed and not frozen, its power state is restored, what was attached is
# detached at the end, nothing is left except what the next backup undoes, and that backup contains all changes.
sub check_failure ($package, $state, $mechanism, $name) {
    my %opt = $failures{$name}->%*;
    $opt{started} = $name eq 'volumes';
    my $plugin = vzdump($package, $state, $mechanism, %opt);
    my $names = names($plugin);
    die "the calls were: $names\n" if $names !~ m/ power detach\z/ || $names !~ m/ resume\b/;
    die "it was thawed before it was frozen: $names\n" if $names =~ m/thaw.*freeze/;
    die "it stays frozen: $names\n" if $names =~ m/freeze(?!.* thaw)/;
    my @told = grep { m/\A(?:warn|err)/ } $plugin->{log}->@*;
    die "nothing of it is in the log\n" if !@told;
    return;
}

# A signal that does not end the backup, such as one after the bitmaps have been cleared: it is a success, and the remaining
# steps are done.
sub check_late_signal ($package, $state, $mechanism, %opt) {
    my $plugin = vzdump($package, $state, $mechanism, %opt);
    my $names = names($plugin);
    die "the calls were: $names\n" if $names !~ m/ freeze .*thaw .*backup_vm power detach\z/;
    my @told = grep { m/\A(?:warn|err)/ } $plugin->{log}->@*;
    die "the log says: @told\n" if @told && "@told" !~ m/\A\w+: interrupted by signal$/;
    die "the log says nothing of it\n" if !@told && $opt{terminate};
    my $next = vzdump($package, $state, $mechanism);
    my $dirty = ($next->{provider}{regions}{'drive-scsi0'} // [])->[1] // 0;
    die "$dirty bytes in the next backup\n" if $dirty;
    return;
}

sub check_late_signals ($package, $state, $mechanism) {
    my %teardown = (terminate => 'backup-access-teardown');
    my %cases = (
        'the teardown' => {%teardown},
        'the teardown, before the guest ends' => { %teardown, started => 1 },
        'the thaw, which catches it' => { in => 'thaw' },
    );
    for my $name (sort keys %cases) {
        my $done = eval { check_late_signal($package, $state, $mechanism, $cases{$name}->%*); 1 };
        die "a signal in $name: $@" if !$done;
    }
    return;
}

# The code as it is inserted in a file that has only these names.
sub check_alone ($block) {
    my $pragmas = q(no feature ':all'; use feature ':default'; use strict; use warnings;);
    my $text = "package PBA::Test::Alone; $pragmas no warnings 'redefine';\n$block->{code}\n1;";
    eval $text or die "it does not compile alone: $@";    ## no critic (StringyEval)
    return;
}

return sub ($block) {
    state $backend = PBA::Test::Backend->start(
        name => 'pve',
        disks => [{ id => 'scsi0', size => 16 * $mib, shape => 'drive' }],
    );
    state $state
        = {
        proxy => { target => $backend->qmp_path, listen => $backend->work_dir('proxy') . '/qmp' },
        };
    my $peer = sub ($vmid) { return { id => $vmid } };
    no warnings 'redefine';
    *PVE::QemuServer::Helpers::qmp_socket = sub ($of) {
        return $of->{id} == 100 ? $state->{proxy}{listen} : die "no guest $of->{id}\n";
    };
    my $outside = $backend->outside;
    check_alone($block);
    my $package = run_perl($block, vm_qmp_peer => $peer);
    my $has_notes = $block->{code} =~ m/store-note/;
    my @failures = grep { $has_notes || !m/note/ } sort keys %failures;
    for my $mechanism ('nbd', -e '/dev/fuse' ? 'file-handle' : ()) {
        check_good(vzdump($package, $state, $mechanism, bwlimit => 1024, firewall => "[OPTIONS]\n"),
            bwlimit => 1024);
        for my $name ($mechanism eq 'nbd' ? @failures : qw(volumes backup_vm teardown)) {
            $backend->guest->write('scsi0', 5 * $mib, 4096, 0x31);
            my $done = eval { check_failure($package, $state, $mechanism, $name); 1 };
            die "$name fails: $@" if !$done;
            my $plugin = vzdump($package, $state, $mechanism);
            my $dirty = ($plugin->{provider}{regions}{'drive-scsi0'} // [])->[1] // 0;
            die "after $name: $dirty bytes in an incremental backup\n" if $dirty < 4 * $mib;
            check_same($outside, $backend->outside);
        }
        die "a good backup keeps the bits\n"
            if check_good(vzdump($package, $state, $mechanism));
        check_late_signals($package, $state, $mechanism);
        check_same($outside, $backend->outside);
    }
    return;
};
