# Copies of a running guest's disks while it writes: full and incremental copies to every kind of target, with
# failures in between. A copy must equal the disks at one instant, and a failed copy must not lose anything.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use POSIX ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::QemuNbd qw(img);
use PBA::Test::Share qw(share);
use PVE::BackupAccess::Volume;

my $QemuNbd = 'PBA::Test::QemuNbd';
my $mib = 1024 * 1024;
my $seed = 20261122;
my $blocks = 2048;
my %sizes = (disk0 => 24 * $mib, disk1 => 12 * $mib + 512);
my @ids = sort keys %sizes;

# The initial content of a target, so that a gap does not look like zeroes.
sub new_image ($file, $size) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    for (my $left = $size; $left > 0; $left -= $mib) {
        print {$fh} "\xee" x ($left < $mib ? $left : $mib);
    }
    close($fh) or die "$file: $!\n";
    return;
}

# Each copies a volume to the raw image.
my %sinks = (
    file => sub ($volume, $file, @options) { $volume->copy(to => $file, @options) },
    descriptor => sub ($volume, $file, @options) {
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        return $volume->copy(to => $fh, 'request-size' => 65536, @options);
    },
    server => sub ($volume, $file, @options) {
        my $server = $QemuNbd->start(file => $file);
        my $statistics = $volume->copy(to => $server->uri, @options);
        $server->stop;
        return $statistics;
    },
    qcow2 => sub ($volume, $file, @options) {
        img('convert', '-f', 'raw', '-O', 'qcow2', $file, "$file.qcow2");
        my $server = $QemuNbd->start(file => "$file.qcow2", format => 'qcow2');
        my $statistics = $volume->copy(to => $server->uri, @options);
        $server->stop;
        img('convert', '-f', 'qcow2', '-O', 'raw', "$file.qcow2", $file);
        return $statistics;
    },
    device => sub ($volume, $file, @options) {
        chomp(my $device = `losetup --find --show --sector-size 512 $file`);
        die "losetup failed\n" if $?;
        my $statistics = eval { $volume->copy(to => $device, @options) };
        my $error = $@;
        system('losetup', '--detach', $device) == 0 or die "losetup failed\n";
        return $statistics // die $error;
    },
    function => sub ($volume, $file, @options) {
        open(my $fh, '+<:raw', $file) or die "$file: $!\n";
        return $volume->copy(
            to => sub ($offset, $data) {
                sysseek($fh, $offset, 0) or die "seek: $!\n";
                syswrite($fh, $data) == length($data) or die "write: $!\n";
            },
            connections => 1,
            @options,
        );
    },
);
delete($sinks{device}) if $> != 0 || !-e '/dev/loop-control';

# A sink does the same with both mechanisms, so a plain run takes only two sinks with the second mechanism.
sub sinks_for ($mechanism) {
    return sort keys %sinks if $mechanism eq 'nbd' || $ENV{PBA_FULL};
    return qw(descriptor file);
}

# Makes the guest write during the copy, when a part of it is done.
sub write_meanwhile ($context) {
    my $is_first = 1;
    return sub ($done, $total) {
        $context->{backend}->guest->wait_more_churn(20) if $is_first;
        $is_first = 0;
    };
}

# Opens the volume with either mechanism; the class is the same.
sub open_volume ($context, $access, $id) {
    my $device = $context->{backend}->device($id);
    return PVE::BackupAccess::Volume->open($device,
        $access->volumes($context->{mechanism})->{$device});
}

# Makes one backup of both disks. fail => code that gets the volume and ends the copy of the first disk.
sub backup ($context, $mode, $sink, $fail = undef) {
    my $backend = $context->{backend};
    my $access = $backend->access;
    $access->setup($backend->devices($mode));
    my %statistics;
    for my $id (@ids) {
        my $volume = open_volume($context, $access, $id);
        my $file = "$context->{dir}/$id";
        if ($fail) {
            my $done = eval { $fail->($volume); 1 };
            ok(!$done, 'the copy fails') or next;
            like($@, qr/offset \d+|enough/, 'the error names the offset');
            $access->teardown(0);
            return;
        }
        $statistics{$id}
            = $sinks{$sink}->($volume, $file, progress => write_meanwhile($context));
    }
    $access->teardown(1);
    return \%statistics;
}

