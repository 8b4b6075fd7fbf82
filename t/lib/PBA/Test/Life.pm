package PBA::Test::Life;

# The life of a guest's two disks, their bitmaps and their archives: a sequence of events, between which the
# guest writes. After each backup, the restored disks must equal the disks byte by byte. A model knows what
# every disk image contains. There is no guest system: qemu-io makes the writes through the guest's device.
#
#   my $life = PBA::Test::Life->new(backend => 'upstream', provider => 'chain', seed => 1);
#   my $problem = $life->run(qw(ok ram ok rollback-ram ok));    # undef: no problem
#
# provider: chain (PVE::BackupAccess::Provider::Qcow2Chain); blind, which is chain without the identities of
# disks; example (Example::RawImages); or raw, which does not support IDs. naming: node, qdev or drive, the kind of names that backups use.
# persistent: bitmaps survive a restart.

use v5.36;

use File::Path ();
use POSIX ();

use PVE::BackupAccess::Provider::Qcow2Chain;
use PVE::BackupAccess::Provider::Qcow2Chain::Image;
use PVE::BackupAccess::Provider::Qcow2Chain::Server;
use PVE::BackupAccess::Task;

use PBA::Test::Backend;
use PBA::Test::Life::Blind;
use PBA::Test::Life::Chain;
use PBA::Test::Life::Example;
use PBA::Test::Life::Machine;
use PBA::Test::Life::Others;
use PBA::Test::Life::Raw;
use PBA::Test::Life::State;
use PBA::Test::Life::Stores;
use PBA::Test::QemuNbd;
use PBA::Test::RawProvider;

use parent -norequire, map { "PBA::Test::Life::$_" } qw(Machine Others State Stores);

$PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $ENV{PBA_QEMU_IMG} // 'qemu-img';
$PVE::BackupAccess::Provider::Store::Server::qemu_nbd = $ENV{PBA_QEMU_NBD} // 'qemu-nbd';

my $mib = 1024 * 1024;
my $step = 4 * $mib;    # the unit of a resize: one bit of a bitmap of Proxmox' QEMU
my $size = 4 * $step;
my $block = 65536;
my @ids = qw(disk0 disk1);
my $target = 'snapshot-access:test';
my $uuid = '11111111-2222-3333-4444-555555555555';

my %classes = map { lc($_) => "PBA::Test::Life::$_" } qw(Blind Chain Example Raw);

my %events = (
    'ok' => \&_backup,
    'failed' => sub ($self) { $self->_failed('begin') },
    'failed-late' => sub ($self) { $self->_failed('end') },
    'killed' => sub ($self) { $self->_killed('begin') },
    'killed-late' => sub ($self) { $self->_killed('end') },
    'ram' => sub ($self) { $self->_ram_snapshot },
    'rollback-ram' => sub ($self) { $self->_ram_rollback },
    'host' => sub ($self) { $self->_host_snapshot },
    'rollback-host' => sub ($self) { $self->_host_rollback },
    'savevm' => sub ($self) { $self->_savevm },
    'loadvm' => sub ($self) { $self->_loadvm },
    'migrate' => sub ($self) { $self->_migrate_and_back(node => 'b', store => 'node-b') },
    'restart' => sub ($self) { $self->_restart },
    'off' => sub ($self) { $self->_back_up_images },
    'crash' => sub ($self) { $self->_crash },
    'swap' => sub ($self) { $self->_swap },
    'replug' => sub ($self) { $self->_replug },
    'alias' => \&_alias,
    'rename' => \&_rename_disks,
    'renumber' => sub ($self) { $self->_renumber },
    'grow' => sub ($self) { $self->_resize($step) },
    'shrink' => sub ($self) { $self->_resize(-$step) },
    'shrink-grow' => sub ($self) { $self->_resize(-$step) && $self->_resize($step) },
    'other-store' => sub ($self) { $self->_backup(store => 'other') },
    'copied-store' => sub ($self) { $self->_copy_store },
    'removed' => sub ($self) { $self->_remove_newest },
    'stranger' => sub ($self) { $self->_stranger },
    'second-target' => sub ($self) { $self->_backup(store => 'second', target => 'second') },
    'unaware' => sub ($self) { $self->_backup(unaware => 1) },
);

