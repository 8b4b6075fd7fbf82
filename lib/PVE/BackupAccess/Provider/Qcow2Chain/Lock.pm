package PVE::BackupAccess::Provider::Qcow2Chain::Lock;

# Which processes may use a guest's archives at the same time. A lock is a handle: it is held until
# it is dropped, or until all processes that have the handle have closed it.

use v5.36;

use Exporter qw(import);
use Fcntl qw(:flock O_CREAT O_RDONLY O_RDWR);
use Time::HiRes ();

use PVE::BackupAccess::Error;

our @EXPORT_OK = qw(drop_lock take_lock try_lock);

my $Error = 'PVE::BackupAccess::Error';
my $look_every = 0.2;    # seconds

# Archives are added or removed by one process at a time. Any number of others may read meanwhile, but not
# while images are merged or taken away.
my %locks = (
    change => {
        file => '.lock',
        how => LOCK_EX,
        busy => 'is in use by another backup or prune',
    },
    read => {
        file => '.reading',
        how => LOCK_SH,
        busy => 'is in use: another process is removing an archive',
    },
    removal => {
        file => '.reading',
        how => LOCK_EX,
        busy => 'is read by a verify, restore, serve or mount',
    },
);

# No other program inherits it, and with it the lock, whatever the caller has set. A reader of a read-only
# directory needs no lock, since no process can remove anything there: undef.
my sub open_file ($path, $how) {
    local $^F = 2;
    my $fh;
    return $fh if sysopen($fh, $path, O_RDWR | O_CREAT, 0600);
    $Error->throw('SystemError', "cannot open $path - $!") if $how != LOCK_SH;
    return sysopen($fh, $path, O_RDONLY) ? $fh : undef;
}

# A true value that holds the lock, undef if another process has it.
sub try_lock ($dir, $kind) {
    my ($file, $how) = $locks{$kind}->@{qw(file how)};
    my $fh = open_file("$dir/$file", $how) // return 'the directory is read-only';
    return flock($fh, $how | LOCK_NB) ? $fh : undef;
}

# The same, or it dies after so many seconds.
sub take_lock ($dir, $kind, $seconds) {
    my $deadline = Time::HiRes::time() + $seconds;
    while (1) {
        my $lock = try_lock($dir, $kind);
        return $lock if $lock;
        my $left = $deadline - Time::HiRes::time();
        last if $left <= 0;
        Time::HiRes::sleep($left < $look_every ? $left : $look_every);
    }
    $Error->throw('StateError',
        "$dir $locks{$kind}{busy} - try again when that has ended, or wait for it (--wait)");
}

# For all processes that have it: one that was forked to run a program has the handle until it does so, which
# may be after the work has failed and the next is begun.
sub drop_lock ($lock) {
    flock($lock, LOCK_UN) if ref($lock);
    return;
}

1;
