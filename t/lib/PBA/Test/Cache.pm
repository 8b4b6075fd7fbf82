package PBA::Test::Cache;

# Files that the tests need and the system lacks: a kernel for the test guest, its initramfs and, if requested,
# a newer QEMU. They are downloaded with apt and unpacked in a private directory; nothing is ever installed.

use v5.36;

use Cwd ();
use Digest::SHA ();
use Fcntl qw(:flock);
use File::Basename qw(basename dirname);
use File::Path qw(make_path remove_tree);
use File::Temp ();

use PBA::Test::Cpio;

my $KERNEL_PACKAGE = 'linux-image-cloud-amd64';
my $BACKPORTS = 'bookworm-backports';
my $KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg';
my @QEMU10_PACKAGES
    = qw(qemu-system-x86 qemu-system-common qemu-system-data qemu-utils seabios ipxe-qemu);
my @QEMU10_PROGRAMS = qw(qemu-system-x86_64 qemu-img qemu-nbd qemu-io qemu-storage-daemon);

# The init program loads these in this order; their dependencies are added before each.
my %MODULES = (
    virtio => [qw(virtio_pci virtio_blk)],
    scsi => [qw(virtio_scsi sd_mod)],
);

# What a kernel that the program unpacks begins with.
my %UNPACKS = (lz4 => "\x02\x21\x4c\x18", zstd => "\x28\xb5\x2f\xfd");

sub directory ($class) {
    my $dir = $ENV{PBA_CACHE};
    if (!defined $dir || $dir eq '') {
        my $home = $ENV{HOME} // (getpwuid($<))[7];
        my $base = $ENV{XDG_CACHE_HOME} || "$home/.cache";
        $dir = "$base/pve-backup-access";
    }
    make_path($dir);
    return Cwd::abs_path($dir);
}

# Prepares everything that a test run needs, so that the tests themselves do not use the network.
sub prepare ($class, %opt) {
    $class->initramfs;
    $class->qemu10 if $opt{qemu10} // $class->has_qemu10;
    return 1;
}

# Later releases have a QEMU that is at least as new.
sub has_qemu10 ($class) { return $class->codename eq 'bookworm' }

# Returns { image => file, modules => directory with modules.dep, version => ... }.
sub kernel ($class) {
    my $dir = $class->built('kernel', sub ($tmp) { $class->_build_kernel($tmp) });
    my ($vmlinuz) = glob "$dir/boot/vmlinuz-*";
    my $version = basename($vmlinuz) =~ s/^vmlinuz-//r;

    # Unpacked by the host, in milliseconds: an emulated guest takes half a second.
    my $unpacked = $class->built("vmlinux-$version",
        sub ($tmp) { _unpack_kernel($vmlinuz, "$tmp/vmlinux") });
    return {
        image => "$unpacked/vmlinux",
        modules => "$dir/lib/modules/$version",
        version => $version
    };
}

# Returns the path of the guest's initramfs, which is rebuilt if the agent or the kernel has changed.
sub initramfs ($class) {
    my $kernel = $class->kernel;
    my $digest = Digest::SHA->new(256);
    $digest->add("format 1 $kernel->{version}\n");
    $digest->addfile($_) for $class->_agent_sources, __FILE__, _busybox();
    my $key = substr($digest->hexdigest, 0, 16);

    my $build = sub ($tmp) {
        $class->remove_old('initramfs-*');
        $class->_build_initramfs($tmp, $kernel);
    };
    return $class->built("initramfs-$key", $build) . '/initramfs.cpio';
}

# Returns the prefix with QEMU 10.0: bin/qemu-system-x86_64, bin/qemu-img, bin/qemu-nbd, ...
sub qemu10 ($class) {
    return $class->built('qemu10', sub ($tmp) { $class->_build_qemu10($tmp) });
}

# The environment that makes the tests and the module's helpers use that QEMU.
sub qemu10_env ($class) {
    my $prefix = $class->qemu10;
    return (
        PBA_QEMU => "$prefix/bin/qemu-system-x86_64",
        PBA_QEMU_IMG => "$prefix/bin/qemu-img",
        PBA_QEMU_NBD => "$prefix/bin/qemu-nbd",
    );
}

# ---- building in the cache ----

