package PVE::BackupAccess::File;

# Files and directories that survive a crash.

use v5.36;

use Digest::SHA ();
use Exporter qw(import);
use Fcntl qw(O_CREAT O_DIRECTORY O_NONBLOCK O_RDONLY O_TRUNC O_WRONLY S_ISREG);
use File::Path ();
use IO::Handle ();
use Time::HiRes ();

use PVE::BackupAccess::Error;
use PVE::BackupAccess::Try qw(attempt attempt_any reason rethrow);

our @EXPORT_OK
    = qw(device_number directory_exists entries file_exists file_system_of fingerprint make_directory move open_if_there
    read_file read_if_there remove_tree remove_unused replace_file sha256 sync write_file);

our $mountinfo = '/proc/self/mountinfo';    # see proc(5)

my sub fail ($message) {
    PVE::BackupAccess::Error->throw('SystemError', $message);
}

# Whether $! means that the file does not exist. Other errors, such as those of a server that is unavailable for a moment, do
# not: if they were treated so, an archive could be removed that another one builds on.
my sub is_absent () { return $!{ENOENT} || $!{ENOTDIR} }

sub file_exists ($path) {
    return 1 if lstat($path);
    return 0 if is_absent();
    fail("cannot look for $path - $!");
}

# The same, and that it is a directory.
sub directory_exists ($path) {
    return -d _ ? 1 : 0 if stat($path);
    return 0 if is_absent();
    fail("cannot look for $path - $!");
}

# The number of a device, from stat, as the kernel writes it: major:minor.
sub device_number ($dev) {
    return ($dev >> 8 & 0xfff) . ':' . ($dev & 0xff | $dev >> 12 & 0xfff00);
}

# The type and the options of the file system with a file, given by its path or handle. Both are empty if they are unknown.
sub file_system_of ($file) {
    my ($dev) = stat($file) or return ('', '');
    my $number = device_number($dev);
    open(my $fh, '<', $mountinfo) or return ('', '');
    my @found = ('', '');
    while (my $line = <$fh>) {
        my ($device, $type, $options) = $line =~ m/\A\d+ \d+ (\d+:\d+) .* - (\S+) \S* ?(\S+)\s*\z/
            or next;
        @found = ($type, $options) if $device eq $number;
    }
    return @found;
}

# When this returns, the content of the file or directory is on disk.
sub sync ($path) {
    my $flags = O_RDONLY | (-d $path ? O_DIRECTORY : 0);
    sysopen(my $fh, $path, $flags) or fail("cannot open $path - $!");
    $fh->sync or fail("cannot flush $path - $!");
    return;
}

sub write_file ($path, $content) {
    sysopen(my $fh, $path, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK, 0600)
        or fail("cannot write $path - $!");
    binmode($fh);
    print {$fh} $content or fail("cannot write $path - $!");
    close($fh) or fail("cannot write $path - $!");
    return;
}

# After a crash, the file has either the old or the new content; after this returns, the new one.
sub replace_file ($path, $content) {
    unlink("$path.new");    # what a killed process left may have other names: hard links
    write_file("$path.new", $content);
    sync("$path.new");
    move("$path.new", $path);
    return;
}

# The directory is flushed as well.
sub move ($from, $to) {
    rename($from, $to) or fail("cannot rename $from to $to - $!");
    sync($to =~ s{/[^/]+\z}{}r);
    return;
}

my sub not_regular ($path) { fail("$path is not a regular file") }

# A handle to read a file, undef if it does not exist. Opening a FIFO would wait for a writer, and opening a device may do
# something.
sub open_if_there ($path) {
    my $fh;
    if (stat($path)) {
        -f _ or not_regular($path);
        return $fh if sysopen($fh, $path, O_RDONLY | O_NONBLOCK) && binmode($fh);
    }
    return undef if is_absent();
    fail("cannot read $path - $!");
}

sub read_file ($path) {
    return read_if_there($path) // fail("cannot read $path - $!");
}

# The same, but undef if there is no such file.
sub read_if_there ($path) {
    my $fh = open_if_there($path) // return undef;
    local $/ = undef;
    my $content = <$fh>;
    fail("cannot read $path - $!") if !defined($content) || $fh->error;
    return $content;
}

# The names in a directory, none if it does not exist. An unreadable directory is an error: an
# archive that is overlooked may build on one that is about to be removed.
sub entries ($path) {
    my $is_open = opendir(my $dh, $path);
    return () if !$is_open && $!{ENOENT};
    fail("cannot read $path - $!") if !$is_open;
    local $! = 0;
    my @entries = readdir($dh);
    fail("cannot read $path - $!") if $!;
    return sort(@entries);
}

sub make_directory ($path) {
    File::Path::make_path($path, { mode => 0700, error => \my $errors });
    return if -d $path;
    my $problem = $!;
    my ($error) = map { values $_->%* } $errors->@*;
    fail("cannot make the directory $path - " . ($error // $problem));
}

# Removes a directory and what is in it, or a file. Goes on after an error, and returns the first one. File::Path changes
# the current directory meanwhile, and fails if this process may not return there.
sub _remove_all ($path) {
    no warnings 'recursion';    ## no critic (ProhibitNoWarnings): trees may be deep
    my @about = lstat($path);
    if (!@about || !-d _) {
        return unlink($path) ? undef : "$path: $!";
    }
    chmod(0700, $path)
        if ($about[2] & 0700) != 0700;    # a tree that was restored may have any permissions
    my @problems;
    my $error = attempt {
        @problems = map { m/\A(.*)\z/s ? _remove_all("$path/$1") // () : () }
            grep { !m/\A[.][.]?\z/ }
            entries($path)
    };
    push(@problems, reason($error)) if $error;
    rmdir($path) or push(@problems, "$path: $!");
    return $problems[0];
}

sub remove_tree ($path) {
    my $problem = _remove_all($path);
    return if !file_exists($path);
    fail("cannot remove $path - " . ($problem // 'its server does not remove it'));
}

# What NFS and FUSE call a removed file until the last program has closed it.
my $still_open = qr/\A[.](?:nfs|fuse_hidden)[0-9a-fA-F]+\z/;

# Removes a directory. If some of its files are open in a program on this host, it stays with these, and is to be removed
# later.
sub remove_unused ($path) {
    my $error = attempt { remove_tree($path) };
    return if !$error;
    rethrow($error) if grep { !m/\A[.][.]?\z/ && $_ !~ $still_open } entries($path);
    return;
}

# Size and time of a file, which show whether it was changed since it was hashed.
sub fingerprint ($path) {
    my @stat = Time::HiRes::stat($path);
    return undef if !@stat && is_absent();
    fail("cannot look at $path - $!") if !@stat;
    not_regular($path) if !S_ISREG($stat[2]);
    return { size => $stat[7], mtime => sprintf('%.6f', $stat[9]) };
}

sub sha256 ($path) {
    my $fh = open_if_there($path) // fail("cannot read $path - $!");
    my $digest = Digest::SHA->new(256);
    my $error = attempt_any { $digest->addfile($fh) };
    fail("cannot read $path - $!") if $error;
    return $digest->hexdigest;
}

1;
