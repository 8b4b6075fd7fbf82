package PVE::BackupAccess::Provider::Store::PrivateDir;

# A private temporary directory: for the socket, log and raw file of a server, or for a tree that is restored. It is
# removed with the object. If its process was killed, its lock is free, and the next new directory removes it.

use v5.36;

use Fcntl qw(LOCK_EX LOCK_NB O_DIRECTORY O_NOFOLLOW O_RDONLY);
use File::Spec ();
use File::Temp ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::File qw(remove_tree);
use PVE::BackupAccess::Try qw(attempt attempt_any rethrow);
use PVE::BackupAccess::Wait qw(wait_for_lock);

my $prefix = 'pba-server-';

# The files that such a directory may contain. Nothing else is removed.
my @files = qw(nbd log raw qmp);
my $tree = 'tree';

my sub fail ($message) { PVE::BackupAccess::Error->throw('SystemError', $message) }

# No other program inherits the lock, even if the caller has changed $^F.
my sub open_dir ($path) {
    local $^F = 2;
    sysopen(my $lock, $path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW) or return undef;
    return $lock;
}

my sub remove ($path) {
    unlink(map { "$path/$_" } @files);
    attempt_any { remove_tree("$path/$tree") } if -d "$path/$tree";
    return rmdir($path);
}

my sub remove_left ($parent) {
    opendir(my $dh, $parent) or return;
    for my $path (map { m/\A(\Q$prefix\E\w+)\z/ ? "$parent/$1" : () } readdir($dh)) {
        my $lock = open_dir($path) // next;
        remove($path) if flock($lock, LOCK_EX | LOCK_NB) && (stat($lock))[4] == $>;
    }
    return;
}

# Another process may have removed the locked directory, and a third one made a directory with the same name.
my sub is_same ($lock, $path) {
    my @locked = stat($lock);
    my @found = stat($path);
    return @locked && @found && $locked[0] == $found[0] && $locked[1] == $found[1];
}

my sub make ($parent) {
    my $path;
    my $error = attempt_any { $path = File::Temp::tempdir("${prefix}XXXXXXXX", DIR => $parent) };
    fail("cannot make a temporary directory in $parent - $!") if $error;
    return $path;
}

# The lock of a new directory. Before it is taken, another process may take the directory for a leftover and remove it:
# then undef.
my sub lock_new ($path) {
    my $lock = open_dir($path);
    return undef if !$lock && $!{ENOENT};
    my $problem = "$!";
    my $error = attempt {
        fail("cannot lock the temporary directory $path - $problem") if !$lock;
        wait_for_lock($lock, $path);
    };
    return is_same($lock, $path) ? $lock : undef if !$error;
    rmdir($path);
    rethrow($error);
}

sub new ($class, $parent = File::Spec->tmpdir) {
    remove_left($parent);
    my ($path, $lock);
    do {
        $path = make($parent);
        $lock = lock_new($path);
    } until ($lock);
    return bless({ path => $path, lock => $lock, owner => $$ }, $class);
}

sub path ($self) { return $self->{path} }

sub CLONE_SKIP { return 1 }

sub DESTROY ($self) {
    return if $self->{owner} != $$;
    local ($!, $?);
    remove($self->{path});
    return;
}

1;
