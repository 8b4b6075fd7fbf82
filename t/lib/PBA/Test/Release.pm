package PBA::Test::Release;

# Runs all of ./run test on another release of Debian, in a chroot in the cache. debootstrap creates the chroot
# from the mirrors of this machine's own packages, and it is kept for the next time.
#
#   PBA::Test::Release->new('trixie')->run(@arguments);             # the release's own QEMU
#   PBA::Test::Release->new('trixie-backports')->run(@arguments);   # its backports' newest
#
# This machine is not changed. /proc and /dev are mounted for the chroot in a mount namespace, which ends with
# its last process.

use v5.36;

use Fcntl qw(:flock F_SETFD);
use File::Path qw(make_path remove_tree);

use PBA::Test::Cache;

my $Cache = 'PBA::Test::Cache';

my $KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';
my $BACKPORTED = 'qemu* seabios ipxe-qemu';
my $SOURCES = '/srv/pve-backup-access';

# The variables that select the tests and control ./run.
my @PASSED_ON = qw(PBA_FULL PBA_JOBS TERM);

sub new ($class, $name) {
    my ($release, $backports) = $name =~ m/\A([a-z]+)(-backports)?\z/
        or die "'$name' is no release of Debian: a name as 'trixie' or 'trixie-backports'\n";
    die "needs root: it makes a chroot\n" if $> != 0;
    return bless({ name => $name, release => $release, backports => $backports }, $class);
}

# Runs ./run test there, in place of this process.
sub run ($self, @arguments) {
    local $| = 1;
    $self->{root}
        = $Cache->built("release-$self->{name}", sub ($tmp) { $self->_make($tmp) });
    my $lock = $self->_lock;
    $self->_update;
    $self->_copy_sources;
    return $self->_enter("cd $SOURCES && exec ./run test \"\$@\"", @arguments);
}

# Two runs at the same time would build in the same tree. The process that waits for the namespace holds the
# lock.
sub _lock ($self) {
    open(my $lock, '>>', "$self->{root}.lock") or die "$self->{root}.lock: $!\n";
    if (!flock($lock, LOCK_EX | LOCK_NB)) {
        say "waiting for another run on $self->{name}";
        flock($lock, LOCK_EX) or die "lock $self->{root}.lock: $!\n";
    }
    fcntl($lock, F_SETFD, 0) or die "fcntl: $!\n";
    return $lock;
}

# ---- creation ----

sub _make ($self, $root) {
    say "making a chroot of $self->{release}";
    my $uris = $Cache->debian_uris;
    my $own = $Cache->codename;
    my $main = $uris->{$own} // die "no mirror for $own in the system's apt sources\n";
    _call('debootstrap', '--variant=minbase', "--keyring=$KEYRING", $self->{release}, $root, $main);
    my @suites = ([$self->{release}, $main]);
    for my $more ('updates', 'security', $self->{backports} ? 'backports' : ()) {
        my $uri = $uris->{"$own-$more"} // ($more eq 'backports' ? $main : next);
        push(@suites, ["$self->{release}-$more", $uri]);
    }
    _write("$root/etc/apt/sources.list", map { "deb $_->[1] $_->[0] main\n" } @suites);
    _write("$root/etc/apt/apt.conf.d/00host", grep { m/^Acquire::/ } qx{apt-config dump});
    _write("$root/etc/apt/preferences.d/qemu",
        "Package: $BACKPORTED\nPin: release n=$self->{name}\nPin-Priority: 990\n")
        if $self->{backports};

    # No service may be started there.
    _write("$root/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n");
    chmod(0755, "$root/usr/sbin/policy-rc.d");
    return;
}

# Installs what has been added to the release since the chroot was created.
sub _update ($self) {
    _call('cp', '/etc/resolv.conf', "$self->{root}/etc/resolv.conf");
    my $apt = 'apt-get -qq -o APT::Sandbox::User=root';
    my $script = "$apt update && $apt -y dist-upgrade >/dev/null && $apt clean";
    my $pid = fork() // die "cannot fork: $!\n";
    $self->_enter($script) if !$pid;
    waitpid($pid, 0);
    die "the chroot in $self->{root} cannot be brought up to date\n" if $?;
    return;
}

# Copies the sources in their current state, including uncommitted changes: the files that git knows, or else
# those in MANIFEST.
sub _copy_sources ($self) {
    my $target = "$self->{root}$SOURCES";
    remove_tree($target);
    make_path($target);
    my $list = -e '.git' ? 'git ls-files -z' : q{tr '\n' '\0' <MANIFEST};
    _call('bash', '-c', qq{set -o pipefail; $list | tar -c --null -T - | tar -x -C "\$1"},
        '-', $target);

    # Some gates ask git for the project's files.
    _call(qw(git -C), $target, @$_) for [qw(init -q)], [qw(add -A)];
    return;
}

# ---- execution ----

# Runs the script there as PID 1 of a namespace, so that all processes that it leaves running end with it.
sub _enter ($self, $script, @arguments) {

    # Uses pivot_root, like a real machine, because the kernel creates no user namespaces in a chroot.
    my $mount
        = 'mount --bind "$1" "$1" && mount -t proc proc "$1/proc" && '
        . 'mount --rbind /dev "$1/dev" && cd "$1" && pivot_root . mnt && cd / && umount -l mnt && '
        . 'shift && exec "$@"';
    my @environment = map { defined($ENV{$_}) ? "$_=$ENV{$_}" : () } @PASSED_ON;
    my @command = (
        qw(unshare --mount --propagation private --pid --fork --kill-child),
        ('bash', '-c', "for fd in {3..9}; do eval \"exec \$fd>&-\"; done; $mount", '-'),
        ($self->{root}, qw(env -i HOME=/root LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive)),
        'PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
        @environment,
        'bash',
        '-c',
        $script,
        '-',
        @arguments,
    );
    exec(@command) or die "cannot run $command[0]: $!\n";
}

sub _call (@command) {
    my $log = $command[0] eq 'debootstrap' ? '/dev/null' : undef;
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDOUT, '>', $log) or die "$log: $!\n" if $log;
        exec(@command) or die "cannot run $command[0]: $!\n";
    }
    waitpid($pid, 0);
    die "'@command' failed (status $?)\n" if $?;
    return;
}

sub _write ($file, @lines) {
    open(my $fh, '>', $file) or die "$file: $!\n";
    print {$fh} @lines;
    close($fh) or die "$file: $!\n";
    return;
}

1;