# Returns <cache>/$name. If it does not exist, $build creates it in a temporary directory beside it. The rename
# makes it appear completely or not at all, and the lock prevents two test runs from building it at the same
# time.
sub built ($class, $name, $build) {
    my $cache = $class->directory;
    my $dir = "$cache/$name";
    return $dir if -d $dir;

    my $lock_file = "$cache/" . ($name =~ s/-[0-9a-f]+\z//r) . '.lock';
    open(my $lock, '>>', $lock_file) or die "$lock_file: $!\n";
    flock($lock, LOCK_EX) or die "lock $lock_file: $!\n";
    return $dir if -d $dir;

    my $tmp = File::Temp->newdir("$name.XXXXXX", DIR => $cache);
    chmod 0755, "$tmp" or die "chmod $tmp: $!\n";
    $build->("$tmp");
    rename("$tmp", $dir) or die "rename $tmp to $dir: $!\n";
    $tmp->unlink_on_destroy(0);
    return $dir;
}

# Removes what was not created today; nothing that another test run uses is that old.
sub remove_old ($class, $pattern) {
    my $cache = $class->directory;
    remove_tree(grep { -M $_ > 1 } glob "$cache/$pattern");
    return;
}

# Runs a program. Returns its standard output, or dies with its whole output if it fails.
sub _run (@command) {
    my $errors = File::Temp->new;
    open(my $saved, '>&', \*STDERR) or die "dup: $!\n";
    open(STDERR, '>&', $errors) or die "dup: $!\n";
    my $pid = open(my $out, '-|', @command);
    open(STDERR, '>&', $saved) or die "dup: $!\n";
    die "cannot run $command[0]: $!\n" if !$pid;

    my $output = _rest($out);
    return $output if close($out);
    seek($errors, 0, 0);
    die "'@command' failed (status $?): $output" . _rest($errors) . "\n";
}

sub _rest ($fh) {
    local $/ = undef;
    return scalar(<$fh>) // '';
}

sub _in_directory ($dir, $code) {
    my $before = Cwd::getcwd();
    chdir($dir) or die "chdir $dir: $!\n";
    my $ok = eval { $code->(); 1 };
    my $error = $@;
    chdir($before) or die "chdir $before: $!\n";
    die $error if !$ok;
}

sub _write_file ($path, $content, $mode = 0644) {
    open(my $fh, '>:raw', $path) or die "$path: $!\n";
    print $fh $content;
    close($fh) or die "$path: $!\n";
    chmod $mode, $path or die "chmod $path: $!\n";
}

sub _read_file ($path) {
    open(my $fh, '<:raw', $path) or die "$path: $!\n";
    return _rest($fh);
}

# ---- apt, without changes to the system ----

# If apt is run by root, it downloads as the user _apt, who cannot write here, and warns about that.
sub _apt_options ($class, $tmp) {
    return _options(
        ($> == 0 ? ('APT::Sandbox::User' => 'root') : ()),
        'Dir::Cache' => "$tmp/apt-cache",
        'APT::Get::Assume-Yes' => 'true',
        'Debug::NoLocking' => 'true',
    );
}

# The mirrors from which the system itself gets Debian: { suite => URI }. They are read from apt's files,
# because apt only reports suites whose lists it has.
sub debian_uris ($class) {
    my %uri;
    for my $file ('/etc/apt/sources.list', glob '/etc/apt/sources.list.d/*.{list,sources}') {
        next if !-r $file;
        my $text = _read_file($file);
        my @pairs = $file =~ /\.list$/ ? _one_line_sources($text) : _stanza_sources($text);
        $uri{ $_->[1] } //= $_->[0] for @pairs;
    }
    return \%uri;
}

sub _one_line_sources ($text) {
    return map { [split ' '] } $text =~ /^\s*deb\s+(?:\[[^]]*\]\s*)?(\S+\s+\S+)/mg;
}

