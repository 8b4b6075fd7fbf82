# examples/pve-storage-plugin, from storage.cfg to the restore, with Proxmox VE's calls and stand-ins for its
# storage layer.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use lib "$FindBin::Bin/../examples/pve-storage-plugin";
use Test::More;

use PBA::Test::BitmapDisk;
use PBA::Test::Container;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::PluginBase;
use PVE::Storage;
use PVE::Storage::Plugin;

my $example = "$FindBin::Bin/../examples/pve-storage-plugin";
my $class = 'PVE::Storage::Custom::Qcow2ChainPlugin';
my $device = 'drive-scsi0';
my $vmid = 100;

sub content ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

require_ok($class);
isa_ok($class, 'PVE::Storage::Plugin');
$class->register;

my $tmp = File::Temp->newdir('pba-plugin-XXXXXXXX', TMPDIR => 1);
my $config = content("$example/storage.cfg");
like(content("$example/README.md"), qr/\Q$config\E/, 'the README shows this storage.cfg');
my ($storeid, $scfg) = PVE::Storage::Plugin->parse_config('storage.cfg', $config)->{ids}->%*;
is($scfg->{path}, '/mnt/backup', 'storage.cfg: the path');
$scfg->{path} = "$tmp/mnt";
$scfg->{'state-dir'} = "$tmp/state";
my $plugin = PVE::Storage::Plugin->lookup($scfg->{type});

subtest 'the methods that Proxmox VE calls' => sub {
    cmp_ok($plugin->api, '<=', PVE::Storage::APIVER(), "the plugin's API version is supported");
    is($plugin->plugindata->{features}{'backup-provider'}, 1, 'a backup provider');
    is($plugin->type, 'qcow2chain', "the plugin's type");
    ok(!eval { $plugin->activate_storage($storeid, $scfg, {}); 1 },
        'a missing directory cannot be activated');
    mkdir($scfg->{path}) or die "mkdir: $!\n";
    ok($plugin->activate_storage($storeid, $scfg, {}), 'active');
    is_deeply($plugin->list_volumes($storeid, $scfg, undef, [qw(backup images)]), [], 'empty');
    ok(!eval { $plugin->parse_volname('backup/vm/100/x'); 1 }, 'a name of something else');
    ok(!eval { $plugin->alloc_image($storeid, $scfg, 100, 'raw', undef, 1); 1 },
        'the storage has no images');
};

# Versions 13 and 15 of the storage API have added arguments to existing calls.
subtest 'arguments of a later API' => sub {
    my %arguments = (
        new_backup_provider => [$scfg, $storeid, sub { }],
        activate_storage => [$storeid, $scfg, {}],
        parse_volname => ['backup/vm/100/20261122T010003Z'],
        path => [$scfg, 'backup/vm/100/20261122T010003Z', $storeid, undef],
        list_volumes => [$storeid, $scfg, undef, ['backup']],
        prune_backups => [$scfg, $storeid, {}, $vmid, 'qemu', 1, sub { }],
        get_volume_attribute => [$scfg, $storeid, 'backup/vm/100/20261122T010003Z', 'notes'],
    );
    for my $method (sort keys %arguments) {
        ok(eval { $plugin->$method($arguments{$method}->@*, 'later'); 1 }, $method) or diag($@);
    }
};

# As VZDump does it: the archive gets notes, and older archives are pruned, before the cleanup.
sub vzdump ($disk, $time, %options) {
    my @log;
    my $provider
        = $plugin->new_backup_provider($scfg, $storeid, sub (@line) { push(@log, "@line") });
    $provider->job_init($time);
    my $name = $provider->backup_init($vmid, 'qemu', $time)->{'archive-name'};
    my $mechanism = $provider->backup_get_mechanism($vmid, 'qemu');
    my $modes
        = $provider->backup_vm_query_incremental($vmid, { $device => { size => $disk->size } });
    my $volumes = { $device => $disk->open($modes->{$device}) };
    my $done = eval {
        $provider->backup_vm($vmid, "name: test\n", $volumes, { 'bandwidth-limit' => 0 });
        1;
    } or diag($@);
    $disk->close($done);
    my $volname = "backup/$name";
    $plugin->update_volume_attribute($scfg, $storeid, $volname, 'notes', "of $time");
    $plugin->update_volume_attribute($scfg, $storeid, $volname, 'protected', 1)
        if $options{protected};
    my $keep = { 'keep-last' => 2 };
    my $pruned = $plugin->prune_backups($scfg, $storeid, $keep, $vmid, 'qemu', 0, sub (@) { });
    $provider->backup_cleanup($vmid, 'qemu', 1, {});
    $provider->job_cleanup;
    my @removed = grep { $_->{mark} eq 'remove' } $pruned->@*;
    return { volname => $volname, mode => $modes->{$device}, removed => scalar(@removed) };
}

