# Data that earlier archives already have is not stored again: rewritten blocks, and a full read after a bitmap
# was lost. Data whose stored copy is damaged is stored again.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use JSON::PP ();

use PBA::Test::Chain qw(write_and_back_up);
use PVE::BackupAccess::File qw(fingerprint sha256);
use PVE::BackupAccess::Provider::Store::Manifest qw(encode_manifest);

my $KiB = 1 << 10;
my $device = 'drive-scsi0';

# One archive, with data from 256 KiB to 384 KiB and from 1 MiB to 1,152 KiB.
sub new_chain () {
    my $chain = PBA::Test::Chain->new;
    my $name = write_and_back_up($chain, [256 * $KiB, 128 * $KiB, 0x11],
        [1024 * $KiB, 128 * $KiB, 0x12]);
    $chain->log;
    return ($chain, $name);
}

sub lose_bitmap ($chain) {
    my $disk = $chain->disk($device);
    $disk->_bitmap('--remove');
    $disk->{has_bitmap} = 0;
    return;
}

# The parent of the archive's device according to list.
sub parent_of ($chain, $name) {
    my ($entry) = grep { $_->{volname} eq $name } $chain->provider->list(100)->@*;
    my $parent = $entry->{devices}{$device}{parent};
    return defined($parent) ? "vm/100/$parent" : undef;
}

sub rot ($chain, $name, $offset) {
    PBA::Test::Chain::rot($chain->path_of($name, "$device.qcow2"), $offset);
    return;
}

subtest 'a guest that rewrites the same data' => sub {
    my ($chain, $first) = new_chain();
    my $second = write_and_back_up(
        $chain,
        [256 * $KiB, 128 * $KiB, 0x11],
        [512 * $KiB, 64 * $KiB, 0],
        [1024 * $KiB, 64 * $KiB, 0x13],
    );
    like(
        $chain->log,
        qr/$device: stored 64\.0 KiB in .*, 192\.0 KiB are unchanged\)/,
        'only the changed data is stored'
    );
    write_and_back_up($chain, [1024 * $KiB, 64 * $KiB, 0x12]);
    like(
        $chain->log,
        qr/$device: stored 64\.0 KiB in /,
        'data that only an older archive has is stored again'
    );
    $chain->check('all archives are right');
    $chain->provider->remove($first);
    $chain->forget($first);
    $chain->check('without the first');
};

# Gives the archive digests of one large block, as another program might write them.
sub make_large_blocks ($chain, $name, $block) {
    my ($digests, $file) = map { $chain->path_of($name, $_) } "$device.digests", 'manifest.json';
    open(my $out, '>:raw', $digests) or die "$digests: $!\n";
    print {$out} pack(
        'a12 a4 a16 Q> N N x4048',
        "PBA-DIGESTS\n", 1, 'SHA-256', $chain->disk($device)->size,
        $block, 1
    );
    print {$out} "\1" x 32;
    close($out) or die "$digests: $!\n";
    open(my $in, '<:raw', $file) or die "$file: $!\n";
    my $manifest = JSON::PP->new->utf8->decode(join('', <$in>));
    $manifest->{devices}{$device}{digests}{block} = $block;
    $manifest->{files}{"$device.digests"}
        = { fingerprint($digests)->%*, sha256 => sha256($digests) };
    open($out, '>:raw', $file) or die "$file: $!\n";
    print {$out} encode_manifest($manifest);
    close($out) or die "$file: $!\n";
    return;
}

subtest 'an archive with digests of larger blocks' => sub {
    my ($chain, $first) = new_chain();
    make_large_blocks($chain, $first, 8 << 20);
    my $second = write_and_back_up($chain, [512 * $KiB, 64 * $KiB, 0x15]);
    is(parent_of($chain, $second), undef, 'nothing builds on it');
    like($chain->log, qr/has digests of blocks of another size/, 'and the log says why');
    $chain->check('both are right');
};

subtest 'a bitmap that was lost' => sub {
    my ($chain, $first) = new_chain();
    my $second = write_and_back_up($chain, [512 * $KiB, 64 * $KiB, 0x15]);
    lose_bitmap($chain);
    $chain->log;
    my $third = write_and_back_up(
        $chain,
        [256 * $KiB, 64 * $KiB, 0],
        [512 * $KiB + 7 * 512, 512, 0x16],
        [2048 * $KiB, 64 * $KiB, 0x17],
    );
    is($chain->modes->{$device}, 'new', 'the whole disk is read');
    my $name = $second =~ s{.*/}{}r;
    like(
        $chain->log,
        qr/$device: read in full, stored 192\.0 KiB that differ from $name in .*64\.0 KiB of it zero/,
        'stores what differs'
    );
    is(parent_of($chain, $third), $second, 'the archive builds on the newest one');
    my $fourth = write_and_back_up($chain, [2048 * $KiB, 64 * $KiB, 0x18]);
    is(parent_of($chain, $fourth), $third, 'increments continue from it');
    $chain->check('each archive');
    $chain->provider->remove($second);
    $chain->forget($second);
    $chain->check('merged');
    $chain->provider->prune(100, 1);
    $chain->forget($first, $third);
    $chain->check('pruned');
};

