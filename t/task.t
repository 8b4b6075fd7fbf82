# A guest's backup with a provider: the calls of the provider, their order, what it reads, and the result.
#
# One QEMU is enough: a task reaches QEMU through the module; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use List::Util qw(pairvalues sum0);
use Scalar::Util qw(weaken);
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Provider;
use PVE::BackupAccess::Task;

my $Provider = 'PBA::Test::Provider';

my $mib = 1024 * 1024;
my $seed = 20261122;
my $blocks = 2048;
my %sizes = (disk0 => 64 * $mib, disk1 => 32 * $mib + 512);
my @ids = sort keys %sizes;

# ---- order and arguments ----

my @job = (
    qw(job_init backup_init backup_get_mechanism backup_vm_query_incremental freeze thaw backup_vm),
    qw(backup_cleanup backup_handle_log_file job_cleanup)
);

sub check_arguments ($context, $arguments, $start) {
    my $backend = $context->{backend};
    my %volumes = map { $backend->device($_) => { size => $sizes{$_}, base => undef } } @ids;
    $volumes{$_}{identity} = "drive $_" for keys %volumes;
    $volumes{disk0}{node} = 'disk0';
    $volumes{disk0}{identity} = 'device /machine/peripheral/disk0-dev' if $backend->name ne 'pve';

    for my $time ($arguments->{job_init}[0], splice($arguments->{backup_init}->@*, 2, 1)) {
        ok($time >= $start && $time <= time(), 'a time of now');
    }
    my ($vmid, $config, $volumes, $info) = $arguments->{backup_vm}->@*;
    is_deeply($arguments->{backup_init}, [100, 'qemu'], 'backup_init');
    is_deeply($arguments->{backup_get_mechanism}, [100, 'qemu'], 'backup_get_mechanism');
    is_deeply(
        $arguments->{backup_vm_query_incremental},
        [100, \%volumes],
        'the sizes, and no backup before'
    );
    is_deeply([$vmid, $config], [100, "name: test\n"], 'backup_vm: the configuration');
    my ($id, $guest) = delete($info->@{qw(backup-id guest-uuid)});
    like($id, qr/\A[0-9a-f]{32}\z/, 'backup_vm: the id of the backup');
    like($guest, qr/\A[0-9a-f-]{36}\z/, 'backup_vm: the guest');
    is_deeply(
        $info,
        { 'bandwidth-limit' => 123 * $mib, 'firewall-config' => "[OPTIONS]\n" },
        'backup_vm: the limit and the firewall configuration'
    );
    is_deeply([sort keys $volumes->%*], [sort keys %volumes], 'backup_vm: the volumes');
    is_deeply($arguments->{backup_cleanup}, [100, 'qemu', 1, {}], 'backup_cleanup');
    is_deeply($arguments->{job_cleanup}, [], 'job_cleanup');
}

