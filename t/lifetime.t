# Who ends an access, and when: processes, signals, scopes, and other programs' activity in the same QEMU.
#
# One QEMU is enough: processes and signals belong to the caller.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;
use Time::HiRes qw(alarm time);

use PBA::Test::Backend;

my $size = 16 * 1024 * 1024;
my @disks = ({ id => 'disk0', size => $size, format => 'qcow2' });

# Runs code in a forked child, and returns its exit status. The child ends like a program, with destructors.
sub in_child ($code) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        Test::More->builder->no_ending(1);
        my $status = eval { $code->() } // 99;
        exit($status);
    }
    waitpid($pid, 0);
    return $? >> 8;
}

sub check_fork ($backend) {
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    my $volume = $access->volume($backend->device('disk0'));
    is(in_child(sub { 7 }), 7, 'a child exits');
    is(in_child(sub { undef $volume; undef $access; 8 }), 8, 'a child drops its copies');
    is(
        in_child(
            sub {
                eval { $access->teardown(1) };
                ref($@) && $@->class eq 'StateError' ? 9 : 1;
            }
        ),
        9,
        'a child cannot tear it down',
    );
    is(
        in_child(
            sub {
                eval { $volume->pread(0, 512) };
                $@ =~ m/another process/ ? 9 : 1;
            }
        ),
        9,
        "the child cannot read over the parent's connection"
    );
    is(length($volume->pread(0, 65536)), 65536, 'the parent reads on');
    my ($offset, $length) = $volume->next_dirty_region;
    is($length, $size, 'the parent gets the whole map');
    $access->teardown(1);
}

sub check_scope ($backend, $outside) {
    my @warnings;
    local $SIG{__WARN__} = sub ($text) { push(@warnings, $text) };
    $backend->write('disk0', 0, 65536, 0x61);
    {
        my $access = $backend->access;
        $access->setup($backend->devices('use'));
        $access->volumes('nbd');
    }
    is(scalar(@warnings), 1, 'out of scope: there is one warning');
    like($warnings[0], qr/was not torn down/, 'out of scope: the warning says what happened');
    is_deeply($backend->outside, $outside, 'out of scope: nothing is left');
    my ($bitmap) = $backend->target_bitmaps;
    cmp_ok($bitmap->{count}, '>=', 65536, 'out of scope: the bitmap kept its bits');
    is($bitmap->{recording}, 1, 'out of scope: the bitmap records');
}

# A program exits or dies while its access is active: global destruction.
sub check_program_end ($backend, $outside) {
    for my $end ('1', 'die "in mid-backup\n"') {
        my %options = $backend->options;
        my $program
            = 'use PVE::BackupAccess; my %o = @ARGV; our $a = PVE::BackupAccess->new(%o); '
            . "\$a->setup([{ device => '"
            . $backend->device('disk0')
            . "', 'bitmap-mode' => 'use' }]); \$a->volumes('nbd'); $end";

        # In taint mode, everything from the command line is tainted.
        my @command = ($^X, '-T', '-Iblib/lib', '-Iblib/arch', '-e', $program, %options);
        my $output = qx{@{[ join(' ', map { "'" . s/'/'\\''/gr . "'" } @command) ]} 2>&1};
        like($output, qr/was not torn down/, "a program ends ($end): warning");
        is_deeply($backend->outside, $outside, "a program ends ($end): nothing is left");
    }
}

sub check_signals ($backend, $outside) {
    my $access = $backend->access;

    # A stopped QEMU accepts connections, but never answers.
    local $SIG{ALRM} = sub { die { my => 'exception' } };
    my $pid = $backend->vm->pid;
    kill('STOP', $pid);
    my $begin = time();
    alarm(0.3);
    my $done = eval { $access->setup($backend->devices('use')); 1 };
    my $error = $@;
    alarm(0);
    my $seconds = time() - $begin;
    kill('CONT', $pid);
    ok(!$done, 'a handler that dies ends setup');
    is(ref($error), 'HASH', 'its exception comes through as it is') or diag($error);
    cmp_ok($seconds, '<', 1.3, 'within a second');
    undef $access;
    is_deeply($backend->outside, $outside, 'nothing is left');

    $access = $backend->access;
    my $calls = 0;
    local $SIG{ALRM} = sub { $calls++; alarm(0.01) };
    alarm(0.01);
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    $access->teardown(1);
    alarm(0);
    pass("a handler that returns does not disturb (called $calls times)");
    is_deeply($backend->outside, $outside, 'nothing is left after a handler that returns');
}

