# Bitmaps across a restart of the VM, and across a regular end of the VM during an access (upstream backend).
#
# One QEMU is enough: qcow2 images store bitmaps in the same way; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Client;
use PBA::Test::Overlay qw(commit_overlay put_overlay);
use PBA::Test::Repository;

my $Backend = 'PBA::Test::Backend';
my $mib = 1024 * 1024;
my $size = 16 * $mib;

# QEMU generates new node names for a -drive at every start.
sub start () {
    my $backend = $Backend->start(
        name => 'upstream',
        guest => 0,
        disks => [{ id => 'disk0', size => $size, format => 'qcow2', shape => 'drive' }],
    );
    return ($backend, PBA::Test::Repository->new($backend));
}

sub restored_is ($backend, $repository, $name) {
    my $disk = $backend->vm->raw_image('disk0');
    is(system('cmp', '-s', $disk, $repository->image('disk0')),
        0, "$name: restored equals the disk");
}

subtest 'persistent bitmap, clean restart' => sub {
    my ($backend, $repository) = start();
    my %options = (options => { persistent => 1 });
    $backend->write('disk0', 0, $size, 0x31);
    $repository->backup(mode => 'new', success => 1, %options);
    $backend->write('disk0', 3 * $mib, 65536, 0x32);
    $backend->restart;
    $backend->write('disk0', 7 * $mib, 65536, 0x33);
    my $result = $repository->backup(mode => 'use', success => 1, %options);
    is($result->{disk0}{action}, 'used', 'the bitmap is used');
    is($result->{disk0}{bytes}, 2 * 65536,
        'the bitmap has the writes before and after the restart');
    restored_is($backend, $repository, 'after the restart');
};

subtest 'bitmap that is not persistent, clean restart' => sub {
    my ($backend, $repository) = start();
    $repository->backup(mode => 'new', success => 1);
    $backend->restart;
    my $result = $repository->backup(mode => 'use', success => 1);
    is($result->{disk0}{action}, 'missing-recreated', 'the bitmap is gone, and setup reports that');
    is($result->{disk0}{bytes}, $size, 'the whole disk is dirty');
};

# During the access, the guest writes, QEMU quits and is started again: the result is that of a failed backup.
sub quit_in_mid_access (%options) {
    my ($backend, $repository) = start();
    $backend->write('disk0', 0, $size, 0x31);
    $repository->backup(mode => 'new', success => 1, options => \%options);
    $backend->write('disk0', 2 * $mib, 65536, 0x32);
    my $access = $backend->access(%options);
    $access->setup($backend->devices('use'));
    $access->volumes('nbd');
    $backend->write('disk0', 4 * $mib, 65536, 0x33);
    $backend->vm->quit;
    ok(!eval { $access->teardown(1); 1 }, 'teardown after QEMU has quit is an error');
    is($@->class, 'ConnectionError', 'the error has the class ConnectionError');
    is_deeply([$backend->left_files], [], 'nothing local is left');
    undef $access;
    $backend->restart;
    $backend->write('disk0', 6 * $mib, 65536, 0x34);
    my $result = $repository->backup(mode => 'use', success => 1, options => \%options);
    restored_is($backend, $repository, 'after the next backup');
    is_deeply($backend->other_bitmaps, [], 'no background bitmap is left');
    return $result->{disk0};
}

subtest 'clean quit in mid-access, persistent bitmap' => sub {
    my $disk = quit_in_mid_access(persistent => 1);
    is($disk->{action}, 'used', 'the bitmap is used');
    is($disk->{bytes}, 3 * 65536, 'the bitmap has the writes before, during and after the access');
};

subtest 'clean quit in mid-access, bitmap that is not persistent' => sub {
    my $disk = quit_in_mid_access();
    is($disk->{action}, 'missing-recreated', 'the bitmap is gone, and setup reports that');
};

