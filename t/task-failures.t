# Providers that die, answer nonsense, fork, or misuse the volumes; hooks, signals and teardowns that fail.
# After each, the guest's block graph is as before, the provider has been told, and the next backup contains
# what the guest wrote before.
#
# One QEMU is enough: faults of providers do not depend on QEMU.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use IO::Socket::UNIX ();
use POSIX ();
use Test::More;
use Time::HiRes ();

use PBA::Test::AgentPeer;
use PBA::Test::Backend;
use PBA::Test::Provider;
use PBA::Test::QMP;
use PVE::BackupAccess::GuestAgent;
use PVE::BackupAccess::Task;
use PVE::BackupAccess::Volume;

my $Provider = 'PBA::Test::Provider';

my $mib = 1024 * 1024;
my $size = 16 * $mib;
my $granularity = 4 * $mib;    # of Proxmox' bitmaps
my $slots = 64;
my @ids = qw(disk0 disk1);

# Runs a job after the guest has written to a block of its own. Returns the result or undef.
sub run_job ($context, $name, $provider, %opt) {
    my $backend = $context->{backend};
    my $offset = $context->{slot}++ % $slots * $granularity;
    $backend->guest->write('disk0', $offset, 4096, 0x31);
    my $task = $backend->task($provider, %opt);
    my $result = eval { $task->run_job };
    $context->{error} = $@;
    POSIX::_exit($result ? 1 : 7) if $$ != $context->{pid};
    is_deeply([$backend->problems($context->{outside})], [], "$name: nothing is left");
    $context->{unread}{$offset} = $name;
    check_contains($context, $provider->blocks($backend->device('disk0'))) if $provider->{regions};
    $context->{unread} = {} if $result;
    return $result;
}

# The data of all failed backups must be in this one.
sub check_contains ($context, $dirty) {
    my @lost = grep { !$dirty->{$_} } sort { $a <=> $b } keys $context->{unread}->%*;
    is_deeply([$context->{unread}->@{@lost}], [], 'no bit of an earlier backup is lost');
}

# The bitmap has an ID, and only a task continues from it.
sub check_bits ($context) {
    my $dirty = dirty_of_next($context);
    cmp_ok($dirty, '<', $slots * $granularity, 'not everything is dirty');
}

sub dirty_of_next ($context) {
    my $provider = $Provider->new;
    ok(run_job($context, 'a good one', $provider), 'a good one: done') or diag($context->{error});
    return 65536 * keys $provider->blocks($context->{backend}->device('disk0'))->%*;
}

# ---- each method dies ----

my @started = qw(job_init backup_init);
my @asked = (@started, qw(backup_get_mechanism backup_vm_query_incremental));
my @told = qw(backup_cleanup backup_handle_log_file job_cleanup);
my %calls_until = (
    job_init => [qw(job_init job_cleanup)],
    backup_init => [@started, @told],
    backup_get_mechanism => [@started, 'backup_get_mechanism', @told],
    backup_vm_query_incremental => [@asked, @told],
    backup_vm => [@asked, 'backup_vm', @told],
    backup_cleanup => [@asked, qw(backup_vm backup_cleanup), @told],
    backup_handle_log_file => [@asked, 'backup_vm', @told],
    job_cleanup => [@asked, 'backup_vm', @told],
);

# These are called when the archive is complete and the bitmap has been cleared.
my %is_late = map { $_ => 1 } qw(backup_handle_log_file job_cleanup);

sub check_death ($context, $method, $exception, $how = sub { die $exception }) {
    my $name = "$method dies" . (ref($exception) ? ' with an object' : '');
    my $provider = $Provider->new(on => { $method => sub (@) { $how->() } });
    ok(!run_job($context, $name, $provider), "$name: the job dies, too");
    is_deeply($context->{error}, $exception, "$name: the exception arrives unchanged");
    my @calls = $provider->take_calls;
    is_deeply([map { $_->[0] } @calls], $calls_until{$method}, "$name: the calls");
    my ($cleanup) = grep { $_->[0] eq 'backup_cleanup' && !$_->[3] } @calls;
    is_deeply(
        $cleanup,
        ['backup_cleanup', 100, 'qemu', 0, { error => "$exception" }],
        "$name: what the provider is told"
    ) if !$is_late{$method} && $method ne 'job_init';
    ok(!$cleanup, "$name: the provider is not told of a failure") if $is_late{$method};
    $context->{unread} = {} if $is_late{$method};
}

