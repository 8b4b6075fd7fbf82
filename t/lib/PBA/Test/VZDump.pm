package PBA::Test::VZDump;

# Backups of a guest by the real PVE::VZDump, in one of three forms. 'today' is qemu-server's own code. The
# other two have archive_external and cleanup of doc/qemu-server.md, word for word, with today's cleanup as
# detach_external. Each backup runs in a separate process, as a task does.
#
#   my $made = PBA::Test::VZDump->new(dir => $dir, vmid => 100)->backup('one object', 'nbd');

use v5.36;

use File::Path qw(make_path);
use JSON::PP ();
use POSIX ();
use Time::HiRes ();

use PBA::Test::DocCode;
use PBA::Test::Provider;
use PBA::Test::VZDump::Host qw(write_file);

my $json = JSON::PP->new->canonical->allow_blessed;

# Code that stays in qemu-server, and is in archive_external today. It can access what is private to the file.
my $stays = <<'PERL';
use feature 'signatures';
sub start_external ($self, $vmid) {
    $self->enforce_vm_running_for_backup($vmid);
    $self->{qmeventd_fh} = PVE::QemuServer::register_qmeventd_handle($vmid);
}
sub attach_external ($self, $task, $vmid) {
    $attach_tpmstate_drive->($self, $task, $vmid);
    my $is_template = PVE::QemuConfig->is_template($self->{vmlist}{$vmid});
    my $support = mon_cmd($vmid, 'query-proxmox-support');
    my $options = $self->{vzdump}{opts}{fleecing};
    check_and_prepare_fleecing($self, $vmid, $options, $task->{disks}, $is_template, $support, 1)
        or die "cannot set up backup access without fleecing\n";
    $task->{'use-fleecing'} = 1;
}
sub guest_config ($self, $task) {
    return PVE::Tools::file_get_contents("$task->{tmpdir}/qemu-server.conf");
}
sub firewall_config ($self, $task) {
    my $file = "$task->{tmpdir}/qemu-server.fw";
    return -e $file ? PVE::Tools::file_get_contents($file) : undef;
}
PERL

# dir => of the images and of the stored data, vmid => the guest's.
sub new ($class, %opt) {
    return bless({ forms => _forms(), groups => {}, %opt }, $class);
}

sub _forms () {
    my ($blocks) = PBA::Test::DocCode::read_file('doc/qemu-server.md');
    my ($object, $calls) = grep { $_->{fixture} eq 'vzdump' } $blocks->@*;
    my ($notes) = grep { $_->{code} =~ m/sub load_note/ } $blocks->@*;
    return {
        today => undef,
        'one object' => "$object->{code}$notes->{code}",
        'call by call' => $calls->{code},
    };
}

