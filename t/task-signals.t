# Signals, and exceptions of providers and callbacks, at every place of a job: in each method of the provider,
# in log lines, in freeze, thaw and the progress of a copy, and at the commands of a qmp code ref. The exception
# arrives unchanged; the job ends, and the next one does not begin; a complete backup stays complete; and what
# the guest wrote is in a later backup.
#
# One QEMU is enough: what a task does with exceptions does not depend on QEMU.
#
# There is no guest: QEMU itself makes the writes. A plain run includes one kind of exception at each place, and
# a part of the commands; PBA_FULL=1 includes all.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use List::Util qw(shuffle);
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Provider;
use PBA::Test::QMP;
use PBA::Test::Thrown qw(is_same strike thrown_by what_arrives);
use PVE::BackupAccess::Volume;

my $Provider = 'PBA::Test::Provider';

my @methods = qw(job_init backup_init backup_get_mechanism backup_vm_query_incremental backup_vm
    backup_cleanup backup_handle_log_file job_cleanup);
my @kinds = ('TERM, a text', 'INT, an object', 'a false object', 'an object', 'a text');
my @signals = @kinds[0, 1];
my @code_ref_kinds = (@signals, 'ALRM, in other words', 'HUP, an object in other words');
my $block = 4 << 20;    # of Proxmox' bitmaps
my ($seed, $share) = (20261128, 8);

# ---- places: each returns the options of a task in which something happens there ----

# Calls the original method; $when says whether the event happens before or after that.
sub in_method ($point) {
    my $usual = $Provider->new;
    my $method = $point->{at};
    my $on = sub ($self, @arguments) {
        $point->hit if $point->{when} eq 'before';
        my $result = $usual->$method(@arguments);
        $self->{regions} = $usual->{regions} if $usual->{regions};
        $point->hit if $point->{when} eq 'after';
        return $result;
    };
    return (provider => $Provider->new(on => { $method => $on }));
}

sub in_log ($point) {
    my $count = 0;
    return (
        log => sub ($level, $line) {
            push($point->{log}->@*, $line);
            $point->hit if ++$count == $point->{at};
        }
    );
}

sub in_hook ($point) {
    return ($point->{at} => sub { $point->hit });
}

sub in_progress ($point) {
    my $copy = sub ($self, $vmid, $config, $volumes, $info) {
        for my $device (sort keys $volumes->%*) {
            PVE::BackupAccess::Volume->open($device, $volumes->{$device})
                ->copy(to => '/dev/null', progress => sub (@) { $point->hit });
        }
    };
    return (provider => $Provider->new(on => { backup_vm => $copy }, mode => 'new'));
}

sub in_qmp ($point) {
    my $count = 0;
    return (
        qmp => sub ($command, $arguments) {
            my $is_it = ++$count == $point->{at};
            $point->hit if $is_it && $point->{when} eq 'before';
            my $value = $point->{monitor}->execute($command, $arguments->%*);
            $point->hit if $is_it && $point->{when} eq 'after';
            return $value;
        }
    );
}

# ---- one place ----

# Happens once; the later calls of the provider are recorded.
sub hit ($point) {
    return if $point->{was_hit}++;
    $point->{earlier} = [$point->{provider}->take_calls];
    strike($point->{kind});
}

# Two successive jobs; the event happens in the first one.
sub run_jobs ($context, $point) {
    my $backend = $context->{backend};
    my %options = $point->{place}->($point);
    my $provider = $point->{provider} = delete($options{provider}) // $Provider->new;
    my $next = $Provider->new;
    my %qmp = (qmp => $context->{qmp});
    my $tasks = [$backend->task($provider, %qmp, %options), $backend->task($next, %qmp)];
    my $got = what_arrives(
        sub {
            my @results = map { $_->run_job } $tasks->@*;
            return \@results;
        }
    );
    return ($got, $next);
}

# Until there is an archive, the provider is told of the failure; later, it is told of none. Returns whether
# there is an archive.
sub check_calls ($name, $point, $next) {
    my @calls = $point->{provider}->take_calls;
    my %called = map { $_->[0] => 1 } @calls;
    my @begun = grep { $called{$_} } qw(backup_init backup_get_mechanism backup_vm);
    is("@begun", '', "$name: nothing more is begun") if !$point->{late};
    is_deeply([$next->take_names], [], "$name: the next job does not begin");
    my @cleanups = grep { $_->[0] eq 'backup_cleanup' } $point->{earlier}->@*, @calls;
    my @failures = grep { !$_->[3] } @cleanups;
    cmp_ok(scalar(@failures), '<=', 1, "$name: a failure is told once");
    return @cleanups && !@failures;
}

# What is not in a complete archive must be in the next backup, which contains these blocks.
sub check_contains ($context, $name, $dirty) {
    my @lost = grep { !$dirty->{$_} } sort { $a <=> $b } keys $context->{unread}->%*;
    is_deeply([$context->{unread}->@{@lost}], [], "$name: no bit is lost");
    $context->{unread} = {};
    return;
}

# The bitmap has an ID, and only a task continues from it.
sub next_dirty ($context) {
    my $provider = $Provider->new;
    $context->{backend}->task($provider, qmp => $context->{qmp})->run_job;
    return $provider->blocks($context->{device});
}

sub check_bits ($context, $name) {
    check_contains($context, $name, next_dirty($context));
}