sub check_deaths ($context) {
    check_death($context, $_, "$_ has no time\n") for sort keys %calls_until;
    check_death($context, 'backup_vm', { my => 'exception' });

    # VZDump ends its job if the error is this text.
    my $text = "interrupted by signal\n";
    local $SIG{TERM} = sub { die $text };
    my $signal = sub { kill(TERM => $$) };
    check_death($context, $_, $text, $signal) for qw(backup_vm backup_cleanup job_cleanup);

    # The first error takes precedence, and each step is tried.
    my $provider = $Provider->new(
        on => {
            map {
                my $name = $_;
                $name => sub (@) { die "$name\n" }
            } qw(backup_vm backup_cleanup backup_handle_log_file job_cleanup)
        }
    );
    run_job($context, 'all die', $provider);
    is($context->{error}, "backup_vm\n", 'all die: the first error');
    is_deeply([$provider->take_names], $calls_until{backup_vm}, 'all die: the calls');
    ok($context->{backend}->logged(qr/\Awarn: after that - $_$/), "all die: $_ is logged")
        for qw(backup_cleanup backup_handle_log_file job_cleanup);
}

# A signal takes precedence over earlier errors. If it arrives when the archive is complete, the provider must
# not discard the archive.
sub check_late_signals ($context) {
    my $text = "interrupted by signal\n";
    local $SIG{TERM} = sub { die $text };
    my $provider = $Provider->new(
        on => {
            backup_vm => sub (@) { die "no space\n" },
            backup_cleanup => sub (@) { kill(TERM => $$); return {} },
        }
    );
    run_job($context, 'a signal after an error', $provider);
    is($context->{error}, $text, 'a signal after an error: the signal takes precedence');
    is_deeply([$provider->take_names],
        $calls_until{backup_vm}, 'a signal after an error: the calls');
    ok($context->{backend}->logged(qr/\Awarn: after that - no space$/),
        'a signal after an error: the error is logged');

    my $qmp = PBA::Test::QMP->new(path => $context->{backend}->qmp_path);
    my $sent = 0;
    my $transport = sub ($command, $arguments) {
        kill(TERM => $$) if $command eq 'nbd-server-stop' && !$sent++;
        return $qmp->execute($command, $arguments->%*);
    };
    $provider = $Provider->new;
    run_job($context, 'a signal in the teardown', $provider, qmp => $transport);
    is($context->{error}, $text, 'a signal in the teardown: ends the job');
    is_deeply(
        [$provider->take_names],
        $calls_until{job_cleanup},
        'a signal in the teardown: no failure for the provider'
    );
}

# ---- invalid answers ----

my %nonsense = (
    'an unknown mechanism' =>
        [backup_get_mechanism => 'directory', qr/\Amechanism 'directory' .* nbd, file-handle$/],
    'no mechanism' => [backup_get_mechanism => undef, qr/returned no mechanism for VMs$/],
    'a text for a hash of modes' =>
        [backup_vm_query_incremental => 'use', qr/returned 'use', not a hash$/],
    'a list for a hash of modes' => [backup_vm_query_incremental => ['use'], qr/not a hash$/],
    'an unknown mode' => [
        backup_vm_query_incremental => { disk0 => 'reuse', 'drive-disk1' => 'reuse' },
        qr/\Adevice \S+: bitmap mode 'reuse' .* unknown - must be one of none, new, use$/
    ],
    'no archive' => [backup_init => undef, qr/no hash with an archive-name$/],
    'a text for an archive' => [backup_init => 'vm/100', qr/no hash with an archive-name$/],
    'no name of an archive' => [backup_init => {}, qr/no hash with an archive-name$/],
    'a bad name of an archive' =>
        [backup_init => { 'archive-name' => "a\nb" }, qr/\Aarchive-name 'a b' .* characters other/],
);

