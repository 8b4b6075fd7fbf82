# Qcow2Chain from its callers' point of view: order and arguments of the API, locks, signals, processes, names,
# taint mode.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use POSIX ();
use Time::HiRes ();

use PBA::Test::Chain;
use PVE::BackupAccess::Provider::Qcow2Chain;

my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';

my $class = 'PVE::BackupAccess::Provider::Qcow2Chain';
my $chain = PBA::Test::Chain->new;
$chain->write_random;

sub fails ($code, $error, $text) {
    my $done = eval { $code->(); 1 };
    ok(!$done && ref($@) && $@->isa('PVE::BackupAccess::Error'), $text);
    like($@, $error, "$text: the error");
}

subtest 'arguments' => sub {
    my $provider = $chain->provider;
    my $store = $chain->store;
    fails(sub () { $class->new(undef, { path => 'backup' }, 's') },
        qr/must be an absolute path/, 'path');
    fails(sub () { $class->new(undef, {}, 's') }, qr/path must be a string/, 'new: without a path');
    fails(
        sub () { $class->new(undef, { path => $store }, '') },
        qr/storeid must not/,
        'new: with an empty ID'
    );
    fails(
        sub () { $class->new(undef, { path => "$store/none" }, 's')->job_init(time()) },
        qr/does not exist - is its file system mounted/,
        'a directory that is missing'
    );
    fails(sub () { $provider->backup_init('../x', 'qemu', 1) }, qr/vmid must be/, 'vmid');
    fails(
        sub () { $provider->backup_vm(100, '', {}, {}) },
        qr/backup_init must be called/,
        'backup_vm without backup_init'
    );
    fails(sub () { $provider->verify('vm/100/../x') }, qr/is not the name of an archive/, 'name');

    is_deeply($provider->backup_cleanup(100, undef, 0, {}), { stats => {} }, 'cleanup alone');
    is_deeply($provider->list, [], 'an empty store has no archives');
    open(my $file, '>', "$store/vm") or die "$store/vm: $!\n";
    fails(
        sub () { $provider->list },
        qr/cannot read .*vm/,
        'a store that cannot be read is an error'
    );
    unlink("$store/vm") or die "$store/vm: $!\n";
    isa_ok($provider, 'PVE::BackupProvider::Plugin::Base');
    is($provider->provider_name, 'Qcow2Chain', "the provider's name");
};

subtest 'a backup and its reports' => sub {
    my ($provider, @progress) = $chain->provider;
    $provider->on_progress(sub (@values) { push(@progress, \@values) });
    my $name = $chain->backup or die $chain->error;
    my ($last) = grep { $_->[0] eq 'drive-scsi0' } reverse(@progress);
    my $size = $chain->disk('drive-scsi0')->size;
    is_deeply($last, ['drive-scsi0', $size, $size], 'progress');
    my $log = $chain->tmp . '/log';
    open(my $fh, '>', $log) or die "$log: $!\n";
    print {$fh} "INFO: fine\n";
    close($fh);
    $provider->backup_handle_log_file(100, $log);
    ok(-s $chain->path_of($name, 'backup.log'), 'the log is kept');
    my ($listed) = $provider->list->@*;
    is($listed->{volname}, $name, 'list: the name');
    is($listed->{time}, 1_795_000_060, 'list: the time');
    is($listed->{devices}{'drive-scsi0'}{size}, $size, 'list: the size of a device');
    is($chain->result->{stats}{'archive-size'}, $listed->{size}, 'the size of the archive');
    is_deeply([$provider->restore_get_mechanism("backup/$name")],
        [qw(qemu-img qemu)], 'restore: the mechanism, by a name of Proxmox VE');
    ok(-d $chain->guest_dir && !((stat(_))[2] & 077), 'other users cannot read the archive');
    $chain->check('with a log');

    my $began = Time::HiRes::time();
    my $disk = $chain->disk('drive-scsi0');
    $disk->write([0, 2 << 20, 77]);
    $chain->backup(info => { 'bandwidth-limit' => 4 << 20 }) or die $chain->error;
    cmp_ok(Time::HiRes::time() - $began, '>', 0.3, 'the bandwidth is limited');

    local $chain->{time} = 1_000_000_000;
    my $back = $chain->backup or die $chain->error;
    is($back, ($chain->names)[-1], 'the clock was set back: the new archive is still the last one');
    like(
        $chain->log,
        qr{^warn: archive vm/100/\w+ is dated later than now, .* check the clock}m,
        'and the log says so'
    );
};

subtest 'one at a time' => sub {
    my $other = $class->new(undef, { path => $chain->store }, 'test');
    $chain->backup(
        during => sub () {
            fails(sub () { $other->backup_init(100, 'qemu', 1) }, qr/is in use by/, 'a backup');
            fails(sub () { $other->prune(100, 1) }, qr/is in use by/, 'a prune');
            is($other->backup_init(101, 'qemu', 1)->{'archive-name'},
                'vm/101/19700101T000001Z', 'another guest can be backed up');
            $other->backup_cleanup(101, 'qemu', 0, {});
            is_deeply($other->verify(($chain->names)[0]), [], 'verify is possible');
        }
    ) or die $chain->error;
};

# ---- processes ----

