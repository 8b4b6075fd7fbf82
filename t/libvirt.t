# Guests of libvirt: the command with --libvirt, libvirt's own jobs before and during an access, and what
# libvirt does to a domain between backups.
#
# One QEMU is enough: libvirt uses the machine's, and the tests of the access test QEMU. A plain run includes a
# quarter of the jobs and changes; PBA_FULL=1 includes all.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::Command qw(command run_command);
use PBA::Test::Libvirt;
use PBA::Test::Share qw(share);
use PVE::BackupAccess;

my $Libvirt = 'PBA::Test::Libvirt';
my $problem = $Libvirt->problem;
plan(skip_all => $problem) if defined($problem);

my $mib = 1 << 20;
my $store = File::Temp->newdir('pba-libvirt-XXXXXXXX', TMPDIR => 1);
my $libvirt = $Libvirt->start('system');
my $other_host;    # the target of migrations
my $run_dir = $libvirt->dir . '/run';
my @guest = ('--libvirt', 'web1', '--connect', $libvirt->uri, '--run-dir', $run_dir);
my %device = (vda => 'virtio-disk0', sda => 'scsi0-0-0-0');

$libvirt->add_disk('vda', bus => 'virtio', size => 16 * $mib, format => 'qcow2');
$libvirt->add_disk('sda', bus => 'scsi', size => 4 * $mib, format => 'raw', label => '64001:64001');
$libvirt->add_disk('hdc', bus => 'ide', size => $mib, format => 'raw', cdrom => 1);
$libvirt->start_domain;

sub xml () { return $libvirt->must('dumpxml', 'web1') }

sub back_up ($name, @options) {
    my $run = run_command('backup', "$store", @guest, @options);
    is($run->{status}, 0, "$name: the backup is done") or diag($run->{err});
    chomp($run->{out});
    return $run;
}