sub check_nonsense ($context) {
    for my $name (sort keys %nonsense) {
        my ($method, $value, $message) = $nonsense{$name}->@*;
        my $provider = $Provider->new(on => { $method => sub (@) { return $value } });
        ok(!run_job($context, $name, $provider), "$name: an error");
        like("$context->{error}", $message, "$name: the error says so");
        is_deeply([$provider->take_names], $calls_until{$method}, "$name: the calls");
    }
}

# An unknown device is ignored; other keys are not used.
sub check_harmless ($context) {
    my $backend = $context->{backend};
    my $provider = $Provider->new(
        on => {
            backup_vm_query_incremental => sub ($self, $vmid, $volumes) {
                my %modes = map { $_ => 'use' } keys $volumes->%*, 'drive-scsi7';
                $_->%* = () for values($volumes->%*), $volumes;
                return \%modes;
            },
            backup_vm => sub ($self, $vmid, $config, $volumes, $info) { $volumes->%* = () },
            backup_cleanup => sub (@) { return 'done' },
        }
    );
    my $result = run_job($context, 'a device that is not there', $provider);
    ok($result, 'a device that is not there: is ignored') or diag($context->{error});
    ok($backend->logged(qr/\Awarn: .* for drive-scsi7, which is not a device of this backup/),
        'a device that is not there: the log says so');
    ok(!exists($result->{'archive-size'}), 'no statistics: the result has no archive size');
}

# ---- misuse of volumes, and processes ----

sub is_useless ($name, $device, $volume) {
    my $handle = $volume->{'file-handle'};
    my $read = eval {
        my $reader = PVE::BackupAccess::Volume->open($device, $volume);
        my ($offset) = $reader->next_dirty_region;
        $reader->pread($offset, 4096);
    };
    ok(!defined($read), "$name: the volume cannot be read") or return;
    ok(!$handle || !defined(fileno($handle)), "$name: the handle is closed");
}

sub check_kept_volumes ($context, $mechanism) {
    my $name = "$mechanism: the volumes are kept";
    my $kept;
    my $provider = $Provider->new(
        mechanism => $mechanism,
        mode => 'new',
        on => { backup_vm => sub ($self, $vmid, $config, $volumes, $info) { $kept = $volumes } },
    );
    ok(run_job($context, $name, $provider), "$name: the job is done") or diag($context->{error});
    is_useless("$name: $_", $_, $kept->{$_}) for sort keys $kept->%*;
    undef $kept;
    is_deeply([$context->{backend}->problems($context->{outside})], [], "$name: given up");
}

sub check_closed_handle ($context) {
    my $close = sub ($self, $vmid, $config, $volumes, $info) {
        $self->store($volumes);
        close($_->{'file-handle'}) for values $volumes->%*;
    };
    my $provider = $Provider->new(mechanism => 'file-handle', on => { backup_vm => $close });
    ok(run_job($context, 'closed handles', $provider), 'closed handles: the job is done')
        or diag($context->{error});
}

# A child process exits like a program, dies, or returns; it must leave everything to its parent.
my %child = (
    exits => sub { exit(7) },
    dies => sub { die "child\n" },
    'comes back' => sub { },
);

# Methods that a child process must not call.
my %not_in_child = map {
    my $parent = $$;
    $_ => sub (@) { POSIX::_exit(3) if $$ != $parent; return {} }
} @told;

sub check_forks ($context) {
    for my $how (sort keys %child) {
        my $name = "a child $how";
        my $fork = sub ($self, $vmid, $config, $volumes, $info) {
            my $pid = fork() // die "fork: $!\n";
            if (!$pid) {
                Test::More->builder->no_ending(1);
                return $child{$how}->();
            }
            waitpid($pid, 0);
            $self->{status} = $? >> 8;
            $self->store($volumes);
        };
        my $provider = $Provider->new(on => { backup_vm => $fork, %not_in_child });
        ok(run_job($context, $name, $provider), "$name: the job is done")
            or diag($context->{error});
        is($provider->{status}, 7, "$name: the child ends without a result");
        my @names = $provider->take_names;
        is_deeply(\@names, $calls_until{job_cleanup}, "$name: the parent goes on");
    }
}

# ---- freeze, thaw ----

sub hooks ($provider, %on) {
    return map {
        my $hook = $_;
        $hook => sub { $provider->note($hook); $on{$hook}->() if $on{$hook} }
    } qw(freeze thaw);
}

