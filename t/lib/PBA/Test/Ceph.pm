package PBA::Test::Ceph;

# A one-node Ceph cluster for a test, which ends with the object. PBA_CEPH may name the directory of a cluster
# that one-node-ceph.sh has started before.
#
#   my $ceph = PBA::Test::Ceph->start;    # undef if Ceph is not installed
#   my $namespace = $ceph->new_namespace;
#   my $text = $ceph->run('rbd', 'ls', "backup/$namespace");

use v5.36;

use FindBin;
use File::Path qw(remove_tree);
use File::Temp ();
use IO::Socket::INET ();
use POSIX ();

use PBA::Test::Container;
use PVE::BackupAccess::Provider::RBD;

my @programs = qw(ceph-mon ceph-mgr ceph-osd rbd rados);

sub is_installed ($class) {
    return !grep { !-x "/usr/bin/$_" } @programs;
}

# By default a monitor collects changes for up to a second, such as the creation of snapshots.
my @quick = ('paxos propose interval = 0.05', 'paxos min wait = 0.01');

# is_quick: whether such changes are made at once, unlike in a real cluster.
sub start ($class, $is_quick = 1) {
    my $dir = $ENV{PBA_CEPH};
    my $self = bless({ dir => $dir, owner => $$ }, $class);
    return $self if defined($dir);
    $self->{dir} = File::Temp::tempdir('pba-ceph-XXXXXXXX', TMPDIR => 1);
    $self->{'is own'} = 1;
    my $socket = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 1)
        or die "no port: $!\n";
    my $port = $socket->sockport;
    close($socket);
    my $log = "$self->{dir}/start.log";
    my @command = ("$FindBin::Bin/one-node-ceph.sh", $self->{dir}, $port, $is_quick ? @quick : ());
    return $self if system('sh', '-c', 'exec "$@" >"$0" 2>&1', $log, @command) == 0;
    die "Ceph did not start:\n" . $self->run('cat', $log);    # the directory goes with the object
}

sub conf ($self) { return "$self->{dir}/ceph.conf" }

sub run ($self, @command) {
    local $ENV{CEPH_CONF} = $self->conf;
    open(my $out, '-|', @command) or die "$command[0]: $!\n";
    local $/ = undef;
    my $text = <$out> // '';
    close($out) or die "@command failed: $?\n";
    return $text;
}

sub new_namespace ($self) {
    my $name = "test-$$-" . ++$self->{namespaces};
    $self->run('rbd', 'namespace', 'create', "backup/$name");
    return $name;
}

# Creates a user with these capabilities, and returns its name.
sub new_user ($self, @capabilities) {
    my $name = "test-$$-" . ++$self->{users};
    my $key = $self->run(qw(ceph auth get-or-create), "client.$name", @capabilities);
    open(my $fh, '>>', "$self->{dir}/keyring") or die "keyring: $!\n";
    print {$fh} $key;
    close($fh) or die "keyring: $!\n";
    return $name;
}

# A container whose backups go to that namespace.
sub new_container ($self, $namespace, %more) {
    my %scfg = (pool => 'backup', namespace => $namespace, 'ceph-conf' => $self->conf, %more);
    return PBA::Test::Container->new(
        first_id => $> ? 0 : 100_000,
        new_provider => sub ($log) {
            return PVE::BackupAccess::Provider::RBD->new(undef, \%scfg, 'test', $log);
        },
    );
}

# Kills the cluster's only OSD.
sub stop_osd ($self) {
    open(my $fh, '<', "$self->{dir}/osd.0.pid") or die "osd.0.pid: $!\n";
    kill(KILL => <$fh>);
    return;
}

sub start_osd ($self) {
    local $ENV{CEPH_CONF} = $self->conf;
    system("ceph-osd -i 0 </dev/null >'$self->{dir}/osd.log' 2>&1") == 0
        or die "the OSD did not start: see $self->{dir}/osd.log\n";
    return;
}

# Stops the OSD, and starts it again after some seconds. Returns at once.
sub restart_osd ($self, $seconds) {
    $self->stop_osd;
    my $pid = fork() // die "fork: $!\n";
    return if $pid;
    sleep($seconds);
    eval { $self->start_osd };
    POSIX::_exit(0);
}

# The directory last: it tells which processes there are.
sub DESTROY ($self) {
    return if !$self->{'is own'} || $self->{owner} != $$;
    local ($!, $?);
    for my $file (glob("$self->{dir}/*.pid")) {
        open(my $fh, '<', $file) or next;
        my ($pid) = (<$fh> // '') =~ m/\A([0-9]+)/ or next;
        kill(KILL => $pid);
        while (kill(0 => $pid)) { waitpid($pid, 1); select(undef, undef, undef, 0.05) }
    }
    remove_tree($self->{dir});
    return;
}

1;