# The archive must equal the guest's disks, to which nobody writes at this time.
sub is_the_guest ($name, $archive, @targets) {
    my $out = File::Temp->newdir('pba-libvirt-XXXXXXXX', TMPDIR => 1);
    my $run = run_command('restore', $archive, "$out");
    is($run->{status}, 0, "$name: restored") or diag($run->{err});
    for my $target (@targets ? @targets : sort keys %device) {
        my ($image, $format) = $libvirt->active_image($target);
        my @command = ($ENV{PBA_QEMU_IMG} // 'qemu-img', qw(compare -q -U -f raw -F), $format);
        is(system(@command, "$out/$device{$target}.raw", $image), 0, "$name: $target is the disk");
    }
    return;
}

my $byte = 0;

sub change () {
    $byte++;
    $libvirt->write($device{vda}, $byte, $byte % 16 * $mib, 65536);
    $libvirt->write($device{sda}, $byte, $byte % 4 * $mib, 65536);
    return;
}

# Whether the backup of that disk was incremental.
sub is_increment ($run, $target) {
    return $run->{err} =~ m/^\Q$device{$target}\E: storing an increment/m;
}

subtest 'backups' => sub {
    change();
    my $xml = xml();
    my $full = back_up('full');
    like(
        $full->{err},
        qr/^ide0-1-0 is left out: it is (?:removable|read-only)$/m,
        'the CD-ROM is left out'
    );
    change();
    my $run = back_up('incremental');
    ok(is_increment($run, $_), "incremental: $_") for sort keys %device;
    is(xml(), $xml, q(libvirt's view of the domain is unchanged));
    is_the_guest('full and incremental', $run->{out});
    is_the_guest('latest, by the name of the domain', "$store/web1");
    my $one = back_up('by target', '--device', 'vda');
    unlike($one->{err}, qr/scsi0/, '--device by target: only that disk is backed up');
    my $rest = back_up('exclude', '--exclude', 'vda');
    like($rest->{err}, qr/^virtio-disk0 is left out: --exclude names it$/m, '--exclude by target');
    my $map = run_command('map', 'vda', @guest);
    like($map->{out}, qr/\Avirtio-disk0, /, 'map by target');
    my $status = run_command('status', @guest);
    like($status->{out}, qr/^no backup is running$/m, 'status');
    like($status->{out}, qr/ virtio-disk0 /, 'status: the disks by the names that last');
    my $mode = (stat($run_dir))[2] & 07777;
    is($mode & 066, 0, 'other users cannot list the run directory');
    is_deeply([glob("$run_dir/*")], [], 'nothing is left in it');
};

# Defines a domain that is off, with another image.
sub define ($name) {
    my $image = $libvirt->dir . "/images/it's & $name.qcow2";
    system($ENV{PBA_QEMU_IMG} // 'qemu-img', qw(create -q -f qcow2), $image, '1M');
    my %text = map { $_ => $_ =~ s/&/&amp;/gr =~ s/'/&apos;/gr } $name, $image;
    open(my $fh, '>', $libvirt->dir . '/other.xml') or die "other.xml: $!\n";
    print {$fh} "<domain type='qemu'><name>$text{$name}</name><memory unit='MiB'>32</memory>"
        . "<metadata><a xmlns='http://example.org/'><disk type='file' device='disk'>"
        . "<target dev='vdb' bus='virtio'/></disk></a></metadata>"
        . "<os><type arch='x86_64' machine='pc'>hvm</type></os><devices><disk type='file' device='disk'>"
        . "<driver type='qcow2'/><source file='$text{$image}'/><target dev='vda' bus='virtio'/></disk>"
        . '</devices></domain>';
    close($fh);
    $libvirt->must('define', $libvirt->dir . '/other.xml');
    return;
}

subtest 'names of domains' => sub {
    my ($id, $uuid) = map { $libvirt->must($_, 'web1') =~ s/\s+//gr } qw(domid domuuid);
    my @connect = ('--connect', $libvirt->uri, '--run-dir', $run_dir);
    for my $name ($id, $uuid) {
        my $run = run_command('status', '--libvirt', $name, @connect);
        like($run->{out}, qr/ virtio-disk0 /, "$name: is web1") or diag($run->{err});
    }
    define($id);
    my $run = run_command('backup', "$store", '--libvirt', $id, @connect, qw(--vmid 500));
    is($run->{status}, 0, 'a name of digits') or diag($run->{err});
    unlike($run->{err}, qr/scsi0/, 'a name of digits: comes before the ID of another domain');
    define('R & D');
    $run = run_command('backup', "$store", '--libvirt', 'R & D', @connect);
    like(
        $run->{err},
        qr/'R & D' is not a valid name of a guest [^\n]* - give another one with --guest, or/,
        'a name that is not valid for archives: the error says what to do'
    );
    $run = run_command('backup', "$store", '--libvirt', 'R & D', @connect, qw(--guest rd));
    is($run->{status}, 0, 'such a name, and --guest') or diag($run->{err});
    unlike($run->{err}, qr/disk1/, 'a disk in the metadata is none');
    my @others = grep { $_ ne $uuid } $libvirt->must(qw(list --all --uuid)) =~ m/(\S+)/g;
    $libvirt->must('undefine', $_)
        for @others;    # by ID, because virsh would take a name of digits for the ID of web1
};

subtest 'on, off, on' => sub {
    back_up('on: full', '--full', '--persistent', '--target-id', 'life');
    for my $state ('off', 'off again', 'on') {
        change() if $state eq 'off';
        $libvirt->must($state eq 'on' ? 'start' : 'destroy', 'web1') if $state ne 'off again';
        change() if $state eq 'on';
        my $run = back_up($state, '--target-id', 'life');
        ok(is_increment($run, 'vda'), "$state: an increment");
        is_the_guest($state, $run->{out});
    }
    change();
    my $run = run_command(
        'backup', "$store", '--image',
        $libvirt->image('vda'),
        qw(--guest x --image-format qcow2)
    );
    is($run->{status}, 1, 'the image of a guest that runs: refused');
    like(
        $run->{err},
        qr/\A[^\n]*vda\.img is open for writing in another process[^\n]*\n\z/,
        'the error is one line'
    );
    kill(KILL => $libvirt->qemu_pid);
    sleep(1) while $libvirt->must('domstate', 'web1') =~ m/running/;
    $run = back_up('killed', '--target-id', 'life');
    ok(!is_increment($run, 'vda'), 'killed: the bitmap is not trusted');
    is_the_guest('killed', $run->{out});
    $libvirt->must('start', 'web1');

    my ($target) = run_command('status', @guest)->{out} =~ m/(life@[0-9a-f]+)/;
    $run = run_command('forget', @guest, '--target-id', 'life');
    like(
        $run->{err},
        qr/^[^\n]*target 'life' has no bitmaps - [^\n]*\Q$target\E/,
        'an incomplete target name: the error names the existing targets'
    );
    $run = run_command('forget', @guest, '--target-id', $target);
    is($run->{status}, 0, 'its bitmaps are forgotten') or diag($run->{err});
    unlike(run_command('status', @guest)->{out}, qr/\Q$target\E/, 'it has no bitmaps');
};

subtest 'errors' => sub {
    for my $case (
        ['nosuch', qr/failed to get domain 'nosuch'/],
        [q(it's "one"), qr/failed to get domain/],
        ['--help', qr/failed to get domain/],
        )
    {
        my ($domain, $problem) = $case->@*;
        my $run = run_command('status', "--libvirt=$domain", '--connect', $libvirt->uri);
        is($run->{status}, 1, "$domain: exit status");
        like(
            $run->{err},
            qr/\Apve-backup-access status: [^\n]*$problem[^\n]*\n\z/,
            "$domain: a line"
        );
    }
    my $run = run_command('status', @guest, '--qmp', '/x');
    is($run->{status}, 2, '--libvirt and --qmp exclude each other');
    $run
        = run_command('status', '--libvirt', 'web1', '--connect', 'qemu:///system?socket=/nowhere');
    like($run->{err}, qr/\A[^\n]*failed to connect[^\n]*\n\z/, 'libvirt is not reachable');
    $run = run_command('backup', "$store", @guest, '--qemu-user', 'nosuch');
    like(
        $run->{err},
        qr/\A[^\n]*qemu-user 'nosuch': there is no such name on this machine\n\z/,
        'the user does not exist'
    );
    $run = run_command('backup', "$store", @guest, '--qemu-user', '64002', '--qemu-group', '64002');
    like(
        $run->{err},
        qr/Permission denied.*AppArmor.*rwk/,
        'QEMU runs as another user: the error says what to do'
    );
};

# ---- libvirt's own jobs ----

sub new_access () {
    return PVE::BackupAccess->new(
        qmp => $libvirt->qmp,
        'target-id' => 'during',
        'fleecing-dir' => '/var/tmp',
        'qemu-user' => 64_055,
        'qemu-group' => 64_055,
        log => sub { },
    );
}

sub devices () {
    return [map { { device => $_, 'bitmap-mode' => 'use' } } sort values %device];
}

my $extra = 0;
sub new_file () { return $libvirt->dir . '/images/extra' . ++$extra }

sub backup_xml ($mode) {
    my $file = new_file();
    my $disk
        = $mode eq 'push'
        ? "<target file='$file'/><driver type='raw'/>"
        : "<scratch file='$file'/>";
    my $server = $mode eq 'pull' ? "<server transport='unix' socket='$file.sock'/>" : '';
    my $type = "type='file'";
    open(my $fh, '>', "$file.xml") or die "$file.xml: $!\n";
    print {$fh}
        "<domainbackup mode='$mode'>$server<disks><disk name='vda' backup='yes' $type>$disk</disk>"
        . "<disk name='sda' backup='no'/></disks></domainbackup>";
    close($fh);
    return "$file.xml";
}

sub other_host () { return $other_host //= $Libvirt->start('system') }

# Both hosts use the same disk images, whose cache mode libvirt considers unsafe for that.
sub migrate_to ($host) { return (qw(migrate --live --unsafe web1), $host->uri, 'tcp://127.0.0.1') }

# Name => the command, and the command that ends the job if it has begun.
my %jobs = (
    blockcopy =>
        [sub { ('blockcopy', 'web1', 'vda', new_file(), '--transient-job', qw(--wait --pivot)) }],
    'blockcopy, synchronous' => [
        sub {
            (
                'blockcopy', 'web1', 'vda', new_file(), '--transient-job', '--synchronous-writes',
                qw(--wait --pivot)
            )
        }
    ],
    'blockcopy that stays' => [
        sub { ('blockcopy', 'web1', 'vda', new_file(), '--transient-job', qw(--wait)) },
        ['blockjob', 'web1', 'vda', '--abort']
    ],
    'backup-begin push' =>
        [sub { ('backup-begin', 'web1', backup_xml('push')) }, ['domjobabort', 'web1']],
    'backup-begin pull' =>
        [sub { ('backup-begin', 'web1', backup_xml('pull')) }, ['domjobabort', 'web1']],
    snapshot => [
        sub {
            (
                'snapshot-create-as', 'web1',
                qw(--disk-only --no-metadata --diskspec), 'vda,file=' . new_file(),
                '--diskspec', 'sda,snapshot=no'
            )
        }
    ],
    blockcommit => [sub { ('blockcommit', 'web1', 'vda', qw(--active --wait --pivot)) }],
    save => [sub { ('save', 'web1', new_file()) }],
    migrate => [sub { migrate_to(other_host()) }],
    blockresize => [sub { ('blockresize', 'web1', 'sda', '5M') }],
);

# Each of them is active when the backup begins, which must be refused or correct.
my %before = (
    'blockcopy' => [
        sub { ('blockcopy', 'web1', 'vda', new_file(), '--transient-job', '--wait') },
        ['blockjob', 'web1', 'vda', '--abort']
    ],
    'backup-begin pull' =>
        [sub { ('backup-begin', 'web1', backup_xml('pull')) }, ['domjobabort', 'web1']],
    'backup-begin push' =>
        [sub { ('backup-begin', 'web1', backup_xml('push')) }, ['domjobabort', 'web1']],
);

subtest 'a job that runs already' => sub {
    for my $name (sort keys %before) {
        my ($command, $end) = $before{$name}->@*;
        $libvirt->must($command->());
        my $run = run_command('backup', "$store", @guest);
        note("$name: $run->{status} ", $run->{err} =~ m/(\N+)\n\z/);
        like(
            $run->{err},
            qr/^pve-backup-access backup: [^\n]*(?:job|NBD server)[^\n]* - [^\n]+\n\z/m,
            "$name: the error says why and what to do"
        ) if $run->{status};
        change();
        $libvirt->virsh($end->@*);
        my $after = back_up("$name: afterwards");
        is_the_guest("$name: afterwards", $after->{out});
    }
};

subtest 'during an access' => sub {
    for my $name (share(share(sort keys %jobs))) {
        my ($command, $end) = $jobs{$name}->@*;
        change();
        my $xml = xml();
        my $access = new_access();
        $access->setup(devices());
        $access->volumes('nbd');
        my $run = $libvirt->virsh($command->());
        note("$name: $run->{status} " . $run->{text} =~ s/\s+/ /gr);
        $libvirt->virsh($end->@*) if $end && !$run->{status};
        my $done = eval { $access->teardown(1); 1 };
        my $error = $@;
        is($libvirt->must('domstate', 'web1') =~ s/\s+//gr, 'running', "$name: the guest runs");
        ok($done, "$name: teardown") or diag($error);
        is(xml(), $xml, "$name: refused, and the domain is as it was") if $run->{status};
        change();
        my $after = back_up($name);
        is_the_guest($name, $after->{out});
    }
};

# ---- between backups ----

# The change, and whether the next backup of vda may be incremental.
my %changes = (
    'the CD-ROM is ejected' => sub { $libvirt->must('change-media', 'web1', 'hdc', '--eject') },
    'the CD-ROM is removed' => sub {
        $libvirt->must('destroy', 'web1');
        $libvirt->must('detach-disk', 'web1', 'hdc', '--config');
        $libvirt->must('start', 'web1');
    },
    'a snapshot' => sub {
        $libvirt->must(
            'snapshot-create-as', 'web1',
            '--disk-only', '--no-metadata',
            '--diskspec', 'vda,file=' . new_file(),
            '--diskspec', 'sda,snapshot=no'
        );
    },
    'a snapshot that is committed' => sub {
        $libvirt->must(
            'snapshot-create-as', 'web1',
            '--disk-only', '--no-metadata',
            '--diskspec', 'vda,file=' . new_file(),
            '--diskspec', 'sda,snapshot=no'
        );
        change();
        $libvirt->must('blockcommit', 'web1', 'vda', qw(--active --wait --pivot));
    },
    'a blockcopy' => sub {
        $libvirt->must('blockcopy', 'web1', 'vda', new_file(), '--transient-job',
            qw(--wait --pivot));
    },
    'saved and restored' => sub {
        my $file = new_file();
        $libvirt->must('save', 'web1', $file);
        $libvirt->must('restore', $file);
    },

    # This is the last one, because afterwards QEMU cannot store bitmaps in an image that has become a backing
    # file.
    'to another host and back' => sub {
        $libvirt->must(migrate_to(other_host()));
        other_host()->must(migrate_to($libvirt));
    },
);

subtest 'between backups' => sub {
    for my $name (share(share(sort keys %changes))) {
        back_up("$name: before");
        change();
        $changes{$name}->();
        change();
        my $run = back_up($name);
        note("$name: vda is ", is_increment($run, 'vda') ? 'an increment' : 'full');
        is_the_guest($name, $run->{out});
        change();
        my $next = back_up("$name: the next");
        ok(is_increment($next, $_), "$name: the next: $_ is an increment") for sort keys %device;
        is_the_guest("$name: the next", $next->{out});
    }
};

done_testing;
