# Backups of guests that are off, from their images. qemu-io writes to them in between; like a guest's QEMU, it
# maintains persistent bitmaps. t/libvirt.t has a guest that is switched off and on.
#
# One QEMU is enough: the tests of the access test QEMU.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(O_EXCL O_RDWR);
use File::Temp ();
use POSIX ();
use Test::More;

use PBA::Test::Command qw(run_command start_command);
use PBA::Test::VM;
use PVE::BackupAccess;
use PVE::BackupAccess::Image;

my $dir = File::Temp->newdir('pba-image-XXXXXXXX', TMPDIR => 1);
my %file = (disk => "$dir/disk.qcow2", data => "$dir/data.raw");
my %format = (disk => 'qcow2', data => 'raw');
my %size = (disk => '16M', data => '4M');
my @images = map { ('--image', $file{$_}) } sort keys %file;
my @guest = (@images, qw(--guest web1));

mkdir("$dir/$_") or die "$dir/$_: $!\n" for qw(store fleecing run);

sub tool ($tool, @arguments) {
    my $output = qx($tool @{[map { "'$_'" } @arguments]} 2>&1);
    return ($?, $output);
}

sub write_to ($name, $byte, $place) {
    my ($status, $said)
        = tool('qemu-io', '-f', $format{$name}, '-c', "write -P $byte $place", $file{$name});
    return $status ? $said : undef;
}

tool('qemu-img', 'create', '-q', '-f', $format{$_}, $file{$_}, $size{$_}) for sort keys %file;
is(write_to($_, 1, '1M 1M'), undef, "$_: some data is written") for sort keys %file;

sub back_up (@options) {
    return run_command('backup', "$dir/store", '--fleecing-dir', "$dir/fleecing", @options);
}

sub good ($name, @options) {
    my $run = back_up(@options);
    is($run->{status}, 0, "$name: the backup is done") or diag($run->{err});
    my $out = File::Temp->newdir('pba-image-XXXXXXXX', TMPDIR => 1);
    chomp($run->{out});
    run_command('restore', $run->{out}, "$out");
    for my $device (sort keys %file) {
        next if !-e "$out/$device.raw";
        my ($status) = tool(qw(qemu-img compare -q -f raw -F),
            $format{$device}, "$out/$device.raw", $file{$device});
        is($status, 0, "$name: $device is the disk");
    }
    return $run->{err};
}

sub refused ($name, $status, $problem, @options) {
    my $run = back_up(@options);
    is($run->{status}, $status, "$name: exit status");
    my $more = $status == 2 ? qr/Try [^\n]+\n/ : qr//;
    like(
        $run->{err},
        qr/\Apve-backup-access backup: [^\n]*$problem[^\n]*\n$more\z/,
        "$name: a line"
    );
    return;
}

subtest 'qcow2 and raw' => sub {
    like(good('full', @guest), qr/^disk: storing a full image$/m, 'full');
    is(write_to($_, 2, '3M 64k'), undef, "$_: a change") for sort keys %file;
    my $log = good('the next', @guest);
    like(
        $log,
        qr/^disk: dirty-bitmap status: OK \(64\.0 KiB of 16\.0 MiB dirty\)$/m,
        'qcow2: only the change is dirty'
    );
    like($log, qr/^data: dirty-bitmap status: created new/m, 'raw: there is no persistent bitmap');
    like(
        $log,
        qr/^data: read in full, stored 64\.0 KiB that differ/m,
        'raw: only the difference is stored'
    );
    like(good('nothing', @guest), qr/^disk: .*nothing of 16\.0 MiB dirty/m, 'nothing changed');
    my $run = run_command('status', @images);
    like($run->{out}, qr/^store\@\w+ +disk +0 B +recording/m, 'status') or diag($run->{err});
    $run = run_command('map', 'disk', @images, '--fleecing-dir', "$dir/fleecing");
    like($run->{out}, qr/\Adisk, target store\@/, 'map') or diag($run->{err});
    my ($target) = $run->{out} =~ m/target (\S+):/;
    $run = run_command('forget', @images, '--target-id', $target);
    is($run->{status}, 0, 'forget') or diag($run->{err});
    my (undef, $info) = tool(qw(qemu-img info), $file{disk});
    unlike($info, qr{bitmaps}, 'forget: the image has no bitmap');
    like(good('after that', @guest), qr/^disk: dirty-bitmap status: created new/m, 'full again');
};

