# Provider::RBD where its programs do what a real cluster seldom makes them do; no Ceph is needed.
#
# One QEMU is enough: none is run.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Digest::SHA qw(sha256_hex);
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::NoCeph;
use PVE::BackupAccess::CLI::ArchivePath qw(find_archive);
use PVE::BackupAccess::CLI::Store qw(store_name_of);
use PVE::BackupAccess::Program qw(new_pipe start_program);
use PVE::BackupAccess::Provider::RBD;
use PVE::BackupAccess::Provider::RBD::Archive;
use PVE::BackupAccess::Provider::RBD::Guest;
use PVE::BackupAccess::Provider::RBD::Lock;
use PVE::BackupAccess::Provider::RBD::Server;
use PVE::BackupAccess::Provider::Store::Digests qw(digests_size);
use PVE::BackupAccess::Provider::Store::Manifest qw(encode_manifest);

my $Archive = 'PVE::BackupAccess::Provider::RBD::Archive';
my $Lock = 'PVE::BackupAccess::Provider::RBD::Lock';
my $NoCeph = 'PBA::Test::NoCeph';
my $Server = 'PVE::BackupAccess::Provider::RBD::Server';
my $place = 'rbd:backup/test';
my @log;

sub ceph_with (%how) {
    return $NoCeph->new(
        pool => 'backup',
        namespace => 'test',
        conf => '/none',
        log => sub ($level, $message) { push(@log, "$level: $message") },
        watchers => ['127.0.0.1:0/1 client.1'],
        %how
    );
}

# What the code dies with, in a process that a SIGPIPE ends, as a shell starts it.
sub error_of ($code) {
    pipe(my $from, my $to) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        local $SIG{PIPE} = 'DEFAULT';
        my $error = eval { $code->(); 1 } ? 'none' : "$@";
        syswrite($to, $error);
        POSIX::_exit(0);
    }
    close($to);
    waitpid($pid, 0);
    return $? ? "killed by signal $?" : readline($from);
}

subtest 'a watch that cannot be had' => sub {
    my %says = (
        'echo "error: (2) No such file" >&2; exit 1' => 'error: (2) No such file',
        'exit 1' => 'rados has ended',
    );
    for my $script (sort keys %says) {
        my $ceph = ceph_with(script => $script);
        is(
            error_of(sub () { $Lock->try($ceph, 'pba.vm-100', 'read') }),
            "cannot watch the object pba.vm-100.read in $place - $says{$script}\n",
            "$says{$script}: which object, and why"
        );
    }
};

subtest 'a watch whose program ends by itself' => sub {
    my $ceph = ceph_with(script => 'echo "press enter to exit..."');
    my $drop = sub () {
        my $lock = $Lock->try($ceph, 'pba.vm-100', 'change') // die "no lock\n";
        sleep(0.5);
        $lock->drop;
    };
    is(error_of($drop), 'none', 'is dropped');
};

subtest 'a watch that waits for the cluster' => sub {
    local $PVE::BackupAccess::Provider::RBD::Ceph::tell_every = 0;
    @log = ();
    my $ceph = ceph_with(script => 'sleep 1; echo "press enter to exit..."; read line');
    ok($Lock->try($ceph, 'pba.vm-100', 'change'), 'it is had at last');
    like(
        $log[0],
        qr/^warn: rados watch in $place: still waiting for the Ceph cluster of /,
        'and says meanwhile what it waits for'
    );
};

subtest 'a watch that the cluster does not list' => sub {
    my $ceph = ceph_with(script => 'echo "press enter to exit..."; read line', watchers => []);
    is(
        error_of(sub () { $Lock->try($ceph, 'pba.vm-100', 'change') }),
        "the cluster does not list the watch of the object pba.vm-100.change in $place\n",
        'is no lock'
    );
};

# What rados prints while it watches, and what a check of the lock makes of it.
my %reports = (
    'NOTIFY cookie 94147 notify_id 1 from 4121' => '',
    '2026-11-30T08:00:00.000+0000 7f0 0 monclient: hunting for new mon' => '',
    'ERROR cookie 94147 err (107) Transport endpoint is not connected' => 'lost',
);

sub lock_that_says ($kind, $line, $then = 'read line') {
    my $ceph = ceph_with(
        script => qq(echo "press enter to exit..."; echo "$line"; $then),
        $kind eq 'read' ? (watchers => []) : (),
    );
    return $Lock->try($ceph, 'pba.vm-100', $kind) // die "no lock\n";
}