# As qemu-server does it, including its check of the source.
sub restored ($volname) {
    my $provider = $plugin->new_backup_provider($scfg, $storeid, sub (@) { });
    is_deeply([$provider->restore_get_mechanism($volname)], [qw(qemu-img qemu)], 'the mechanism');
    is($provider->archive_get_guest_config($volname), "name: test\n", 'the configuration');
    is($provider->archive_get_guest_config($volname, $storeid),
        "name: test\n", 'the configuration is shown');
    my $size = $provider->restore_vm_init($volname)->{$device}{size};
    my $path = $provider->restore_vm_volume_init($volname, $device, {})->{'qemu-img-path'};
    ok(-f $path, 'the source is a file') or return '';
    is(-s $path, $size, 'the file has the size of the disk');
    my $target = "$tmp/restored.raw";
    open(my $fh, '>', $target) or die "$target: $!\n";
    truncate($fh, $size) or die "$target: $!\n";
    PBA::Test::QemuNbd::img('convert', '-n', '-f', 'raw', '-O', 'raw', $path, $target);
    $provider->restore_vm_volume_cleanup($volname, $device, {});
    $provider->restore_vm_cleanup($volname);
    ok(!-e $path, 'the source is gone');
    return content($target);
}

my $disk = PBA::Test::BitmapDisk->new(dir => "$tmp", device => $device, size => 2 << 20);
my (@backups, %content);
for my $number (1 .. 4) {
    $disk->write([$number * 65536, 100_352, $number]);
    my $backup = vzdump($disk, 1_795_000_000 + 60 * $number, protected => $number == 1);
    push(@backups, $backup->{volname});
    $content{ $backup->{volname} } = $disk->content;
    is($backup->{mode}, $number == 1 ? 'new' : 'use', "backup $number: mode");
    is($backup->{removed}, $number == 4 ? 1 : 0, "backup $number: pruned");
}

subtest 'the list of archives' => sub {
    my $volumes = $plugin->list_volumes($storeid, $scfg, $vmid, ['backup']);
    is_deeply([map { $_->{volid} } $volumes->@*], [map { "nightly:$_" } @backups[0, 2, 3]], 'list');
    is_deeply([map { $_->{protected} } $volumes->@*], [1, 0, 0], 'the first is protected');
    is($volumes->[1]{notes}, 'of 1795000180', 'notes');
    is($volumes->[1]{ctime}, 1_795_000_180, 'the time');
    is_deeply($plugin->list_volumes($storeid, $scfg, 101, ['backup']),
        [], 'another guest has no archives');
    cmp_ok($plugin->volume_size_info($scfg, $storeid, $backups[3]), '>', 65536, 'a size');
    is_deeply([$plugin->parse_volname($backups[3])]->[2], '100', 'the guest');
    ok(-d scalar($plugin->path($scfg, $backups[3], $storeid)), 'a path');
};

subtest 'restore' => sub {
    plan(skip_all => 'no /dev/fuse') if !-e '/dev/fuse';
    ok(restored($_) eq $content{$_}, "$_ is what the disk was") for @backups[0, 2, 3];
};

# A container with the same number: each has its own retention, and Proxmox VE says which of them it means.
subtest 'a container' => sub {
    plan(skip_all => 'needs zstd') if system('zstd --version >/dev/null 2>&1') != 0;
    my $container = PBA::Test::Container->new(vmid => $vmid, store => $scfg->{path})->fill;
    my $log = sub (@) { };
    $container->{provider} = $plugin->new_backup_provider($scfg, $storeid, $log);
    my (@names, @removed);
    for (1 .. 3) {
        my $then = sub ($name) {
            push(@names, "backup/$name");
            $plugin->update_volume_attribute($scfg, $storeid, $names[-1], 'notes', 'a container');
            my @args = ($scfg, $storeid, { 'keep-last' => 2 }, $vmid);
            my $pruned = $plugin->prune_backups(@args, 'lxc', 0, $log);
            push(@removed, map { $_->{volid} } grep { $_->{mark} eq 'remove' } $pruned->@*);
        };
        $container->backup(then => $then) // diag($container->error);
    }
    is_deeply(\@removed, ["nightly:$names[0]"], 'pruned');
    my $volumes = $plugin->list_volumes($storeid, $scfg, $vmid, ['backup']);
    my @containers = grep { $_->{subtype} eq 'lxc' } $volumes->@*;
    is_deeply([map { $_->{volid} } @containers], [map { "nightly:$_" } @names[1, 2]], 'listed');
    is($containers[0]{notes}, 'a container', 'notes');
    is(scalar($volumes->@*), 5, 'beside the virtual machine');
    ok(-f $plugin->path($scfg, $names[2], $storeid) . '/root.tar.zst', 'a path');
    is_deeply([$container->provider->restore_get_mechanism($names[2])], [qw(tar lxc)], 'restore');
    $plugin->free_image($storeid, $scfg, $_, 0)->() for @names[1, 2];
};

subtest 'removal' => sub {
    ok(!eval { $plugin->free_image($storeid, $scfg, $backups[0], 0); 1 },
        'a protected backup cannot be removed');
    $plugin->update_volume_attribute($scfg, $storeid, $backups[0], 'protected', 0);
    $plugin->free_image($storeid, $scfg, $backups[0], 0)->();
    my $volumes = $plugin->list_volumes($storeid, $scfg, undef, ['backup']);
    is_deeply([map { $_->{volid} } $volumes->@*], [map { "nightly:$_" } @backups[2, 3]], 'gone');
    my $provider = $plugin->new_backup_provider($scfg, $storeid, sub (@) { });
    is_deeply($provider->verify($backups[3]), [], 'the others are in order');
};

done_testing;
