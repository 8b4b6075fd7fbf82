# The accepted NBD URIs for source and target: connections by TCP, Unix and vsock sockets. Others that libnbd
# may know, such as those that run programs, are refused before anything is done.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::NBDServer qw(open_volume);
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

my $dir = File::Temp->newdir('pba-uris-XXXXXXXX', TMPDIR => 1);
my $size = 1 << 20;
my $server = PBA::Test::NBDServer->start(size => $size, export => 'disk', offer_bitmap => 0);
my $socket = $server->socket_path;

# Creates a program of that name that leaves a trace when it is run.
sub make_trap ($program) {
    open(my $fh, '>', "$dir/$program") or die "$program: $!\n";
    print {$fh} "#!/bin/sh\ntouch $dir/was-run\n";
    close($fh) or die "$program: $!\n";
    chmod(0755, "$dir/$program");
}
make_trap($_) for qw(ssh sh nbdkit qemu-nbd);
$ENV{PATH} = "$dir:$ENV{PATH}";

sub open_uri ($uri) {
    return PVE::BackupAccess::Volume->open('disk', { 'nbd-path' => $uri, size => $size });
}

my %sides = (
    source => sub ($uri) { open_uri($uri) },
    target => sub ($uri) { open_uri($server->uri)->copy(to => $uri) },
);

my $scheme = qr/begins with '\S+:' is not supported - use nbd:/;
my $parameter
    = sub ($name) { qr/the NBD URI has the parameter '\Q$name\E', which is not supported/ };
my %refused = (
    'nbd+ssh://localhost/disk' => $scheme,
    'nbds+ssh://localhost/disk' => $scheme,
    "nbd+exec:///disk?socket=$socket" => $scheme,
    "nbd+fd:///disk?socket=$socket" => $scheme,
    "nbd+unix:///disk?socket=$socket&command=ls" => $parameter->('command'),
    "nbd+unix:///disk?socket=$socket;command=ls" => $parameter->('command'),
    "nbd+unix:///disk?socket=$socket&c%6fmmand=ls" => $parameter->('c%6fmmand'),
    "nbd+unix:///disk?socket=$socket&tls-psk-file=/etc/passwd" => $parameter->('tls-psk-file'),
    'nbd://127.0.0.1:1/disk?tls-certificates=/etc' => $parameter->('tls-certificates'),
    'nbds://127.0.0.1:1/disk?tls-priority=NONE' => $parameter->('tls-priority'),
    'nbds://127.0.0.1:1/disk?Socket=/x' => $parameter->('Socket'),
);

for my $side (sort keys %sides) {
    for my $uri (sort keys %refused) {
        ok(!eval { $sides{$side}->($uri); 1 }, "$side: $uri");
        like(my $error = $@, qr/\Adevice disk: .*$refused{$uri}/, "$side: $uri: error");
        is(eval { $error->class }, 'ArgumentError', "$side: $uri: class");
    }

    # These get as far as a connection.
    my %failing = (
        'nbd://127.0.0.1:1/disk' => qr/connecting failed/,
        'nbds://127.0.0.1:1/disk?tls-verify-peer=false' => qr/connecting failed/,
        'nbd+vsock://1:1/disk' => qr/connecting failed/,
        "nbds+unix:///disk?socket=$socket&tls-psk-file=$dir/none" => qr/connecting failed/,
        "nbd+unix:///disk?socket=$dir/none" => qr/connecting failed.*No such file/,
    );
    for my $uri (sort keys %failing) {
        ok(!eval { $sides{$side}->($uri); 1 }, "$side: $uri: nobody there");
        like($@, $failing{$uri}, "$side: $uri: error");
    }
}
ok(!-e "$dir/was-run", 'no program was run');

for my $uri ("nbd+unix:///disk?socket=$socket", "nbd+unix:///disk?&socket=$socket&") {
    is(open_uri($uri)->size, $size, "connects: $uri");
}

# Anything that is not a URI is a path, whatever it contains.
mkdir("$dir/a:");
symlink($socket, "$dir/a:/disk");
is(open_volume($server, 'nbd-path' => "$dir/a://disk", 'bitmap-mode' => 'none')->size,
    $size, 'a path with :// in it');

done_testing();
