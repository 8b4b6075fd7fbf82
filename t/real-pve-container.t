# The real PVE::VZDump::LXC and PVE::LXC::Create, from the sources or the Proxmox host that PBA_PVE_CONTAINER
# names: the backup of a container by Qcow2Chain, and by RBD if Ceph is installed, and its restore, in user
# namespaces, from a tar file and from a directory. Everything else that they use of Proxmox VE, except for
# pve-common, is a stand-in.
#
# One QEMU is enough: containers have none.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Ceph;
use PBA::Test::Container qw(describe write_file);
use PBA::Test::VZDump::Host qw(empty_modules);
use PVE::BackupAccess::Provider::RBD;

my $tree = $ENV{PBA_PVE_CONTAINER};
plan(skip_all => 'needs PBA_PVE_CONTAINER') if !$tree;
plan(skip_all => 'needs root') if $>;

my $first_id = 100_000;
my @id_map = map { [$_, 0, $first_id, 65_536] } qw(u g);
my $stand_in
    = qr{\APVE/(?:Cluster|GuestHelpers|INotify|LXC|LXC/(?:Config|Setup)|Storage|Storage/.*|VZDump|VZDump/(?:Plugin|ConvertOVZ)|RPCEnvironment|RESTEnvironment|DataCenterConfig)\.pm\z};

# The ID map, which root may write itself; and the command that runs another one in such a namespace.
sub make_programs ($dir) {
    for my $kind (qw(uid gid)) {
        my $map = "echo \"\$@\" > /proc/\$pid/${kind}_map\n";
        write_file("$dir/new${kind}map", "#!/bin/sh\npid=\$1\nshift\n$map", 0755);
    }
    my $code = 'run_in_namespace(' . $first_id . ', sub { run_command(@ARGV) })';
    my @lib = map { "-I$FindBin::Bin/$_" } qw(lib ../blib/lib ../blib/arch);
    write_file(
        "$dir/in-namespace",
        "#!/bin/sh\nexec $^X @lib -MPBA::Test::Container=run_command,run_in_namespace -e '$code' -- \"\$@\"\n",
        0755
    );
    return;
}

my @places = grep { -d "$_/PVE" } map { ($_, "$_/src", "$_/usr/share/perl5") } $tree,
    glob("$tree/*");
unshift(@INC, empty_modules($stand_in), @places);
my $is_loaded
    = eval { require PVE::LXC::Create; require PVE::LXC::Namespaces; require PVE::VZDump::LXC; 1 };
plan(skip_all => "needs what pve-container needs: $@") if !$is_loaded;

my $time = 1_795_000_000;
my @log;
my $note = sub ($self, @line) { push(@log, "@line") };
{
    no warnings qw(once redefine);
    *PVE::LXC::parse_id_maps = sub { return (\@id_map, $first_id, $first_id) };
    *PVE::LXC::userns_command = sub { return ['in-namespace'] };
    *PVE::VZDump::Plugin::loginfo = *PVE::VZDump::Plugin::log = $note;
    @PVE::Storage::Plugin::COMMON_TAR_FLAGS = @PBA::Test::Container::flags;
}

# A container with a system, which pct accepts as a tar file; and one without sbin, which it does not accept.
sub make_container ($kind, %options) {
    my $container = PBA::Test::Container->new(first_id => $first_id, %options)->fill;
    unlink($container->root . '/sbin') if $kind eq 'directory';
    return $container;
}

# The part of a job in which the provider stores the data.
sub archive ($container, $kind) {
    my $job = $container->tmp . '/job';
    write_file("$job/etc/vzdump/pct.conf", "hostname: $kind\n");
    write_file("$job/etc/vzdump/pct.fw", "[OPTIONS]\n");
    my %vzdump = (
        opts => { bwlimit => 102_400 },
        'backup-provider' => $container->provider,
        findexcl => ['/tmp/?*'],
    );
    my %task = (
        mode => 'snapshot',
        disks => [{ mp => '/' }],
        snapdir => $container->root,
        tmpdir => $job,
        id_map => \@id_map,
        root_uid => $first_id,
        root_gid => $first_id,
        userns_cmd => ['in-namespace'],
    );
    my $provider = $container->{provider};
    my $name = $provider->backup_init(101, 'lxc', $time += 60)->{'archive-name'};
    bless({ vzdump => \%vzdump }, 'PVE::VZDump::LXC')->archive(\%task, 101, undef, undef);
    like(join("\n", splice(@log)), qr/using backup mechanism 'directory'/, 'pve-container says');
    is((map { $_->{volname} } $provider->list->@*)[-1], $name, 'the archive is listed');
    my $stats = $provider->backup_cleanup(101, 'lxc', 1, {})->{stats};
    cmp_ok($stats->{'archive-size'}, '>', 0, 'a size');
    return $name;
}

# Restores without output.
sub restore ($container, $name, $directory) {
    mkdir($directory) or die "$directory: $!\n";
    chown($first_id, $first_id, $directory);
    open(my $stdout, '>&', \*STDOUT) or die "STDOUT: $!\n";
    open(STDOUT, '>', '/dev/null') or die "STDOUT: $!\n";
    my @arguments = ($container->provider, 'test', "backup/$name", $directory);
    my $done = eval {
        PVE::LXC::Create::restore_external_archive(@arguments, { unprivileged => 1 }, 0, undef);
        1;
    };
    my $error = $done ? '' : $@;
    open(STDOUT, '>&', $stdout) or die "STDOUT: $!\n";
    is($error, '', 'restored');
    return;
}

my $ceph = PBA::Test::Ceph->is_installed ? PBA::Test::Ceph->start : undef;

sub new_rbd ($log) {
    return PVE::BackupAccess::Provider::RBD->new(undef,
        { pool => 'backup', 'ceph-conf' => $ceph->conf },
        'test', $log);
}

my %stores = (Qcow2Chain => {}, $ceph ? (RBD => { new_provider => \&new_rbd }) : ());

for my $case (
    map {
        my $store = $_;
        map { [$store, $_] } qw(tar directory)
    } sort keys %stores
    )
{
    my ($store, $kind) = $case->@*;
    subtest "$store: restored by $kind" => sub {
        my $container = make_container($kind, $stores{$store}->%*);
        my ($root, $tmp) = ($container->root, $container->tmp);
        make_programs("$tmp/programs");
        local $ENV{PATH} = "$tmp/programs:$ENV{PATH}";
        local $ENV{TMPDIR} = $tmp;
        my $name = archive($container, $kind);
        my $provider = $container->{provider};
        is(
            $provider->archive_get_guest_config($name, 'test'),
            "hostname: $kind\n",
            'the configuration of the container'
        );
        is(($provider->restore_get_mechanism($name, 'test'))[0], $kind, 'the mechanism');
        is_deeply($provider->verify($name), [], 'verify finds no damage');
        restore($container, $name, "$tmp/restored");
        utime(1, 1, map { ($_, "$_/tmp") } $root, "$tmp/restored");
        my @left_out = ('./dev/*', './tmp/*');
        ok(describe($root, @left_out) eq describe("$tmp/restored", @left_out),
            'everything is restored');
    };
}

done_testing;
