# Markers that cannot be judged are not undone: of a process in another PID namespace, of another machine or
# boot, or of version 0.1.0; and the effect of force on each (I2, I7). Markers must not disturb others: a
# migration transfers the guest's bitmaps even if there is a leftover marker.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;

my $Backend = 'PBA::Test::Backend';

my $json = JSON::PP->new->canonical;
my $size = 16 << 20;
my $unknown
    = qr/this host cannot tell whether process \d+ \(on another .*\) still runs.*recover with force/;
my $damaged
    = qr/this host cannot tell whether the process whose marker is damaged or of a later version still runs/;

sub refused ($code, $pattern, $name) {
    ok(!eval { $code->(); 1 }, "$name: refused");
    is(ref($@) && $@->class, 'StateError', "$name: class") or diag($@);
    like("$@", $pattern, "$name: the message");
    return;
}

sub recover ($backend, %more) {
    return PVE::BackupAccess->recover($backend->options, log => sub { }, %more);
}

sub state_of ($backend) {
    my $vm = $backend->vm;
    return $json->encode([$vm->graph, $vm->exports, $vm->bitmaps]);
}

# Runs Perl code in a PID namespace of its own, and returns its output.
sub elsewhere ($backend, $code) {
    my $options = JSON::PP->new->encode({ $backend->options });
    my $program
        = 'use v5.36; use POSIX (); use JSON::PP; use PVE::BackupAccess; my %o = decode_json(shift)->%*;'
        . ' eval { '
        . $code
        . '; 1 } or print "died: ", ref($@) ? $@->class : "", " $@";';
    open(
        my $out, '-|', qw(unshare -pf --mount-proc),
        $^X, (map { "-I$_" } @INC),
        '-e', $program, $options
    ) or die "unshare: $!\n";
    local $/ = undef;
    return scalar(<$out>);
}

sub check_namespaces ($backend) {
    my $outside = $backend->outside;
    my $access = $backend->access;
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    my $before = state_of($backend);
    my $device = $backend->device('disk0');
    like(
        elsewhere($backend, 'PVE::BackupAccess->recover(%o, log => sub {})'),
        qr/\Adied: StateError.*$unknown/s,
        'recover from another PID namespace: refused'
    );
    my $setup
        = "PVE::BackupAccess->new(%o)->setup([{device => '$device', 'bitmap-mode' => 'use'}])";
    like(elsewhere($backend, $setup), qr/\Adied: StateError.*$unknown/s, 'setup: refused');
    is(state_of($backend), $before, 'nothing was touched');
    my $status = 'delete $o{"target-id"}; my $s = PVE::BackupAccess->status(%o);'
        . ' print JSON::PP->new->canonical->encode($s->{access}), scalar($s->{"left-overs"}->@*)';
    like(
        elsewhere($backend, $status),
        qr/"alive":null.*"pid":$$\D.*\}0\z/,
        'status does not know whether the process is alive'
    );
    ok(eval { $access->teardown(0); 1 }, 'the access ends well') or diag($@);
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

# A process in that namespace cannot be judged from here, until the caller says that it is dead.
sub check_force ($backend) {
    my $outside = $backend->outside;
    my $device = $backend->device('disk0');
    my $up = "my \$a = PVE::BackupAccess->new(%o); \$a->setup([{device => '$device',"
        . ' "bitmap-mode" => "use"}]); $a->volumes("nbd"); POSIX::_exit(0)';
    elsewhere($backend, $up);
    my $left = state_of($backend);
    refused(sub { recover($backend) }, $unknown, 'recover');
    refused(sub { $backend->access->setup($backend->devices('use')) }, $unknown, 'setup');
    refused(
        sub { recover($backend, force => 1, 'target-id' => 'another') },
        qr/$unknown for its target-id - it belongs to another target-id/,
        'recover of another target with force'
    );
    is(state_of($backend), $left, 'nothing was touched');
    my @log;
    my $lines = recover($backend, force => 1, log => sub ($level, $text) { push(@log, $text) });
    like(
        "@log",
        qr/force: assuming that process \d+ .*has ended/,
        'the log reports that the process is assumed to have ended'
    );
    ok((grep { m/process mark .*assumed to have ended/ } $lines->@*), 'and the lines')
        or diag(@$lines);
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

# A live process of this host is never undone, even with force.
sub check_alive ($backend) {
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = $backend->access;
            $access->setup($backend->devices('use'));
            $tell->('up');
            $access->teardown(0);
        }
    );
    $client->next_word;
    refused(
        sub { recover($backend, force => 1) },
        qr/process @{[$client->pid]} is already backing it up/,
        'recover with force, while the process is alive'
    );
    $client->let_go_on;
    $client->wait_end;
    return;
}