sub children () {
    return map {
        split(
            ' ',
            do { local (@ARGV, $/) = $_; <> // '' }
        )
    } glob("/proc/$$/task/*/children");
}

subtest 'processes' => sub {
    my $name = ($chain->names)[-1];
    my @before = children();
    {
        local $SIG{CHLD} = 'IGNORE';
        ok($chain->backup, 'SIGCHLD ignored: a backup') or diag($chain->error);
        my $file = $chain->provider->restore_vm_volume_init($name, 'drive-scsi0', {});
        ok(eval { $chain->provider->restore_vm_cleanup($name); 1 }, 'SIGCHLD ignored: a restore')
            or diag($@);
    }
    $chain->provider->restore_vm_volume_init($name, $_, {}) for $chain->devices;
    is(scalar(children()), @before + 2, 'a server for each device');
    $chain->provider->restore_vm_cleanup($name);
    is_deeply([children()], \@before, 'no process is left after the cleanup');
    $chain->provider->restore_vm_volume_init($name, 'drive-scsi0', {});
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        $chain->use_store($chain->store);
        POSIX::_exit(0);
    }
    waitpid($pid, 0);
    is(scalar(children()), @before + 1, 'a forked child ends no server');
    $chain->use_store($chain->store);
    is_deeply([children()], \@before, 'a provider that goes out of scope ends its own servers');
};

subtest 'a signal in a backup' => sub {
    my @before = children();
    local $SIG{ALRM} = sub { die "enough\n" };
    $chain->provider->on_progress(sub (@) { kill(ALRM => $$) });
    is($chain->backup, undef, 'a signal handler dies');
    is($chain->error, "enough\n", 'the exception arrives unchanged');
    is_deeply([children()], \@before, 'nothing is left');
};

subtest 'restores that fail' => sub {
    my $name = ($chain->names)[-1];
    my @before = children();
    fails(sub () { $chain->provider->restore_vm_volume_init('vm/100/20000101T000000Z', 'x', {}) },
        qr/no archive/, 'the archive does not exist');
    fails(
        sub () { $chain->provider->restore_vm_volume_init($name, 'x', {}) },
        qr/has no device x/,
        'the device does not exist'
    );
    my $image = $chain->path_of($name, 'drive-scsi0.qcow2');
    local $PVE::BackupAccess::Provider::Store::Server::qemu_nbd = 'no-such-program';
    fails(
        sub () { $Server->start($image) },
        qr/cannot run no-such-program/,
        'qemu-nbd cannot be run'
    );
    fails(
        sub () {
            local $PVE::BackupAccess::Provider::Store::Server::qemu_nbd = 'qemu-nbd';
            $Server->start("$image.none");
        },
        qr/cannot serve .*No such file/,
        'the image does not exist'
    );
    is_deeply([children()], \@before, 'no server process is left');
};

# ---- names, taint mode ----

subtest 'odd names' => sub {
    my $dir = $chain->tmp . "/a b,c:d=e%\x{e9}";
    utf8::encode($dir);
    mkdir($dir) or die "mkdir: $!\n";
    my $provider = $class->new(undef, { path => $dir, 'state-dir' => $chain->state_dir }, 'test');
    my $disk = $chain->disk('drive-scsi0');
    my $vmid = 100;
    my $back_up = sub ($odd) {
        my $name = $provider->backup_init($vmid, 'qemu', 1)->{'archive-name'};
        my $modes
            = $provider->backup_vm_query_incremental($vmid, { $odd => { size => $disk->size } });
        $disk->{device} = $odd;
        my $volume = $disk->open($modes->{$odd});
        my $done = eval { $provider->backup_vm($vmid, '', { $odd => $volume }, {}); 1 } or diag($@);
        $disk->close($done);
        $provider->backup_cleanup($vmid, 'qemu', $done, {});
        return $name;
    };

    # The file of the last one has nearly the longest possible name.
    for my $odd ("#block/../\x{20ac} x,y:z", '..', '.hidden', "\x{434}" x 41) {
        utf8::encode(my $text = $odd);
        for my $number (1, 2) {
            my $name = $back_up->($odd);
            is_deeply($provider->verify($name), [], "$text: archive $number is in order");
            is_deeply([keys $provider->restore_vm_init($name)->%*],
                [$odd], 'the device has its name');
            is($provider->archive_get_guest_config($name), '', 'an empty configuration');
            is($provider->archive_get_firewall_config($name),
                undef, 'there is no firewall configuration');
            $disk->write([0, 65536, 98 + $number]);
        }
        is(scalar($provider->prune($vmid, 1)->@*), 1, "$text: pruned");
        my ($left) = $provider->list($vmid++)->@*;
        is_deeply($provider->verify($left->{volname}), [], "$text: the other one is in order");
    }
};

# Everything from the command line is tainted.
subtest 'taint mode' => sub {
    my $disk = $chain->disk('drive-efidisk0');
    my $store = $chain->tmp . '/taint';
    mkdir($store) or die "$store: $!\n";
    for my $mode (qw(new use use)) {
        my $volume = $disk->open($mode);
        my @volume = map { $_ => $volume->{$_} } grep { defined($volume->{$_}) } keys $volume->%*;
        my $program = "$FindBin::Bin/taint/qcow2-chain.pl";
        my @command
            = ($^X, '-T', '-Iblib/lib', '-Iblib/arch', $program, $store, 'drive-efidisk0', @volume);
        is(system(@command), 0, "mode $mode");
        $disk->close($? == 0);
        $disk->write([65536, 512, 5]);
    }
    is(scalar($class->new(undef, { path => $store }, 's')->list->@*), 2, 'two are left');
};

done_testing;