sub error_of_check ($method, $lock) {
    sleep(0.5);
    return eval { $lock->$method; 1 } ? '' : "$@";
}

subtest 'a watch that the cluster has forgotten' => sub {
    my %since = (
        change => 'another backup or prune may have begun',
        read => 'another process may have removed the archive',
    );
    for my $line (sort keys %reports) {
        my $lock = lock_that_says('read', $line);
        my $expected = $reports{$line}
            && "the lock pba.vm-100.read in $place was lost, because the"
            . " cluster has not heard of this host for half a minute, and $since{read} - try again\n";
        is(error_of_check('check_report', $lock), $expected, $line);
        is(error_of_check('check_report', $lock), $expected, 'still');
    }
    for my $kind (sort keys %since) {
        my $ended = lock_that_says($kind, 'bye', 'exit 1');
        like(
            error_of_check('check_report', $ended),
            qr/was lost,.* and $since{$kind} - try again/,
            "$kind: the program has ended"
        );
    }
    like(error_of_check('check', lock_that_says('change', 'ERROR cookie 1 err (107)')),
        qr/was lost/, 'although the cluster lists a watch, which may be that of another process');
};

subtest 'a server whose archive is not protected from removal any more' => sub {
    my $server
        = bless({ owner => $$, reading => lock_that_says('read', 'ERROR cookie 1') }, $Server);
    like(error_of_check('is_running', $server), qr/may have removed the archive/, 'an error');
    $server->kill;
    pass('it can be ended');
};

# A killed client would stay a watcher of its image for half a minute.
subtest 'a server that is to end' => sub {
    my ($out, $to) = new_pipe();
    my $server = bless({ owner => $$ }, $Server);
    my $script = q(trap 'sleep 0.3; echo closed; exit' TERM; echo up; while :; do sleep 0.05; done);
    start_program(\$server->{pid}, { out => $to }, 'sh', '-c', $script);
    close($to);
    is(readline($out), "up\n", 'it runs');
    $server->kill;
    is(readline($out), "closed\n", 'it has the time to close its image');
    ok(!$server->is_running, 'and has ended');
};

# As qemu-nbd before its main loop runs.
subtest 'a server that ignores the first signal' => sub {
    my ($out, $to) = new_pipe();
    my $server = bless({ owner => $$ }, $Server);
    my $script
        = q(trap 'trap "echo closed; exit" TERM' TERM; echo up; while :; do sleep 0.05; done);
    start_program(\$server->{pid}, { out => $to }, 'sh', '-c', $script);
    close($to);
    is(readline($out), "up\n", 'it runs');
    my $began = time;
    $server->kill;
    is(readline($out), "closed\n", 'gets another one');
    cmp_ok(time - $began, '<', 9, 'soon');
};

package PBA::Test::Text {
    sub pread (@) { return 'x' x 512 }
}

# What is written to the image must be what was read from it.
subtest 'the first block of an image, while there is no room for temporary files' => sub {
    my $server = bless({ owner => $$, connection => bless({}, 'PBA::Test::Text') }, $Server);
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::RBD::Server::temporary_file = sub () {
        open(my $fh, '<', '/dev/zero') or die "open: $!\n";
        return $fh;
    };
    ok(!eval { $server->lock_image(512); 1 }, 'is not copied');
    like($@, qr/^cannot write a temporary file - /, 'the error says why');
};

my $name = '20261130T080000Z';
my $image = "pba-vm-100-drive-scsi0-$name";
my %device = (size => 512, image => $image, digests => { sha256 => '0' x 64 });
my $manifest = encode_manifest(
    { format => 1, id => 'a1', devices => { 'drive-scsi0' => \%device }, files => {} });

# A guest with a snapshot.
sub guest_with (%how) {
    my $ceph = ceph_with(
        removed => [],
        images => { $image => [{ name => $name, size => 512, protected => 0 }] },
        %how
    );
    return ($ceph,
        PVE::BackupAccess::Provider::RBD::Guest->new(ceph => $ceph, place => 'vm/100', wait => 0));
}

subtest 'a restore during which the archive is removed' => sub {
    my ($ceph, $guest) = guest_with(stored => { "archive $name" => $manifest });
    is($guest->reading_problem($name, 'drive-scsi0'),
        undef, 'nothing is wrong while its snapshot is there');
    $ceph->{images}{$image} = [];
    like(
        $guest->reading_problem($name, 'drive-scsi0'),
        qr/^the snapshot \Q$image\E\@$name is missing: the archive was removed during that time/,
        'what was read may be wrong'
    );
};

