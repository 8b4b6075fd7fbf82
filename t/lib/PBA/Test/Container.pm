package PBA::Test::Container;

# Trees of containers with all kinds of files, and the calls that Proxmox VE's pve-container makes to a backup
# provider: a backup, in the container's user namespace if it has one, and a restore.
#
#   my $container = PBA::Test::Container->new(first_id => 100_000);
#   my $volname = $container->backup or die $container->error;
#   $container->restore($volname, "$dir/restored");

use v5.36;

use Errno qw(ENOTSUP EOPNOTSUPP);
use Fcntl qw(S_IFCHR S_IFIFO);
use File::Path qw(make_path);
use File::Temp ();
use IO::Socket::UNIX ();
use POSIX ();
use Socket qw(AF_UNIX PF_UNSPEC SOCK_STREAM);

use PVE::BackupAccess::Provider::Qcow2Chain;

use Exporter qw(import);

our @EXPORT_OK = qw(describe in_own_mounts run_command run_in_namespace write_file);

my $id_count = 65_536;
my ($new_mounts, $new_user) = (0x20000, 0x10000000);    # CLONE_NEWNS, CLONE_NEWUSER
my %calls = (
    x86_64 => { setxattr => 188, unshare => 272 },
    aarch64 => { setxattr => 5, unshare => 97 },
);
my $call = $calls{ (POSIX::uname())[4] };

sub write_file ($path, $content = '', $mode = 0644) {
    make_path($path =~ s!/[^/]*\z!!r);
    open(my $fh, '>:raw', $path) or die "$path: $!\n";
    print {$fh} $content;
    close($fh) or die "$path: $!\n";
    chmod($mode, $path);
    return $path;
}

sub run_command (@command) {
    system(@command) == 0 or die "'@command' failed: status $?\n";
    return;
}

# first_id: the ID on the host of the container's root. It is 0 for a privileged container, or the ID of the
# current user.
sub new ($class, %options) {
    my $tmp = File::Temp->newdir('pba-container-XXXXXXXX', TMPDIR => 1);
    chmod(0755, "$tmp");    # so that other users can reach their containers in it
    my $self = bless(
        {
            tmp => $tmp,
            store => "$tmp/store",
            first_id => 0,
            vmid => 101,
            time => 1_795_000_000,
            log => [],
            %options
        },
        $class
    );
    mkdir($self->{store}, 0700);
    mkdir("$tmp/root");
    $self->provider;
    return $self;
}

sub tmp ($self) { return "$self->{tmp}" }
sub store ($self) { return $self->{store} }
sub root ($self) { return "$self->{tmp}/root" }
sub error ($self) { return $self->{error} }
sub result ($self) { return $self->{result} }
sub log ($self) { return join("\n", splice($self->{log}->@*)) }
sub guest_dir ($self) { return "$self->{store}/ct/$self->{vmid}" }

# Creates a provider, as another process would: a Qcow2Chain, or what new_provider, an option of new, returns.
sub provider ($self, %scfg) {
    my $log = $self->{log};
    my $make = $self->{new_provider} // sub ($log_function) {
        return PVE::BackupAccess::Provider::Qcow2Chain->new(undef,
            { path => $self->{store}, %scfg },
            'test', $log_function);
    };
    return $self->{provider}
        = $make->(sub ($level, $message) { push($log->@*, "$level: $message") });
}

# ---- a tree ----

my sub set_xattr ($path, $name, $value) {
    return if !$call;
    return if syscall($call->{setxattr}, $path, $name, $value, length($value), 0) == 0;
    die "$path: cannot set $name - $!\n" if !$!{ENOTSUP} && !$!{EOPNOTSUPP} && !$!{EPERM};
}

# An ACL that gives a user the right to read in addition to the mode, and a capability that is only valid in the
# container.
my sub acl ($user) {
    my @entries = ([1, 6, ~0], [2, 4, $user], [4, 4, ~0], [16, 4, ~0], [32, 0, ~0]);
    return pack('V', 2) . join('', map { pack('vvV', $_->@[0, 1], $_->[2] & 0xffffffff) } @entries);
}

my sub capability ($root) {
    my @bits = (1 << 10, 0, 0, 0);    # CAP_NET_BIND_SERVICE
    return $root ? pack('V6', 0x03000001, @bits, $root) : pack('V5', 0x02000001, @bits);
}