sub check_job ($context) {
    my $backend = $context->{backend};
    my $log_file;
    my $provider = $Provider->new(
        on => {
            backup_handle_log_file => sub ($self, $vmid, $file) {
                open(my $fh, '<', $file) or die "$file: $!\n";
                $log_file = join('', <$fh>);
            },
        }
    );
    my $task = $backend->task(
        $provider,
        'bandwidth-limit' => 123 * $mib,
        'firewall-config' => "[OPTIONS]\n",
        freeze => sub { $provider->note('freeze') },
        thaw => sub { $provider->note('thaw') },
    );
    $provider->{on}{job_init} = sub (@) {
        $task->log('info', "the provider's own line \x{263a}");
        $task->log('info', "/Gr\xc3\xb6\xc3\x9fe, as bytes");
    };
    my $start = time();
    my $result = $task->run_job;

    my @calls = $provider->take_calls;
    is_deeply([map { $_->[0] } @calls], \@job, 'the order of the calls');
    check_arguments($context, { map { shift($_->@*) => $_ } @calls }, $start);
    check_result($backend, $result, $log_file);
    like($log_file, qr/^INFO: the provider's own line \xe2\x98\xba$/m, "log: the provider's line");
    like($log_file, qr!^INFO: /Gr\xc3\xb6\xc3\x9fe, as bytes$!m, 'log: the name of a file');
    is_deeply($backend->outside, $context->{outside}, 'nothing is left');
}

# The result of a first backup.
sub check_result ($backend, $result, $log_file) {
    is($result->{'archive-name'}, 'vm/100/1', 'result: the name of the archive');
    is($result->{'archive-size'}, 4711, 'result: the size of the archive');
    my $reason = 'there is no bitmap of an earlier backup';
    for my $id (@ids) {
        my $device = $backend->device($id);
        is_deeply(
            $result->{devices}{$device},
            {
                size => $sizes{$id},
                'bitmap-mode' => 'new',
                'bitmap-action' => 'missing-recreated',
                dirty => $sizes{$id},
                fallback => $reason,
            },
            "result: $id"
        );
        like($log_file, qr/^INFO: \Q$device\E: full read: $reason$/m, "log: $id");
    }
}

# Inside of another program's job, and with only the required options.
sub check_run ($context) {
    my $provider = $Provider->new;
    my $result = $context->{backend}->task($provider, 'bandwidth-limit' => 0, freeze => undef)->run;
    my @calls = $provider->take_calls;
    is_deeply(
        [map { $_->[0] } @calls],
        [qw(backup_get_mechanism backup_vm_query_incremental backup_vm)],
        'run: the calls'
    );
    is_deeply(
        [sort keys $calls[2][4]->%*],
        [qw(backup-id guest-uuid)],
        'run: there is no limit and no firewall configuration'
    );
    is_deeply([sort keys $result->%*], [qw(devices id seconds)], 'run: the result');
}

# ---- bitmaps ----

sub check_dirty ($context) {
    my ($backend, $provider) = ($context->{backend}, $Provider->new);
    my ($device0, $device1) = map { $backend->device($_) } @ids;
    my $task = $backend->task($provider);
    $task->run;

    $backend->guest->write('disk0', 4 * $mib, 65536, 0x31);
    my $devices = $task->run->{devices};
    my $regions = $provider->{regions};
    for my $device ($device0, $device1) {
        my $read = sum0(pairvalues($regions->{$device}->@*));
        is($devices->{$device}{dirty}, $read, "dirty bytes of $device are what is to be read");
        is($devices->{$device}{fallback}, undef, 'no fallback');
    }
    is($devices->{$device1}{dirty}, 0, 'the second disk has no dirty bytes');
    my $size = $devices->{$device0}{dirty} == 65536 ? '64.0 KiB' : '4.0 MiB';
    ok($backend->logged(qr/\Ainfo: $device0: dirty-bitmap status: OK \($size of 64.0 MiB dirty\)/),
        'the status in words');
    ok(
        $backend->logged(
            qr/\Ainfo: $device1: dirty-bitmap status: OK \(nothing of 32.0 MiB dirty\)/),
        'the status of a clean disk as text'
    );
}

# [the provider's answer, mode and action of disk0, mode and action of disk1]
my @answers = (
    [
        'new',
        sub (@devices) {
            map { $_ => 'new' } @devices;
        },
        ('new', 'new') x 2
    ],
    [
        'use',
        sub (@devices) {
            map { $_ => 'use' } @devices;
        },
        ('reuse', 'used') x 2
    ],
    ['left out', sub (@devices) { ($devices[0] => 'use') }, 'reuse', 'used', 'none', 'not-used'],
    [
        'undef',
        sub (@devices) { ($devices[0] => undef, $devices[1] => 'use') },
        'none',
        'not-used',
        'new',
        'missing-recreated'
    ],
    [
        'none',
        sub (@devices) {
            map { $_ => 'none' } @devices;
        },
        ('none', 'not-used') x 2
    ],
);

sub check_modes ($context) {
    my $backend = $context->{backend};
    my @devices = map { $backend->device($_) } @ids;
    for my $case (@answers) {
        my ($name, $answer, @expected) = $case->@*;
        my $provider = $Provider->new(
            on => { backup_vm_query_incremental => sub (@) { return { $answer->(@devices) } } });
        my $result = $backend->task($provider)->run;
        my @found = map { $_->@{qw(bitmap-mode bitmap-action)} } $result->{devices}->@{@devices};
        is_deeply(\@found, \@expected, "answer '$name': modes and actions");
    }
    my $provider = $Provider->new(mode => undef);
    my $device = $backend->task($provider)->run->{devices}{ $devices[0] };
    is($device->{'bitmap-mode'}, 'none', 'no answer: there is no bitmap');
    is($device->{dirty}, $sizes{disk0}, 'no answer: the whole disk is to be read');
}

# ---- data ----

# A provider that copies each device to an image.
sub image_provider ($context, $mechanism) {
    my $dir = $context->{dir};
    my $copy = sub ($self, $vmid, $config, $volumes, $info) {
        for my $device (sort keys $volumes->%*) {
            my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
            $volume->copy(to => "$dir/$device");
            die "the store is full\n" if $self->{fails};
        }
    };
    return $Provider->new(mechanism => $mechanism, on => { backup_vm => $copy });
}

sub check_images ($context, $name) {
    my $backend = $context->{backend};
    my %images = map { $_ => $context->{dir} . '/' . $backend->device($_) } @ids;
    my ($write, $problem) = $context->{model}->check_images(\%images);
    is($problem, undef, "$name: the images are the disks after write $write");
    cmp_ok($write, '>', $context->{'last write'}, "$name: a later instant than the last one");
    $context->{'last write'} = $write;
    is_deeply($backend->outside, $context->{outside}, "$name: nothing is left");
}

sub check_data ($context, $mechanism) {
    my ($backend, $provider) = ($context->{backend}, image_provider($context, $mechanism));
    my $device = $backend->device('disk0');
    my $task = $backend->task($provider);
    $provider->{mode} = 'new';
    for my $step (qw(full incremental failing repeated)) {
        $backend->guest->wait_more_churn(20);
        $provider->{fails} = $step eq 'failing';
        my $result = eval { $task->run_job };
        is($@, $step eq 'failing' ? "the store is full\n" : '', "$mechanism, $step: the outcome");
        next if !$result;
        my $mode = $result->{devices}{$device}{'bitmap-mode'};
        is($mode, $step eq 'full' ? 'new' : 'reuse', "$mechanism, $step: bitmap mode");
        check_images($context, "$mechanism, $step");
        $provider->{mode} = 'use';
    }

    # The provider still holds everything that it was given.
    my @objects = ($task, $task->{access});
    weaken($_) for @objects;
    undef $task;
    is_deeply(\@objects, [undef, undef], "$mechanism: nothing keeps the task or its access");
}

sub check_backend ($name) {
    my $context = PBA::Test::Backend->start_with_model($name, \%sizes, $seed, $blocks);
    my $backend = $context->{backend};
    $context->@{ 'dir', 'last write' } = ($backend->work_dir('images'), 0);
    check_job($context);
    check_run($context);
    check_modes($context);
    check_dirty($context);
    $backend->guest->zero($_, 0, $blocks * 4096) for @ids;
    $backend->guest->start_churn(seed => $seed, disks => \@ids, blocks => $blocks);
    check_data($context, 'nbd');
    SKIP: {
        skip('no /dev/fuse', 1) if !-e '/dev/fuse';
        check_data($context, 'file-handle');
    }
    $backend->guest->stop_churn;
    $backend->check_manners;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
