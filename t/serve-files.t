# Restores single files of an archive with the commands of doc/operating.md.
#
# One QEMU is enough: it only has a disk that is backed up.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Command qw(run_command start_command);

plan(skip_all => 'no /dev/fuse: nothing is mounted') if !-e '/dev/fuse';
plan(skip_all => 'needs root and loop devices') if $> != 0 || !-e '/dev/loop-control';
plan(skip_all => 'no mount namespaces') if system('unshare --mount true 2>/dev/null') != 0;

my $tmp = File::Temp->newdir('pba-files-XXXXXXXX', TMPDIR => 1);
mkdir("$tmp/$_") or die "mkdir: $!\n" for qw(backups disks files content);

sub write_file ($path, $content) {
    open(my $fh, '>', $path) or die "$path: $!\n";
    print {$fh} $content;
    close($fh) or die "$path: $!\n";
    return;
}

# A disk with a file system in its first partition, which starts at sector 2048.
my $text = "what the guest has written\n" x 1000;
my ($image, $size) = ("$tmp/image.raw", 16 << 20);
write_file("$tmp/content/letter", $text);
write_file($image, '');
truncate($image, $size) or die "truncate: $!\n";
system(qw(mke2fs -q -F -t ext4 -d), "$tmp/content", '-E', 'offset=1048576', $image, '12m') == 0
    or die "mke2fs failed\n";

my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    guest => 0,
    disks =>
        [{ id => 'drive-scsi0', file => $image, format => 'raw', size => $size, shape => 'drive' }],
);
my $backup = run_command('backup', "$tmp/backups", '--qmp', $backend->qmp_path, '--guest', 'web1');
is($backup->{status}, 0, 'a backup') or diag($backup->{err});

# The documented command that mounts a file system, with this test's paths.
sub documented_mount () {
    open(my $fh, '<', "$FindBin::Bin/../doc/operating.md") or die "operating.md: $!\n";
    my ($line) = grep { m/\Amount -o / } <$fh>;
    return $line =~ s{/mnt/(\w+)}{$tmp/$1}gr;
}

my $command = start_command('mount', "$tmp/backups/web1", "$tmp/disks");
$command->wait_for(out => qr/^\S+ .*\n/m);
my ($device, $raw) = $command->text('out') =~ m/^(\S+) (.*)$/m;
is($raw, "$tmp/disks/$device.raw", 'the raw file has the documented name');
my $script
    = documented_mount() =~ s/drive-scsi0/$device/r . "cat $tmp/files/letter\numount $tmp/files\n";
open(my $files, '-|', 'unshare', '--mount', 'sh', '-ec', $script) or die "unshare: $!\n";
my $found = do { local $/ = undef; <$files> };
ok(close($files), 'the file system is mounted') or diag($script);
is($found, $text, 'the file has the content that the guest wrote');
$command->kill('TERM');
is($command->finish->{status}, 0, 'the command ends');
is_deeply([glob("$tmp/disks/*")], [], 'nothing is left');

done_testing;
