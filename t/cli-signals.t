# A signal ends the command while it reads archives, and is not mistaken for damage of an archive. In version
# 0.1.0 it was: the backup continued as a full one, and further signals did not end it.
#
# One QEMU is enough: the test does not depend on it.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;
use Time::HiRes qw(sleep time);

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command start_command);

my $backend = PBA::Test::Backend->start(
    name => 'pve',
    guest => 0,
    disks => [{ id => 'scsi0', size => 16 << 20, bus => 'scsi', shape => 'drive' }],
);
my $vm = $backend->vm;
my $store = $vm->dir . '/store';
mkdir($store) or die "$store: $!\n";
my @backup = ('backup', $store, '--qmp', $backend->qmp_path, '--vmid', 100);
push(@backup, '--run-dir', $backend->work_dir('run'), '--fleecing-dir', $vm->dir);
my $outside = $backend->outside;

sub content ($file, @new) {
    open(my $fh, @new ? '>:raw' : '<:raw', $file) or die "$file: $!\n";
    if (@new) {
        print {$fh} @new and close($fh) or die "$file: $!\n";
        return;
    }
    local $/ = undef;
    return scalar(<$fh>);
}

# Whether a program that the command has started uses the image.
sub is_reading ($command, $image) {
    my ($children)
        = map { content($_) } '/proc/' . $command->pid . '/task/' . $command->pid . '/children';
    return grep {
        eval { content("/proc/$_/cmdline") =~ m/\0\Q$image\E\0/ }
    } split(' ', $children);
}

# The programs that have the image in their command line, whoever started them.
sub running ($image) {
    return grep {
        eval { content("/proc/$_/cmdline") =~ m/\0\Q$image\E\0/ }
    } map { m{(\d+)\z} } glob('/proc/[0-9]*');
}

# The same, after killed processes have had time to end.
sub still_running ($image) {
    my $deadline = time + 20;
    sleep(0.01) while running($image) && time < $deadline;
    return running($image);
}

# Waits until the command reads the image.
sub wait_for_reading ($command, $image) {
    my $deadline = time + 60;
    while (!is_reading($command, $image)) {
        die "it does not read $image: " . $command->text('err')
            if !$command->goes_on || time > $deadline;
    }
    sleep(0.2);
    return;
}

my $first = run_command(@backup);
is($first->{status}, 0, 'a backup') or diag($first->{err});
chomp(my $archive = $first->{out});
my $image = "$archive/drive-scsi0.qcow2";

# What the command runs in place of qemu-img hangs, as on a storage that does not answer.
my $hangs = $vm->dir . '/hangs';
content($hangs, "#!/bin/sh\nexec tail -f /dev/null -- \"$image\"\n");
chmod(0755, $hangs) or die "chmod: $!\n";
my $options = $ENV{PERL5OPT} // '';
$ENV{PERL5OPT} = "$options -I$FindBin::Bin/lib -MPBA::Test::OtherImg=$hangs";

my %commands = (backup => \@backup, verify => ['verify', $archive]);
for my $name (sort keys %commands) {
    for my $signals ([qw(INT)], [qw(TERM INT)], [qw(HUP)]) {
        my $what = "$name, @$signals";
        my $command = start_command($commands{$name}->@*);
        wait_for_reading($command, $image);
        my $began = time;
        for my $signal ($signals->@*) {
            $command->kill($signal);
            sleep(0.05);
        }
        my $run = $command->finish;
        is_deeply([still_running($image)], [], "$what: no program continues");
        my %number = (HUP => 1, INT => 2, TERM => 15);
        is($run->{signal}, $number{ $signals->[0] }, "$what: the signal ends the process");
        cmp_ok(time - $began, '<', 30, "$what: soon");
        my @lines = split(m/\n/, $run->{err});
        is(
            $lines[-1],
            "pve-backup-access: interrupted by SIG$signals->[0]",
            "$what: the last line names the signal"
        );
        is(scalar(grep { m/interrupted/ } @lines), 1, "$what: the message is printed once");
        unlike($run->{out} . $run->{err}, qr/DAMAGED|full backup/, "$what: is no damage");
        is_deeply($backend->outside, $outside, "$what: nothing is left in QEMU");
        is_deeply(
            [map { s{.*/}{}r } glob("$store/vm/100/{.tmp,.del,2}*")],
            [$archive =~ s{.*/}{}r],
            "$what: nothing is left in the store"
        );
    }
}

$ENV{PERL5OPT} = $options;
my $next = run_command(@backup);
is($next->{status}, 0, 'the next backup') or diag($next->{err});
like(
    $next->{err},
    qr/^drive-scsi0: storing an increment/m,
    'the next backup continues from the first'
);

done_testing;
