# What status reports about an access while it is active, after its process was killed, and after recover.
# status itself changes nothing.
#
# One QEMU is enough: other tests send the same queries on both; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::QMP;

my $mib = 1024 * 1024;
my $size = 16 * $mib;
my @ids = qw(disk0 disk1);

# A client that runs up to a certain point.
sub start_client ($code) {
    my $client = PBA::Test::Client->start(sub ($tell) { my @keep = $code->(); $tell->('up') });
    is($client->next_word, 'up', 'a client is up');
    return $client;
}

sub check_idle ($backend, $name) {
    my $status = $backend->status;
    is($status->{backend}, $backend->name, "$name: backend");
    is($status->{access}, undef, "$name: no access");
    is_deeply($status->{$_}, [], "$name: no $_") for qw(exports fleecing left-overs warnings);
    return $status;
}

sub check_bitmaps ($backend, $status, $expected, $name) {
    my %dirty = map { ("$_->{device} $_->{background}" => $_->{'dirty-bytes'}) }
        grep { defined($_->{'target-id'}) || $_->{background} } $status->{bitmaps}->@*;
    is_deeply(\%dirty, $expected, $name) or diag(explain($status->{bitmaps}));
    my @wrong = grep { !$_->{background} && $_->{'target-id'} ne 'snapshot-access:test' }
        $status->{bitmaps}->@*;
    is_deeply(\@wrong, [], "$name: the target is named");
}

sub check_access ($status, %expected) {
    my $access = $status->{access};
    is(
        $access->{'target-id'},
        $expected{'target-id'} // 'snapshot-access:test',
        'the target of the access'
    );
    is($access->{$_}, $expected{$_}, "the $_ of the access") for qw(pid alive);
    is_deeply([sort $access->{devices}->@*], $expected{devices}, 'the devices of the access');
}

sub check_fleecing ($backend, $status, @devices) {
    my %fleecing = map { $_->{device} => $_ } $status->{fleecing}->@*;
    is(scalar(keys %fleecing), scalar(@devices), 'a fleecing image for each device');
    for my $image (values %fleecing) {
        is($image->{size}, $size, "$image->{device}: the size of the image");
        cmp_ok($image->{'free-bytes'}, '>', 0, "$image->{device}: the free space is known");
        is($image->{'nearly-full'}, 0, "$image->{device}: the file system is not nearly full");
    }
    my ($image) = grep { ($_->{'image-bytes'} // 0) >= 65536 } $status->{fleecing}->@*;
    ok($image, 'the bytes that an image occupies');
}

sub check_backend ($name) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => [map { { id => $_, size => $size, format => 'qcow2', throttle => 1 } } @ids],
    );
    my $block = $name eq 'pve' ? 4 * $mib : 65536;
    my @devices = sort map { $backend->device($_) } @ids;
    is_deeply(check_idle($backend, 'before')->{bitmaps}, [], 'no bitmaps yet');

    my $base = $backend->access;
    $base->setup($backend->devices('new'));
    $base->teardown(1);
    $backend->write('disk0', 0, 65536, 0x41);
    check_bitmaps(
        $backend,
        check_idle($backend, 'with bitmaps'),
        { "$devices[0] 0" => $block, "$devices[1] 0" => 0 },
        'dirty bytes'
    );

    check_while_up($backend, $block);
    check_other($backend, @devices);
    check_foreign($backend) if $name eq 'pve';
    $backend->check_manners;
}

# The access of another process, which is then killed.
sub check_while_up ($backend, $block) {
    my @devices = sort map { $backend->device($_) } @ids;
    my $outside = $backend->outside;
    my $client = start_client(
        sub {
            my $access = $backend->access;
            $access->setup($backend->devices('use'));
            $access->volumes('nbd');
            return $access;
        }
    );
    my $pid = $client->pid;
    $backend->write($_, 0, 65536, 0x42) for @ids;
    my $status = $backend->status;
    check_access($status, pid => $pid, alive => 1, devices => \@devices);
    is_deeply($status->{'left-overs'}, [], 'what a live process has is not a leftover');
    is_deeply([map { $_->{device} } sort { $a->{device} cmp $b->{device} } $status->{exports}->@*],
        \@devices, 'the exports');
    check_fleecing($backend, $status, @ids);
    my %background = map { ("$_ 1" => $block) } @devices;
    check_bitmaps(
        $backend, $status,
        { "$devices[0] 0" => $block, "$devices[1] 0" => 0, %background },
        'frozen and background bitmaps'
    );

    $client->kill9;
    check_left_overs($backend, $pid, @devices);
    is_deeply($backend->outside, $outside, 'nothing is left');
    check_no_bitmaps($backend);
}

