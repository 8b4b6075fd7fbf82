# pve-backup-access and the guest: how the command shows bitmaps and accesses, how it handles leftover accesses,
# and that an interruption leaves none behind. On both backends.
#
# One QEMU is enough: the command knows QEMU only through the module.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command start_command start_on_terminal);
use PBA::Test::CommandGuest;

# Before the first backup, there is nothing to show, and the command creates nothing.
sub check_without_bitmaps ($test) {
    my $status = succeeds('status', 'status', $test->{guest}->@*);
    like(
        $status->{out},
        qr/\Abackend: (?:stock QEMU|Proxmox VE)\nno backup is running\nno bitmaps/,
        'status: nothing yet'
    );
    fails('map without a bitmap', 'has no bitmap yet', 'map', 'drive-scsi0', $test->{guest}->@*);
    is_deeply($test->{vm}->bitmaps, {}, 'map without a bitmap: no bitmap is created');
    check_outside($test, 'map without a bitmap');
}

# The regions that the writes make dirty: [offset, length], with the granularity of a bitmap.
sub regions_of ($granularity, $size, @writes) {
    my %dirty;
    for my $write (@writes) {
        my ($offset, $length) = $write->@*;
        $dirty{$_} = 1
            for int($offset / $granularity) .. int(($offset + $length - 1) / $granularity);
    }
    my @regions;
    for my $index (sort { $a <=> $b } keys %dirty) {
        my $end = ($index + 1) * $granularity;
        my $length = ($end < $size ? $end : $size) - $index * $granularity;
        if (@regions && $regions[-1][0] + $regions[-1][1] == $index * $granularity) {
            $regions[-1][1] += $length;
        }
        else {
            push(@regions, [$index * $granularity, $length]);
        }
    }
    return \@regions;
}

sub check_map ($test) {
    my @writes = ([0, 64 * 1024], [9 * $mib + 512, 512], [24 * $mib, 8 * $mib]);
    $test->{vm}->qemu_io('scsi0', "write -P 0x51 $_->[0] $_->[1]") for @writes;
    my ($bitmap) = grep { $_->{device} eq 'drive-scsi0' } status($test)->{bitmaps}->@*;
    my $regions = regions_of($bitmap->{granularity}, 32 * $mib, @writes);
    my $bitmaps = $test->{vm}->bitmaps;
    my @map = ('map', 'drive-scsi0', $test->{guest}->@*);

    my $map = $json->decode(succeeds('map', @map, '--json')->{out});
    is_deeply([map { [$_->@{qw(offset length)}] } $map->{regions}->@*], $regions, 'map: regions');
    is($map->{dirty}, $bitmap->{'dirty-bytes'}, 'map: sum');
    is($map->{'target-id'}, $bitmap->{'target-id'}, 'map: the only target is found');
    my $clean
        = $json->decode(run_command('map', 'drive-efidisk0', $test->{guest}->@*, '--json')->{out});
    is_deeply($clean->{regions}, [], 'map: a clean disk has no regions');
    check_map_on_terminal(@map);

    succeeds('map: picture', @map, '--svg', "$test->{dir}/map.svg");
    open(my $svg, '<', "$test->{dir}/map.svg") or die "map.svg: $!\n";
    my $picture = join('', <$svg>);
    like($picture, qr!\A<svg .*</svg>\n\z!s, 'map: a picture');
    my $cells = 0;
    $cells += $_->[1] / 65536 for $regions->@*;
    is(scalar(() = $picture =~ m/<title>64\.0 KiB dirty of 64\.0 KiB/g), $cells,
        'map: dirty cells');

    is_deeply($test->{vm}->bitmaps, $bitmaps, 'map: every bitmap is as before');
    check_outside($test, 'map');
    is(run_command(@map, '--json', '--svg', 'x')->{status},
        2, 'map: --json and --svg exclude each other');
    fails('map: no such target', q(of target 'nosuch'), @map, '--target-id', 'nosuch');
}

