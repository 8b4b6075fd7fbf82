# A block defines archive_external, and perhaps cleanup, of a VZDump plugin for a guest as on Proxmox VE
# with the disk drive-scsi0. They are called as VZDump does, with what stays in qemu-server done here: a
# full backup, one that fails, and incremental ones, by both mechanisms.

use v5.36;

use PBA::Test::Backend;
use PBA::Test::DocCode;
use PBA::Test::Provider;
use PBA::Test::QMP;

my $mib = 1024 * 1024;

my %notes;

package PBA::Test::VZDumpPlugin {

    sub note ($self, $name) { push($self->{calls}->@*, $name) }

    sub prepare_external ($self, $task, $vmid) {
        $task->{disks} = [{ qmdevice => 'drive-scsi0' }];
    }

    sub guest_config ($self, $task) { return "name: test\n" }
    sub firewall_config ($self, $task) { return $self->{firewall} }
    sub qga_fs_freeze ($self, $task, $vmid) { $self->note('freeze'); return 1 }
    sub qga_fs_thaw ($self, $vmid) { $self->note('thaw') }
    sub resume_vm_after_job_start ($self, $task, $vmid) { $self->note('resume') }
    sub restore_vm_power_state ($self, $vmid) { $self->note('power') }
    sub load_note ($self, $key) { return $notes{$key} }
    sub store_note ($self, $key, $text) { $notes{$key} = $text }
    sub log ($self, $level, $message) { push($self->{log}->@*, "$level: $message") }
}

# One backup; returns the calls of the hooks and the provider, and the bytes that were dirty.
sub vzdump ($package, $mechanism, %opt) {
    my $provider = PBA::Test::Provider->new(mechanism => $mechanism);
    $provider->{on}{backup_vm} = sub (@) { die "full\n" }
        if $opt{fails};
    my $plugin = bless(
        {
            vzdump =>
                { opts => { storage => 'test', bwlimit => 1024 }, 'backup-provider' => $provider },
            firewall => $opt{fails} ? undef : "[OPTIONS]\n",
            calls => $provider->{calls},
        },
        $package
    );
    {
        no strict 'refs';
        @{"${package}::ISA"} = 'PBA::Test::VZDumpPlugin';
    }
    my $task = {};
    my $ok = eval { $plugin->archive_external($task, 100); 1 };
    my $error = $@;
    $plugin->cleanup($task, 100) if $plugin->can('cleanup');
    die "it is '$error' that it died with\n" if !$ok && !($opt{fails} && $error eq "full\n");
    die "it did not die\n" if $ok && $opt{fails};
    check_calls($plugin, $provider);
    return ($provider->{regions}{'drive-scsi0'} // [])->[1];
}

sub check_calls ($plugin, $provider) {
    my ($query, $vm) = map {
        my $name = $_;
        grep { ref && $_->[0] eq $name } $plugin->{calls}->@*
    } qw(backup_vm_query_incremental backup_vm);
    my $names = join(' ', map { ref ? $_->[0] : $_ } $plugin->{calls}->@*);
    die "the calls were: $names\n"
        if $names !~ m/\Abackup_get_mechanism \w+_incremental freeze thaw resume backup_vm\b/
        || $names !~ m/ power\z/;
    delete($query->[2]{'drive-scsi0'}{base});
    delete($vm->[4]->@{qw(backup-id guest-uuid)});
    PBA::Test::DocCode::check_same({ 'drive-scsi0' => { size => 16 * $mib } }, $query->[2]);
    my %options = ('bandwidth-limit' => $mib);
    $options{'firewall-config'} = $plugin->{firewall} if defined($plugin->{firewall});
    PBA::Test::DocCode::check_same(\%options, $vm->[4]);
    my @warnings = grep { m/\Awarn/ } $plugin->{log}->@*;
    die "warnings: @warnings\n" if @warnings;
}

return sub ($block) {
    state $backend = PBA::Test::Backend->start(
        name => 'pve',
        disks => [{ id => 'scsi0', size => 16 * $mib, shape => 'drive' }],
    );
    state $qmp = PBA::Test::QMP->new(path => $backend->qmp_path);
    my $mon_cmd = sub ($vmid, $command, %arguments) {
        delete($arguments{timeout}) // die "mon_cmd has a time limit of its own\n";
        return $qmp->execute($command, %arguments);
    };
    my $outside = $backend->outside;
    my $package = PBA::Test::DocCode::run_perl($block, mon_cmd => $mon_cmd);
    for my $mechanism ('nbd', -e '/dev/fuse' ? 'file-handle' : ()) {
        vzdump($package, $mechanism);
        $backend->guest->write('scsi0', 5 * $mib, 4096, 0x31);
        vzdump($package, $mechanism, fails => 1);
        my $dirty = vzdump($package, $mechanism);
        die "$dirty bytes in an incremental backup\n" if $dirty != 4 * $mib;
        die "a good backup keeps the bits\n" if vzdump($package, $mechanism);
    }
    PBA::Test::DocCode::check_same($outside, $backend->outside);
};
