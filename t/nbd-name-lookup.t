# Host names in NBD URIs that no name server answers for: a signal ends the call, for source and target, and so
# does the end of the process. A name that is found is connected to, and one that is not found is reported.
#
# One QEMU is enough: none is started.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use IO::Socket::INET ();
use IO::Socket::UNIX ();
use POSIX ();
use Test::More;

use PBA::Test::HostileNBD qw(interrupted);
use PBA::Test::NBDServer qw(open_volume pattern);
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

plan(skip_all => 'needs root') if $> != 0;
plan(skip_all => 'no mount namespaces') if system('unshare --mount --net true 2>/dev/null') != 0;

# The machine's own name servers are not used.
if (!$ENV{PBA_UNSHARED}) {
    $ENV{PBA_UNSHARED} = 1;
    exec(qw(unshare --mount --net), $^X, (map { "-I$_" } @INC), $0) or die "unshare: $!\n";
}

my $size = 1 << 20;
my $limit = 30;    # seconds: the name server blocks for longer
my $dir = File::Temp->newdir('pba-lookup-XXXXXXXX', TMPDIR => 1);
my $source = PBA::Test::NBDServer->start(size => $size, dirty => [[0, $size]]);

sub write_file ($file, $text) {
    open(my $fh, '>', "$dir/$file") or die "$dir/$file: $!\n";
    print {$fh} $text;
    close($fh) or die "$dir/$file: $!\n";
    system('mount', '--bind', "$dir/$file", "/etc/$file") == 0 or die "cannot mount /etc/$file\n";
    return;
}

system(qw(ip link set lo up)) == 0 or die "no network\n";
write_file('resolv.conf', "nameserver 127.0.0.9\noptions timeout:30 attempts:5\n");
write_file('hosts', "127.0.0.1 found.example.org\n");
my $silent = IO::Socket::INET->new(LocalAddr => '127.0.0.9', LocalPort => 53, Proto => 'udp')
    or die "no name server: $!\n";

sub open_uri ($uri) {
    return PVE::BackupAccess::Volume->open('disk', { 'nbd-path' => $uri, size => $size });
}

my %sides = (
    source => sub ($uri) { open_uri($uri)->close },
    target => sub ($uri) { open_volume($source)->copy(to => $uri, discard => 0) },
);

for my $side (sort keys %sides) {
    for my $scheme (qw(nbd nbds)) {
        is(interrupted(sub { $sides{$side}->("$scheme://silent.example.org/disk") }, $limit),
            7, "$scheme, $side: a signal ends it, and the process ends");
    }
    ok(!eval { $sides{$side}->('nbd://found.example.org:1/disk'); 1 },
        "$side: the name is found, but nothing listens");
    like(my $error = $@, qr/\Adevice disk: connecting failed - .*refused/, 'error');
    is(eval { $error->class }, 'NbdError', 'class');
}

# Connects by TCP to a name, through a relay to one of our servers.
subtest 'a name that is found' => sub {
    my $listener = IO::Socket::INET->new(LocalAddr => '127.0.0.1', Listen => 5) or die "TCP: $!\n";
    my $port = $listener->sockport;
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        while (my $client = $listener->accept) {
            relay($client) if !fork();
        }
    }
    my $volume = open_uri("nbd://found.example.org:$port/disk");
    ok($volume->pread(4096, 65536) eq pattern(4096, 65536), 'is read from');
    $volume->close;
    kill('KILL', $pid);
    waitpid($pid, 0);
};

sub relay ($client) {
    my $server = IO::Socket::UNIX->new(Peer => $source->socket_path) or POSIX::_exit(1);
    my %other = (fileno($client) => $server, fileno($server) => $client);
    while (1) {
        vec(my $ready = '', fileno($client), 1) = 1;
        vec($ready, fileno($server), 1) = 1;
        select($ready, undef, undef, undef);
        for my $from ($client, $server) {
            next if !vec($ready, fileno($from), 1);
            sysread($from, my $bytes, 65536) or POSIX::_exit(0);
            while (length($bytes)) {
                my $count = syswrite($other{ fileno($from) }, $bytes) // POSIX::_exit(0);
                substr($bytes, 0, $count, '');
            }
        }
    }
}

done_testing;
