# Each command is interrupted at various times. Either the signal ends it, or its work was done. Nothing is left
# in QEMU, in temporary directories or at the target; every listed archive is intact; and the next backup and
# its restore equal the disk.
#
# One QEMU is enough: the command knows QEMU only through the module.
#
# A plain run interrupts each command at one time on one backend, chosen by a seed; PBA_FULL=1 at many times on
# both.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Path qw(remove_tree);
use File::Temp ();
use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command start_command);
use PBA::Test::CommandGuest;

my ($seed, $times) = (20261128, $ENV{PBA_FULL} ? 30 : 1);
my %number = (HUP => 1, INT => 2, TERM => 15);
my @signals = sort keys %number;

# ---- the commands: arguments, and a check that gets whether a signal ended the command ----

sub out_dir ($test) { return "$test->{dir}/out/one" }

# A restored file, if it exists, is the whole disk.
sub check_restored ($test, $name, $was_ended) {
    my $dir = out_dir($test);
    my @files = map { s{.*/}{}r } glob("$dir/{*,.[!.]*}");
    is_deeply([grep { m/\.part\z/ } @files], [], "$name: no temporary file is left");
    for my $device (qw(drive-efidisk0 drive-scsi0)) {
        next if $was_ended && !-e "$dir/$device.raw";
        my $disk = $test->{vm}->raw_image($device =~ s/drive-//r);
        is(system('cmp', '-s', $disk, "$dir/$device.raw"), 0, "$name: $device is whole");
    }
    my $config = -e "$dir/guest.conf" ? -s _ : undef;
    ok(!defined($config) || $config == 13, "$name: the configuration is complete");
    remove_tree($dir);
    mkdir($dir) or die "$dir: $!\n";
}

sub archives ($test) {
    return
        map { "$test->{store}/$_->{volname}" }
        $json->decode(run_command('list', $test->{store}, '--json')->{out})->@*;
}

sub check_store ($test, $name, @) {
    my @left = grep { !m!/$archive_name\z! } glob("$test->{store}/vm/100/{*Z,.tmp*,.del*}");
    $test->{may_be_left}
        ? pass("$name: ended later")
        : is("@left", '', "$name: no temporary directory is left");
    my $verify = run_command('verify', $test->{store});
    is($verify->{status}, 0, "$name: every archive is whole") or diag($verify->{out});
}

# The next removal completes one that was interrupted.
sub check_pruned ($test, $name, $was_ended) {
    local $test->{may_be_left} = 1;
    check_store($test, $name);
    succeeds("$name: again", 'prune', $test->{store}, '--keep', 2);
    delete($test->{may_be_left});
    check_store($test, "$name: the store after the next prune");
}

sub commands ($test) {
    my ($last) = reverse(archives($test));
    my @store = ($test->{store});
    return (
        backup => [[backup($test, '--guest-config', $test->{config})], \&check_store],
        restore => [['restore', $last, out_dir($test)], \&check_restored],
        verify => [['verify', $last], sub (@) { }],
        prune => [['prune', @store, '--keep', 2], \&check_pruned],
        list => [['list', @store], sub (@) { }],
        map => [['map', 'drive-scsi0', $test->{guest}->@*], sub (@) { }],
        status => [['status', $test->{guest}->@*], sub (@) { }],
        recover => [['recover', $test->{guest}->@*, '--target-id', 'nobody'], sub (@) { }],
    );
}

# ---- one run ----

sub prepare ($test, $name) {
    $test->{vm}->qemu_io('scsi0', sprintf('write -P %d 3M 64k', ++$test->{byte}));
    return if $name ne 'restore' && $name ne 'prune';
    succeeds("before $name", backup($test, '--guest-config', $test->{config}));
}

sub run_interrupted ($test, $name, $signal, $part) {
    prepare($test, $name);
    my %commands = commands($test);
    my ($arguments, $check) = $commands{$name}->@*;
    my $command = start_command($arguments->@*);
    sleep($part * $test->{seconds}{$name});
    $command->kill($signal);
    my $run = $command->finish;
    my $text = sprintf('%s, SIG%s after %.2f', $name, $signal, $part);
    my $was_ended = $run->{signal} ? 1 : 0;

    if ($was_ended) {
        is($run->{signal}, $number{$signal}, "$text: the signal ends the process");
        unlike($run->{err}, qr/DAMAGED| at \S+ line \d/, "$text: no other messages");
    }
    else {
        is($run->{status}, 0, "$text: was ready") or diag($run->{err});
    }
    $check->($test, $text, $was_ended);
    is_deeply($test->{backend}->outside, $test->{outside}, "$text: nothing is left in QEMU");
    my @left = glob("$test->{dir}/tmp/*");
    is("@left", '', "$text: nor in TMPDIR") if $run->{err} =~ m/interrupted|\A\z/;
    remove_tree(@left);
    return $was_ended;
}

# Measures how long the command takes.
sub measure ($test, $name) {
    prepare($test, $name);
    my %commands = commands($test);
    my ($arguments, $check) = $commands{$name}->@*;
    my $began = time;
    succeeds($name, $arguments->@*);
    $test->{seconds}{$name} = time - $began;
    $check->($test, $name, 0);
}

# Commands that use the backend run on both.
my %plain = (
    upstream => [qw(backup list map restore verify)],
    pve => [qw(backup prune recover status)],
);

sub check_commands ($test) {
    my ($turn, $ended) = (0, 0);
    my @all = sort keys { commands($test) }->%*;
    for my $name ($ENV{PBA_FULL} ? @all : $plain{ $test->{backend}->name }->@*) {
        measure($test, $name);
        for (1 .. $times) {
            my ($signal, $part) = ($signals[$turn++ % @signals], rand());

            # The command may be faster now than when it was measured.
            $ended += run_interrupted($test, $name, $signal, $part)
                || run_interrupted($test, $name, $signal, $part / 4);
        }
    }
    cmp_ok($ended, '>', 0, 'some were interrupted');
    chomp(my $archive = succeeds('the next backup', backup($test))->{out});
    restore_and_compare($test, $archive, 'the next backup');
}

# Its QEMU, its disks and the restored images are removed.
sub check_try_provider ($signal) {
    my $dir = File::Temp->newdir('pba-try.XXXXXXXX', TMPDIR => 1);
    local $ENV{TMPDIR} = "$dir";
    my @command = ('try-provider', 'PBA::Test::RawProvider', '-I', "$FindBin::Bin/lib");
    my $command = start_command(@command);
    $command->wait_for(out => qr/^ok [0-9]+ - full backup: backup_vm$/m);
    sleep(rand(3));
    $command->kill($signal);
    my $run = $command->finish;
    is($run->{signal}, $number{$signal}, "try-provider, SIG$signal: ends by it");
    is_deeply([glob("$dir/*")], [], "try-provider, SIG$signal: nothing is left");
    my @running = grep { content($_) =~ m/\Q$dir\E/ } glob('/proc/[0-9]*/cmdline');
    is_deeply(\@running, [], "try-provider, SIG$signal: its QEMU has ended");
}

sub content ($file) {
    open(my $fh, '<', $file) or return '';
    local $/ = undef;
    return <$fh> // '';
}

srand($seed);
diag("each command $times time(s), seed $seed");
for my $name (PBA::Test::Backend->names) {
    subtest "backend $name" => sub {
        my $test = start_guest($name);
        local $ENV{TMPDIR} = "$test->{dir}/tmp";
        $test->{config} = "$test->{dir}/guest.conf";
        open(my $fh, '>', $test->{config}) or die "guest.conf: $!\n";
        print {$fh} "name: tested\n" and close($fh) or die "guest.conf: $!\n";
        mkdir(out_dir($test)) or die "mkdir: $!\n";
        $test->{vm}->qemu_io('scsi0', 'write -P 0x11 0 16M');
        succeeds('a first backup', backup($test, '--guest-config', $test->{config})) for 1 .. 2;
        check_commands($test);
    };
}

subtest 'try-provider' => sub { check_try_provider($_) for $ENV{PBA_FULL} ? @signals : 'TERM' };

done_testing;
