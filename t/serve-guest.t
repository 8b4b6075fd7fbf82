# A guest boots directly from an archive: its disk is an overlay over what `serve` exports, and the command of
# doc/operating.md streams the archive into it while the guest reads and writes. Then the server is no longer needed.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Chain;
use PBA::Test::Command qw(start_command);
use PBA::Test::QemuNbd;
use PBA::Test::VM;

my $kib = 1024;
my $mib = 1024 * $kib;
my $device = 'drive-scsi0';

my $chain = PBA::Test::Chain->new->add_archives(2, 40);
my ($name) = ($chain->names)[-1];
my $data = $chain->{expected}{$name}{$device};

my $sockets = $chain->tmp . '/sockets';
mkdir($sockets) or die "mkdir: $!\n";
my $server
    = start_command('serve', $chain->path_of($name), '--device', $device, '--socket-dir', $sockets);
$server->wait_for(out => qr/^\S+ .*\n/m);
my ($uri) = $server->text('out') =~ m/^\Q$device\E (.*)$/m;
my $overlay = $chain->tmp . '/overlay.qcow2';
PBA::Test::QemuNbd::img(qw(create -q -f qcow2 -F raw -b), $uri, $overlay);

my $vm = PBA::Test::VM->start(
    disks => [{ id => $device, file => $overlay, format => 'qcow2', size => length($data) }]);
my $guest = $vm->guest;
is($guest->read_sum($device), unpack('%64N*', $data), 'the guest has the archive');

sub guest_writes ($at, $length, $byte) {
    $guest->write($device, $at, $length, $byte);
    substr($data, $at, $length) = chr($byte) x $length;
}

sub has_job () {
    return scalar(grep { $_->{id} eq 'restore' } $vm->qmp('query-jobs')->@*);
}

sub documented_command () {
    open(my $fh, '<', "$FindBin::Bin/../doc/operating.md") or die "operating.md: $!\n";
    my ($command) = grep { m/\A[{]"execute"/ } <$fh>;
    return JSON::PP->new->decode($command);
}

guest_writes($mib, 64 * $kib, 0x51);
my $stream = documented_command();
$vm->qmp($stream->{execute}, $stream->{arguments}->%*, speed => $mib);
guest_writes(3 * $mib, 128 * $kib, 0x52);
ok(has_job(), 'the guest writes while the archive comes');
is($guest->read_sum($device), unpack('%64N*', $data), 'the guest reads the right data');
$vm->qmp_try('block-job-set-speed', device => 'restore', speed => 0);    # the job may have ended
my $tries = 600;
sleep(0.05) while has_job() && --$tries;
ok($tries, 'the job ends');

$server->kill('TERM');
is($server->finish->{status}, 0, 'the server is ended');
is_deeply([glob("$sockets/*")], [], 'nothing is left');
is($guest->read_sum($device), unpack('%64N*', $data), 'the guest does not notice');
$vm->quit;
my $image = $chain->tmp . '/image.raw';
PBA::Test::QemuNbd::img(qw(convert -f qcow2 -O raw), $overlay, $image);
open(my $fh, '<:raw', $image) or die "$image: $!\n";
ok(
    do { local $/; <$fh> }
        eq $data, 'the disk contains the whole archive'
);
done_testing();