# Rarer events, and actions of other programs.
my %more_events = (
    'failed-kept' => sub ($self) { $self->_failed('cleanup') },
    'shared-store' => sub ($self) { $self->_migrate_and_back },
    'store-saved' => sub ($self) { $self->_save_store },
    'store-back' => sub ($self) { $self->_put_store_back },
    'second-target-here' =>
        sub ($self) { $self->_backup(store => $self->_current_store, target => 'second') },
    'persistence' => sub ($self) { $self->_change_persistence },
    'hand-remove' => sub ($self) { $self->_hand('remove') },
    'hand-disable' => sub ($self) { $self->_hand('disable') },
    'hand-untie' => sub ($self) { $self->_hand('untie') },
    'hand-record' => sub ($self) { $self->_hand('record') },
    'hand-second-companion' => sub ($self) { $self->_hand('second-companion') },
    'hand-rename' => sub ($self) { $self->_hand('rename') },
    'hand-odd-names' => sub ($self) { $self->_hand('odd-names') },
    'move-disk' => sub ($self) { $self->_move_disk },
    'overlay' => sub ($self) { $self->_overlay },
    'grow-offline' => sub ($self) { $self->_resize_offline($step) },
    'shrink-grow-offline' =>
        sub ($self) { $self->_resize_offline(-$step) && $self->_resize_offline($step) },
    'written-off' => sub ($self) { $self->_change_image(0) },
    'committed-off' => sub ($self) { $self->_change_image(1) },
    'twin' => sub ($self) { $self->_twin },
    'other-guest' => sub ($self) { $self->_other_guest },
    'old-manifests' => sub ($self) { $self->_forget_identities },
    'odd-notes' => sub ($self) { $self->_spoil_notes },
    'one-disk' => sub ($self) { $self->_backup(only => ['disk1']) },
    'full' => sub ($self) { $self->_backup(full => 1) },
    'audit' => sub ($self) { $self->_backup(audit => 1) },
    'prune' => sub ($self) { $self->_provider($self->_current_store)->prune(100, 1); return },
);

# Events while the provider of a backup is asked what it builds on: after QEMU has told the bases of the bitmaps, and
# before the access is set up.
for my $event (
    qw(swap renumber replug shrink-grow rollback-ram rollback-host restart crash migrate),
    qw(other-store second-target hand-remove hand-untie))
{
    my $code = $events{$event} // $more_events{$event};
    $more_events{"asked-$event"} = sub ($self) { $self->_backup_during($code) };
}

# After these events, a bitmap without an ID may not match the newest archive, and nothing shows it.
my %unseen = map { $_ => 1, "asked-$_" => 1 }
    qw(rollback-ram rollback-host loadvm migrate shared-store swap renumber rename alias shrink-grow
    shrink-grow-offline twin other-guest stranger move-disk overlay store-back);

# Events that only a provider that supports IDs can detect, and what only Qcow2Chain can do.
my @need_ids
    = qw(other-store asked-other-store removed unaware store-saved store-back second-target-here);
my @need_chain = qw(full audit prune old-manifests);
my %impossible = (example => \@need_chain, raw => [@need_ids, @need_chain]);