# Another backup begins when this process has looked whether its lock is still there, and before it looks what there is.
subtest 'a lock that is lost before the removal of what a killed backup left' => sub {
    my ($ceph, $guest) = guest_with(
        stored => {},
        script => 'echo "press enter to exit..."; read line'
    );
    my $lock = $guest->change_lock;
    my $images = $NoCeph->can('images');
    no warnings 'redefine';
    local *PBA::Test::NoCeph::images = sub (@which) {
        $ceph->{watchers} = ['127.0.0.1:0/2 client.2'];
        return $images->(@which);
    };
    like(($guest->clean)[0], qr/was lost/, 'the lock was lost');
    is_deeply($ceph->{removed}, [], 'nothing of the other backup is removed');
};

# An administrator may keep a copy of an image, under a name that begins like those of the guest's images.
subtest 'images of others' => sub {
    my ($ceph, $guest) = guest_with(stored => { "archive $name" => $manifest });
    my $left = 'pba-vm-100-drive-scsi1-20261130T090000Z';
    $ceph->{images}{$_} = [] for "$image-copy", 'pba-vm-100-copy', "pba-vm-100-$name", $left;
    is_deeply([$guest->clean, $ceph->{removed}], [[$left]], 'stay');
};

# Each look at the lock is a call of a program.
subtest 'a clean-up that finds nothing' => sub {
    my ($ceph, $guest) = guest_with(stored => { "archive $name" => $manifest });
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::RBD::Guest::check_lock = sub (@) { die "it looks\n" };
    is_deeply([$guest->clean], [], 'needs no look at the lock');
};

subtest 'an archive that is protected while a prune removes others' => sub {
    my ($ceph, $guest) = guest_with(stored => { "archive $name" => '{}' });
    ok(!$guest->is_protected($name), 'it is not yet');
    $ceph->{images}{$image}[0]{protected} = 1;
    ok(!eval { $guest->remove($name); 1 }, 'it is not removed');
    like($@, qr/archive $name is protected - unprotect its snapshots first/, 'and why');
    is_deeply(
        [$ceph->{stored}, $ceph->{removed}],
        [{ "archive $name" => '{}' }, []],
        'its manifest is there'
    );
};

subtest 'the files of digests of devices with long names' => sub {
    my ($ceph, $guest) = guest_with(stored => {});
    my $archive = $Archive->begin($guest, $name);
    my %file = map { $archive->digests($_) => 1 } "\x{434}" x 100, 'x' x 200, 'x' x 201;
    is(scalar(keys %file), 3, 'each has its own');
    is_deeply([grep { s{.*/}{}r =~ m/.{101}/ } keys %file], [], 'which may exist');
};

# An archive is loaded by each step of a backup. For a disk of 1 TiB, the digests are 512 MiB.
subtest 'the digests of an archive' => sub {
    my $sha256 = sha256_hex("\0" x digests_size(512, 65536));
    my %devices = ('drive-scsi0' => { %device, digests => { sha256 => $sha256 } });
    my $text = encode_manifest({ format => 1, id => 'a1', devices => \%devices, files => {} });
    my ($ceph, $guest) = guest_with(stored => { "archive $name" => $text });
    my $calls = 0;
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::RBD::Ceph::get = sub (@) { $calls++; return 0 };
    my %files = map { $guest->archive($name)->digests('drive-scsi0') => 1 } 1 .. 3;
    is_deeply([scalar(keys %files), $calls], [1, 1], 'are fetched once');
};

subtest 'a manifest that would be refused' => sub {
    my ($ceph, $guest) = guest_with(stored => {});
    my $archive = $Archive->begin($guest, $name, guest => ['x']);
    ok(!eval { $guest->publish($archive); 1 }, 'is not stored');
    like(
        $@,
        qr/^the manifest of archive $name is damaged - its guest is not a text$/m,
        'the error says why'
    );
    is_deeply($ceph->{stored}, {}, 'there is no archive');
};