my sub sparse_file ($path) {
    open(my $fh, '>', $path) or die "$path: $!\n";
    seek($fh, 1 << 20, 0);
    print {$fh} 'data';
    truncate($fh, 3 << 20) or die "$path: $!\n";
    close($fh);
}

# Creates the files of a container, with everything that tar may lose: modes, owners, times, links, holes,
# attributes, unusual names.
sub fill ($self) {
    my $root = $self->root;
    make_path(map { "$root/$_" } qw(bin dev etc home/user proc run sys tmp/sub usr/sbin var/tmp));
    symlink('usr/sbin', "$root/sbin");
    symlink('/nowhere/else', "$root/etc/broken");
    write_file("$root/usr/sbin/init", "#!/bin/sh\n", 0755);
    write_file("$root/bin/passwd", 'x' x 5000, 0755);
    write_file("$root/etc/empty");
    write_file("$root/etc/shadow", "root:*\n", 0600);
    write_file("$root/home/user/a \"b\"\n\xff*?[c]", 'odd');
    write_file("$root/home/user/--option", 'odd');
    write_file("$root/home/user/" . 'n' x 200, 'long');
    write_file("$root/tmp/left", 'rubbish');
    write_file("$root/tmp/sub/left", 'rubbish');
    link("$root/bin/passwd", "$root/bin/again") or die "link: $!\n";
    sparse_file("$root/var/sparse");
    POSIX::mkfifo("$root/run/fifo", 0600);
    IO::Socket::UNIX->new(Local => "$root/run/socket", Listen => 1) or die "socket: $!\n";
    $self->{device} = !$> && system(qw(mknod), "$root/dev/null", qw(c 1 3)) == 0;
    $self->_own;
    my $id = $self->{first_id};
    set_xattr("$root/etc/shadow", 'user.note', "a\0b");
    set_xattr("$root/etc/shadow", 'system.posix_acl_access', acl($id + 33)) if !$>;
    set_xattr("$root/bin/passwd", 'security.capability', capability($id)) if !$>;
    utime(1_000_000_000, 1_000_000_000.25, $_) for "$root/etc/shadow", "$root/etc";
    return $self;
}

# Gives the files to the container's users.
sub _own ($self) {
    return if $>;
    my ($root, $id) = ($self->root, $self->{first_id});
    run_command('chown', '--recursive', '--no-dereference', "$id:$id", $root);
    chown($id + 1000, $id + 1000, "$root/home/user");
    chown($id + 33, $id + 4, "$root/etc/shadow");
    chmod(04755, "$root/bin/passwd");
    chmod(01777, "$root/tmp");
    return;
}

# Describes everything in a tree, as bytes, except for paths that match a pattern.
sub describe ($root, @exclude) {
    my @command = (
        qw(tar --create --file=- --sort=name --numeric-owner --acls --xattrs --xattrs-include=*),
        '--pax-option=delete=atime,delete=ctime,exthdr.name=%d/%f',
        '--warning=no-file-ignored',
        (map { "--exclude=$_" } @exclude),
        "--directory=$root",
        '.'
    );
    open(my $fh, '-|:raw', @command) or die "tar: $!\n";
    local $/;
    my $bytes = <$fh>;
    close($fh) or die "tar failed: $?\n";
    return $bytes;
}

# ---- the calls of pve-container ----

# Runs code as root of a user namespace, as PVE::LXC::Namespaces does with a container's ID map: in a forked
# process, which is killed at the end. Dies with the error of the code.
sub run_in_namespace ($first_id, $code) {
    socketpair(my $mine, my $other, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or die "socketpair: $!\n";
    pipe(my $result, my $to) or die "pipe: $!\n";
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        close($_) for $mine, $result;
        my $ok = eval {
            syscall($call->{unshare}, $new_user | $new_mounts) == 0 or die "unshare: $!\n";
            syswrite($other, '1');
            sysread($other, my $go, 1) == 1 or die "no map of ids\n";
            ($(, $)) = (0, 0);
            ($<, $>) = (0, 0);
            $code->();
            1;
        };
        syswrite($to, $ok ? 'ok' : "$@");
        POSIX::_exit(0);
    }
    close($_) for $other, $to;
    sysread($mine, my $ready, 1);
    for my $kind (qw(uid gid)) {
        open(my $map, '>', "/proc/$pid/${kind}_map") or die "${kind}_map: $!\n";
        syswrite($map, "0 $first_id $id_count\n") or die "${kind}_map: $!\n";
    }
    syswrite($mine, '2');
    my $ok = eval { local $/; $ready = <$result>; 1 };
    my $died = $@;
    kill('KILL', $pid);
    waitpid($pid, 0);
    die $died if !$ok;
    die $ready eq '' ? "the process was killed\n" : $ready if $ready ne 'ok';
    return;
}

