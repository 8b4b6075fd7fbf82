package PBA::Test::CommandGuest;

# A guest for tests of the command: a QEMU with two disks and no guest system, a directory for archives, and
# checks that every run must pass.

use v5.36;

use Exporter qw(import);
use JSON::PP ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command);

our @EXPORT = qw($archive_name $json $mib backup check_outside fails is_private restore_and_compare
    same_disks start_guest status succeeds);

our $mib = 1024 * 1024;
our $json = JSON::PP->new->utf8;
our $archive_name = qr!vm/100/[0-9]{8}T[0-9]{6}Z!;

my @devices = qw(drive-efidisk0 drive-scsi0);
my %disk = ('drive-scsi0' => 'scsi0', 'drive-efidisk0' => 'efidisk0');
my @disks = (
    { id => 'scsi0', size => 32 * $mib, bus => 'scsi', shape => 'drive' },
    { id => 'efidisk0', size => 528 * 1024, bus => 'scsi', shape => 'drive' },
);

umask(022);

# @others replace the default disks.
sub start_guest ($name, @others) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        guest => 0,
        disks => @others ? \@others : \@disks,
    );

    # As on Proxmox VE, the name of the socket contains the number of the guest. The name of the directory
    # contains characters that are special to Perl, JSON and URIs.
    my $dir = $backend->vm->dir . "/Gr\xc3\xb6\xc3\x9fe%26&#+";
    mkdir($dir) or die "$dir: $!\n";
    symlink($backend->qmp_path, "$dir/100.qmp") or die "symlink: $!\n";
    my $test = { backend => $backend, vm => $backend->vm, dir => $dir, store => "$dir/store" };
    mkdir($_) or die "$_: $!\n" for $test->{store}, "$dir/out", "$dir/tmp";
    $test->{guest} = ['--qmp', "$dir/100.qmp", '--run-dir', $backend->work_dir('run')];
    push($test->{guest}->@*, '--fleecing-dir', $backend->work_dir('fleecing'))
        if $name eq 'upstream';
    $test->{outside} = $backend->outside;
    return $test;
}

# Checks what must hold while no command runs.
sub check_outside ($test, $name) {
    is_deeply($test->{backend}->outside, $test->{outside}, "$name: nothing is left in QEMU");
    my $all = $test->{vm}->bitmaps;
    my @bitmaps = map {
        $all->{$_}->@{ grep { !m/\Apba-id:/ } keys $all->{$_}->%* }
    } keys $all->%*;
    is(scalar(grep { !$_->{recording} } @bitmaps), 0, "$name: every bitmap records");
    cmp_ok(scalar(@bitmaps), '<=', 2, "$name: none but the targets'");
}

sub succeeds ($name, @arguments) {
    my $run = run_command(@arguments);
    is($run->{status}, 0, "$name: exit status") or diag($run->{err});
    return $run;
}

sub fails ($name, $pattern, @arguments) {
    my $run = run_command(@arguments);
    is($run->{status}, 1, "$name: exit status 1");
    like($run->{err}, qr/^pve-backup-access $arguments[0]: .*$pattern/m, "$name: says why");
    is($run->{out}, '', "$name: no result");
    return $run;
}

sub backup ($test, @more) { return ('backup', $test->{store}, $test->{guest}->@*, @more) }

sub same_disks ($test, $dir, $name) {
    for my $device (@devices) {
        my $disk = $test->{vm}->raw_image($disk{$device});
        is(system('cmp', '-s', $disk, "$dir/$device.raw"), 0, "$name: $device equals the disk");
    }
}

# A disk's data must be accessible to its owner only, whatever the umask is.
sub is_private ($dir, $name) {
    my @public = grep { ((stat)[2] & 0777) != 0600 } glob("$dir/*");
    is_deeply(\@public, [], "$name: only the owner can read it");
}

sub restore_and_compare ($test, $archive, $name) {
    my $dir = "$test->{dir}/out/" . ++$test->{restores};
    mkdir($dir) or die "$dir: $!\n";
    my $run = succeeds("$name: restore", 'restore', $archive, $dir);
    is($run->{out}, join('', map { "$dir/$_.raw\n" } @devices), "$name: prints the files");
    same_disks($test, $dir, $name);
    is_private($dir, $name);
    return $dir;
}

sub status ($test) {
    return $json->decode(succeeds('status', 'status', $test->{guest}->@*, '--json')->{out});
}

1;
