# A fleecing image that is full breaks the snapshot, never a guest write (I3): the reader gets an error,
# teardown works, and the bitmap keeps every bit. If its file system becomes nearly full, status warns before
# that.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use File::Temp ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Provider;
use PBA::Test::Repository;

# Runs in a mount namespace of its own, so that nothing stays mounted however the test ends.
if (!$ENV{PBA_UNSHARED} && system('unshare --mount true 2>/dev/null') == 0) {
    $ENV{PBA_UNSHARED} = 1;
    exec(qw(unshare --mount), $^X, (map { "-I$_" } @INC), $0) or die "unshare: $!\n";
}

my $mib = 1024 * 1024;
my $size = 32 * $mib;

# The size of the dirty part, which the guest then overwrites; the file system is smaller.
my $dirty = 24 * $mib;
my $file_system = 16 * $mib;

my $hint = qr/failed .*the snapshot broke: is the fleecing image full/;

# ---- a file system that is really full ----

sub run (@command) {
    local $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin";
    return system("@command >/dev/null 2>&1") == 0;
}

# Returns the directory, or undef if the mount is not possible.
sub mount_small ($dir) {
    my $image = "$dir/small.img";
    open(my $fh, '>', $image) or die "$image: $!\n";
    truncate($fh, $file_system) or die "$image: $!\n";
    close($fh);
    mkdir("$dir/small");
    return undef if !run('mkfs.ext4 -q -F -m 0 -O ^has_journal', $image);
    return undef if !run('mount -o loop', $image, "$dir/small");
    return "$dir/small";
}

sub fleecing_options ($backend, $dir) {
    return ('fleecing-dir' => $dir) if $backend->name eq 'upstream';
    $backend->vm->remove_fleecing_node($backend->device('disk0') . '-fleecing');
    $backend->attach_fleecing('disk0', in => $dir);
    return ();
}

sub fleecing_status ($backend) {
    my $status = $backend->status;
    return ($status->{fleecing}[0], $status->{warnings});
}

# The guest writes continuously. Returns the offset at which status reports that the file system is nearly full.
sub write_until_full ($backend, $volume, $mechanism) {
    my $warned;
    for (my $offset = 0; $offset < $dirty; $offset += $mib) {
        $backend->guest->write('disk0', $offset, $mib, 0x42);
        next if defined($warned);
        my ($image, $warnings) = fleecing_status($backend);
        next if !$image->{'nearly-full'};
        $warned = $offset + $mib;
        cmp_ok($image->{'free-bytes'}, '<', $file_system / 10, 'little is free');
        cmp_ok($image->{'image-bytes'}, '>=', $warned - $mib, 'the occupied bytes are reported');
        like(
            "@$warnings",
            qr/its fleecing image '.*' is nearly full: \d+ bytes are free/,
            'a warning names the full image'
        );
        is($volume->pread(0, 65536), 'A' x 65536, 'the snapshot still holds then');
    }
    return $warned;
}

sub check_file_system ($backend, $dir, $mechanism) {
    my $repository = PBA::Test::Repository->new($backend);
    $repository->backup(mode => 'new', success => 1);
    $backend->guest->write('disk0', 0, $dirty, 0x41);
    my $outside = $backend->outside;
    my %fleecing = fleecing_options($backend, $dir);
    my $access = $backend->access(%fleecing);
    $access->setup($backend->devices('use'));
    my $device = $backend->device('disk0');
    my $volume
        = PVE::BackupAccess::Volume->open($device, $access->volumes($mechanism)->{$device});
    my ($image, $warnings) = fleecing_status($backend);
    is($image->{'nearly-full'}, 0, 'at first, there is space');
    is_deeply($warnings, [], 'at first, there is no warning');

    ok(defined(write_until_full($backend, $volume, $mechanism)), 'status warned');
    is($backend->guest->read('disk0', $dirty - 4096, 4096), 'B' x 4096, 'every write went through');
    is($backend->vm->qmp('query-status')->{status}, 'running', 'the guest runs');
    ok(!eval { read_all($volume); 1 }, 'the reader gets an error');
    like("$@", qr/\Adevice $device: reading .*$hint/, 'the error says the likely reason');
    $volume->close;
    $access->teardown(0);
    my ($bitmap) = $backend->target_bitmaps;
    cmp_ok($bitmap->{count}, '>=', $dirty, 'the bitmap has its bits');

    my %roomy = fleecing_options($backend, $backend->vm->dir);
    is_deeply($backend->outside, $outside, 'teardown works');
    $repository->backup(mode => 'use', success => 1);
    is(system('cmp', '-s', $backend->vm->raw_image('disk0'), $repository->image('disk0')),
        0, 'the next backup is the disk');
}

# Another file takes all but one MiB of the space.
sub fill ($dir) {
    my ($blocks, $free) = (split(' ', qx(stat -f -c '%S %a' $dir)));
    my $filler = "$dir/filler";
    open(my $fh, '>', $filler) or die "$filler: $!\n";
    print {$fh} "\0" x ($blocks * $free - $mib);
    close($fh) or die "$filler: $!\n";
    return $filler;
}

