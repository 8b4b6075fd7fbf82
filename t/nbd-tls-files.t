# TLS connections that fail: keys and certificates that are not regular files, have no end, or are on a file
# system that hangs, and a server that stops in the middle of the handshake. None of this blocks: a signal ends
# the call with the exception of its handler, for source and target, and the process ends.
#
# One QEMU is enough: qemu-storage-daemon is only used as a file system that can be stopped.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use IO::Socket::UNIX ();
use POSIX ();
use Test::More;
use Time::HiRes qw(alarm sleep time);

use PBA::Test::HostileNBD qw(interrupted);
use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

# Runs in a mount namespace of its own, so that nothing stays mounted however the test ends.
if (!$ENV{PBA_UNSHARED} && system('unshare --mount true 2>/dev/null') == 0) {
    $ENV{PBA_UNSHARED} = 1;
    exec(qw(unshare --mount), $^X, (map { "-I$_" } @INC), $0) or die "unshare: $!\n";
}

my $size = 1 << 20;
my $limit = 30;    # seconds: only a hang takes longer
my $dir = File::Temp->newdir('pba-tls-XXXXXXXX', TMPDIR => 1);
my $source = PBA::Test::NBDServer->start(size => $size, dirty => [[0, $size]]);

my ($opt_magic, $reply_magic) = ("IHAVEOPT", pack("H*", "0003e889045565a9"));
my ($starttls, $ack) = (5, 1);

sub read_all ($socket, $length) {
    my $bytes = '';
    while (length($bytes) < $length) {
        sysread($socket, $bytes, $length - length($bytes), length($bytes)) or POSIX::_exit(0);
    }
    return $bytes;
}

# Agrees to TLS, and then sends nothing.
sub agree_only ($client) {
    syswrite($client, 'NBDMAGIC' . $opt_magic . pack('n', 3));
    read_all($client, 4 + 16);
    syswrite($client, $reply_magic . pack('N3', $starttls, $ack, 0));
    read_all($client, 1 << 30);
}

my $listener = IO::Socket::UNIX->new(Local => "$dir/sock", Listen => 64) or die "listen: $!\n";
my $server = fork() // die "cannot fork: $!\n";
if (!$server) {
    $SIG{CHLD} = 'IGNORE';
    while (1) {
        my $client = $listener->accept or next;
        agree_only($client) if !fork();
    }
}
my $owner = $$;
END { kill('KILL', $server) if $$ == $owner }
close($listener);

sub uri (@parameters) {
    return 'nbds+unix://backup@/disk?' . join('&', "socket=$dir/sock", @parameters);
}

sub open_uri ($uri) {
    return PVE::BackupAccess::Volume->open('disk', { 'nbd-path' => $uri, size => $size });
}

my %sides = (
    source => sub ($uri) { open_uri($uri)->close },
    target => sub ($uri) { open_volume($source)->copy(to => $uri, discard => 0) },
);

sub make_file ($name, $length = 0) {
    open(my $fh, '>', "$dir/$name") or die "$dir/$name: $!\n";
    truncate($fh, $length) or die "$dir/$name: $!\n";
    close($fh);
    return "$dir/$name";
}

for my $name ('pipe', 'fifo/ca-cert.pem', 'key/client-key.pem') {
    mkdir("$dir/$1") if $name =~ m!(.*)/!;
    POSIX::mkfifo("$dir/$name", 0600) or die "$dir/$name: $!\n";
}

my $kind = qr/is not a regular file/;
my %refused = (
    "tls-psk-file=$dir/pipe" => qr/'\Q$dir\E\/pipe' $kind/,
    "tls-psk-file=$dir/p%69pe" => qr/'\Q$dir\E\/pipe' $kind/,
    "tls-psk-file=$dir" => qr/'\Q$dir\E' $kind/,
    'tls-psk-file=/dev/zero' => qr!'/dev/zero' $kind!,
    "tls-certificates=$dir/fifo" => qr/ca-cert\.pem' $kind/,
    "tls-certificates=$dir/key" => qr/client-key\.pem' $kind/,
    'tls-psk-file='
        . make_file('huge', 1 << 40) => qr/huge' has 1099511627776 bytes - .* may have at most/,
);

for my $side (sort keys %sides) {
    for my $parameter (sort keys %refused) {
        ok(!eval { $sides{$side}->(uri($parameter)); 1 }, "$side: $parameter");
        like(my $error = $@, $refused{$parameter}, 'error');
        is(eval { $error->class }, 'ArgumentError', 'class');
    }
}

my $key = make_file('psk');
{
    open(my $fh, '>', $key) or die "$key: $!\n";
    print {$fh} 'backup:' . ('5a' x 32) . "\n";
    close($fh) or die "$key: $!\n";
}
for my $side (sort keys %sides) {
    is(interrupted(sub { $sides{$side}->(uri("tls-psk-file=$key")) }, $limit),
        7, "$side: a server that stops in the handshake: a signal ends it, and the process ends");
}

sub count_of ($what) { return scalar(() = glob("/proc/self/$what/*")) }

subtest 'nothing is left of interrupted calls' => sub {
    my %before = map { $_ => count_of($_) } qw(fd task);
    for my $try (1 .. 5) {
        local $SIG{ALRM} = sub { die "interrupted\n" };
        alarm(0.3);
        ok(!eval { open_uri(uri("tls-psk-file=$key")); 1 }, "attempt $try");
        is($@, "interrupted\n", "the signal's exception arrives");
    }
    my $end = time() + $limit;
    sleep(0.05) while time() < $end && grep { count_of($_) > $before{$_} } keys %before;
    is_deeply({ map { $_ => count_of($_) } keys %before }, \%before, 'descriptors and threads');
};

# A regular file on a file system that is stopped.
subtest 'a file system that hangs' => sub {
    plan(skip_all => 'no qemu-storage-daemon')
        if !grep { -x "$_/qemu-storage-daemon" } split(m/:/, $ENV{PATH});
    plan(skip_all => 'no /dev/fuse') if !-e '/dev/fuse';
    make_file('backing', $size);
    my $mounted = make_file('mounted');
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        exec(
            'qemu-storage-daemon', '--blockdev',
            "driver=file,node-name=n,filename=$dir/backing", '--export',
            "fuse,id=e,node-name=n,mountpoint=$mounted"
        ) or POSIX::_exit(127);
    }
    my $end = time() + $limit;
    while ((-s $mounted // 0) != $size) {
        time() < $end or die "no FUSE file after $limit seconds\n";
        sleep(0.02);
    }
    kill('STOP', $pid);
    for my $side (sort keys %sides) {
        is(interrupted(sub { $sides{$side}->(uri("tls-psk-file=$mounted")) }, $limit),
            7, "$side: a signal ends it, and the process ends");
    }
    kill('CONT', $pid);
    kill('KILL', $pid);
    waitpid($pid, 0);
    system("umount -l $mounted 2>/dev/null; true");
};

done_testing;