# The leftovers of the dead process, before and after recover.
sub check_left_overs ($backend, $pid, @devices) {
    my $status = $backend->status;
    check_access($status, pid => $pid, alive => 0, devices => \@devices);
    my @left = $status->{'left-overs'}->@*;
    for my $device (@devices) {
        ok((grep { ($_->{device} // '') eq $device && $_->{what} =~ m/\Aexport '/ } @left),
            "$device: its export is a leftover");
    }
    my ($mark) = grep { $_->{what} =~ m/\Aprocess mark 'pba-owner-$pid-/ } @left;
    is($mark->{harmless}, 1, 'the mark is named, and harmless');
    ok((grep { $_->{what} =~ m/NBD server at/ && !$_->{harmless} } @left), 'and the NBD server');
    is_deeply($backend->status->{'left-overs'}, $status->{'left-overs'}, 'asking changes nothing');

    my $lines = PVE::BackupAccess->recover($backend->options, log => sub { });
    for my $thing (@left) {
        my $device = defined($thing->{device}) ? "device $thing->{device}: " : '';
        ok((grep { m/\A\Q$device$thing->{what}\E was / } $lines->@*),
            "recover speaks of '$thing->{what}', too")
            or diag(explain($lines));
    }
    check_idle($backend, 'after recover');
}

# A target without bitmaps is known from the run directory; QEMU itself only has a hash.
sub check_no_bitmaps ($backend) {
    my $client = start_client(
        sub {
            my $access = $backend->access('target-id' => 'no bitmaps');
            $access->setup($backend->devices('none', 'disk0'));
            return $access;
        }
    );
    my $pid = $client->pid;
    my $status = $backend->status;
    check_access(
        $status,
        'target-id' => 'no bitmaps',
        pid => $pid,
        alive => 1,
        devices => [$backend->device('disk0')]
    );
    my $access = $backend->access;
    ok(!eval { $access->setup($backend->devices('use')); 1 }, 'setup for another target: refused');
    like(
        "$@",
        qr/process $pid is already backing it up - its target is 'no bitmaps'/,
        'process and target are named'
    );
    $client->kill9;
    ok(!eval { $access->setup($backend->devices('use')); 1 }, 'the leftovers are refused as well');
    like(
        "$@",
        qr/left its access for target 'no bitmaps' - call recover/,
        'the error names the target'
    );
    PVE::BackupAccess->recover($backend->options('target-id' => 'no bitmaps'), log => sub { });
    check_idle($backend, 'after recover');
}

# An access by Proxmox' commands that this module did not make, such as that of today's qemu-server.
sub check_foreign ($backend) {
    my ($device, $target) = ($backend->device('disk0'), 'theirs');
    my $qmp = PBA::Test::QMP->new(path => $backend->qmp_path);
    my @devices = ({ device => $device, 'bitmap-mode' => 'use' });
    $qmp->execute('backup-access-setup', 'target-id' => $target, devices => \@devices);
    $qmp->close;
    my $status = $backend->status;
    is_deeply(
        $status->{access},
        { 'target-id' => $target, pid => undef, alive => undef, devices => [] },
        "somebody else's access: whose it is not known"
    );
    is_deeply(
        $status->{'bitmap-info'},
        [{ drive => $device, action => 'missing-recreated', size => $size, dirty => $size }],
        "an access of another program: QEMU's own information"
    );
    is_deeply($status->{'left-overs'}, [], "an access of another program: there are no leftovers");
    $qmp = PBA::Test::QMP->new(path => $backend->qmp_path);
    $qmp->execute('backup-access-teardown', 'target-id' => $target, success => JSON::PP::false);
    $qmp->close;
    check_idle($backend, 'after the teardown of the other program');
}

# A process that was killed after it added its marker, and the directory of a dead process: both are harmless.
sub check_other ($backend, @devices) {
    my $client = start_client(sub { });
    my $pid = $client->pid;
    $client->kill9;
    $backend->vm->qmp(
        'blockdev-add',
        driver => 'null-co',
        'node-name' => "pba-owner-$pid-1",
        size => 0,
        'read-only' => JSON::PP::true
    );
    my $status = $backend->status;
    is($status->{access}, undef, 'a mark alone is no access');
    is_deeply(
        [map { [$_->@{qw(what harmless)}] } $status->{'left-overs'}->@*],
        [["process mark 'pba-owner-$pid-1'", 1]],
        'a mark is a harmless leftover'
    );
    PVE::BackupAccess->recover($backend->options, log => sub { });
    check_idle($backend, 'in the end');
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub { check_backend($name) };
}

done_testing;