# A task reports this at its beginning, or at its next check, which this test triggers.
sub check_task ($backend, $dir) {
    my $warning = qr/\Awarn: device .* its fleecing image '.*' is nearly full/;
    my %fleecing = fleecing_options($backend, $dir);
    my $filler = fill($dir);
    $backend->task(PBA::Test::Provider->new(mode => 'use'), %fleecing)->run;
    is($backend->logged($warning), 1, "a task's log warns");
    unlink($filler);
    return fleecing_options($backend, $backend->vm->dir) if !-w '/dev/fuse';

    my $task;
    my $backup = sub ($self, $vmid, $config, $volumes, $info) {
        my ($volume) = values $volumes->%*;
        is($backend->logged($warning), 0, 'at the beginning, there is space');
        $filler = fill($dir);
        $volume->{'next-dirty-region'}->();
        is($backend->logged($warning), 0, 'the task does not check each time');
        $task->{'looked at fleecing'} = 0;
        $volume->{'next-dirty-region'}->();
        is($backend->logged($warning), 1, 'the task notices it during a backup');
    };
    %fleecing = fleecing_options($backend, $dir);
    $task = $backend->task(
        PBA::Test::Provider->new(
            mode => 'new',
            mechanism => 'file-handle',
            on => { backup_vm => $backup }
        ),
        %fleecing
    );
    $task->run;
    unlink($filler);
    fleecing_options($backend, $backend->vm->dir);
}

sub read_all ($volume) {
    while (my ($offset, $length) = $volume->next_dirty_region) {
        for (my $at = $offset; $at < $offset + $length; $at += $mib) {
            $volume->pread($at, $mib);
        }
    }
}

# ---- a node that fails every write ----

sub check_failing_node ($backend) {
    my $vm = $backend->vm;
    my $guest = $backend->guest;
    open(my $fh, '>', $vm->dir . '/full.raw') or die "full.raw: $!\n";
    truncate($fh, $size) or die "truncate: $!\n";
    $vm->qmp(
        'blockdev-add',
        driver => 'blkdebug',
        'node-name' => 'full',
        image => { driver => 'file', filename => $vm->dir . '/full.raw' },
        'inject-error' => [{ event => 'none', iotype => 'write', errno => 28 }],
    );
    my $access = $backend->access;
    $access->setup($backend->devices('new'));
    $access->teardown(1);
    $guest->write('disk0', 4 * $mib, 65536, 0x41);

    my $outside = $backend->outside;
    $access = $backend->access(fleecing => { disk0 => 'full' });
    $access->setup($backend->devices('use'));
    my $volume = $access->volume('disk0');
    is($volume->pread(4 * $mib, 65536), 'A' x 65536, 'the snapshot can be read at first');
    $guest->write('disk0', 4 * $mib, 65536, 0x42);
    is($guest->read('disk0', 4 * $mib, 4096), 'B' x 4096, 'the guest\'s write went through');

    ok(!eval { $volume->pread(4 * $mib, 65536); 1 }, 'the reader gets an error');
    like("$@", qr/\Adevice disk0: reading 65536 bytes at offset 4194304 $hint/, 'the reason');
    my ($offset, $length) = $volume->next_dirty_region;
    is($offset, 4 * $mib, 'the map still answers');

    $access->teardown(0);
    is_deeply($backend->outside, $outside, 'teardown works');
    my ($bitmap) = $backend->target_bitmaps;
    is($bitmap->{count}, 65536, 'the bitmap has its bits');

    $access = $backend->access;
    $access->setup($backend->devices('use'));
    is($access->volume('disk0')->pread(4 * $mib, 65536), 'B' x 65536, 'the next backup works');
    $access->teardown(1);
}

sub check_mount ($backend) {
    my $dir = File::Temp->newdir('pba-full.XXXXXX', TMPDIR => 1);
    my $small = mount_small("$dir") // plan(skip_all => 'needs root and loop devices');
    my $ok = eval {
        for my $mechanism (qw(nbd file-handle)) {
            subtest $mechanism => sub {
                plan(skip_all => 'no /dev/fuse')
                    if $mechanism eq 'file-handle' && !-w '/dev/fuse';
                check_file_system($backend, $small, $mechanism);
            };
        }
        check_task($backend, $small);
        1;
    };
    my $error = $@;
    ok(run('umount', $small), 'the file system is free again');
    die $error if !$ok;
}

for my $name (PBA::Test::Backend->names) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [{ id => 'disk0', size => $size, device_args => 'werror=report' }],
    );
    subtest "backend $name: a node that fails every write" => sub { check_failing_node($backend) }
        if $name eq 'upstream';
    subtest "backend $name: a file system runs full" => sub { check_mount($backend) };
    $backend->check_manners;
}
done_testing;