sub check_images ($context, $name) {
    my ($write, $problem)
        = $context->{model}->check_images({ map { $_ => "$context->{dir}/$_" } @ids });
    is($problem, undef, "$name: the images are the disks after write $write");
    cmp_ok(
        $write, '>',
        $context->{last_write},
        "$name: the instant is later than that of the last backup"
    );
    $context->{last_write} = $write;
    is_deeply($context->{backend}->outside, $context->{outside}, "$name: nothing is left");
    is_deeply($context->{backend}->other_bitmaps, [], "$name: no bitmap but the target's own");
    $context->{backend}->guest->wait_more_churn(20);
}

# Ways in which a copy can fail; in each of them, a part of the source has been discarded already.
my %failures = (
    'a full target' => sub ($context, $volume) { $volume->copy(to => '/dev/full') },
    'an exception' => sub ($context, $volume) {
        my $calls = 0;
        $volume->copy(to => sub (@) { die "enough\n" if ++$calls == 3 }, 'request-size' => 65536);
    },
    'a target that is killed' => sub ($context, $volume) {
        my $file = "$context->{dir}/scratch";
        new_image($file, $volume->size);
        my $server = $QemuNbd->start(file => $file);
        $volume->copy(
            to => $server->uri,
            'bandwidth-limit' => 4 * $mib,
            progress => sub (@) { $server->stop('KILL') },
        );
    },
    map { ("a source that goes, $_" => \&lose_source) } 1 .. ($ENV{PBA_FULL} ? 12 : 3),
);

# Makes the source fail at a random dirty offset, the same one in each run of the test. Another process does
# that, because QEMU may have to send its answers before it can stop.
sub lose_source ($context, $volume) {
    my $vm = $context->{backend}->vm;
    my ($left, $pid) = (rand($mib / 2));
    my $done = eval {
        copy_and_stop($volume,
            sub ($length) { $pid //= stop_server($vm) if ($left -= $length) <= 0 });
        1;
    };
    my $error = $@;
    waitpid($pid, 0) if $pid;
    die $error if !$done;
    return;
}

sub stop_server ($vm) {
    my $pid = fork() // die "cannot fork: $!\n";
    return $pid if $pid;
    eval { $vm->end_exports };
    POSIX::_exit(0);
}

sub copy_and_stop ($volume, $seen) {
    $volume->copy(
        to => sub ($offset, $data) { $seen->(length($data)) },
        connections => 1 + int(rand(4)),
        'request-size' => 65536,
        'bandwidth-limit' => 2 * $mib,    # so that more is left than was read ahead
    );
    return;
}

sub check_backend ($name, $mechanism) {
    my $context = PBA::Test::Backend->start_with_model($name, \%sizes, $seed, $blocks);
    my $backend = $context->{backend};
    $context->@{qw(mechanism dir last_write)} = ($mechanism, $backend->work_dir('copies'), 0);
    new_image("$context->{dir}/$_", $sizes{$_}) for @ids;
    $backend->guest->start_churn(seed => $seed, disks => \@ids, blocks => $blocks);
    $backend->guest->wait_churn(20);

    for my $sink (sinks_for($mechanism)) {
        for my $mode (qw(new use), $sink eq 'file' || $ENV{PBA_FULL} ? 'none' : ()) {
            my $statistics = backup($context, $mode, $sink);
            check_images($context, "$sink, mode $mode");
            my ($copied, $discarded) = $statistics->{disk0}->@{qw(bytes-read bytes-discarded)};
            if ($mode eq 'use') {
                cmp_ok($copied, '<', $sizes{disk0} / 2, "$sink: an increment is a part");
            }
            else {
                is($copied, $sizes{disk0}, "$sink, mode $mode: everything is copied");
            }
            is($discarded, $copied, "$sink, mode $mode: discarded what was copied");
        }
    }

    backup($context, 'new', 'file');
    check_images($context, 'before the failures');
    srand($seed);
    for my $failure (share(sort keys %failures)) {
        $backend->guest->wait_more_churn(200) if $failure =~ m/source/;
        backup($context, 'use', undef, sub ($volume) { $failures{$failure}->($context, $volume) });
        $backend->guest->wait_more_churn(20);
        backup($context, 'use', 'file');
        check_images($context, "after $failure");
    }
    $backend->guest->stop_churn;
    $backend->check_manners;
}

my @cases = map { ([$_, 'nbd'], [$_, 'file-handle']) } PBA::Test::Backend->names;
for my $case (share(@cases)) {
    my ($name, $mechanism) = $case->@*;
    subtest "backend $name, $mechanism" => sub {
        plan(skip_all => 'no /dev/fuse') if $mechanism eq 'file-handle' && !-e '/dev/fuse';
        check_backend($name, $mechanism);
    };
}

done_testing;