sub _possible ($provider, $events) {
    my %impossible = map { $_ => 1 } ($impossible{$provider} // [])->@*;
    return sort grep { !$impossible{$_} } keys $events->%*;
}

sub events ($class, $provider) { return _possible($provider, \%events) }

sub all_events ($class, $provider) {
    return map { _possible($provider, $_) } \%events, \%more_events;
}

sub new ($class, %opt) {
    my $self = bless({ naming => 'node', persistent => 0, %opt }, $class);
    my $shape = $self->{naming} eq 'drive' ? 'drive' : 'blockdev';
    $self->{backend} = PBA::Test::Backend->start_paused(
        name => $self->{backend},
        fleecing => 0,
        args => ['-uuid', $uuid],
        disks => [
            map { { id => $_, size => $size, format => 'qcow2', bus => 'scsi', shape => $shape } }
                @ids
        ],
    );
    $self->{uuid} = $uuid;
    $self->{store} = $self->{backend}->work_dir('store');
    $self->{content} = { map { $self->_vm->disk($_)->{file} => "\7" x $size } @ids };
    $self->_vm->qemu_io($_, "write -P 7 0 $size") for @ids;
    $self->{counts} = { incremental => 0, full => 0, events => 0 };
    $self->{done} = [];
    srand($self->{seed} // 1);
    return $self;
}

sub backend ($self) { return $self->{backend} }
sub counts ($self) { return $self->{counts} }
sub modes ($self) { return $self->{modes} }
sub log ($self) { return $self->{log} }
sub _vm ($self) { return $self->{backend}->vm }

# Runs the events. Returns what happened and what is wrong, or undef if nothing is wrong.
sub run ($self, @events) {
    for my $event (@events) {
        push($self->{done}->@*, $event);
        $self->{counts}{events}++;
        my $code = $events{$event} // $more_events{$event};
        my $problem = eval { $self->_write; $code->($self); $self->{problem} } // $@;
        $self->{unfit} = { map { $_ => 1 } @ids } if $unseen{$event};
        next if !$problem;
        my @lines = map { "    $_\n" } ($self->{log} // [])->@*;
        return join(' ', $self->{done}->@*) . ": $problem\n@lines";
    }
    return undef;
}

# The disks must match the model; if they do not, the model is wrong.
sub check_disks ($self) {
    my $vm = $self->_vm;
    $vm->quit;
    return grep { $self->{content}{ $vm->disk($_)->{file} } ne content($vm->raw_image($_)) } @ids;
}

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>) // '';
}

# ---- files ----

# The image of the disk in that slot, that is, of that guest device.
sub _file_in ($self, $id) {
    my $disk = $self->_vm->disk($id);
    return $self->_vm->disk($disk->{plugged} // $id)->{file};
}

sub _naming ($self, $alias) {
    return $self->{naming} if !$alias;
    return $self->{naming} eq 'node' ? 'qdev' : 'node';
}

sub _name ($self, $id, $alias = 0) {
    my $naming = $self->_naming($alias);
    return $naming eq 'qdev' ? "$id-dev" : $naming eq 'drive' ? "drive-$id" : $id;
}

sub _file_of_name ($self, $id, $alias) {
    return $self->_naming($alias) eq 'qdev'
        ? $self->_file_in($id)
        : $self->_vm->disk($id)->{file};
}

sub _write ($self) {
    for my $id (@ids) {
        my $file = $self->_file_in($id);
        my $length = length($self->{content}{$file});
        my $offset = $block * int(rand($length / $block));
        my $byte = 1 + $self->{writes}++ % 255;
        $self->_vm->qemu_io($id, "write -P $byte $offset $block");
        $self->_vm->qemu_io($id, 'flush');
        substr($self->{content}{$file}, $offset, $block, chr($byte) x $block);
    }
    return;
}

# ---- backups ----

sub _provider ($self, $store) {
    my $path = "$self->{store}/$store";
    File::Path::make_path($path);
    return $classes{ $self->{provider} }->new(
        undef, { path => $path, 'state-dir' => "$self->{store}/notes" },
        'test', sub ($level, $message) { push($self->{log}->@*, "$level: $message") }
    );
}

sub _current_store ($self) { return $self->{current} // 'first' }

# Does what qemu-server does: it first undoes what a killed backup left behind.
sub _attach_fleecing ($self) {
    return if $self->{backend}->name eq 'upstream';
    $self->_detach_fleecing if $self->{fleecing};
    for my $id (@ids) {
        my $file = $self->_vm->disk($id)->{file};
        $self->{backend}->attach_fleecing($id, size => length($self->{content}{$file}));
    }
    $self->{fleecing} = 1;
    return;
}

sub _detach_fleecing ($self) {
    return if !$self->{fleecing};
    $self->_recover;
    $self->_vm->remove_fleecing_node($self->{backend}->device($_) . '-fleecing') for @ids;
    $self->{fleecing} = 0;
    return;
}

sub _recover ($self) {
    PVE::BackupAccess->recover($self->{backend}->options, log => sub { });
    $self->{dead} = 0;
    return;
}

# The options of the task.
sub _task_options ($self, %opt) {
    my $target_id = $opt{target} ? "snapshot-access:$opt{target}" : $target;
    return (
        devices => [map { $self->_name($_, $opt{alias}) } ($opt{only} // \@ids)->@*],
        'target-id' => $target_id,
        'firewall-config' => '',
        $self->{persistent} || $opt{images} ? (persistent => 1) : (),
        $opt{images} ? (qmp => $opt{images}->qmp) : (),
        'state-dir' => $self->{backend}->work_dir('state-' . ($self->{node} // 'a')),
        log => sub ($level, $message) { push($self->{log}->@*, "$level: $message") },
    );
}

sub _run_backup ($self, $provider, %opt) {
    my %options = $self->_task_options(%opt);
    $provider->make_full(1) if $opt{full};
    $provider->audit_every(1) if $opt{audit};
    return $self->_unaware($provider, \%options) if $opt{unaware};
    return $self->{backend}->task($provider, %options)->run_job;
}

# Makes a backup like a program that does not support IDs, such as qemu-server.
sub _unaware ($self, $provider, $options) {
    my @devices = $options->{devices}->@*;
    my $access = $self->{backend}->access(
        'target-id' => $options->{'target-id'},
        $self->{persistent} ? (persistent => 1) : (), log => sub { }
    );
    $provider->job_init(time());
    my $name = $provider->backup_init(100, 'qemu', time())->{'archive-name'};
    my $sizes = $access->sizes(@devices);
    my $modes = $provider->backup_vm_query_incremental(100,
        { map { $_ => { size => $sizes->{$_} } } @devices });
    $access->setup([map { { device => $_, 'bitmap-mode' => $modes->{$_} } } @devices]);
    my $volumes = $access->volumes('nbd');
    $provider->backup_vm(100, "name: test\n", $volumes, { 'firewall-config' => '' });
    $provider->backup_cleanup(100, 'qemu', 1, {});
    $access->teardown(1);
    return {
        'archive-name' => $name,
        devices =>
            { map { $_ => { 'bitmap-mode' => $volumes->{$_}{'bitmap-mode'} } } keys $volumes->%* },
    };
}

sub _backup ($self, %opt) {
    $self->@{qw(log modes)} = ([], {});
    my $provider = $opt{provider} // $self->_provider($opt{store} // $self->_current_store);
    $self->_attach_fleecing;
    my $result = eval {
        $self->_recover if $opt{target};    # the access of a dead process for another target stays
        $self->_run_backup($provider, %opt);
    };
    my $error = $@;
    return $self->_retry_after($error, %opt) if !$result;
    $self->{dead} = 0;
    $self->_detach_fleecing;
    $self->_judge_audit($provider) if $opt{audit};
    for my $id (($opt{only} // \@ids)->@*) {
        my $device = $self->_name($id, $opt{alias});
        my $mode = $self->{modes}{$id} = $result->{devices}{$device}{'bitmap-mode'};
        $self->{counts}{ $mode eq 'reuse' ? 'incremental' : 'full' }++;
        next if $opt{unaware} && $self->_is_unfit($id, $mode);
        my $file = $self->_file_of_name($id, $opt{alias});
        $self->_compare($provider, $result->{'archive-name'}, $device, $file);
    }
    return;
}

# For backups without IDs: whether the backup may be wrong, because it used a bitmap after an event that cannot
# be detected.
sub _is_unfit ($self, $id, $mode) {
    delete($self->{unfit}{$id}) if $mode ne 'reuse';
    return $self->{unfit}{$id};
}

# No event of a life may make a bitmap lack a bit.
sub _judge_audit ($self, $provider) {
    my ($finding) = $provider->audit_findings->@*;
    $self->{problem} = $finding->{text} if $finding;
    return;
}

# What a killed backup left behind may only be undone after the VM has been stopped.
sub _retry_after ($self, $error, %opt) {
    return $self->_detach_fleecing if $opt{'may fail'} && $error !~ m/ line [0-9]+[.]?$/;
    $self->{problem} = "the backup failed: $error";
    return if $opt{again} || $error !~ m/until the VM is stopped/;
    delete($self->{problem});
    $self->_restart;
    return $self->_backup(%opt, again => 1);
}

sub _compare ($self, $provider, $archive, $device, $file) {
    my ($format, $from) = $provider->content_of($archive, $device);
    my $restored = $from;
    if ($format ne 'raw') {
        $restored = "$self->{store}/restored.raw";
        PBA::Test::QemuNbd::img('convert', '-f', $format, '-O', 'raw', $from, $restored);
    }
    my ($got, $expected) = (content($restored), $self->{content}{$file});
    return if $got eq $expected;
    my $wrong = length($got) == length($expected) ? ($got ^. $expected) =~ tr/\0//c : 'some';
    $self->{problem} = "$device: $wrong bytes of what is restored are not the disk's";
    return;
}

sub _failed ($self, $when) {
    $self->{log} = [];
    my $provider = $self->_provider($self->_current_store);
    $provider->{strike} = sub ($now) { die "the provider fails\n" if $now eq $when };
    $self->_attach_fleecing;
    my $done = eval { $self->_run_backup($provider); 1 };
    $self->{problem} = 'a backup that fails is good' if $done;
    $self->_detach_fleecing if $@ !~ m/until the VM is stopped/;
    return;
}

sub _killed ($self, $when) {
    $self->{log} = [];
    $self->_attach_fleecing;
    $self->{dead} = 1;
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        my $provider = $self->_provider($self->_current_store);
        $provider->{strike} = sub ($now) { kill(KILL => $$) if $now eq $when };
        eval { $self->_run_backup($provider) };
        POSIX::_exit(1);
    }
    waitpid($pid, 0);
    return;
}

# Makes a backup during which something happens, when its provider is asked. It is right, or it fails.
sub _backup_during ($self, $happen) {
    my $provider = $self->_provider($self->_current_store);
    $provider->{strike} = sub ($now) { $happen->($self) if $now eq 'asked' };
    return $self->_backup(provider => $provider, 'may fail' => 1);
}

# Whether backups can use two different names of a disk.
sub _has_alias ($self) {
    return $self->{naming} ne 'drive' && $self->{backend}->name eq 'upstream';
}

sub _alias ($self) { return $self->_has_alias ? $self->_backup(alias => 1) : undef }

# From now on, backups use the other names of the disks.
sub _rename_disks ($self) {
    $self->{naming} = $self->_naming(1) if $self->_has_alias;
    return;
}

1;
