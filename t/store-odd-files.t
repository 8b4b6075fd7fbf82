# A FIFO, a socket, a device or a directory in the place of a file of a store, or a FIFO that the header of an image names,
# holds nobody up: each command ends, and other archives can be read.
#
# One QEMU is enough: qemu-img and qemu-nbd only use files.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use IO::Socket::UNIX ();
use POSIX ();
use Test::More;
use Time::HiRes ();

use PBA::Test::Chain;
use PVE::BackupAccess::Provider::Qcow2Chain::Names qw(number_of);
use PVE::BackupAccess::Provider::Store::Tar qw(is_for_pct stream_problem);

my $seconds = 60;    # each of the calls takes less than one

my %kinds = (
    fifo => sub ($path) { POSIX::mkfifo($path, 0600) },
    socket => sub ($path) { IO::Socket::UNIX->new(Local => $path, Listen => 1) },
    device => sub ($path) { symlink('/dev/zero', $path) },
    directory => sub ($path) { mkdir($path) },
);

my $chain = PBA::Test::Chain->new->add_archives(3);
my @names = $chain->names;
my $store = $chain->store;
my $device = 'drive-scsi0';

# Whether all calls of a process end in time. Their errors do not matter.
sub all_end (@calls) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        alarm($seconds);
        for my $call (@calls) {
            eval { $call->(); 1 } or print {*STDERR} map { "# $_" } $@;
        }
        POSIX::_exit(0);
    }
    waitpid($pid, 0);
    return $? == 0;
}

# Replaces a file. A socket's path must be short.
sub replace ($kind, $path) {
    my ($dir, $name) = $path =~ m{\A(.*)/([^/]*)\z};
    unlink($path);
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        chdir($dir) && $kinds{$kind}->($name) or print {*STDERR} "$path: $!\n";
        POSIX::_exit(0);
    }
    waitpid($pid, 0);
    (-e $path || -l $path) or die "$path was not made\n";
    return;
}

sub calls () {
    my $provider = $chain->provider;
    return (
        sub { $provider->list },
        sub { $provider->verify($_) for @names },
        sub { $chain->restored($names[2], $device) },
        sub { $provider->archive_get_guest_config($names[1]) },
        sub { $provider->digests($names[2], $device) },
        sub { number_of($chain->store, 'web') },
        sub { $provider->retention(100, 1) },
        sub { $chain->backup or die $chain->error },
        sub { $provider->remove($names[0]) },
        sub { $provider->prune(100, 1) },
    );
}

my @files = map { "$names[1]/$_" } qw(manifest.json removed.json guest.conf),
    map { "$device.$_" } qw(qcow2 digests merged joined);

push(@files, 'vm/100/name', 'vm/100/.reading', 'vm/100/.lock');

for my $kind (sort keys %kinds) {
    subtest $kind => sub {
        push(@files, shift(@files));
        for my $file (map { $_ % 4 && !$ENV{PBA_FULL} ? () : $files[$_] } 0 .. $#files) {
            my $copy = $chain->use_copy($store);
            replace($kind, "$copy/$file");
            ok(all_end(calls()), "$file: all ends");
        }
        my $tree = $chain->tmp . "/$kind.tar.zst";
        replace($kind, $tree);
        ok(all_end(sub { stream_problem($tree, {}) }, sub { is_for_pct($tree) }),
            'a tree: all ends');
    };
}

sub put ($header, $at, $bytes) {
    substr($header->$*, $at, length($bytes), $bytes);
    return;
}

# Makes QEMU open this file as the backing file of an image, or as its data file. Neither size nor time of the image changes.
my %headers = (
    backing => sub ($header, $file) {
        put($header, 8, pack('Q> N', 2048, length($file)));
        put($header, 2048, $file);
    },
    data => sub ($header, $file) {
        my ($features, $at) = unpack('x72 Q> x20 N', $header->$*);
        put($header, 72, pack('Q>', $features | 4));
        my $room = 8 * int((length($file) + 7) / 8);
        my $extension = pack("NN a$room", 0x44415441, length($file), $file);
        put($header, $at, $extension . "\0" x 8);
    },
);

sub change_header ($image, $kind, $file) {
    my @times = (Time::HiRes::stat($image))[8, 9];
    open(my $fh, '+<:raw', $image) or die "$image: $!\n";
    read($fh, my $header, 4096);
    $headers{$kind}->(\$header, $file);
    seek($fh, 0, 0);
    print {$fh} $header;
    close($fh) or die "$image: $!\n";
    Time::HiRes::utime($times[0], $times[1], $image);
    return;
}

subtest 'a manifest that is larger than memory' => sub {
    my $file = $chain->use_copy($store) . "/$names[1]/manifest.json";
    truncate($file, 1 << 26) or die "$file: $!\n";    # stands for more
    my @list = $chain->provider->list(100)->@*;
    like($list[1]{problem}, qr/the manifest \S+ is damaged - it has 67108864 bytes/, 'is not read');
    ok(!defined($list[0]{problem}), 'the others are listed');
};

my $fifo = $chain->tmp . '/fifo';
POSIX::mkfifo($fifo, 0600) or die "$fifo: $!\n";

for my $kind (sort keys %headers) {
    subtest "a FIFO as $kind file" => sub {
        my @cases = map { [$_, 0], [$_, 1] } 0 .. 2;
        for my $case ($ENV{PBA_FULL} ? @cases : @cases[1, 2]) {
            my ($number, $is_killed) = $case->@*;
            my $copy = $chain->use_copy($store);
            change_header("$copy/$names[$number]/$device.qcow2", $kind, $fifo);
            my $middle = "$copy/$names[1]";
            rename("$middle/manifest.json", "$middle/removed.json") if $is_killed;
            my $when = $is_killed ? ', in a removal' : '';
            ok(all_end(calls()), "archive $number$when: all ends");
        }
    };
}

subtest 'each reader of a manifest gets its own' => sub {
    require PVE::BackupAccess::Provider::Store::Manifest;
    my $decode = \&PVE::BackupAccess::Provider::Store::Manifest::decode_manifest;
    my ($first, $second) = map { $decode->('{"devices":{"a":{"size":1}}}') } 1, 2;
    $first->{devices}{a}{parent} = 'other';
    is_deeply(
        $second,
        { devices => { a => { size => 1 } } },
        'a change is not seen by another reader'
    );
    is_deeply($decode->('{"devices":{"a":{"size":1}}}'), $second, 'nor by a later one');
    is($decode->('{"devices":'), undef, 'a text that is not JSON is no manifest') for 1, 2;
};

done_testing;