subtest 'the names of disks, and the UUID' => sub {
    my @uuid = ('--uuid', '00000000-0000-4000-8000-000000000001');
    my @named = ('--image', "scsi0=$file{disk}", @uuid, '--guest', 'named');
    back_up(@named);
    my $log = back_up(@named)->{err};
    like($log, qr/^scsi0: .*nothing of/m, 'a name');
    $log = back_up('--image', "other=$file{disk}", @uuid, '--guest', 'named')->{err};
    like(
        $log,
        qr/^other: dirty-bitmap status: was missing|created new/m,
        'another name: a full backup'
    );
    $log
        = back_up(@named[0, 1], '--uuid', '00000000-0000-4000-8000-000000000002', qw(--guest named))
        ->{err};
    unlike($log, qr/nothing of/, 'another guest: a full backup');
};

# Names that are not valid as names of nodes.
subtest 'odd names' => sub {
    my %file = map { $_ => "$dir/$_.qcow2" } '100-disk-0', 'a-name-of-more-than-31-characters',
        "\xe2\x82\xac";
    tool(qw(qemu-img create -q -f qcow2), $_, '1M') for values %file;
    my @names = sort keys %file;
    for my $kind ('a full image', 'an increment') {
        my $run = back_up((map { ('--image', $file{$_}) } @names), qw(--guest odd));
        is($run->{status}, 0, "$kind: status") or diag($run->{err});
        for my $name (@names) {
            like($run->{err}, qr/^\Q$name\E: storing $kind/m, "$kind: $name");
        }
        my $out = File::Temp->newdir('pba-image-XXXXXXXX', TMPDIR => 1);
        run_command('restore', "$dir/store/odd", "$out");
        is_deeply(
            [sort map { m{/([^/]+)\.raw\z} } glob("$out/*")],
            [sort @names],
            "$kind: the files"
        );
        @names = reverse(@names);
    }
    my $run = run_command('status', map { ('--image', $_) } values %file);
    like($run->{out}, qr/ \Q$_\E +0 B +recording/, "status: $_") for @names;
};

