# Copies to other kinds of storage and to other hosts, as described in doc/scaling.md: nbdkit, RBD, and NBD over
# TLS, which is refused without the key. The code blocks there are parts of this file.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use File::Temp ();
use IO::Socket::INET ();
use POSIX ();
use Time::HiRes ();

use PBA::Test::BitmapDisk;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Volume;

my $Volume = 'PVE::BackupAccess::Volume';

my $device = 'drive-scsi0';
my $tmp = File::Temp->newdir('pba-scaling-XXXXXXXX', TMPDIR => 1);
my $dir = "$tmp";
my $size = 16 << 20;

# ---- servers ----

# Ends a server that a script has started, by its PID file NAME.pid. nbdkit writes this file after it has moved
# to the background.
sub end_server ($file) {
    local $?;
    open(my $fh, '<', $file) or die "$file: $!\n";
    my ($pid) = <$fh> =~ m/([0-9]+)/ or die "$file is empty\n";
    kill(KILL => $pid);
    Time::HiRes::sleep(0.01) while has_files($pid);
    unlink($file);
    return;
}

# A process can only wait for its own children, and without a wait, a process that has ended stays a zombie. Its
# first thread may become one before the others have ended.
sub has_files ($pid) {
    for my $thread (glob("/proc/$pid/task/*/stat")) {
        open(my $fh, '<', $thread) or next;
        return 1 if (<$fh> // ') Z') !~ m/\) [ZX]/;
    }
    return 0;
}

END {
    end_server($_) for glob("$dir/*.pid $dir/ceph/*.pid");
    undef($tmp);    # not earlier
}

sub run_shell ($script, %environment) {
    local @ENV{ 'dir', keys %environment } = ($dir, values %environment);
    system('bash', '-euo', 'pipefail', '-c', $script) == 0 or die "failed: $script\n";
    return;
}

sub free_port () {
    my $socket = IO::Socket::INET->new(Listen => 1, LocalAddr => '127.0.0.1') or die "$@\n";
    my $port = $socket->sockport;
    close($socket);
    return $port;
}

# ---- the copy ----

my $disk = PBA::Test::BitmapDisk->new(dir => $dir, device => $device, size => $size);

# Stores the volumes as a provider does.
sub store ($volumes, $target) {
    my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
    my $statistics = $volume->copy(to => $target);
    $volume->close;
    return $statistics;
}

# The image to which the first increment is written.
sub write_empty ($image) {
    open(my $fh, '>', $image) or die "$image: $!\n";
    truncate($fh, $size) or die "$image: $!\n";
    close($fh) or die "$image: $!\n";
}

sub content_of ($uri) {
    my $file = "$dir/content.raw";
    PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $uri, $file);
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return substr(scalar(<$fh>), 0, $size);
}

# A full copy, then an incremental one over it, then a check of the target's content.
sub check_target ($text, $target, $reader = $target, $between = sub () { }) {
    for my $mode (qw(new use)) {
        $disk->write(map { [int(rand(200)) * 65536, 100_352, 1 + int(rand(255))] } 1 .. 10);
        my $statistics = eval { store({ $device => $disk->open($mode) }, $target) };
        diag($@) if !$statistics;
        $disk->close($statistics ? 1 : 0);
        ok($statistics && content_of($reader) eq $disk->content, "$text: mode $mode");
        cmp_ok($statistics->{'bytes-read'}, '<', $size, "$text: a part") if $mode eq 'use';
        $between->() if $mode eq 'new';
    }
    return;
}

srand(20261122);

subtest 'nbdkit' => sub {
    run_shell(<<'SHELL');
        truncate --size 16M "$dir/drive-scsi0.raw"
        nbdkit --unix "$dir/nbdkit" --pidfile "$dir/nbdkit.pid" file "$dir/drive-scsi0.raw"
SHELL
    check_target('file', "nbd+unix:///?socket=$dir/nbdkit");
    end_server("$dir/nbdkit.pid");
    unlink("$dir/nbdkit");
    run_shell(<<'SHELL');
        nbdkit --unix "$dir/nbdkit" --pidfile "$dir/nbdkit.pid" memory 16M
SHELL
    check_target('memory', "nbd+unix:///?socket=$dir/nbdkit");
};

# ---- TLS ----

run_shell(<<'SHELL');
        mkdir --mode 0700 "$dir/keys"
        psktool --username backup --pskfile "$dir/keys/keys.psk" >/dev/null
SHELL

sub fails ($uri, $error, $text) {
    my $volume = eval { $Volume->open($device, { 'nbd-path' => $uri }) };
    is($volume, undef, "$text: refused");
    like($@, $error, "$text: the error");
    return;
}

# A server that accepts only TLS.
sub check_refusals ($uri) {
    my $other = "$dir/other.psk";
    run_shell(qq(psktool --username backup --pskfile "$other" >/dev/null));
    fails($uri =~ s/tls-psk-file=.*/tls-psk-file=$other/r, qr/connecting failed/, 'another key');
    fails($uri =~ s/backup\@/nobody@/r, qr/connecting failed/, 'another user');
    fails($uri =~ s/\Anbds(.*?)backup\@(.*)\?.*/nbd$1$2/r, qr/TLS|tls/, 'no TLS');
    return;
}