sub check_point ($context, $place, %at) {
    my $point
        = bless({ %at, place => $place, log => [], monitor => $context->{monitor} }, __PACKAGE__);
    my $name = join(', ', grep { defined } $at{what}, $at{at}, $at{when}, $at{kind});
    my $backend = $context->{backend};
    my $offset = $context->{slot}++ % 4 * $block;
    $backend->vm->qemu_io('disk0', "write -P 0x31 $offset 64k");
    my ($got, $next) = run_jobs($context, $point);
    return 0 if !$point->{was_hit};

    ok(is_same($got->{error}, thrown_by($at{kind})), "$name: arrives as it was thrown")
        or diag(ref($got->{error}) || $got->{error} // 'nothing');
    $point->{late} = $got->{late};
    my $is_good = check_calls($name, $point, $next);
    is_deeply([$backend->problems($context->{outside})], [], "$name: nothing is left")
        or BAIL_OUT('what is left would be found after each');
    $context->{unread}{$offset} = $name;
    my $provider = $point->{provider};
    check_contains($context, $name, $provider->blocks($context->{device}))
        if $is_good && $provider->{regions};
    return 1;
}

# ---- all places ----

# One kind of exception, or all of them.
sub kinds_of ($context, @all) {
    return $ENV{PBA_FULL} ? @all : $all[$context->{turn}++ % @all];
}

sub check_methods ($context) {
    for my $method (@methods) {
        for my $when (qw(before after)) {
            check_point(
                $context, \&in_method,
                what => 'method',
                at => $method,
                when => $when,
                kind => $_
            ) for kinds_of($context, @kinds);
        }
    }
    check_bits($context, 'methods');
}

sub check_callbacks ($context) {
    for my $hook (qw(freeze thaw)) {
        check_point($context, \&in_hook, what => 'hook', at => $hook, kind => $_)
            for kinds_of($context, @kinds);
    }
    check_point($context, \&in_progress, what => 'progress', at => 'of a copy', kind => $_)
        for kinds_of($context, @kinds);
    check_bits($context, 'callbacks');

    my $line = 0;
    my $more = 1;
    while ($more) {
        $line++;
        $more &&= check_point($context, \&in_log, what => 'log line', at => $line, kind => $_)
            for kinds_of($context, @kinds);
    }
    cmp_ok($line, '>', 4, 'there were log lines');
    check_bits($context, 'log lines');
}

# A job without an event shows how many commands there are.
sub check_commands ($context) {
    my $count = 0;
    my $qmp = sub ($command, $arguments) {
        $count++;
        return $context->{monitor}->execute($command, $arguments->%*);
    };
    $context->{backend}->task($Provider->new, qmp => $qmp)->run_job;
    cmp_ok($count, '>', 20, 'there were commands');
    my @places = map { ([$_, 'before'], [$_, 'after']) } 1 .. $count;
    @places = (shuffle(@places))[0 .. $share - 1] if !$ENV{PBA_FULL};
    for my $place (@places) {
        check_point(
            $context, \&in_qmp,
            what => 'command',
            at => $place->[0],
            when => $place->[1],
            kind => $_
        ) for kinds_of($context, @code_ref_kinds);
    }
    check_bits($context, 'commands');
}

# A signal after the bitmaps have been cleared: run and run_job return the result, and then the exception is
# thrown.
sub check_committed ($context) {
    my $commit = $context->{backend}->name eq 'pve' ? 'backup-access-teardown' : 'transaction';
    for my $method (qw(run run_job)) {
        for my $kind (@signals) {
            my $last = 0;
            my $qmp = sub ($command, $arguments) {
                my $value = $context->{monitor}->execute($command, $arguments->%*);
                my $ends = $command eq 'block-dirty-bitmap-remove' || $command eq $commit;
                strike($kind) if $context->{told} && $ends && !$last++;
                return $value;
            };
            local $context->{told};
            my $provider = $Provider->new(
                on => {
                    backup_vm => sub ($self, $vmid, $config, $volumes, $info) {
                        $self->store($volumes);
                        $context->{told} = 1;
                    }
                }
            );
            my $task = $context->{backend}->task($provider, qmp => $qmp);
            my $got = what_arrives(sub { $task->$method });
            my $name = "$method, committed, $kind";
            ok($last, "$name: the exception arrived");
            ok($got->{done} && $got->{late},
                "$name: the result is complete before the exception arrives");
            is(ref($got->{value}{devices}), 'HASH', "$name: the result is complete");
            ok(is_same($got->{error}, thrown_by($kind)), "$name: the exception arrives unchanged");
            is_deeply([$context->{backend}->problems($context->{outside})],
                [], "$name: nothing is left");
        }
    }
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => [{ id => 'disk0', size => 16 << 20, bus => 'scsi', shape => 'drive' }],
    );
    my $monitor = PBA::Test::QMP->new(path => $backend->qmp_path);
    my $qmp = sub ($command, $arguments) { $monitor->execute($command, $arguments->%*) };
    my $context = { backend => $backend, monitor => $monitor, qmp => $qmp, slot => 0, turn => 0 };
    $context->{device} = $backend->device('disk0');
    $context->{unread} = {};
    $context->{outside} = $backend->outside;
    next_dirty($context);
    check_methods($context);
    check_callbacks($context);
    check_commands($context);
    check_committed($context);
    $backend->check_manners;
}

srand($seed);
diag("one kind at each place, $share commands, seed $seed") if !$ENV{PBA_FULL};
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