# The name of a disk's node, or of its guest device, by which the running guest was backed up.
subtest 'the names of the running guest' => sub {
    my $uuid = '00000000-0000-4000-8000-000000000003';
    my $vm = PBA::Test::VM->start(
        guest => 0,
        paused => 1,
        memory => 32,
        args => ['-uuid', $uuid],
        disks => [
            { id => 'node', size => 1 << 20, format => 'qcow2' },
            { id => 'drive', size => 1 << 20, format => 'qcow2', shape => 'drive', bus => 'scsi' },
            { id => 'raw', size => 1 << 20 },
        ],
    );
    my %id = (node => 'node', 'drive-dev' => 'drive', raw => 'raw');
    my @named = map { ('--image', "$_=" . $vm->disk($id{$_})->{file}) } sort keys %id;
    my @running = ('--qmp', $vm->qmp_path, '--run-dir', "$dir/run", '--persistent');
    my $next = sub ($name, @options) {
        my $run = back_up(@options, qw(--guest live));
        is($run->{status}, 0, "$name: status") or diag($run->{err});
        like($run->{err}, qr/^$_: dirty-bitmap status: OK \(64\.0 KiB of/m, "$name: $_")
            for qw(node drive-dev);
        like($run->{err}, qr/^raw: read in full, stored 64\.0 KiB that differ/m, "$name: raw")
            if $name eq 'off';
        my $out = File::Temp->newdir('pba-image-XXXXXXXX', TMPDIR => 1);
        run_command('restore', $run->{out} =~ s/\n//r, "$out");
        for my $device (sort keys %id) {
            my $image = $vm->raw_image($id{$device});
            is(system('cmp', '-s', "$out/$device.raw", $image), 0, "$name: $device is the disk");
        }
    };
    my @devices = map { ('--device', $_) } sort keys %id;
    is(back_up(@running, @devices, qw(--guest live))->{status}, 0, 'running: the first backup');
    $vm->qemu_io($_, 'write -P 1 0 64k') for values %id;
    $vm->quit;
    $next->('off', @named, '--uuid', $uuid);
    $vm->restart;
    $vm->qemu_io($_, 'write -P 2 128k 64k') for values %id;
    $next->('running again', @running, @devices);
};

sub open_image ($name) {
    return PVE::BackupAccess::Image->start(
        disks => [{ device => $name, file => $file{$name}, format => $format{$name} }]);
}

sub access_to ($image) {
    return PVE::BackupAccess->new(
        qmp => $image->qmp,
        'target-id' => 'test',
        'fleecing-dir' => "$dir/fleecing",
        'run-dir' => "$dir/run",
        log => sub { },
    );
}

subtest 'who else has the image open' => sub {
    for my $name (sort keys %file) {
        sysopen(my $fh, $file{$name}, O_RDWR) or die "$file{$name}: $!\n";
        refused(
            "$name: any process that writes", 1,
            qr/\Q$file{$name}\E is open for writing/, @guest
        );
        close($fh);
        open(my $reader, '<', $file{$name}) or die "$file{$name}: $!\n";
        good("$name: one that reads", @guest);
        close($reader);
        my $image = open_image($name);
        my $access = access_to($image);
        $access->setup([{ device => $name, 'bitmap-mode' => 'none' }]);
        like(write_to($name, 9, '0 64k'),
            qr/lock/, "$name: a QEMU that would write during the backup");
        refused("$name: another backup", 1, qr/open for writing/, @guest);
        $access->teardown(1);
        $image->stop;
        is(write_to($name, 9, '0 64k'), undef, "$name: a QEMU can write after the backup");
    }
};

# The images are open as by a kernel, and as by qemu-io without locks.
subtest 'devices and backing files' => sub {
    tool(qw(qemu-img create -q -f raw), "$dir/base", '4M');
    tool(qw(qemu-img create -q -f qcow2 -F raw -b), "$dir/base", "$dir/top.qcow2");
    my @top = ('--image', "$dir/top.qcow2", qw(--guest top));
    sysopen(my $fh, "$dir/base", O_RDWR) or die "$dir/base: $!\n";
    refused('the backing file', 1, qr{\Q$dir/base\E is open for writing}, @top);
    close($fh);
    is(back_up(@top)->{status}, 0, 'the backing file can be backed up if nobody writes to it');

    my $device = $> == 0 ? qx(losetup --find --show $dir/base 2>/dev/null) =~ s/\n//r : '';
    return note('no loop devices') if $device eq '';
    my @device = ('--image', "vd=$device", qw(--image-format raw --guest device));
    is(back_up(@device)->{status}, 0, 'a block device') or diag(back_up(@device)->{err});
    sysopen($fh, $device, O_RDWR) or die "$device: $!\n";
    refused('a block device', 1, qr/\Q$device\E is open for writing/, @device);
    close($fh);
    sysopen($fh, $device, O_RDWR | O_EXCL) or die "$device: $!\n";
    refused('a device that is mounted', 1, qr/\Q$device\E is mounted or used/, @device);
    close($fh);
    system('losetup', '--detach', $device);
};

# QEMU would guess the format from the base's content, where its guest may have written a header that names
# another file.
subtest 'formats are not guessed' => sub {
    tool(qw(qemu-img create -q -f raw), "$dir/secret", '1M');
    tool(qw(qemu-img create -q -f qcow2 -F raw -b), "$dir/secret", "$dir/evil");
    tool(qw(qemu-img create -q -f qcow2 -F raw -b), "$dir/evil", "$dir/top.qcow2");
    sysopen(my $fh, "$dir/top.qcow2", O_RDWR) or die "top.qcow2: $!\n";
    sysread($fh, my $header, 65_536);
    sysseek($fh, index($header, "\xe2\x79\x2a\xca"), 0);
    syswrite($fh, "\x12\x34\x56\x78")
        ;    # an extension that QEMU does not know, so no format is recorded
    close($fh);
    refused(
        'the format of a backing file',
        1, qr{the format of its backing file \Q$dir/evil\E is not recorded .*qemu-img rebase -u},
        '--image', "$dir/top.qcow2", qw(--guest evil)
    );
};

subtest 'names and directories' => sub {
    mkdir("$dir/$_") for 'again', 'a,b', my $long = 'x' x 90;
    tool(qw(qemu-img create -q -f raw), $_, '1M')
        for "$dir/again/disk.raw", "$dir/\xff.raw", "$dir/\xc3\xbc.raw";
    refused('one name', 2,
        qr{\Q$dir/again/disk.raw\E are both called 'disk' - give one another name},
        @guest, '--image', "$dir/again/disk.raw");
    refused('not UTF-8', 1, qr/the path is not UTF-8/, '--image', "$dir/\xff.raw", qw(--guest x));
    my $run = back_up(qw(--guest two --image),
        "$dir/\xc3\xbc.raw", '--image', "unnamed-0=$dir/again/disk.raw");
    is($run->{status}, 0, q(a name that another disk's node might have)) or diag($run->{err});
    {
        local $ENV{TMPDIR} = "$dir/a,b";
        is(back_up(@guest)->{status}, 0, 'a comma in TMPDIR');
    }
    local $ENV{TMPDIR} = "$dir/$long";
    refused('a long TMPDIR', 1, qr/cannot make the socket .* set TMPDIR/, @guest);
};

subtest 'one after the other' => sub {
    open(my $other, '+<', $file{data}) or die "$file{data}: $!\n";    # as another backup would
    refused('at once', 1, qr/is open for writing in another process/, @guest);
    ok(!eval { open_image('data'); 1 }, 'the same from Perl');
    is(ref($@) && $@->class, 'StateError', 'has a class that --wait knows');
    my $waiting = start_command('backup', "$dir/store", '--fleecing-dir', "$dir/fleecing",
        @guest, qw(--quiet --wait 100));
    $waiting->goes_on for 1 .. 5;
    close($other);
    is($waiting->finish->{status}, 0, 'with --wait: after the other');
};

# The command is killed: the daemon ends, and the next backup contains what the killed one contained.
subtest 'killed' => sub {
    good('before', @guest);
    is(write_to('disk', 7, '8M 1M'), undef, 'a change');
    for my $signal (qw(KILL TERM)) {
        my $run = start_command('backup', "$dir/store", '--fleecing-dir', "$dir/fleecing", @guest,
            qw(--bandwidth-limit 64K));
        $run->wait_for('err', qr/disk: storing/);
        $run->kill($signal);
        is($run->finish->{signal}, POSIX->can("SIG$signal")->(), "$signal: the command ends");
        my $tries = 100;
        select(undef, undef, undef, 0.1)
            while --$tries && qx(ps -eo args) =~ m/^qemu-storage-daemon .*\Q$dir\E/m;
        ok($tries, "$signal: the daemon ends");
    }
    my $log = good('the next', @guest);
    like(
        $log,
        qr/^disk: dirty-bitmap status: OK \(1\.0 MiB of/m,
        'the next backup contains the change'
    ) or diag($log);
};

subtest 'bad input' => sub {
    POSIX::mkfifo("$dir/fifo.raw", 0600);
    open(my $fh, '>', "$dir/broken.qcow2") or die "broken: $!\n";
    print {$fh} "no qcow2\n" x 1000;
    close($fh);
    my @x = qw(--guest x);
    refused(
        'no such file', 1,
        qr{cannot open /nowhere\.raw - No such file},
        qw(--image /nowhere.raw), @x
    );
    refused('a directory', 1, qr/neither a file nor/, '--image', "$dir", @x,
        qw(--image-format raw));
    refused('a FIFO', 1, qr/neither a file nor/, '--image', "$dir/fifo.raw", @x);
    refused('no qcow2', 1, qr/not in qcow2 format/, '--image', "$dir/broken.qcow2", @x);
    refused('no format', 2, qr/give --image-format/, '--image', "$dir/broken", @x);
    refused('a format', 2, qr/must be qcow2 or raw, not 'vmdk'/, @guest, qw(--image-format vmdk));
    refused('twice', 1, qr/disk 'disk' is given twice/, @guest, '--image', $file{disk});
    refused('no guest', 2, qr/--vmid or --guest is missing/, @images);
    refused('a UUID', 2, qr/--uuid must be a UUID/, @guest, qw(--uuid 1));
    refused('two kinds', 2, qr/--qmp and --image exclude each other/, @guest, qw(--qmp /x));
    refused('no images', 2, qr/--image-format needs --image/, qw(--qmp /x --image-format raw));
};

done_testing;