subtest 'kill -9 makes a persistent bitmap inconsistent' => sub {
    my ($backend, $repository) = start();
    my %options = (options => { persistent => 1 });
    $repository->backup(mode => 'new', success => 1, %options);

    # QEMU stores the bitmap when it quits, and marks it as in use at the next start.
    $backend->restart;
    $backend->vm->kill9;
    $backend->restart;
    my ($bitmap) = $backend->target_bitmaps;
    is($bitmap->{inconsistent}, 1, 'the bitmap came back inconsistent');
    my $result = $repository->backup(mode => 'use', success => 1, %options);
    is($result->{disk0}{action}, 'missing-recreated', 'the bitmap is created anew');
    is($result->{disk0}{bytes}, $size, 'the whole disk is dirty');
};

# A regular end of QEMU removes the access of a killed client, and leaves two halves of the bitmap.
sub split_bitmap ($backend, %options) {
    my $client = PBA::Test::Client->start(
        sub ($tell) {
            my $access = PVE::BackupAccess->new(%options);
            $access->setup($backend->devices('new'));
            $tell->('up');
        }
    );
    is($client->next_word, 'up', 'a client has an access');
    $client->kill9;
    $backend->restart;
    is(scalar(keys $backend->vm->bitmaps->{disk0}->%*), 2, 'the bitmap is in two halves');
    return;
}

# After such an end, QEMU is killed.
subtest 'kill -9 with a bitmap in two halves' => sub {
    for my $how (qw(recover setup)) {
        my $backend = $Backend->start(
            name => 'upstream',
            guest => 0,
            disks => [{ id => 'disk0', size => $size, format => 'qcow2' }],
        );
        my %options = $backend->options(persistent => 1, log => sub { });
        split_bitmap($backend, %options);
        $backend->vm->kill9;
        $backend->restart;
        my @bitmaps = values $backend->vm->bitmaps->{disk0}->%*;
        is_deeply([map { $_->{inconsistent} } @bitmaps], [1, 1], 'both bitmaps are inconsistent');
        if ($how eq 'recover') {
            my $lines = PVE::BackupAccess->recover($backend->options, log => sub { });
            is(scalar(grep { m/disk0.*bitmap .* was removed, since/ } $lines->@*),
                1, 'recover says what it did');
            is_deeply([values $backend->vm->bitmaps->%*], [], 'both bitmaps are removed');
        }
        my $access = PVE::BackupAccess->new(%options);
        my $info = $access->setup($backend->devices('use'))->[0];
        is($info->{'bitmap-action'}, 'missing-recreated', "after $how: the next one says so");
        my ($offset, $length) = $access->volume('disk0')->next_dirty_region;
        is($length, $size, 'the backup is full');
        $access->teardown(1);
        is_deeply($backend->status->{'left-overs'}, [], 'nothing is left over');
    }
};

# QEMU does not change stored bitmaps of an image that is read-only, as one below an overlay.
subtest 'an overlay above an image with a bitmap in two halves' => sub {
    my $backend = $Backend->start(
        name => 'upstream',
        guest => 0,
        disks => [{ id => 'disk0', size => $size, format => 'qcow2', bus => 'scsi' }],
    );
    my $vm = $backend->vm;
    my %options = $backend->options(persistent => 1, log => sub { });
    split_bitmap($backend, %options);
    put_overlay($vm, 'disk0');
    my $lines = PVE::BackupAccess->recover($backend->options, log => sub { });
    unlike("@$lines", qr/bitmap/, 'recover leaves it as it is');

    for my $action (qw(missing-recreated used)) {
        my $access = PVE::BackupAccess->new(%options);
        my $info
            = $access->setup([{ device => 'disk0-dev', 'bitmap-mode' => 'use' }])->[0];
        is($info->{'bitmap-action'}, $action, "the overlay is backed up: $action");
        $access->teardown(1);
    }
    is(scalar(keys $vm->bitmaps->{disk0}->%*), 2, 'the image below is as it was');
    is_deeply($backend->status->{'left-overs'}, [], 'nothing is left over');

    # When the image is the top one again, its bitmap is joined.
    commit_overlay($vm);
    $lines = PVE::BackupAccess->recover($backend->options, log => sub { });
    is(scalar(grep { m/was joined with its background bitmap/ } $lines->@*),
        1, 'after the commit, recover joins the halves');
    is(scalar(keys $vm->bitmaps->{disk0}->%*), 1, 'one bitmap is left');
};

done_testing;
