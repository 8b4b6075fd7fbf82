# A file system without fsync that reports only at close() that it has lost written data.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Fcntl qw(O_RDWR);
use File::Temp ();
use POSIX ();
use Test::More;

use PBA::Test::NBDServer qw(open_volume);
use PVE::BackupAccess::Volume;

plan(skip_all => 'needs root and /dev/fuse') if $> != 0 || !-e '/dev/fuse';

# Runs in a mount namespace of its own, so that nothing stays mounted however the test ends.
if (!$ENV{PBA_UNSHARED} && system('unshare --mount true 2>/dev/null') == 0) {
    $ENV{PBA_UNSHARED} = 1;
    exec(qw(unshare --mount), $^X, (map { "-I$_" } @INC), $0) or die "unshare: $!\n";
}

my $size = 1 << 20;
my $dir = File::Temp->newdir('pba-close-XXXXXXXX', TMPDIR => 1);
my $file = "$dir/mnt";

# Linux: include/uapi/linux/fuse.h
my %replies = (
    2 => undef,                                                            # FORGET
    3 => \&attributes,                                                     # GETATTR
    4 => \&attributes,                                                     # SETATTR
    14 => sub ($in) { pack('QLL', 7, 1, 0) },                              # OPEN
    16 => sub ($in) { pack('LL', unpack('L', substr($in, 56, 4)), 0) },    # WRITE
    18 => sub ($in) { '' },                                                # RELEASE
    26 => sub ($in) { pack('LLLLSSLLSSL7', 7, 31, 1 << 17, 0, 12, 9, 1 << 17, 1, (0) x 9) },  # INIT
);

sub attributes ($in) {
    return
          pack('QLL', 0, 0, 0)
        . pack('Q6L10', 1, $size, $size / 512, (0) x 6, oct('100600'), 1, 0, 0, 0, 4096, 0);
}

sub serve ($fuse) {
    while (sysread($fuse, my $in, 1 << 20)) {
        my (undef, $operation, $id) = unpack('LLQ', $in);
        my $code = $replies{$operation};
        next if !$code && exists($replies{$operation});
        my $error = $code ? 0 : $operation == 25 ? POSIX::EIO() : POSIX::ENOSYS();    # 25: FLUSH
        my $data = $code ? $code->($in) : '';
        syswrite($fuse, pack('LlQ', 16 + length($data), -$error, $id) . $data);
    }
    return;
}

open(my $fh, '>', $file) or die "$file: $!\n";
close($fh);
sysopen(my $fuse, '/dev/fuse', O_RDWR) or plan(skip_all => "/dev/fuse: $!");
my @mount
    = ('none', $file, 'fuse', 0, 'fd=' . fileno($fuse) . ',rootmode=100000,user_id=0,group_id=0');
require 'syscall.ph';    ## no critic (BarewordIncludes)
syscall(SYS_mount(), @mount) == 0 or die "mount: $!\n";
my $pid = fork() // die "fork: $!\n";

if (!$pid) {
    serve($fuse);
    POSIX::_exit(0);
}
close($fuse);

my $source = PBA::Test::NBDServer->start(size => $size, dirty => [[0, $size]]);
ok(!eval { open_volume($source)->copy(to => $file, discard => 0); 1 }, 'a path: the copy dies');
like("$@", qr/flushing \Q$file\E failed - Input/, 'the error is that of close()');
open(my $handle, '+<', $file) or die "$file: $!\n";
ok(!eval { open_volume($source)->copy(to => $handle, discard => 0); 1 }, 'a handle: the copy dies');
like("$@", qr/flushing the file descriptor \d+ failed - Input/, 'the error is the same');
{
    no warnings 'io';    ## no critic (ProhibitNoWarnings)
    close($handle);
}

kill('KILL', $pid);
waitpid($pid, 0);
system('umount', '-l', $file);

done_testing;
