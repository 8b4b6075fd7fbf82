# A guest's backup by a provider: what the provider is asked and told, in which order, and what is
# left when anything goes wrong.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PVE::BackupAccess::Task;
use PBA::Test::Provider;

my $mib = 1024 * 1024;
my %sizes = (disk0 => 64 * $mib, disk1 => 32 * $mib + 512);
my @ids = sort keys %sizes;

sub new_task ($context, $provider, %opt) {
    my $backend = $context->{backend};
    $context->{log} = [];
    return PVE::BackupAccess::Task->new(
        $backend->options,
        vmid => 100,
        provider => $provider,
        devices => [map { $backend->device($_) } @ids],
        'guest-config' => "name: test\n",
        log => sub ($level, $message) { push($context->{log}->@*, "$level: $message") },
        %opt,
    );
}

sub check_order ($context) {
    my $backend = $context->{backend};
    my $provider = PBA::Test::Provider->new(
        on => {
            backup_handle_log_file => sub ($self, $vmid, $file) {
                open(my $fh, '<', $file) or die "$file: $!\n";
                $context->{'log file'} = join('', <$fh>);
            },
        }
    );
    my $task = new_task(
        $context, $provider,
        'bandwidth-limit' => 123 * $mib,
        'firewall-config' => "[OPTIONS]\n",
        freeze => sub { $provider->note('freeze') },
        thaw => sub { $provider->note('thaw') },
    );
    my $before = time();
    my $result = $task->run_job;
    my @calls = $provider->take_calls;
    is_deeply(
        [map { $_->[0] } @calls],
        [
            qw(job_init backup_init backup_get_mechanism backup_vm_query_incremental freeze thaw),
            qw(backup_vm backup_cleanup backup_handle_log_file job_cleanup)
        ],
        'the order of the calls'
    );
    my %arguments = map { shift($_->@*) => $_ } @calls;
    cmp_ok($arguments{job_init}[0], '>=', $before, 'job_init: a time');
    is_deeply([$arguments{backup_init}->@[0, 1]], [100, 'qemu'], 'backup_init: VM and its type');
    cmp_ok($arguments{backup_init}[2], '>=', $before, 'backup_init: a time');
    is_deeply($arguments{backup_get_mechanism}, [100, 'qemu'], 'backup_get_mechanism');
    my %volumes = map { $backend->device($_) => { size => $sizes{$_} } } @ids;
    is_deeply($arguments{backup_vm_query_incremental}, [100, \%volumes], 'the sizes');
    my ($vmid, $config, $volumes, $info) = $arguments{backup_vm}->@*;
    is_deeply([$vmid, $config], [100, "name: test\n"], 'backup_vm: the configuration');
    is_deeply(
        $info,
        { 'bandwidth-limit' => 123 * $mib, 'firewall-config' => "[OPTIONS]\n" },
        'backup_vm: the limit and the firewall configuration'
    );
    is_deeply([sort keys $volumes->%*], [sort keys %volumes], 'backup_vm: the volumes');
    is_deeply($arguments{backup_cleanup}, [100, 'qemu', 1, {}], 'backup_cleanup');
    is_deeply($arguments{job_cleanup}, [], 'job_cleanup');

    is($result->{'archive-name'}, 'vm/100/1', 'result: the name of the archive');
    is($result->{'archive-size'}, 4711, 'result: its size');
    for my $id (@ids) {
        my $device = $backend->device($id);
        is_deeply(
            $result->{devices}{$device},
            {
                size => $sizes{$id},
                'bitmap-mode' => 'new',
                'bitmap-action' => 'missing-recreated',
                dirty => $sizes{$id},
                fallback => 'there is no bitmap of an earlier backup',
            },
            "result: $id"
        );
        like(
            $context->{'log file'},
            qr/^INFO: \Q$device\E: falls back to a full read: there is no bitmap/m,
            "log file: $id"
        );
    }
    is_deeply($backend->outside, $context->{outside}, 'nothing is left');
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [
            { id => 'disk0', format => 'qcow2', size => $sizes{disk0} },
            { id => 'disk1', size => $sizes{disk1}, bus => 'scsi', shape => 'drive' },
        ],
    );
    my $context = { backend => $backend, outside => $backend->outside };
    check_order($context);
    $backend->check_manners;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
