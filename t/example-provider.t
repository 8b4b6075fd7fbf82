# The provider of doc/providers.md: run by a task, as on the command line, and restored as Proxmox VE does.
#
# One QEMU is enough: a provider sees NBD and files, not QEMU.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib", "$FindBin::Bin/../examples/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Model;
use PVE::BackupAccess::Task;
use Example::RawImages;

my $mib = 1024 * 1024;
my $seed = 20261122;
my $blocks = 1024;
my %sizes = (disk0 => 32 * $mib, disk1 => 8 * $mib + 512);
my @ids = sort keys %sizes;

my $backend = PBA::Test::Backend->start(
    name => 'upstream',
    disks => [map { { id => $_, size => $sizes{$_}, bus => 'scsi' } } @ids],
);
my $outside = $backend->outside;
my $dir = $backend->work_dir('a store');
my $model = PBA::Test::Model->new(
    seed => $seed,
    disks => [map { { id => $_, size => $sizes{$_} } } @ids],
    blocks => $blocks,
);
my @log;

sub new_provider () {
    return Example::RawImages->new(undef, { path => $dir },
        'store', sub (@line) { push(@log, "@line") });
}

sub new_task ($provider, %opt) {
    return $backend->task($provider, 'firewall-config' => "[OPTIONS]\n", %opt);
}

sub back_up (%opt) {
    $backend->guest->wait_more_churn(20);
    return eval { new_task(new_provider(), %opt)->run_job };
}

sub check_restore ($name, $archive) {
    my $provider = new_provider();
    my $volname = "backup/$archive";
    is_deeply([$provider->restore_get_mechanism($volname)], [qw(qemu-img qemu)],
        "$name: mechanism");
    is($provider->archive_get_guest_config($volname), "name: test\n", "$name: configuration");
    is($provider->archive_get_firewall_config($volname), "[OPTIONS]\n", "$name: firewall");
    my %devices = map { $backend->device($_) => { size => $sizes{$_} } } @ids;
    is_deeply($provider->restore_vm_init($volname), \%devices, "$name: devices and sizes");
    my %images;

    for my $id (@ids) {
        my $device = $backend->device($id);
        my $info = $provider->restore_vm_volume_init($volname, $device, {});
        $images{$id} = "$dir/restored-$id";
        my $status = system($ENV{PBA_QEMU_IMG} // 'qemu-img',
            'convert',
            qw(-f raw -O raw),
            $info->{'qemu-img-path'},
            $images{$id}
        );
        is($status, 0, "$name: $id: qemu-img convert");
        $provider->restore_vm_volume_cleanup($volname, $device, {});
    }
    $provider->restore_vm_cleanup($volname);
    my (undef, $problem) = $model->check_images(\%images);
    is($problem, undef, "$name: the images are the disks as of one write");
}

sub modes ($result) {
    return
        join(' ', map { $result->{devices}{$_}{'bitmap-mode'} } sort keys $result->{devices}->%*);
}

$backend->guest->start_churn(seed => $seed, disks => \@ids, blocks => $blocks);
my $full = back_up() or diag($@);
is(modes($full), 'new new', 'the first backup is full');
my $second = back_up();
is(modes($second), 'reuse reuse', 'the second is incremental');
my $bad = back_up(thaw => sub { die "no thaw\n" });
is($bad, undef, 'a backup whose thaw dies fails');
my $third = back_up() or diag($@);
is(modes($third), 'reuse reuse', 'the next is incremental');
check_restore('full', $full->{'archive-name'});
is(sprintf('%o', (stat("$dir/$_->{'archive-name'}"))[2] & 0777),
    '700', 'nobody else can read an archive')
    for $full, $third;
check_restore('second', $second->{'archive-name'});
check_restore('third', $third->{'archive-name'});

# VZDump fails before it reaches a guest.
{
    my $unused = new_provider();
    my @warnings;
    local $SIG{__WARN__} = sub ($text) { push(@warnings, $text) };
    $unused->backup_handle_log_file(101, $0);
    is_deeply($unused->backup_cleanup(101, undef, 0, { error => 'early' }),
        {}, 'a guest without a backup');
    is_deeply(\@warnings, [], 'there is no warning');
}

# VZDump may report a failure after the bitmaps have been cleared; then the archive is removed.
my $provider = new_provider();
$provider->backup_init(100, 'qemu', time());
is(modes(new_task($provider)->run),
    'reuse reuse', 'the backup within a job of VZDump is incremental');
$provider->backup_cleanup(100, 'qemu', 0, { error => 'later' });
is(modes(back_up()), 'new new', 'without the last archive, the next backup is full');
is_deeply([$backend->problems($outside)], [], 'nothing is left');
ok((grep { m/bytes$/ } @log), 'the provider logs');
$backend->guest->stop_churn;

done_testing;
