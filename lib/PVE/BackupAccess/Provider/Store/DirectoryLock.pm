package PVE::BackupAccess::Provider::Store::DirectoryLock;

# Which processes may use a guest's archives at the same time. A lock is a handle: it is held until
# it is dropped, or until all processes that have the handle have closed it.

use v5.36;

use Exporter qw(import);
use Fcntl qw(:flock O_CREAT O_NONBLOCK O_RDONLY O_RDWR);

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Wait qw(fail_to_lock is_taken keep_trying);

our @EXPORT_OK = qw(drop_lock make_locks take_lock try_lock);

my $Error = 'PVE::BackupAccess::Error';

# One process at a time adds or removes archives. Any number of others may read in the meantime, but not while images are
# merged or removed.
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
        busy => 'is in use by a verify, restore, serve or mount',
    },
);

# No other program inherits the handle, and with it the lock, even if the caller has changed $^F. A reader of a directory
# that cannot be written to needs no lock if there is no file for it: then no process has ever removed anything. undef.
my sub open_file ($path, $how) {
    local $^F = 2;
    my $fh;
    return $fh if sysopen($fh, $path, O_RDWR | O_CREAT, 0600);
    my $may_be_read = $how == LOCK_SH && ($!{EROFS} || $!{EACCES} || $!{EPERM});
    return $fh if $may_be_read && sysopen($fh, $path, O_RDONLY | O_NONBLOCK);
    return undef if $may_be_read && $!{ENOENT};
    $Error->throw('SystemError', "cannot open $path - $!");
}

# Makes the files of the locks: without them, readers of a directory that they cannot write to would not be noticed.
sub make_locks ($dir) {
    open_file("$dir/$_->{file}", $_->{how}) for values %locks;
    return;
}

# A true value that holds the lock, undef if another process has it.
sub try_lock ($dir, $kind) {
    my ($file, $how) = $locks{$kind}->@{qw(file how)};
    my $fh = open_file("$dir/$file", $how) // return 'the directory is read-only';
    return $fh if flock($fh, $how | LOCK_NB);
    return undef if is_taken($fh);
    fail_to_lock("$dir/$file");
}

# The same, but waits up to $seconds, and then dies.
sub take_lock ($dir, $kind, $seconds) {
    my $lock = keep_trying($seconds, sub () { try_lock($dir, $kind) });
    return $lock if $lock;
    $Error->throw('StateError',
        "$dir $locks{$kind}{busy} - try again when that has ended, or wait for it (--wait)");
}

# Releases the lock for all processes that have the handle: a child has it between fork and exec, and that may last until
# this work has failed and the next one has begun.
sub drop_lock ($lock) {
    flock($lock, LOCK_UN) if ref($lock);
    return;
}

1;
