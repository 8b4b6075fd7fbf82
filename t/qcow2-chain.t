# Chains of archives as Qcow2Chain keeps them: each is restored and compared byte by byte, whatever
# failed in between, was lost, or was taken away.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use File::Temp ();

use PBA::Test::BitmapDisk;
use PBA::Test::QemuNbd;
use PVE::BackupAccess::Provider::Qcow2Chain;

my $mib = 1024 * 1024;
my $seed = 20261122;
my %sizes = ('drive-scsi0' => 8 * $mib, 'drive-efidisk0' => 528 * 1024 + 512);

# A guest with two disks, its backups, and what each must hold.
sub new_chain ($name, %options) {
    my $tmp = File::Temp->newdir('pba-chain-XXXXXXXX', TMPDIR => 1);
    my $store = "$tmp/store";
    mkdir($store) or die "$store: $!\n";
    my $disks = $options{sizes} // \%sizes;
    my $self = {
        tmp => $tmp,
        name => $name,
        store => $store,
        disks => {
            map {
                $_ => PBA::Test::BitmapDisk->new(dir => "$tmp", device => $_, size => $disks->{$_})
                }
                sort keys $disks->%*
        },
        expected => {},
        log => [],
        time => 1_795_000_000,
    };
    reopen($self);
    return $self;
}

sub reopen ($self) {
    $self->{provider}
        = PVE::BackupAccess::Provider::Qcow2Chain->new(undef, { path => $self->{store} },
        'test', sub ($level, $message) { push($self->{log}->@*, "$level: $message") });
    return;
}

sub write_random ($self, $count = 6) {
    for my $disk (values $self->{disks}->%*) {
        my $blocks = int($disk->size / 512);
        my @writes = map {
            my $length = 1 + int(rand(200));
            my $at = int(rand($blocks));
            $length = $blocks - $at if $at + $length > $blocks;
            [$at * 512, $length * 512, rand() < 0.2 ? 0 : 1 + int(rand(255))];
        } 1 .. $count;
        $disk->write(@writes);
    }
    return;
}

# One backup as PVE::BackupAccess::Task makes it. options: during => called when volumes are there,
# late => 1: fails after the bitmaps have been cleared. Returns the archive's name, undef if it failed.
sub backup ($self, %options) {
    my $provider = $self->{provider};
    my $disks = $self->{disks};
    my ($name, $modes, %volumes);
    my $ok = eval {
        $provider->job_init($self->{time});
        $name = $provider->backup_init(100, 'qemu', $self->{time} += 60)->{'archive-name'};
        $modes = $provider->backup_vm_query_incremental(100,
            { map { $_ => { size => $disks->{$_}->size } } keys $disks->%* });
        $volumes{$_} = $disks->{$_}->open($options{mode} // $modes->{$_}) for sort keys $disks->%*;
        $options{during}->($self) if $options{during};
        $provider->backup_vm(100, "cores: 1\nname: $name\n",
            \%volumes, { 'firewall-config' => "[OPTIONS]\n" });
        1;
    };
    my $error = $self->{error} = $@;
    $disks->{$_}->close($ok) for sort keys %volumes;
    my $success = $ok && !$options{late};
    $self->{result}
        = $provider->backup_cleanup(100, 'qemu', $success, $success ? {} : { error => $error });
    $self->{modes} = { map { $_ => $volumes{$_}{'bitmap-mode'} } keys %volumes };
    return undef if !$success;
    $self->{expected}{$name} = { map { $_ => $disks->{$_}->content } keys $disks->%* };
    return $name;
}

sub restore ($self, $name, $device) {
    my $provider = $self->{provider};
    my $file = "$self->{tmp}/restored.raw";
    my $init = $provider->restore_vm_volume_init($name, $device, {});
    PBA::Test::QemuNbd::img('convert', '-f', 'raw', '-O', 'raw', $init->{'qemu-img-path'}, $file);
    $provider->restore_vm_volume_cleanup($name, $device, {});
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

sub check_archive ($self, $name, $text) {
    my $provider = $self->{provider};
    my $expected = $self->{expected}{$name};
    my $sizes = $provider->restore_vm_init($name);
    my @wrong
        = grep { ($sizes->{$_}{size} // -1) != length($expected->{$_}) } sort keys $expected->%*;
    push(@wrong, grep { restore($self, $name, $_) ne $expected->{$_} } sort keys $expected->%*);
    is("@wrong", '', "$text: $name holds what the disks held");
    is(
        $provider->archive_get_guest_config($name),
        "cores: 1\nname: $name\n",
        "$text: and the configuration"
    );
    $provider->restore_vm_cleanup($name);
}

sub check_all ($self, $text) {
    my @names = map { $_->{volname} } $self->{provider}->list(100)->@*;
    is_deeply(\@names, [sort keys $self->{expected}->%*], "$text: the archives there are");
    check_archive($self, $_, $text) for @names;
    is_deeply([map { $self->{provider}->verify($_)->@* } @names], [], "$text: all in order");
}

srand($seed);
note("seed $seed");

subtest 'full and incremental' => sub {
    my $chain = new_chain('first');
    write_random($chain);
    ok(backup($chain), 'a full backup') or diag($chain->{error});
    is_deeply($chain->{modes}, { map { $_ => 'new' } keys %sizes }, 'is full');
    write_random($chain);
    ok(backup($chain), 'a second one') or diag($chain->{error});
    is_deeply($chain->{modes}, { map { $_ => 'reuse' } keys %sizes }, 'is incremental');
    check_all($chain, 'both');
    diag(explain($chain->{log}, $chain->{provider}->list, $chain->{result})) if $ENV{SHOW};
};

done_testing;