sub _call ($self, $code) {
    return $self->{first_id} ? run_in_namespace($self->{first_id}, $code) : $code->();
}

# Makes one backup. exclude, sources and info are as in the API. during: code that replaces backup_container and
# gets it as an argument. then: code that is called before backup_cleanup. Returns the archive's name, or undef
# if the backup failed.
sub backup ($self, %options) {
    my ($provider, $vmid) = $self->@{qw(provider vmid)};
    my $name;
    my %info = (
        directory => $self->root,
        sources => $options{sources} // ['./'],
        'backup-user-id' => $self->{first_id},
        'firewall-config' => "[OPTIONS]\n",
        ($options{info} // {})->%*
    );
    my $during = $options{during} // sub ($backup_container) { $self->_call($backup_container) };
    my $done = eval {
        $provider->job_init($self->{time});
        $name = $provider->backup_init($vmid, 'lxc', $self->{time} += 60)->{'archive-name'};
        $provider->backup_get_mechanism($vmid, 'lxc') eq 'directory' or die "another mechanism\n";
        $provider->backup_container_prepare($vmid, \%info);
        $during->(
            sub () {
                $provider->backup_container(
                    $vmid,
                    "hostname: $name\n",
                    $options{exclude} // [], \%info
                );
                return;
            }
        );
        $options{then}->($name) if $options{then};
        1;
    };
    $self->{error} = $@;
    $self->{result}
        = $provider->backup_cleanup($vmid, 'lxc', $done, $done ? {} : { error => "$@" });
    return $done ? $name : undef;
}

# The tar flags in PVE::Storage::Plugin.
our @flags
    = qw(--one-file-system -p --sparse --numeric-owner --acls --xattrs --xattrs-include=user.*
    --xattrs-include=security.capability --warning=no-file-ignored --warning=no-xattr-write);

# Makes pct's check of a tar file from another storage, then extracts it. The directory must exist.
sub restore ($self, $volname, $directory) {
    my $provider = $self->{provider};
    my ($mechanism, $type) = $provider->restore_get_mechanism($volname, 'test');
    die "type $type\n" if $type ne 'lxc';
    my $info = $provider->restore_container_init($volname, 'test', {});
    my @extract
        = ('--totals', @flags, '-C', $directory, qw(--skip-old-files --anchored --exclude ./dev/*));
    if ($mechanism eq 'tar') {
        my $path = $info->{'tar-path'};
        die "$path is no file\n" if !-f $path || $path !~ m/\.tar\.zst\z/;
        open(my $fh, '<', $path) or die "$path: $!\n";
        $self->_call(sub () { _pipe($fh, 'tar', 'xpf', '-', '--zstd', @extract) });
    }
    else {
        my @create = (
            'tar', 'cpf', '-',
            (grep { $_ ne '--one-file-system' } @flags),
            "--directory=$info->{'archive-directory'}", '.'
        );
        open(my $fh, '-|', @create) or die "tar: $!\n";
        $self->_call(sub () { _pipe($fh, 'tar', 'xpf', '-', @extract) });
        close($fh) or die "tar failed: $?\n";
    }
    $provider->restore_container_cleanup($volname, 'test', {});
    return $mechanism;
}

sub _pipe ($input, @command) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        open(STDIN, '<&', $input) or POSIX::_exit(127);
        open(STDERR, '>', '/dev/null') or POSIX::_exit(127);
        exec(@command) or POSIX::_exit(127);
    }
    waitpid($pid, 0);
    die "'@command' failed: status $?\n" if $?;
    return;
}

# Gives this process a mount namespace of its own, as pve-container does. Returns whether that was possible.
sub in_own_mounts () {
    return 0 if $> || !$call || syscall($call->{unshare}, $new_mounts) != 0;
    run_command(qw(mount --make-rslave /));
    return 1;
}

1;