# As long as it is listed, it must be known as damaged.
subtest 'killed while a damaged archive is removed' => sub {
    my $note = "damaged $name drive-scsi0";
    my ($ceph, $guest) = guest_with(stored => { "archive $name" => '{}', $note => "yes\n" });
    my ($calls, $remove) = (0, $NoCeph->can('remove_value'));
    {
        no warnings 'redefine';
        local *PBA::Test::NoCeph::remove_value = sub (@which) {
            die "killed\n" if ++$calls == 2;
            return $remove->(@which);
        };
        ok(!eval { $guest->remove($name); 1 }, 'it dies');
    }
    is_deeply($ceph->{stored}, { $note => "yes\n" }, 'only the note is left');
    my $next = PVE::BackupAccess::Provider::RBD::Guest->new(ceph => $ceph, place => 'vm/100');
    is_deeply([$next->clean, $ceph->{stored}], [{}], 'and is removed later');
};

# The client logs to the standard error, for example if it tries another monitor on a busy machine.
subtest 'an object that is missing, and a line of a log' => sub {
    my $line = '2026-11-30T23:25:00.907+0000 7fc8faef76c0 -1 monclient: no authorizer?';
    my $said = 'error getting omap keys backup/pba: (2) No such file or directory';
    for my $text ("$said\\n$line", "$line\\n$said") {
        my $ceph = ceph_with(script => "printf '$text\\n' >&2; exit 1");
        is(eval { $ceph->try_rados('listomapvals', 'pba') // 'missing' }, 'missing', $text)
            or diag($@);
    }
};

subtest 'a verification while the cluster does not answer' => sub {
    my ($ceph, $guest) = guest_with(
        stored => { "archive $name" => $manifest },
        script => 'echo "error getting: (110) Connection timed out" >&2; exit 1',
    );
    my $provider = PVE::BackupAccess::Provider::RBD->new(undef, { pool => 'backup' }, 'test');
    my $problems = sub () { join("\n", $provider->_problems_of($guest, $name, {})) };
    my $unread = qr/^drive-scsi0: rados get .* Connection timed out$/m;
    like(error_of(sub () { die "none: " . $problems->() }),
        qr/\A$unread/, 'it dies: this is no damage');
    is_deeply([keys $ceph->{stored}->%*], ["archive $name"], 'no damage is noted');

    my %gone = (%device, image => 'pba-vm-100-drive-scsi1');
    my %devices = ('drive-scsi0' => \%device, 'drive-scsi1' => \%gone);
    $ceph->{stored}{"archive $name"}
        = encode_manifest({ format => 1, id => 'a1', devices => \%devices, files => {} });
    delete($guest->{values});
    like(
        $problems->(),
        qr/^drive-scsi1: the snapshot .* is missing$/m,
        'damage of another disk is told'
    );
    like($problems->(), $unread, 'beside what cannot be read');
};

# Each call is a program: a list of 1000 guests, each with 30 archives, would run 30,000 of them.
subtest 'the names of the guests in a list' => sub {
    my $calls = 0;
    no warnings qw(once redefine);
    local *PVE::BackupAccess::Provider::RBD::Ceph::values = sub (@) {
        $calls++;
        return { 'guest vm/100' => 'web1', 'guest vm/101' => '' };
    };
    my @names = map { store_name_of({}, 'rbd:backup/names', $_) } 100, 101, 100;
    is_deeply([\@names, $calls], [['web1', undef, 'web1'], 1], 'are asked for once');

    local *PVE::BackupAccess::Provider::RBD::list = sub ($self, $vmid) {
        return [{ volname => "vm/$vmid/20261122T064953Z", time => 1 }];
    };
    my %wanted = (
        'rbd:backup/names/vm/web1' => 'vm/100/20261122T064953Z',
        'rbd:backup/names/vm/web1/latest' => 'vm/100/20261122T064953Z',
        'rbd:backup/names/vm/101' => 'vm/101/20261122T064953Z',
        'rbd:backup/names/vm/web2' => undef,
        'rbd:backup/web1' => undef,
    );
    my %found;
    (undef, $found{$_}) = find_archive({}, $_) for sort keys %wanted;
    is_deeply(\%found, \%wanted, 'stand for the latest archives');
};

subtest 'killed while the cluster stores the manifest' => sub {
    my ($ceph, $guest) = guest_with(killed => 1, stored => {});
    my $archive = $Archive->begin($guest, $name);
    is_deeply([$guest->names], [], 'there is no archive');
    ok(!eval { $guest->publish($archive); 1 }, 'it dies');
    $guest->give_up($archive);
    is_deeply($ceph->{removed}, [], 'but the archive is there, and so its snapshots stay');
    is_deeply([$guest->names], [$name], 'and it is listed');
};

done_testing;