subtest 'a target on another host, over TLS' => sub {
    my ($host, $port, $key_file) = ('127.0.0.1', free_port(), "$dir/keys/keys.psk");
    run_shell(<<'SHELL', host => $host, port => $port);
        qemu-img create -q -f qcow2 "$dir/target.qcow2" 16M
        qemu-nbd --fork --pid-file "$dir/target.pid" --persistent --shared 8 --discard unmap \
            --object tls-creds-psk,id=tls,endpoint=server,dir="$dir/keys" --tls-creds tls \
            --bind "$host" --port "$port" --export-name drive-scsi0 \
            --format qcow2 "$dir/target.qcow2"
SHELL
    my $target = "nbds://backup\@$host:$port/drive-scsi0?tls-psk-file=$key_file";
    check_refusals($target);
    for my $mode (qw(new use)) {
        $disk->write([1 << 20, 65536, 7 + ($mode eq 'use')]);
        my $statistics = store({ $device => $disk->open($mode) }, $target);
        $disk->close(1);
        is($statistics->{'bytes-read'}, $mode eq 'new' ? $size : 65536, "mode $mode: copied");
    }
    end_server("$dir/target.pid");
    PBA::Test::QemuNbd::img('convert', '-f', 'qcow2', '-O', 'raw', "$dir/target.qcow2",
        "$dir/t.raw");
    ok(content_of("$dir/t.raw") eq $disk->content, 'the target equals the disk');
};

# Runs code in a separate process that inherits nothing of this one.
sub in_another_process ($code) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        my $done = eval { $code->(); 1 } or diag($@);
        POSIX::_exit($done ? 0 : 1);
    }
    waitpid($pid, 0);
    return $? == 0;
}

subtest 'a source on another host, over TLS' => sub {
    my ($host, $port, $key_file) = ('127.0.0.1', free_port(), "$dir/keys/keys.psk");
    my $image = "$dir/copy.raw";
    my $read = sub () {
        my $volume = PVE::BackupAccess::Volume->open(
            'drive-scsi0',
            {
                'nbd-path' => "nbds://backup\@$host:$port/drive-scsi0?tls-psk-file=$key_file",
                'bitmap-name' => 'bitmap0',
            }
        );
        $volume->copy(to => $image);
        $volume->close;
    };
    write_empty($image);
    for my $mode (qw(new use)) {
        $disk->write([3 << 20, 65536, 20 + ($mode eq 'use')]);
        $disk->open($mode);
        $disk->{server}->stop;
        run_shell(<<'SHELL', host => $host, port => $port, disk => $disk->{file});
        qemu-nbd --fork --pid-file "$dir/source.pid" --persistent --shared 8 --read-only \
            --object tls-creds-psk,id=tls,endpoint=server,dir="$dir/keys" --tls-creds tls \
            --bind "$host" --port "$port" --export-name drive-scsi0 \
            --bitmap bitmap0 --format qcow2 "$disk"
SHELL
        ok(in_another_process($read), "mode $mode: read");
        ok(content_of($image) eq $disk->content, "mode $mode: the image equals the disk");
        check_refusals("nbds://backup\@$host:$port/drive-scsi0?tls-psk-file=$key_file")
            if $mode eq 'use';
        end_server("$dir/source.pid");
        $disk->close(1);
    }
};

# ---- RBD ----

subtest 'RBD' => sub {
    plan(skip_all => 'needs Ceph and PBA_FULL')
        if !$ENV{PBA_FULL} || grep { !-x "/usr/bin/$_" } qw(ceph-mon ceph-mgr ceph-osd rbd);
    mkdir("$dir/ceph") or die "mkdir: $!\n";
    my $port = free_port();
    local $ENV{CEPH_CONF} = "$dir/ceph/ceph.conf";
    run_shell(qq("$FindBin::Bin/one-node-ceph.sh" "$dir/ceph" $port));
    run_shell(<<'SHELL');
        rbd create --size 16M backup/vm-100-scsi0
        qemu-nbd --fork --pid-file "$dir/rbd.pid" --persistent --shared 8 --discard unmap \
            --socket "$dir/rbd" --format raw "rbd:backup/vm-100-scsi0:conf=$CEPH_CONF"
SHELL
    my $first = $disk->content;
    check_target(
        'RBD',
        "nbd+unix:///?socket=$dir/rbd",
        "nbd+unix:///?socket=$dir/rbd",
        sub () {
            $first = $disk->content;
            run_shell(<<'SHELL');
        rbd snap create --no-progress "backup/vm-100-scsi0@$(date --utc +%Y%m%dT%H%M%SZ)"
SHELL
        }
    );
    run_shell(<<'SHELL');
        rbd export --no-progress "backup/vm-100-scsi0@$(rbd snap ls backup/vm-100-scsi0 |
            awk 'NR == 2 { print $2 }')" "$dir/snapshot.raw"
SHELL
    ok(content_of("$dir/snapshot.raw") eq $first, 'the snapshot has the state of the first copy');
};

done_testing;