sub check_map_on_terminal (@map) {
    local $ENV{LC_ALL} = 'C.UTF-8';
    my $shown = start_on_terminal(60, @map)->finish->{out};
    utf8::decode($shown);
    my ($totals, $strip) = split(m/\r\n/, $shown);
    like(
        $totals,
        qr/\Adrive-scsi0, target .*: [0-9.]+ MiB of 32\.0 MiB dirty \([0-9.]+ %\), 3 reg/,
        'map: totals on a terminal'
    );
    like($strip, qr/\A0 \x{2595}[\x{2581}-\x{2588}]/, 'map: a strip of blocks');
    like($strip, qr/ \x{2588}+\x{258f} 32\.0 MiB\z/, 'map: full at the end');
    cmp_ok(length($strip), '<=', 60, 'map: fits the terminal');
    $ENV{LC_ALL} = 'C';
    like(run_command(@map)->{out}, qr/\n0 \|[ .:=+*#@-]+\@\| 32\.0 MiB\n\z/, 'map: plain letters');
}

# The name of a bitmap must not control the terminal.
sub check_hostile_name ($test) {
    my ($node) = sort keys $test->{vm}->bitmaps->%*;
    my $target = "\e]0;owned\a\e[2Jevil\r\n\x{9b}31m";
    my $name = ($test->{backend}->name eq 'upstream' ? 'pba:' : '') . $target;
    my %bitmap = (node => $node, name => $name);
    $test->{vm}->qmp('block-dirty-bitmap-add', %bitmap);
    my $run = succeeds('a hostile name', 'status', $test->{guest}->@*);
    utf8::decode($run->{out});
    unlike($run->{out} =~ s/\n//gr, qr/[[:cntrl:]]/, 'a hostile name: no control characters');
    like(
        $run->{out},
        qr/^ \]0;owned  \[2Jevil   31m  +\S+ +0 B/m,
        'a hostile name: the line of the bitmap'
    );
    my ($found) = grep { $_->{'target-id'} eq $target } status($test)->{bitmaps}->@*;
    ok($found, 'a hostile name: unchanged in JSON');
    my $map = run_command('map', $found->{device}, $test->{guest}->@*);
    utf8::decode($map->{err});
    like($map->{err}, qr/--target-id: .*evil.*\n\z/, 'a hostile name: an error is one line');
    unlike($map->{err} =~ s/\n\z//r, qr/[[:cntrl:]]/, 'a hostile name: no control characters');
    $test->{vm}->qmp('block-dirty-bitmap-remove', %bitmap);
}

# The leftovers of a killed process are shown and can be undone.
sub check_recover ($test) {
    my $command = start_command(backup($test, '--bandwidth-limit', '1M'));
    $command->wait_for(err => qr/^drive-scsi0: storing an increment/m);
    my $access = status($test)->{access};
    is($access->{alive}, 1, 'status: a backup is running');
    my $busy = run_command('status', $test->{guest}->@*)->{out};
    like(
        $busy,
        qr/^backup access: target store\@\w+, process $access->{pid}\n/m,
        'status: a backup is running, as text'
    );
    like(
        $busy,
        qr/^store\@\w+ +drive-scsi0 .* frozen +[0-9a-f]{32}$/m,
        'status: the bitmaps of the running backup'
    );
    fails('map meanwhile', 'not finished', 'map', 'drive-scsi0', $test->{guest}->@*);
    $command->kill('KILL');
    $command->finish;

    my $left = run_command('status', $test->{guest}->@*)->{out};
    like($left, qr/process $access->{pid}, which is dead/, 'status: a backup was killed');
    like($left, qr/^left behind by a killed process/m,
        'status: the leftovers of the killed backup');
    my $other = fails('another target', 'call recover', backup($test, '--target-id', 'other'));
    like(
        $other->{err},
        qr/^Undo it by: pve-backup-access recover --target-id '\Q$access->{'target-id'}\E'/m,
        'the error names the command that undoes it'
    );
    my @recover = ('recover', $test->{guest}->@*, '--target-id', $access->{'target-id'});
    like(succeeds('recover', @recover)->{out}, qr/\w/, 'recover: prints what was undone');
    is_deeply($json->decode(succeeds('recover', @recover, '--json')->{out}),
        [], 'recover: a second call has nothing to undo');
    check_outside($test, 'recover');
}

# A signal, the terminal's interrupt key or a closed pipe ends the backup as a failure, and everything is
# undone.
sub check_interruption ($test) {
    my $vm = $test->{vm};
    $vm->qemu_io('scsi0', 'write -P 0x31 0 16M');
    my %ways = (
        SIGTERM => [15, sub ($command) { $command->kill('TERM') }],
        'a closed pipe' => [13, sub ($command) { $command->close_output('err') }],
        'the interrupt key' => [2, sub ($command) { $command->type("\x03") }],
    );
    for my $way (sort keys %ways) {
        my ($signal, $interrupt) = $ways{$way}->@*;
        my $on_terminal = $way =~ m/key/;

        # A closed pipe is noticed at the next line, when the copy is done.
        my @slow = backup($test, '--bandwidth-limit', $way =~ m/pipe/ ? '16M' : '1M');
        my $command = $on_terminal ? start_on_terminal(80, @slow) : start_command(@slow);
        $command->wait_for($on_terminal ? 'out' : 'err', qr/^drive-scsi0: storing an increment/m);
        $interrupt->($command);
        my $run = $command->finish;
        is($run->{signal}, $signal, "$way: ends the command");
        like($on_terminal ? $run->{out} : $run->{err}, qr/interrupted by SIG/, "$way: says so")
            if $way !~ m/pipe/;
        check_outside($test, $way);
    }
    my $run = succeeds('after them', backup($test));
    like($run->{err}, qr/^drive-scsi0: dirty-bitmap status: OK \(2[48]\.0 MiB/m, 'no bit was lost');
    chomp(my $archive = $run->{out});
    restore_and_compare($test, $archive, 'a backup after the interrupted ones');
    is(scalar(grep { !m!/$archive_name\z! } glob("$test->{store}/vm/100/*Z")),
        0, 'no temporary directories are left');
}

# forget removes a target's bitmaps, by the name that status shows, but not while they are in use.
sub check_forget ($test) {
    my $shown = sub () {
        [map { $_->{'target-id'} } status($test)->{bitmaps}->@*]
    };
    my ($target, @more) = $shown->()->@*;
    my @forget = ('forget', $test->{guest}->@*, '--target-id', $target);
    $test->{vm}->qemu_io('scsi0', 'write -P 0x41 0 16M');
    my $command = start_command(backup($test, '--bandwidth-limit', '1M'));
    $command->wait_for(err => qr/^drive-scsi0: storing an increment/m);
    fails('forget meanwhile', 'not finished', @forget);
    $command->kill('TERM');
    $command->finish;
    is_deeply($shown->(), [$target, @more], 'forget during a backup: all bitmaps stay');

    my @wrong = ($test->{guest}->@*, '--target-id', 'nosuch');
    fails(
        'forget: of a target that is not known',
        "no bitmaps - targets that have: .*\Q$target\E",
        'forget', @wrong
    );
    like(
        succeeds('recover', 'recover', @wrong)->{err},
        qr/^nothing to undo: target 'nosuch' .*\Q$target\E/,
        'recover: names the known ones'
    );
    my $lines = succeeds('forget', @forget)->{out};
    is(scalar(() = $lines =~ m/^device drive-\S+: bitmap '.*' was removed/mg),
        1 + @more, 'forget: a line for each disk');
    is_deeply($test->{vm}->bitmaps, {}, 'forget: no bitmap is left');
    like(
        succeeds('forget', @forget)->{err},
        qr/has no bitmaps/,
        'forget: a second call finds no bitmaps'
    );
    my $run = succeeds('forget', backup($test));
    like($run->{err}, qr/^drive-scsi0: full read: /m, 'forget: the next backup is full');
    check_outside($test, 'forget');
}

# Disks as on Proxmox VE 9: a throttle filter has the name that the drive had before.
sub check_blockdev ($test) {
    my $device = 'drive-scsi0';
    succeeds('blockdev', backup($test));
    $test->{vm}->qemu_io($device, 'write -P 0x71 0 64k');
    my $status = status($test);
    is_deeply([map { $_->{device} } $status->{bitmaps}->@*],
        [$device], 'blockdev: the bitmap of the disk');
    my $map = succeeds('blockdev: map', 'map', $device, $test->{guest}->@*, '--json');
    is_deeply($json->decode($map->{out})->{regions}[0]{offset}, 0, 'blockdev: the dirty region');
    check_outside($test, 'blockdev');

    # While the access of a killed process is active, another node is above the disk's.
    $test->{vm}->qemu_io($device, 'write -P 0x72 0 8M');
    my $command = start_command(backup($test, '--bandwidth-limit', '1M'));
    $command->wait_for(err => qr/^\Q$device\E: storing an increment/m);
    $command->kill('KILL');
    $command->finish;
    my $run = succeeds('blockdev: after a kill', backup($test));
    like($run->{err}, qr/^\Q$device\E: storing an increment/m, 'blockdev: the same disk is found');
    check_outside($test, 'blockdev: after a kill');
}

for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $test = start_guest($name);
        local $ENV{TMPDIR} = "$test->{dir}/tmp";    # for leftovers of killed processes
        check_without_bitmaps($test);
        succeeds('a first backup', backup($test));
        check_map($test);
        check_hostile_name($test);
        check_recover($test);
        check_interruption($test);
        check_forget($test);
        $test->{backend}->check_manners;
    };
    subtest "backend $name, blockdev" => sub {
        my %disk = (id => 'drive-scsi0', size => 32 * $mib, bus => 'scsi', throttle => 1);
        my $test = start_guest($name, \%disk);
        check_blockdev($test);
        $test->{backend}->check_manners;
    };
}

done_testing;