# The module in that form.
sub _write_plugin ($self, $form) {
    my $name = 'PVE/VZDump/QemuServer.pm';
    my ($original) = grep { -e } map { ref ? () : "$_/$name" } @INC;
    my $source = PVE::Tools::file_get_contents($original);
    if (my $code = $self->{forms}{$form}) {
        $source =~ s/^sub archive_external \{.*?^\}\n//ms or die "archive_external has changed\n";
        $source =~ s/^sub cleanup \{/sub detach_external {/m or die "cleanup has changed\n";
        $source =~ s/^1;\s*\z//m;
        $source .= "$stays$code\n1;\n";
    }
    my $dir = "$self->{dir}/" . $form =~ s/ /-/gr;
    write_file("$dir/$name", $source);
    return $dir;
}

sub _load_plugin ($self, $form) {
    unshift(@INC, $self->_write_plugin($form));
    require PVE::VZDump;
    require PVE::VZDump::QemuServer;
    return;
}

# ---- one backup ----

# Options: mode => snapshot, suspend or stop; signal => sent in the middle of backup_vm, KILL only to the process, others to
# its group, as Proxmox VE does; dies => the name of a method of the provider; script => a hook; bwlimit. Returns what can be compared: { state, msg, calls, volumes,
# info, bytes, log, qmp, took, status }.
sub backup ($self, $form, $mechanism, %opt) {
    my $report = "$self->{dir}/report";
    unlink($report);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        POSIX::setpgid(0, 0);
        my $ok = eval { $self->_in_child($form, $mechanism, $report, %opt); 1 };
        print STDERR $@ if !$ok;
        POSIX::_exit($ok ? 0 : 1);
    }
    waitpid($pid, 0);
    my $status = $?;
    $self->{groups}{$pid} = 1;
    my $made = -e $report ? $json->decode(PVE::Tools::file_get_contents($report)) : {};
    return { $made->%*, status => $status, group => $pid };
}

# Ends processes that a backup has left behind, at the latest with this object.
sub end_group ($self, $group) {
    delete($self->{groups}{$group});
    return kill('KILL', -$group);
}

sub DESTROY ($self) {
    $self->end_group($_) for keys $self->{groups}->%*;
    return;
}

sub _in_child ($self, $form, $mechanism, $report, %opt) {
    open(STDERR, '>', "$self->{dir}/stderr") or die "stderr: $!\n";
    open(STDOUT, '>&', \*STDERR) or die "stdout: $!\n";
    local @SIG{qw(INT TERM QUIT HUP PIPE)}
        = (sub { die "interrupted by signal\n" }) x 5;    # as PVE::API2::VZDump sets them
    $self->_load_plugin($form);
    my $made = { log => [], qmp => [], volumes => {}, took => {} };
    _watch($made);
    _replace('PVE::QemuServer::vm_start',
        sub (@) { system(qw(qm start), $self->{vmid}, '--paused') });
    _replace('PVE::QemuServer::vm_stop', sub (@) { system(qw(qm shutdown), $self->{vmid}) });
    my $provider = $self->_provider($form, $mechanism, $made, %opt);
    my %fleecing = (enabled => 1, storage => 'images');
    my $vzdump = bless(
        {
            'backup-provider' => $provider,
            opts => {
                storage => $self->storage($form, $mechanism),
                mode => $opt{mode} // 'snapshot',
                stopwait => 1,
                remove => 0,
                'prune-backups' => { 'keep-all' => 1 },
                fleecing => \%fleecing,
                map { $_ => $opt{$_} } grep { $opt{$_} } qw(script bwlimit),
            },
        },
        'PVE::VZDump'
    );
    my $plugin = PVE::VZDump::QemuServer->new($vzdump);
    my $task = { vmid => $self->{vmid}, mode => $opt{mode} // 'snapshot', plugin => $plugin };
    my $ok = eval { $vzdump->exec_backup_task($task); 1 };
    $made->{died} = $ok ? undef : $@;
    $made->@{qw(state msg)} = $task->@{qw(state msg)};
    $made->{calls} = [map { $_->[0] } $provider->{calls}->@*];
    write_file($report, $json->encode($made));
    return;
}

sub storage ($self, $form, $mechanism) { return "$form-$mechanism" =~ s/ /-/gr }

# The file with the stored data of a device.
sub image ($self, $form, $mechanism, $device) {
    return "$self->{dir}/" . $self->storage($form, $mechanism) . "-$device.raw";
}

sub _replace ($name, $code) {
    no strict 'refs';
    no warnings 'redefine';
    *{$name} = $code;
    return;
}

# Records QMP commands and the duration of each part.
sub _watch ($made) {
    my $cmd = \&PVE::QMPClient::cmd;
    _replace(
        'PVE::QMPClient::cmd',
        sub ($client, $peer, $command, @rest) {
            push($made->{qmp}->@*, $command->{execute});
            return $cmd->($client, $peer, $command, @rest);
        }
    );
    for my $name (qw(archive_external cleanup)) {
        my $code = PVE::VZDump::QemuServer->can($name);
        _replace(
            "PVE::VZDump::QemuServer::$name",
            sub (@arguments) {
                my $began = Time::HiRes::time();
                my $ok = eval { $code->(@arguments); 1 };
                $made->{took}{$name} = Time::HiRes::time() - $began;
                die $@ if !$ok;
            }
        );
    }
    return;
}

sub _provider ($self, $form, $mechanism, $made, %opt) {
    my $provider = PBA::Test::Provider->new(mechanism => $mechanism, mode => 'use');
    $provider->{on} = {
        backup_vm => sub ($, $vmid, $config, $volumes, $info) {
            $made->{info} = { map { $_ => $info->{$_} } qw(bandwidth-limit firewall-config) };
            $made->{config} = $config;
            $made->{volumes} = { map { $_ => _described($volumes->{$_}) } keys $volumes->%* };
            my @stored;
            for my $device (sort keys $volumes->%*) {
                kill($opt{signal}, $opt{signal} eq 'KILL' ? $$ : -$$)
                    if $opt{signal} && $made->{bytes};
                my $file = $self->image($form, $mechanism, $device);
                my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
                my $is_full = $volumes->{$device}{'bitmap-mode'} ne 'reuse';
                my ($bytes, $keep) = _read_volume($volume, $file, $is_full);
                $made->{bytes}{$device} = $bytes;
                push(@stored, $keep);
                $volume->close;
            }
            $_->() for @stored;
        },
        backup_handle_log_file => sub ($, $vmid, $file) {
            $made->{log} = [split(m/\n/, PVE::Tools::file_get_contents($file))];
        },
    };
    $provider->{on}{ $opt{dies} } = sub (@) { die "$opt{dies} fails\n" }
        if $opt{dies};
    return $provider;
}

# Returns how many bytes were read, and the code that stores them: a backup that fails leaves the stored data as it was.
sub _read_volume ($volume, $file, $is_full) {
    my @pieces;
    unlink("$file.new");
    my $to = $is_full ? "$file.new" : sub (@piece) { push(@pieces, \@piece) };
    my $bytes = $volume->copy(to => $to)->{'bytes-read'};
    my $keep = sub {
        return rename("$file.new", $file) || die "$file: $!\n" if $is_full;
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        for my $piece (@pieces) {
            seek($fh, $piece->[0], 0);
            print {$fh} $piece->[1];
        }
        return close($fh) || die "$file: $!\n";
    };
    return ($bytes, $keep);
}

# The properties of a volume that can be compared.
sub _described ($volume) {
    my %kinds = (
        'nbd-path' => sub ($value) { -S $value ? 'a socket' : 'no socket' },
        'file-handle' => sub ($value) { 'a file of ' . -s $value },
        'next-dirty-region' => sub ($value) { ref($value) },
    );
    return {
        map {
            $_ => ($kinds{$_} // sub ($value) { $value })->($volume->{$_})
            }
            keys $volume->%*
    };
}

1;