sub hook_calls ($provider) {
    return join(' ', grep { m/\A(?:freeze|thaw|backup_vm)\z/ } $provider->take_names);
}

sub check_hooks ($context) {
    my $provider = $Provider->new;
    my %bad = ('run-dir' => '/proc/nowhere');
    ok(!run_job($context, 'setup fails', $provider, hooks($provider), %bad), 'setup fails: error');
    is(hook_calls($provider), '', 'setup fails before the instant: the guest was not frozen');

    my %dies = map {
        my $hook = $_;
        $hook => sub { die "$hook\n" }
    } qw(freeze thaw);
    my @freeze = hooks($provider, freeze => $dies{freeze});
    ok(!run_job($context, 'freeze dies', $provider, @freeze), 'freeze dies: an error');
    is($context->{error}, "freeze\n", 'freeze dies: the exception arrives unchanged');
    is(hook_calls($provider), 'freeze thaw',
        'freeze dies: the guest is thawed, and nothing is read');

    my @thaw = hooks($provider, thaw => $dies{thaw});
    ok(!run_job($context, 'thaw dies', $provider, @thaw), 'thaw dies: an error');
    is($context->{error}, "thaw\n", 'thaw dies: the exception arrives unchanged');
    is(hook_calls($provider), 'freeze thaw', 'thaw dies: nothing read');

    ok(!run_job($context, 'both die', $provider, hooks($provider, %dies)), 'both die: an error');
    is($context->{error}, "freeze\n", 'both die: the first');
    ok($context->{backend}->logged(qr/\Awarn: after that - thaw$/),
        'both die: the second exception is logged');
}

# The agent does not answer in time; the backup continues without it, and the guest is thawed.
sub check_agent ($context) {
    my @log;
    my $peer = PBA::Test::AgentPeer->start(replies => { 'guest-fsfreeze-freeze' => 'busy' });
    my $agent = PVE::BackupAccess::GuestAgent->new(
        socket => $peer->socket_path,
        timeout => 1,
        log => sub (@line) { push(@log, "@line") },
    );
    my $provider = $Provider->new;
    ok(run_job($context, 'freeze times out', $provider, $agent->hooks),
        'freeze times out: the job is done')
        or diag($context->{error});
    ok((grep { m/could not freeze the guest, .* no answer within 1 s/ } @log),
        'freeze times out: a warning');
    is_deeply(
        [$peer->commands],
        [
            map { $_ eq 'sync' ? 'guest-sync-delimited' : "guest-fsfreeze-$_" }
                qw(sync status freeze sync status sync thaw)
        ],
        'freeze times out: thawed'
    );
}

# ---- signals, and a QEMU that refuses ----

sub check_signal ($context) {
    local $SIG{ALRM} = sub { die { signal => 'ALRM' } };
    my $wait = sub ($self, $vmid, $config, $volumes, $info) {
        Time::HiRes::alarm(0.1);
        my ($device) = sort keys $volumes->%*;
        my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
        $volume->copy(to => '/dev/null', 'bandwidth-limit' => 4096);
    };
    my $provider = $Provider->new(mode => 'use', on => { backup_vm => $wait });
    ok(!run_job($context, 'a signal', $provider), 'a signal: ends the job');
    is_deeply($context->{error}, { signal => 'ALRM' }, "a signal: the exception is the handler's");
    is_deeply([$provider->take_names], $calls_until{backup_vm}, 'a signal: the calls');
}

# A transport that refuses one command, once. If a provider were told that a backup failed although its bitmap
# may have been cleared, it could discard data that exists nowhere else.
sub check_teardown_error ($context) {
    my $qmp = PBA::Test::QMP->new(path => $context->{backend}->qmp_path);
    my $refused = 0;
    my $transport = sub ($command, $arguments) {
        die "not today\n" if $command eq 'nbd-server-stop' && !$refused++;
        return $qmp->execute($command, $arguments->%*);
    };
    my $provider = $Provider->new;
    my $result = run_job($context, 'teardown fails', $provider, qmp => $transport);
    ok($result, 'teardown fails: the backup is good') or diag($context->{error});
    like(
        $result->{'teardown-error'},
        qr/nbd-server-stop.*not today/,
        'teardown fails: the result contains the error'
    );
    ok($context->{backend}->logged(qr/\Awarn: teardown failed - .*not today/),
        'teardown fails: logged');
    is_deeply([$provider->take_names], $calls_until{job_cleanup}, 'teardown fails: the calls');
}

