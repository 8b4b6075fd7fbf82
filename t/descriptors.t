# Open files and sockets are not inherited: a program that a provider runs gets none of ours, with either
# mechanism and at any time, and the servers of virtual files have only what they need.
#
# One QEMU is enough: descriptors belong to the caller's process.

use v5.36;

use Fcntl qw(F_GETFD F_SETFD FD_CLOEXEC);
use File::Temp ();
use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;
use Time::HiRes qw(alarm sleep);

use PBA::Test::Backend;
use PBA::Test::Handle;
use PBA::Test::Provider;
use PVE::BackupAccess;
use PVE::BackupAccess::Provider::Qcow2Chain;

my $mib = 1024 * 1024;

# { number => target } of the descriptors of a process, without that of the directory listing itself.
sub descriptors ($pid) {
    opendir(my $dh, "/proc/$pid/fd") or die "no process $pid: $!\n";
    my @numbers = grep { m/\d/ } readdir($dh);
    closedir($dh);
    return {
        map { $_->[0] => $_->[1] } grep { defined($_->[1]) }
        map { [$_, readlink("/proc/$pid/fd/$_")] } @numbers
    };
}

my $list = 'for (glob("/proc/self/fd/*")) { my $what = readlink or next; print "$_ $what\n" }';

# The descriptors of a program that is run from here, as text, without the pipe to which it writes them.
sub of_child () {
    return qx{$^X -e '$list' 2>&1 </dev/null} =~ s/pipe:\[\d+\]/a pipe/gr;
}

my $before;

sub inherits_nothing ($name) {
    is(of_child(), $before, "$name: a program inherits nothing");
}

sub count ($pid, $pattern) {
    return scalar(grep { $_ =~ $pattern } values descriptors($pid)->%*);
}

# A test with nothing to inherit would prove nothing.
sub holds ($count, $pattern, $name) {
    cmp_ok(count($$, $pattern), '>=', $count, "$name: there are descriptors to inherit");
}

# ---- the monitor's socket, during a wait for QEMU ----

sub check_monitor ($backend) {
    my $pid = $backend->vm->pid;
    my $access = $backend->access;
    my $sockets = count($$, qr/socket/);
    my $asked = 0;
    local $SIG{ALRM} = sub {
        return alarm(0.3) if count($$, qr/socket/) == $sockets;    # not connected yet
        $asked++;
        inherits_nothing('the monitor is open');
        kill('CONT', $pid);
    };
    kill('STOP', $pid);
    alarm(0.3);
    $access->setup($backend->devices('new'));
    alarm(0);
    is($asked, 1, 'setup had to wait');
    $access->teardown(1);
}

# ---- in a provider, when everything is open ----

# The handle itself is usable by a program that is given its number.
sub check_handle ($handle, $size) {
    ok(fcntl($handle, F_GETFD, 0) & FD_CLOEXEC, 'the file handle is closed on exec');
    my $path = "/proc/$$/fd/" . fileno($handle);
    my $program = 'open(my $fh, "<", shift) or die "$!\n"; print -s $fh, "\n"';
    is(qx{$^X -e '$program' $path 2>&1}, "$size\n", 'and another program can open it again');
}

# The kinds of descriptors that a server may have, and how many.
my %of_server = (
    '/dev/null' => 2,
    '/dev/fuse' => 1,
    'anon_inode:[signalfd]' => 1,
    'anon_inode:[eventfd]' => 3,    # of two threads, and of queries for zeroes
    'socket' => 3,                  # the parent's, and two connections: data and map
);

sub check_servers ($backend, $devices) {
    my @servers = PBA::Test::Handle->servers($backend->work_dir('run'));
    is(scalar(@servers), $devices, 'a server for each device');
    my %own = reverse(descriptors($$)->%*);
    my %sockets;
    for my $pid (@servers) {
        for (1 .. 100) {
            last
                if count($pid, qr/socket/)
                == $of_server{socket};    # a thread makes one of the connections
            sleep(0.1);
        }
        my %kinds;
        for my $what (values descriptors($pid)->%*) {
            $kinds{ $what =~ m/\A(socket):/ ? $1 : $what }++;
            ok(!$own{$what}, "$what is not one of ours, too") if $what =~ m/\Asocket:/;
            $sockets{$what}++;
        }
        is_deeply(\%kinds, \%of_server, 'a server has its own descriptors only');
    }
    my @shared = grep { m/\Asocket:/ && $sockets{$_} > 1 } keys %sockets;
    is("@shared", '', 'two servers share no descriptor');
}

sub check_volumes ($backend, $mechanism, $volumes, $target) {
    my $name = "mechanism $mechanism";
    my %readers
        = map { $_ => PVE::BackupAccess::Volume->open($_, $volumes->{$_}) } keys $volumes->%*;
    $_->next_dirty_region for values %readers;
    holds(2, $mechanism eq 'nbd' ? qr/socket/ : qr/vfile-/, $name);
    inherits_nothing($name);
    if ($mechanism eq 'file-handle') {
        check_servers($backend, scalar(keys %readers));
        check_handle($_->{'file-handle'}, $_->{size}) for values $volumes->%*;
    }
    my ($during, %options) = (0);
    $options{progress} = sub (@) { inherits_nothing("$name, copying") if !$during++ };
    my $reader = (values %readers)[0];
    $reader->copy(to => $target, %options);
    cmp_ok($during, '>', 0, "$name: copied");
    $_->close for values %readers;
}

sub check_provider ($backend, $mechanism) {

    # The caller decides whether the files that it opens are inherited.
    local $^F = 1000;
    open(my $target, '+>', undef) or die "cannot make a file: $!\n";
    $before = of_child();
    like($before, qr/PerlIO_/, 'a file of the caller is inherited');
    my $inside = 0;
    my $provider = PBA::Test::Provider->new(
        mechanism => $mechanism,
        mode => 'new',
        on => {
            backup_vm => sub ($self, $vmid, $config, $volumes, $info) {
                check_volumes($backend, $mechanism, $volumes, $target);
                $inside++;
            },
        },
    );
    $backend->task($provider)->run_job;
    is($inside, 1, "mechanism $mechanism: the provider was called");
}

# Our own provider also has locks and its own server.
sub check_chain ($backend) {
    local $^F = 1000;
    my $store = File::Temp->newdir('pba-store-XXXXXXXX', TMPDIR => 1);
    $before = of_child();
    my $provider
        = PVE::BackupAccess::Provider::Qcow2Chain->new(undef,
        { path => "$store", 'state-dir' => "$store/state" }, 'test');
    my $during = 0;
    $provider->on_progress(sub (@) { inherits_nothing('Qcow2Chain, copying') if !$during++ });
    $backend->task($provider)->run_job;
    cmp_ok($during, '>', 0, 'Qcow2Chain: copied');
}

my $missing = PBA::Test::Handle->missing;
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my @disks = map { { id => $_, size => 4 * $mib } } qw(disk0 disk1);
        my $backend = PBA::Test::Backend->start(name => $name, disks => \@disks, guest => 0);
        $before = of_child();
        check_monitor($backend);
        check_provider($backend, 'nbd');
        check_chain($backend);
        SKIP: {
            skip($missing, 1) if $missing;
            check_provider($backend, 'file-handle');
        }
    };
}

done_testing;