sub check_foreign_server ($backend, $outside) {
    my $vm = $backend->vm;
    my $socket = $vm->dir . '/foreign.sock';
    $vm->qmp('nbd-server-start', addr => { type => 'unix', data => { path => $socket } });
    my $access = $backend->access('run-dir' => $backend->work_dir('run2'));
    ok(!eval { $access->setup($backend->devices('use')); 1 }, 'another NBD server is up: refused');
    like(
        "$@",
        qr/'nbd-server-start' failed .* QEMU has only one NBD server/,
        'another NBD server is up: the message names the command and what to do'
    );
    ok(-S $socket, 'the other NBD server stays');
    is_deeply([glob($vm->dir . '/run2/*')], [], 'nothing is left');
    $vm->qmp('nbd-server-stop');
    is_deeply($backend->outside, $outside, 'the graph is as before');

    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    $vm->qmp('blockdev-add', driver => 'null-co', 'node-name' => 'theirs', size => 65536);
    $vm->qmp(
        'block-export-add',
        type => 'nbd',
        id => 'foreign',
        'node-name' => 'theirs',
        name => 'foreign'
    );
    my @log;
    local $SIG{__WARN__} = sub ($text) { push(@log, $text) };
    $access->teardown(1);
    is_deeply([map { $_->{id} } $vm->exports->@*],
        ['foreign'], 'an export of others on our server stays');
    like($log[0], qr/the NBD server keeps running/, 'a warning says why');
    $vm->qmp('block-export-del', id => 'foreign', mode => 'hard');
    $vm->qmp('nbd-server-stop');
    $vm->qmp('blockdev-del', 'node-name' => 'theirs');
    is_deeply($backend->outside->{graph}, $outside->{graph}, 'the graph is as before after that');
}

# A bitmap of another program on the same disk keeps recording, whatever happens to ours.
sub check_foreign_bitmap ($backend) {
    my $vm = $backend->vm;
    $vm->qmp('block-dirty-bitmap-add', node => 'disk0', name => 'theirs', granularity => 65536);
    $backend->write('disk0', 0, 65536, 0x62);
    for my $step ([new => 1], [use => 0], [use => 1], [none => 1]) {
        my ($mode, $success) = $step->@*;
        my $access = $backend->access;
        $access->setup($backend->devices($mode));
        $access->volumes('nbd');
        $access->teardown($success);
    }
    $backend->write('disk0', 1 << 20, 65536, 0x63);
    my $theirs = $vm->bitmaps->{disk0}{theirs};
    is($theirs->{count}, 2 * 65536, "the other program's bitmap has all its bits");
    is_deeply([$theirs->@{qw(recording busy)}], [1, 0], "the other program's bitmap records");
    $vm->qmp('block-dirty-bitmap-remove', node => 'disk0', name => 'theirs');
}

sub check_second_setup ($backend) {
    my $access = $backend->access;
    $access->setup($backend->devices('use'));
    ok(!eval { $access->setup($backend->devices('use')); 1 },
        'second setup of one object: refused');
    is($@->class, 'StateError', 'second setup: class');
    $access->teardown(1);
    ok(!eval { $access->teardown(1); 1 }, 'second teardown: refused');
    like("$@", qr/no access is set up/, 'second teardown: message');
    ok(!eval { $access->volumes('nbd'); 1 }, 'volumes after teardown: refused');
    $access->setup($backend->devices('use'));
    $access->teardown(1);
    pass('an object can be used again');
}

# Ends the access as a signal handler would. QEMU has replies for the copy, which does not read them at this
# time.
sub check_end_below_copy ($backend, $mechanism) {
    my $device = $backend->device('disk0');
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    my $volume = PVE::BackupAccess::Volume->open($device, $access->volumes($mechanism)->{$device});
    my $calls = 0;
    my $take = sub ($, $) {
        return if ++$calls != 3;
        local $SIG{ALRM} = sub { die "it waits\n" };
        alarm(30);
        my $done = eval { $access->teardown(0); 1 };
        alarm(0);
        ok($done, "$mechanism: a teardown from below a copy") or diag($@);
    };
    ok(!eval { $volume->copy(to => $take); 1 }, "$mechanism: the copy ends with an error");
    like("$@", qr/^device \Q$device\E: .* offset/, "$mechanism: the error names the device");
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $backend = PBA::Test::Backend->start(name => $name, guest => 0, disks => \@disks);
        my $outside = $backend->outside;
        check_fork($backend);
        is_deeply($backend->outside, $outside, 'nothing is left');
        check_second_setup($backend);
        check_foreign_bitmap($backend);
        check_scope($backend, $outside);
        check_program_end($backend, $outside);
        check_signals($backend, $outside);
        check_foreign_server($backend, $outside);
        check_end_below_copy($backend, $_) for qw(nbd file-handle);
        is_deeply($backend->outside, $outside, 'nothing is left');
        $backend->check_manners;
    };
}

done_testing;