sub _stanza_sources ($text) {
    my @pairs;
    for my $stanza (split /\n\s*\n/, $text =~ s/^#.*\n//mgr) {
        my %field = $stanza =~ /^(\w[\w-]*):[ \t]*(.*)$/mg;
        next if ($field{Types} // '') !~ /\bdeb\b(?!-)/ || ($field{Enabled} // 'yes') eq 'no';
        my ($uri) = split ' ', $field{URIs} // '';
        push @pairs, map { [$uri, $_] } split ' ', $field{Suites} // '' if $uri;
    }
    return @pairs;
}

# Options that make apt use only the given suites, with lists of its own below $tmp. Suites that the system does
# not use are taken from the mirror of its release.
sub _private_lists ($class, $tmp, $release, @suites) {
    my $uris = $class->debian_uris;
    my $main = $uris->{$release} // die "no mirror for $release in the system's apt sources\n";
    my $text = '';
    for my $suite ($release, @suites) {
        my $uri = $uris->{$suite} // $main;
        next if $suite =~ /-security$/ && !$uris->{$suite};
        $text .= "deb [signed-by=$KEYRING] $uri $suite main\n";
    }
    make_path("$tmp/apt-lists/partial", "$tmp/apt-cache/archives/partial");
    _write_file("$tmp/sources.list", $text);

    my @options = (
        $class->_apt_options($tmp),
        _options(
            'Dir::Etc::sourcelist' => "$tmp/sources.list",
            'Dir::Etc::sourceparts' => '/dev/null',
            'Dir::Etc::preferences' => '/dev/null',
            'Dir::Etc::preferencesparts' => '/dev/null',
            'Dir::State::lists' => "$tmp/apt-lists",
            'Acquire::Languages' => 'none',
        ),
    );
    _run('apt-get', @options, '-q', 'update');
    return @options;
}

sub _options (%values) {
    return map { ('-o', "$_=$values{$_}") } sort keys %values;
}

sub _remove_apt_state ($class, $tmp) {
    remove_tree("$tmp/apt-lists", "$tmp/apt-cache");
    unlink "$tmp/sources.list";
}

# ---- the kernel ----

# The metapackage depends on the real package, whose name contains the version.
sub _kernel_package ($class, @options) {
    my $depends = _run('apt-cache', @options, 'depends', $KERNEL_PACKAGE);
    my @names = $depends =~ /Depends: (linux-image-\d\S*)/g;
    for my $name (@names, map { "$_-unsigned" } @names) {
        my $policy = _run('apt-cache', @options, 'policy', $name);
        return $name if $policy =~ /Candidate: (?!\(none\))\S/;
    }
    die "no package to fetch for $KERNEL_PACKAGE\n";
}

sub _download_kernel ($class, $tmp, @options) {
    my $package = $class->_kernel_package(@options);
    _in_directory($tmp, sub { _run('apt-get', @options, '-q', 'download', $package) });
}

sub _build_kernel ($class, $tmp) {
    make_path("$tmp/apt-cache/archives/partial");

    # The system's lists may be missing, or too old for the packages that the mirror still has.
    if (!eval { $class->_download_kernel($tmp, $class->_apt_options($tmp)); 1 }) {
        my $release = $class->codename;
        my @suites = ("$release-updates", "$release-security");
        $class->_download_kernel($tmp, $class->_private_lists($tmp, $release, @suites));
    }
    my ($deb) = glob "$tmp/*.deb";
    _run('dpkg-deb', '-x', $deb, $tmp);
    unlink $deb;
    $class->_remove_apt_state($tmp);
    _merge_usr($tmp);

    my ($vmlinuz) = glob "$tmp/boot/vmlinuz-*";
    die "no kernel in $deb\n" if !$vmlinuz;
    my $version = basename($vmlinuz) =~ s/^vmlinuz-//r;
    local $ENV{PATH} = "$ENV{PATH}:/usr/sbin:/sbin";
    _run('depmod', '-b', $tmp, $version);
}

# A bzImage has setup_sects at 0x1f1, payload_offset and payload_length at 0x248 (Linux, boot.rst). The payload ends with its size,
# four bytes.
sub _unpack_kernel ($vmlinuz, $vmlinux) {
    my $content = _read_file($vmlinuz);
    my ($sectors) = unpack('x497 C', $content);
    my ($offset, $length) = unpack('x584 V V', $content);
    my $payload = substr($content, ($sectors + 1) * 512 + $offset, $length - 4);
    my ($program) = grep { index($payload, $UNPACKS{$_}) == 0 } sort keys %UNPACKS;
    die "$vmlinuz: unknown compression\n" if !$program;
    _write_file("$vmlinux.packed", $payload);
    _write_file($vmlinux, _run($program, '-dcq', "$vmlinux.packed"));
    unlink "$vmlinux.packed";
}

# Newer packages have their modules below usr/lib.
sub _merge_usr ($tmp) {
    return if -d "$tmp/lib/modules" || !-d "$tmp/usr/lib/modules";
    make_path("$tmp/lib");
    rename("$tmp/usr/lib/modules", "$tmp/lib/modules") or die "rename modules: $!\n";
}

sub codename ($class) {
    my ($name) = _read_file('/etc/os-release') =~ /^VERSION_CODENAME=(\w+)/m;
    return $name // die "no VERSION_CODENAME in /etc/os-release\n";
}

# ---- the initramfs ----

sub _agent_sources ($class) {
    my $dir = Cwd::abs_path(dirname(__FILE__) . '/../../../guest');
    return sort glob "$dir/*.[ch]";
}

sub _busybox() {
    my ($busybox) = grep { -x } qw(/bin/busybox /usr/bin/busybox);
    return $busybox // die "busybox is missing (Debian package busybox-static)\n";
}

sub _build_initramfs ($class, $tmp, $kernel) {
    my @sources = grep { /\.c$/ } $class->_agent_sources;
    _run('gcc', qw(-static -O2 -Wall -Wextra -pthread -o), "$tmp/agent", @sources);

    my $cpio = PBA::Test::Cpio->new;
    $cpio->directory($_) for qw(bin dev proc sys mnt modules);
    $cpio->device('dev/console', 5, 1);
    $cpio->file('init', 0755, _read_file("$tmp/agent"));
    $cpio->file('bin/busybox', 0755, _read_file(_busybox()));
    my %added;
    for my $list (sort keys %MODULES) {
        my @files = _module_order($kernel->{modules}, $MODULES{$list}->@*);
        for my $file (grep { !$added{$_}++ } @files) {
            $cpio->file('modules/' . _module_name($file), 0644, _module_content($file));
        }
        my $names = join '', map { _module_name($_) . "\n" } @files;
        $cpio->file("modules/$list.list", 0644, $names);
    }

    # Not compressed, because unpacking takes more time in an emulated guest than the host saves by reading
    # less.
    _write_file("$tmp/initramfs.cpio", $cpio->finish);
    unlink "$tmp/agent";
}

# The files of the modules with their dependencies, in the order in which they must be loaded. Modules that are
# built into this kernel are omitted.
sub _module_order ($dir, @names) {
    my (%path, %needs);
    for my $line (split /\n/, _read_file("$dir/modules.dep")) {
        my ($file, $needed) = $line =~ /^(\S+):\s*(.*)$/ or next;
        $path{ _module_name($file) =~ s/\.ko$//r =~ tr/-/_/r } = $file;
        $needs{$file} = [reverse split ' ', $needed];
    }
    my $builtin = _read_file("$dir/modules.builtin");
    my (@order, %seen);
    for my $name (@names) {
        my $file = $path{$name};
        if (!$file) {
            next if $builtin =~ m{/\Q$name\E\.ko$}m;
            die "kernel module $name not found in $dir\n";
        }
        push @order, grep { !$seen{$_}++ } $needs{$file}->@*, $file;
    }
    return map { "$dir/$_" } @order;
}

sub _module_name ($file) {
    return basename($file) =~ s/\.(?:xz|zst|gz)$//r;
}

sub _module_content ($file) {
    return _run('xz', '-dc', $file) if $file =~ /\.xz$/;
    return _run('zstd', '-dcq', $file) if $file =~ /\.zst$/;
    return _run('gzip', '-dc', $file) if $file =~ /\.gz$/;
    return _read_file($file);
}

# ---- QEMU 10 ----

sub _build_qemu10 ($class, $tmp) {
    my $release = 'bookworm';
    my @suites = ("$release-updates", "$release-security", $BACKPORTS);
    my @options = $class->_private_lists($tmp, $release, @suites);

    # apt knows which libraries are missing or too old on the system. --reinstall makes it download the named
    # packages even if the system has them.
    _run('apt-get', @options, qw(-q install --download-only --no-install-recommends --reinstall),
        '-t', $BACKPORTS, @QEMU10_PACKAGES);
    my @debs = glob "$tmp/apt-cache/archives/*.deb";
    _run('dpkg-deb', '-x', $_, $tmp) for @debs;
    $class->_remove_apt_state($tmp);

    make_path("$tmp/bin");
    for my $program (@QEMU10_PROGRAMS) {
        die "no $program in the packages of $BACKPORTS\n" if !-x "$tmp/usr/bin/$program";
        _write_file("$tmp/bin/$program", _qemu_wrapper($program), 0755);
        my $version = _run("$tmp/bin/$program", '--version');
        die "$program is not version 10.0: $version\n" if $version !~ /\A.* 10\.0\./;
    }
}

# The wrapper finds the prefix relative to itself, because the directory is renamed when it is complete.
sub _qemu_wrapper ($program) {
    my $script = <<'END';
#!/bin/sh
prefix=${0%/*}/..
lib=$prefix/usr/lib/x86_64-linux-gnu
LD_LIBRARY_PATH=$lib:$prefix/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
QEMU_MODULE_DIR=$lib/qemu
export LD_LIBRARY_PATH QEMU_MODULE_DIR
END
    my $firmware = '';
    if ($program =~ /^qemu-system/) {
        $firmware = join '',
            map { qq( -L "\$prefix/usr/$_") } qw(share/qemu share/seabios lib/ipxe/qemu);
    }
    return $script . qq(exec "\$prefix/usr/bin/$program"$firmware "\$@"\n);
}

1;