# The map of the second disk cannot be read to its end. The provider notices that, unless the log needs the map.
sub check_incomplete_map ($context) {
    my $vm = $context->{backend}->vm;
    my $stop = sub ($level, $message) {
        eval { $vm->end_exports } if $message =~ m/dirty-bitmap status/;
    };
    my $provider = $Provider->new;
    ok(!run_job($context, 'an incomplete map', $provider, log => $stop),
        'an incomplete map: an error');
    my @names = $provider->take_names;
    my ($last) = grep { $_ eq 'backup_vm' } @names;
    is_deeply(
        \@names,
        $calls_until{ $last // 'backup_vm_query_incremental' },
        'an incomplete map: the calls'
    );
}

# While another program uses the monitor, no command can be sent, but everything can be read: a check of the
# fleecing image may take a few seconds, not the whole time limit of a QMP command, and is not repeated at once.
sub check_busy_monitor ($context) {
    my $task;
    my $seconds = 0;
    my $backup = sub ($self, $vmid, $config, $volumes, $info) {
        my $next = $volumes->{ $context->{backend}->device('disk0') }{'next-dirty-region'};
        my $monitor = IO::Socket::UNIX->new(Peer => $context->{backend}->qmp_path)
            or die "monitor: $!\n";
        sysread($monitor, my $greeting, 4096);
        $task->{'looked at fleecing'} = 0;
        my $began = Time::HiRes::time();
        $next->() for 1 .. 3;
        $seconds = Time::HiRes::time() - $began;
        close($monitor);
        die "that was all\n";
    };
    my $provider = $Provider->new(
        mechanism => 'file-handle',
        on => { backup_vm => $backup }
    );
    $task = $context->{backend}->task($provider, timeout => 20);
    ok(!eval { $task->run; 1 }, 'a busy monitor: the provider ends it');
    is($@, "that was all\n", 'a busy monitor: nothing else ends the job');
    cmp_ok($seconds, '>', 0, 'a busy monitor: the check was tried');
    cmp_ok($seconds, '<', 15, 'a busy monitor: the check does not take long');
}

sub check_resize ($context) {
    my $vm = $context->{backend}->vm;
    my $resize = sub ($self, $vmid, $volumes) {
        $vm->qmp('block_resize', device => 'drive-disk1', size => 2 * $size);
        return { map { $_ => 'use' } keys $volumes->%* };
    };
    my $provider = $Provider->new(on => { backup_vm_query_incremental => $resize });
    ok(!run_job($context, 'a resize', $provider), 'a resize as the backup begins: an error');
    like(
        "$context->{error}",
        qr/\Adevice drive-disk1 was resized from $size to/,
        'the error says so'
    );
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [
            { id => 'disk0', format => 'qcow2', size => $slots * $granularity },
            { id => 'disk1', size => $size, bus => 'scsi', shape => 'drive' },
        ],
    );
    my $context = { backend => $backend, pid => $$, slot => 0, unread => {} };
    $backend->guest->start_churn(seed => 1, disks => ['disk1'], blocks => 256, pause_us => 2000);
    $context->{outside} = $backend->outside;
    run_job($context, 'the first', $Provider->new);

    check_deaths($context);
    check_bits($context);
    check_late_signals($context);
    check_bits($context);
    check_nonsense($context);
    check_bits($context);
    check_hooks($context);
    check_signal($context);
    check_incomplete_map($context);
    check_bits($context);
    check_harmless($context);
    check_agent($context);
    check_forks($context);
    check_kept_volumes($context, 'nbd');
    SKIP: {
        skip('no /dev/fuse', 1) if !-e '/dev/fuse';
        check_kept_volumes($context, 'file-handle');
        check_closed_handle($context);
        check_busy_monitor($context) if $name eq 'upstream';
    }
    check_teardown_error($context);
    check_bits($context);
    $backend->guest->stop_churn;
    check_resize($context) if $name eq 'upstream';
    $backend->check_manners;
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