sub start_time ($pid) {
    open(my $fh, '<', "/proc/$pid/stat") or die "/proc/$pid/stat: $!\n";
    return (split(' ', readline($fh) =~ s/.*\) //r))[19];
}

sub add_mark ($backend, $name, $mark_size) {
    $backend->vm->qmp(
        'blockdev-add',
        driver => 'null-co',
        'node-name' => $name,
        size => $mark_size,
        'read-only' => JSON::PP::true
    );
    return $name;
}

# Single markers, as created by version 0.1.0, another boot or another machine.
sub check_markers ($backend) {
    my $outside = $backend->outside;
    my $dead = 'pba-owner-' . join('-', getppid(), start_time(getppid()) + 1);
    my $living = 'pba-owner-' . join('-', getppid(), start_time(getppid()));
    add_mark($backend, $dead, 0);
    ok(eval { recover($backend); 1 }, 'one of 0.1.0 of a dead process: undone') or diag($@);
    is_deeply($backend->outside, $outside, 'the marker is gone');
    add_mark($backend, $living, 0);
    refused(
        sub { recover($backend) },
        qr/process @{[getppid()]} is already/,
        'a marker of version 0.1.0 of a live process'
    );
    $backend->vm->qmp('blockdev-del', 'node-name' => $living);

    for my $name ($dead, $living) {
        add_mark($backend, $name, 512 << 30);
        refused(sub { recover($backend) }, $unknown, "$name of elsewhere");
        $backend->vm->qmp('blockdev-del', 'node-name' => $name);
    }
    is_deeply($backend->outside, $outside, 'nothing is left');
    return;
}

# Markers whose names contain no process, and the effect of force on them.
sub check_damaged ($backend) {
    my $outside = $backend->outside;
    my $process = join('-', getppid(), start_time(getppid()));
    my @names = map { "pba-owner-$_" } '', 'x', 12, "$process-0", "$process-1-2", "$process-x",
        '99999999999-1', '4294967297-5', '0-1', '-5-3', "5-9999999999999999x";
    for my $name (@names) {
        add_mark($backend, $name, 0);
        refused(sub { recover($backend) }, $damaged, "'$name', recover");
        refused(sub { $backend->access->setup($backend->devices('use')) }, $damaged, "setup");
        is($backend->status->{access}{alive}, undef, 'status does not know, either');
        my @log;
        my $lines = recover($backend, force => 1, log => sub ($level, $text) { push(@log, $text) });
        like(
            "@log",
            qr/assuming that the process whose marker is damaged.* has ended/,
            'the log of force reports that the process is assumed to have ended'
        );
        ok((grep { m/process mark '$name' was removed/ } $lines->@*),
            'recover reports the removed marker')
            or diag(explain($lines));
        is_deeply($backend->outside, $outside, 'nothing is left');
    }
    return;
}

sub check_migration () {
    my @disks = ({ id => 'disk0', size => $size, format => 'qcow2' });
    my %common = (name => 'upstream', guest => 0);
    my $source = $Backend->start(%common, disks => \@disks);
    $disks[0]{file} = $source->vm->disk('disk0')->{file};
    my $target = $Backend->start(
        %common,
        disks => \@disks,
        paused => 1,
        args => ['-incoming', 'defer']
    );
    my $capability = { capability => 'dirty-bitmaps', state => JSON::PP::true };
    $_->vm->qmp('migrate-set-capabilities', capabilities => [$capability]) for $source, $target;
    my $access = $source->access;
    $access->setup($source->devices('new'));
    my ($mark)
        = grep { $_->{'node-name'} =~ m/\Apba-owner-/ }
        $source->vm->qmp('query-named-block-nodes', flat => JSON::PP::true)->@*;
    $access->teardown(1);
    add_mark($source, $mark->{'node-name'}, $mark->{image}{'virtual-size'});
    is($source->vm->hmp('savevm a'), '', 'a snapshot of the VM is not refused')
        if !$source->vm->bitmaps->{disk0};
    my $uri = 'unix:' . $target->vm->dir . '/migration';
    $target->vm->qmp('migrate-incoming', uri => $uri);
    $source->vm->qmp('migrate', uri => $uri);
    my $status = '';

    for (1 .. 600) {
        $status = $source->vm->qmp('query-migrate')->{status} // '';
        last if $status =~ m/\A(?:completed|failed)\z/;
        select(undef, undef, undef, 0.1);
    }
    is($status, 'completed', 'a guest with a marker is migrated');
    ok($target->vm->bitmaps->{disk0}{'pba:snapshot-access:test'}, 'the bitmaps are migrated');
    return;
}

for my $name ($Backend->names) {
    my $backend = $Backend->start(
        name => $name,
        guest => 0,
        disks => [{ id => 'disk0', size => $size, format => 'qcow2' }]
    );
    subtest "backend $name: markers" => sub { check_markers($backend) };
    subtest "backend $name: damaged markers" => sub { check_damaged($backend) };
    subtest "backend $name: alive" => sub { check_alive($backend) };
    subtest "backend $name: PID namespaces" => sub {
        plan(skip_all => 'needs root') if $> != 0;
        check_namespaces($backend);
        check_force($backend);
    };
    $backend->check_manners;
}
subtest 'migration' => sub {
    plan(skip_all => 'only for a stock QEMU') if PBA::Test::VM->is_proxmox;
    check_migration();
};

done_testing;
