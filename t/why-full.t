# A backup that reads a whole disk says why, in its log and in its result, even if the provider is told of no
# base and answers mode new.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Backend;
use PBA::Test::Provider;

my $size = 8 * 1024 * 1024;
my $tied = 'pba-tied:snapshot-access:test';
my $no_backup = 'the bitmap is not known to be relative to a backup that succeeded';

# Continues from the backup to which the bitmap is reported to be relative.
sub answer ($self, $vmid, $volumes) {
    my %base = map { $_ => $volumes->{$_}{base} } keys $volumes->%*;
    return {
        map { $_ => defined($base{$_}) ? { 'bitmap-mode' => 'use', base => $base{$_} } : 'new' }
            keys %base
    };
}

my $provider = PBA::Test::Provider->new(on => { backup_vm_query_incremental => \&answer });

sub bitmap ($backend, $command, $name, %more) {
    $backend->vm->qmp("block-dirty-bitmap-$command", node => 'disk0', name => $name, %more);
    return;
}

sub companion ($backend) {
    my ($name) = grep { m/\Apba-id:/ } keys $backend->vm->bitmaps->{disk0}->%*;
    return $name;
}

sub resize ($backend, @sizes) {
    $backend->vm->qmp('block_resize', 'node-name' => 'disk0', size => $_) for @sizes;
    return;
}

# A backup of it that fails when it has no base.
sub fail_once ($backend) {
    bitmap($backend, 'remove', $tied);
    local $provider->{on}{backup_vm} = sub (@) { die "not today\n" };
    eval { $backend->task($provider)->run };
    return;
}

# Changes to a bitmap with an ID, and the reason in the next backup.
my @cases = (
    [
        sub ($backend) { bitmap($backend, 'remove', $tied) },
        'there is no bitmap of an earlier backup'
    ],
    [sub ($backend) { bitmap($backend, 'remove', companion($backend)) }, $no_backup],
    [
        sub ($backend) { bitmap($backend, 'enable', companion($backend)) },
        q(the bitmap's companion was changed)
    ],
    [\&fail_once, $no_backup],
    [sub ($backend) { resize($backend, $size / 2, $size) }, 'the disk was resized'],
);

sub check_case ($backend, $spoil, $reason) {
    $backend->task($provider)->run;
    my $device = $backend->device('disk0');
    is($backend->task($provider)->run->{devices}{$device}{fallback}, undef, 'an increment');
    $spoil->($backend);
    my $seen = $backend->task($provider)->run->{devices}{$device};
    is($seen->{'bitmap-mode'}, 'new', "$reason: the next backup is full");
    is($seen->{fallback}, $reason, 'the result says why');
    is($backend->logged(qr/$device.*: $reason\z/), 1, 'the log says why once');
    return;
}

for my $name (PBA::Test::Backend->names) {
    my $backend = PBA::Test::Backend->start_paused(
        name => $name,
        disks => [{ id => 'disk0', size => $size, format => 'qcow2', bus => 'scsi' }],
    );
    subtest "backend $name, $_->[1]" => sub { check_case($backend, $_->@*) }
        for @cases;
}

done_testing;