# The order of the names is not that of the chain any more.
subtest 'an archive that was renamed' => sub {
    my ($chain, $first) = new_chain();
    my $second = write_and_back_up($chain, [512 * $KiB, 64 * $KiB, 0x15]);
    my $renamed = $second =~ s{/20(?=[0-9]{6}T)}{/19}r;
    rename($chain->path_of($second), $chain->path_of($renamed)) or die "rename: $!\n";
    $chain->{expected}{$renamed} = delete($chain->{expected}{$second});
    lose_bitmap($chain);
    $chain->log;
    is(parent_of($chain, write_and_back_up($chain)), undef, 'the next backup is full');
    like(
        $chain->log,
        qr/$device: nothing to compare with - another archive already builds on archive /,
        'the log says why'
    );
    $chain->provider->remove($first);
    $chain->forget($first);
    is_deeply([$chain->provider->verify($renamed)], [[]], 'and the first one can be removed');
};

subtest 'backups that store everything' => sub {
    my ($chain, $first) = new_chain();
    $chain->provider->make_full(1);
    my $full = write_and_back_up($chain);
    is(parent_of($chain, $full), undef, 'a full backup that was asked for');
    $chain->provider->make_full(0);
    no warnings 'once';
    local $PVE::BackupAccess::Provider::Qcow2Chain::Guest::longest_chain = 2;
    lose_bitmap($chain);
    is(parent_of($chain, write_and_back_up($chain)),
        $full, 'the first backup after a full one builds on it');
    lose_bitmap($chain);
    is(parent_of($chain, write_and_back_up($chain)), undef, 'the end of a chain');
    like($chain->log, qr/nothing to compare with - the chain of archive \w+ has 2 archives/,
        'says why');
};

subtest 'a base that rots' => sub {
    my ($chain, $first) = new_chain();
    rot($chain, $first, 1024 * $KiB);
    lose_bitmap($chain);
    is($chain->backup, undef, 'no archive is built on a base whose damage is unknown');
    like(
        $chain->error,
        qr/device $device: archive \w+, which .* is damaged; .* 65536 at offset 1048576/,
        'the error says where'
    );
    $chain->log;
    my $next = write_and_back_up($chain);
    is(parent_of($chain, $next), undef, 'the next backup is full');
    like(
        $chain->log,
        qr/archive \w+ is damaged, according to its last verification/,
        'the log says why'
    );
    is($chain->problem($next), '', 'the next archive has all data');
};

subtest 'damage that verify found' => sub {
    my ($chain, $first) = new_chain();
    rot($chain, $first, 256 * $KiB);
    is($chain->next_modes->{$device},
        'use', 'a backup continues from damage that no verify has found');
    like(join("\n", $chain->provider->verify($first)->@*), qr/offset 262144/, 'is found');
    is($chain->next_modes->{$device}, 'new', 'no archive builds on a damaged one');
    rot($chain, $first, 256 * $KiB);
    is_deeply($chain->provider->verify($first), [], 'the repaired archive passes verify');
    is($chain->next_modes->{$device}, 'use', 'after a good verification, it is a base again');
    rot($chain, $first, 256 * $KiB);
    $chain->provider->verify($first);
    my $next = write_and_back_up($chain, [256 * $KiB, 64 * $KiB, 0x11]);
    is(parent_of($chain, $next), undef, 'the next backup stores all');
    is($chain->problem($next), '', 'the archive contains all data');
};

subtest 'damage that a backup finds while verify reads' => sub {
    my ($chain, $first) = new_chain();
    {
        my $damage = PVE::BackupAccess::Provider::Qcow2Chain::Content->can('damage');
        no warnings 'redefine';
        local *PVE::BackupAccess::Provider::Qcow2Chain::Content::damage = sub ($archive, $of) {
            my @damage = $damage->($archive, $of);
            $archive->note_damage($of, 1);
            return @damage;
        };
        is_deeply($chain->provider->verify($first), [], 'verify has not found it');
    }
    is($chain->next_modes->{$device}, 'new', 'but it stays noted');
};

done_testing;
