package PBA::Test::Backend;

# A virtual machine with one of the two backends: a stock QEMU, or Proxmox' commands, which the front provides
# unless QEMU itself has them. The same tests run on both.

use v5.36;

use JSON::PP ();
use Test::More ();

use PVE::BackupAccess;

use PBA::Test::Front;
use PBA::Test::Model;
use PBA::Test::VM;

my $VM = 'PBA::Test::VM';

my $TARGET = 'snapshot-access:test';

# If QEMU has Proxmox' commands, the module uses these.
sub names ($class) { return $VM->is_proxmox ? 'pve' : qw(upstream pve) }

# name: upstream or pve; form: that of Proxmox' command; fleecing => 0: the test itself attaches the fleecing
# images. All other options are for PBA::Test::VM.
sub start ($class, %opt) {
    my ($name, $form, $fleecing) = delete(@opt{qw(name form fleecing)});
    Test::More::plan(skip_all => 'only for a stock QEMU')
        if $name eq 'upstream' && $VM->is_proxmox;
    my $vm = $VM->start(%opt);
    my %self = (name => $name, vm => $vm, form => $form // 'devices', fleecing => $fleecing // 1);
    my $self = bless(\%self, $class);
    $self->connect;
    return $self;
}

# The same, but the guest is paused and has no system.
sub start_paused ($class, %opt) {
    return $class->start(guest => 0, paused => 1, memory => 32, %opt);
}

# Starts a guest with disk0 and disk1 of these sizes, and creates a model of the guest's churn: { backend,
# outside, model }.
sub start_with_model ($class, $name, $sizes, $seed, $blocks) {
    my $self = $class->start(
        name => $name,
        disks => [
            { id => 'disk0', format => 'qcow2', size => $sizes->{disk0} },
            { id => 'disk1', size => $sizes->{disk1}, bus => 'scsi', shape => 'drive' },
        ],
    );
    my $model = PBA::Test::Model->new(
        seed => $seed,
        disks => [map { { id => $_, size => $sizes->{$_} } } qw(disk0 disk1)],
        blocks => $blocks,
    );
    return { backend => $self, outside => $self->outside, model => $model };
}

# Creates what a backup needs. Must be called again after a restart of the VM.
sub connect ($self) {
    my $vm = $self->{vm};
    undef $self->{front};
    return if $self->{name} eq 'upstream';
    if (!$VM->is_proxmox) {
        $self->{front} = PBA::Test::Front->start(
            qemu_qmp => $vm->qmp_path,
            listen => $vm->dir . '/front.qmp',
            form => $self->{form},
            pid => $vm->pid,
        );
    }
    $self->attach_fleecing($_) for $self->{fleecing} ? $vm->disk_ids : ();
    return;
}

sub attach_fleecing ($self, $id, %opt) {
    my $device = $self->device($id);
    $self->{vm}->add_fleecing_node($id, as => "$device-fleecing", %opt);
    return;
}

sub restart ($self, @args) {
    undef $self->{front};
    $self->{vm}->restart(@args);
    $self->connect;
    return;
}

sub name ($self) { return $self->{name} }
sub vm ($self) { return $self->{vm} }
sub guest ($self) { return $self->{vm}->guest }

# Writes as the guest does: by its system, or by QEMU if it has none.
sub write ($self, $id, $offset, $length, $byte) {
    return $self->guest->write($id, $offset, $length, $byte) if $self->{vm}{opt}{guest};
    return $self->{vm}->qemu_io($id, "write -P $byte $offset $length");
}
sub front ($self) { return $self->{front} }
sub device ($self, $id) { return $self->{vm}->disk($id)->{device} }
sub qmp_path ($self) { return $self->{front} ? $self->{front}->socket_path : $self->{vm}->qmp_path }

# A directory for fleecing images and the NBD socket, in which nothing may be left.
sub work_dir ($self, $name) {
    my $dir = $self->{vm}->dir . "/$name";
    mkdir($dir, 0700);
    return $dir;
}

sub left_files ($self) {
    return map { glob("$self->{vm}{dir}/$_/*") } qw(run fleecing);
}

sub options ($self, %opt) {
    my %fleecing
        = $self->{name} eq 'upstream' ? ('fleecing-dir' => $self->work_dir('fleecing')) : ();
    return (
        qmp => $self->qmp_path,
        'target-id' => $TARGET,
        'run-dir' => $self->work_dir('run'),
        timeout => 30,
        %fleecing,
        %opt,
    );
}

sub access ($self, %opt) {
    return PVE::BackupAccess->new($self->options(%opt));
}

sub status ($self) {
    my %options = $self->options;
    delete($options{'target-id'});
    return PVE::BackupAccess->status(%options);
}

# [{ device, bitmap-mode }] for all disks, with one mode for all.
sub devices ($self, $mode, @ids) {
    @ids = $self->{vm}->disk_ids if !@ids;
    return [map { { device => $self->device($_), 'bitmap-mode' => $mode } } @ids];
}

# A task that backs up all disks with that provider. Its log is kept until the next one.
sub task ($self, $provider, %opt) {
    require PVE::BackupAccess::Task;
    my $log = $self->{log} = [];
    return PVE::BackupAccess::Task->new(
        $self->options,
        vmid => 100,
        'state-dir' => $self->work_dir('state'),
        provider => $provider,
        devices => [map { $self->device($_) } $self->{vm}->disk_ids],
        'guest-config' => "name: test\n",
        log => sub ($level, $message) { push($log->@*, "$level: $message") },
        %opt,
    );
}

# The number of lines in the task's log that match.
sub logged ($self, $pattern) {
    return scalar(grep { $_ =~ $pattern } $self->{log}->@*);
}

# The block graph, the exports and the NBD server's files when no access is active.
sub outside ($self) {
    return {
        graph => $self->{vm}->graph,
        exports => $self->{vm}->exports,
        files => [$self->left_files],
    };
}

# The bitmaps that are not the target's own; there are none when no access is active. A bitmap with an ID has
# one companion, which is not returned.
sub other_bitmaps ($self) {
    my $bitmaps = $self->{vm}->bitmaps;
    my @others;
    for my $node (sort keys $bitmaps->%*) {
        my @names = sort keys $bitmaps->{$node}->%*;
        my ($companion) = grep { m/\Apba-id:/ } @names;
        my $is_tied = grep { $_ eq "pba-tied:$TARGET" } @names;
        push(@others,
            map { "$node: $_" } grep { !m/\A(?:pba:|pba-tied:)?\Q$TARGET\E\z/ }
            grep { !$is_tied || $_ ne ($companion // '') } @names);
    }
    return \@others;
}

# The differences from the state without an access; an empty list if there are none.
sub problems ($self, $outside) {
    state $json = JSON::PP->new->canonical;
    my @problems;
    push(@problems, 'the VM is gone') if !$self->{vm}->is_alive;
    push(@problems, 'something is left')
        if $json->encode($self->outside) ne $json->encode($outside);
    push(@problems, 'a bitmap is left') if $self->other_bitmaps->@*;
    return @problems;
}

# Makes another backup. Returns { device => { offset of a dirty block of 64 KiB => 1 } } of the devices whose
# bitmap is used.
sub next_dirty ($self, %options) {
    my $access = $self->access(%options);
    my $infos = $access->setup($self->devices('use'));
    my %dirty;
    for my $info ($infos->@*) {
        next if $info->{'bitmap-action'} ne 'used';
        my $volume = $access->volume($info->{device});
        my @blocks;
        while (my ($offset, $length) = $volume->next_dirty_region) {
            push(@blocks, map { $offset + $_ * 65536 } 0 .. $length / 65536 - 1);
        }
        $dirty{ $info->{device} } = { map { $_ => 1 } @blocks };
    }
    $access->teardown(1);
    return \%dirty;
}

# Checks what must hold after every test. The front itself stops its QEMU at the cut, which a real Proxmox QEMU
# does not need.
sub check_manners ($self) {
    if (my $front = $self->{front}) {
        my $call = $front->fatal_call;
        Test::More::is($call && $call->{why}, undef, 'no call that kills a Proxmox QEMU');
        Test::More::ok(!(grep { $_ eq 'stop' } $front->names), 'no stop was sent');
    }
    else {
        my @stops = $self->{vm}->events('STOP');
        Test::More::is(scalar(@stops), 0, 'the guest was never paused');
    }
}

# [{ node, name, count, recording, ... }] of the target's bitmaps.
sub target_bitmaps ($self) {
    my $bitmaps = $self->{vm}->bitmaps;
    my @found;
    for my $node (sort keys $bitmaps->%*) {
        for my $name (sort keys $bitmaps->{$node}->%*) {
            push(@found, { node => $node, name => $name, $bitmaps->{$node}{$name}->%* })
                if $name eq $TARGET || $name eq "pba:$TARGET";
        }
    }
    return @found;
}

1;
