# A real migration to another QEMU with the same disks. During an access, the migration fails, the guest
# continues where it is, and so does the access. Without an access, it succeeds, and the next backup at the
# target contains everything or says that it is a full one (I2, I3).
#
# One QEMU is enough: the same code runs after a migration; PBA_FULL=1 runs on both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use JSON::PP ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Backend;
use PBA::Test::VM;

my $full = $ENV{PBA_FULL};
my $mib = 1024 * 1024;
my $size = 8 * $mib;

my $inactive = qr/\Adevice (?:drive-)?disk0: is inactive, as a migration or .* \(cont\)/;

# Offsets of the guest's writes by their time.
my %offset = (before => 1 * $mib, during => 2 * $mib, after => 3 * $mib);

sub write_disk ($vm, $when, @ids) {
    $vm->qemu_io($_, "write -P 7 $offset{$when} 64k") for @ids;
    return;
}

# Which writes the next backup of each disk contains, by their time, or why its bitmap is new.
sub next_backup ($backend, @ids) {
    my $access = $backend->access(log => sub { });
    my %next;
    for my $info ($access->setup($backend->devices('use', @ids))->@*) {
        my $volume = $access->volume($info->{device});
        my @regions;
        while (my @region = $volume->next_dirty_region) {
            push(@regions, \@region);
        }
        my %name = reverse(%offset);
        my @names = map { $_->[1] == 65536 ? $name{ $_->[0] } : 'other' } @regions;
        $next{ $info->{device} =~ s/\Adrive-//r }
            = $info->{'bitmap-action'} eq 'used' ? "@names" : $info->{'bitmap-action'};
    }
    $access->teardown(1);
    return \%next;
}

# The two configurations of the disks in turn.
sub next_shape () {
    state $number = 0;
    return (qw(drive blockdev))[$number++ % 2];
}

# Starts two QEMUs with the same disks, the second one waiting for the guest of the first one, which has made a
# backup of each disk.
sub pair (%options) {
    my %disk = (
        size => $size,
        format => 'qcow2',
        bus => 'scsi',
        shape => $options{shape} // next_shape()
    );
    my @disks = map { { id => $_, %disk } } ($options{disks} // ['disk0'])->@*;
    my %common = (name => $options{name} // 'upstream', guest => 0);
    my $source = PBA::Test::Backend->start(%common, disks => \@disks);
    $_->{file} = $source->vm->disk($_->{id})->{file} for @disks;
    my $target = PBA::Test::Backend->start(
        %common,
        disks => \@disks,
        paused => 1,
        args => ['-incoming', 'defer']
    );
    if ($options{bitmaps}) {
        my $capability = { capability => 'dirty-bitmaps', state => JSON::PP::true };
        $_->vm->qmp('migrate-set-capabilities', capabilities => [$capability]) for $source, $target;
    }
    my $access = $source->access(persistent => $options{persistent} // 0);
    $access->setup($source->devices('new'));
    $access->teardown(1);
    write_disk($source->vm, 'before', $source->vm->disk_ids);
    return ($source, $target);
}

sub begin_migration ($source, $target) {
    my $uri = 'unix:' . $target->vm->dir . '/migration';
    $target->vm->qmp('migrate-incoming', uri => $uri);
    $source->vm->qmp_try('migrate', uri => $uri);
    return;
}

sub wait_migration ($source) {
    my $status = '';
    for (1 .. 1200) {
        $status = $source->vm->qmp('query-migrate')->{status} // '';
        last if $status =~ m/\A(?:completed|failed)\z/;
        sleep(0.1);
    }
    return $status;
}

# 'completed' or 'failed'; the guest then runs in one of the two QEMUs.
sub end_migration ($source, $target) {
    my $status = wait_migration($source);
    $target->vm->qmp('cont') if $status eq 'completed';
    return $status;
}

sub migrate ($source, $target) {
    begin_migration($source, $target);
    return end_migration($source, $target);
}

sub runs_at_source ($source, $target) {
    is($source->vm->qmp('query-status')->{status}, 'running', 'the guest runs on where it is');
    isnt(eval { $target->vm->qmp('query-status')->{status} },
        'running', 'the guest does not run at the target');
    return;
}

sub is_refused ($backend, $pattern, $text) {
    my $outside = $backend->outside;
    ok(!eval { next_backup($backend, 'disk0'); 1 }, "$text: refused");
    is($@->class, 'StateError', "$text: the error has a class");
    like("$@", $pattern, "$text: the error says why");
    is_deeply($backend->outside, $outside, "$text: nothing is changed");
    return;
}

sub reset_guest ($vm) {
    $vm->qmp('set-action', reboot => 'reset');
    $vm->qmp('system_reset');
    for (1 .. 600) {
        return if $vm->qmp('query-status')->{status} eq 'prelaunch';
        sleep(0.1);
    }
    die "the guest is not reset\n";
}

for my $bitmaps (0, 1) {
    my $with = $bitmaps ? 'with its bitmaps' : 'without bitmaps';

    for my $exported ($full ? (0, 1) : 1) {
        my $name = $exported ? 'while it is read' : 'before it is exported';
        subtest "$with, during an access, $name" => sub {
            my ($source, $target) = pair(bitmaps => $bitmaps);
            my $outside = $source->outside;
            my $access = $source->access;
            $access->setup($source->devices('use'));
            my $device = $source->device('disk0');
            my $volume = $exported ? $access->volume($device) : undef;
            write_disk($source->vm, 'during', 'disk0');
            is(migrate($source, $target), 'failed', 'QEMU refuses it');
            runs_at_source($source, $target);
            $volume //= $access->volume($device);
            is_deeply([$volume->next_dirty_region], [$offset{before}, 65536], 'the map continues');
            is($volume->pread($offset{before}, 65536), "\x07" x 65536, 'data can still be read');
            undef $volume;
            $access->teardown(1);
            is_deeply($source->outside, $outside, 'nothing is left');
            write_disk($source->vm, 'after', 'disk0');
            is_deeply(next_backup($source, 'disk0'), { disk0 => 'during after' }, 'no bit is lost');
        };
    }

    # The disk that is not backed up may have been handed over before the other one is refused.
    my @ids = qw(disk0 disk1);
    my @backed_up = $full ? @ids : $bitmaps ? () : 'disk1';
    subtest "$with, during an access to another disk, persistent bitmaps" => sub {
        for my $id (@backed_up) {
            my ($source, $target) = pair(bitmaps => $bitmaps, persistent => 1, disks => \@ids);
            my $access = $source->access(persistent => 1);
            $access->setup($source->devices('use', $id));
            $access->volumes('nbd');
            write_disk($source->vm, 'during', @ids);
            is(migrate($source, $target), 'failed', "access to $id: QEMU refuses it");
            runs_at_source($source, $target);
            $access->teardown(1);
            write_disk($source->vm, 'after', @ids);
            my %expected = (map({ $_ => 'before during after' } @ids), $id => 'during after');
            is_deeply(next_backup($source, @ids), \%expected, 'no bit of either bitmap is lost');
        }
        }
        if @backed_up;

    subtest "$with, between two backups" => sub {
        for my $persistent ($full || !$bitmaps ? (0, 1) : 0) {
            my ($source, $target) = pair(bitmaps => $bitmaps, persistent => $persistent);
            is(migrate($source, $target), 'completed', 'the migration succeeds');
            my $elsewhere = qr/the guest (?:was|is being) migrated .*back it up where it runs/;
            is_refused($source, $elsewhere, 'a backup of the source after the migration');

            # Then QEMU's state does not say any more where the guest is.
            reset_guest($source->vm);
            is_refused($source, $inactive, 'and after a reset');
            write_disk($target->vm, 'after', 'disk0');
            my $next = $bitmaps || $persistent ? 'before after' : 'missing-recreated';
            is_deeply(
                next_backup($target, 'disk0'),
                { disk0 => $next },
                "the next backup of the target: $next"
            );
        }
    };
}

# A stock QEMU fails the migration. An export would take the images back.
sub check_reset_during_access () {
    my ($source, $target) = pair(name => 'pve');
    my $access = $source->access;
    $access->setup($source->devices('none'));
    is(migrate($source, $target), 'completed', 'the migration succeeds');
    reset_guest($source->vm);
    ok(!eval { $access->volumes('nbd'); 1 }, 'volumes refuses');
    like(
        "$@",
        qr/the guest was migrated .* since setup, and then reset - .* \(cont\)/,
        'the error says why'
    );
    write_disk($target->vm, 'after', 'disk0');
    $access->teardown(0);
    return;
}

subtest 'after setup, and then a reset, on a Proxmox QEMU' => sub { check_reset_during_access() }
    if PBA::Test::VM->is_proxmox;

# A snapshot leaves the same reply of query-migrate as a migration.
subtest 'a snapshot before setup, and a reset after it' => sub {
    my $name = PBA::Test::VM->is_proxmox ? 'pve' : 'upstream';
    my ($source) = pair(name => $name);
    $source->vm->hmp('savevm before');
    is($source->vm->qmp('query-migrate')->{status}, 'completed', 'it looks like a migration');
    my $access = $source->access;
    $access->setup($source->devices('none'));
    $source->vm->qmp('stop');
    reset_guest($source->vm);
    ok(eval { $access->volumes('nbd'); 1 }, 'volumes does not refuse') or diag($@);
    $access->teardown(0);
};

# The target may still be given up for the source, which then continues.
subtest 'the target has not taken over the disks yet' => sub {
    for my $shape (qw(drive blockdev)) {
        my ($source, $target) = pair(shape => $shape);
        my $late = { capability => 'late-block-activate', state => JSON::PP::true };
        $target->vm->qmp('migrate-set-capabilities', capabilities => [$late]);
        begin_migration($source, $target);
        is(wait_migration($source), 'completed', "$shape: the migration succeeds");
        sleep(0.05) while $target->vm->qmp('query-status')->{status} eq 'inmigrate';
        is_refused($target, $inactive, "$shape: a backup of the target");
        $target->vm->qmp('cont');
        ok(next_backup($target, 'disk0'), "$shape: a backup when the guest runs there");
    }
};

# The leftovers of a program that was killed in the middle of its teardown: the filters are removed, so the
# guest can migrate.
subtest 'with the two halves of a bitmap' => sub {
    for my $persistent ($full ? (0, 1) : 0) {
        my %options = (bitmaps => !$persistent, persistent => $persistent);
        my ($source, $target) = pair(%options, shape => 'blockdev');
        my $vm = $source->vm;
        $vm->qmp(
            'block-dirty-bitmap-add',
            node => 'disk0',
            name => 'pba-background:snapshot-access:test',
            persistent => $persistent ? JSON::PP::true : JSON::PP::false
        );
        $vm->qmp(
            'block-dirty-bitmap-disable',
            node => 'disk0',
            name => 'pba:snapshot-access:test'
        );
        write_disk($vm, 'during', 'disk0');
        is(migrate($source, $target), 'completed', 'the migration succeeds');
        write_disk($target->vm, 'after', 'disk0');
        is_deeply(
            next_backup($target, 'disk0'),
            { disk0 => 'before during after' },
            'the halves are joined at the target'
        );
        is_deeply($target->other_bitmaps, [], 'no other bitmap is left');
    }
};

# A slow migration, and an access that begins during it.
sub slow_migration ($bitmaps) {
    my ($source, $target) = pair(bitmaps => $bitmaps);
    my $vm = $source->vm;
    $vm->qmp('migrate-set-parameters', 'max-bandwidth' => 20_000);
    begin_migration($source, $target);
    for (1 .. 600) {
        last if ($vm->qmp('query-migrate')->{status} // '') eq 'active';
        sleep(0.1);
    }
    my $go_on = sub {
        is($vm->qmp('query-migrate')->{status}, 'active', 'the migration is still running');
        write_disk($vm, 'during', 'disk0');
        $vm->qmp('migrate-set-parameters', 'max-bandwidth' => 1 << 30);
        return end_migration($source, $target);
    };
    return ($source, $target, $go_on);
}

# QEMU would fail the migration at its end because of the nodes of an access.
for my $bitmaps (0, 1) {
    my $with = $bitmaps ? 'with its bitmaps' : 'without bitmaps';
    subtest "$with, an access begins during it" => sub {
        my ($source, $target, $go_on) = slow_migration($bitmaps);
        my $outside = $source->outside;
        ok(!eval { $source->access->setup($source->devices('use')); 1 }, 'is refused');
        like("$@", qr/\Aa migration of the guest is in progress .*'active'/, 'the error says why');
        is($@->class, 'StateError', 'the error has a class');
        is_deeply($source->outside, $outside, 'nothing is left');
        is($go_on->(), 'completed', 'the migration continues');
        write_disk($target->vm, 'after', 'disk0');
        my $next = $bitmaps ? 'before during after' : 'missing-recreated';
        is_deeply(next_backup($target, 'disk0'), { disk0 => $next }, 'nothing is lost');
    };
}

done_testing;
