# Archives contain what was read: damage by a disk, lost writes, merges, and archives of version 0.1.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use Digest::SHA ();
use File::Temp ();
use JSON::PP ();
use List::Util qw(sum0);
use Time::HiRes ();

use PBA::Test::Chain
    qw(problems rot said_of_block with_entries with_three_archives write_and_back_up);
use PBA::Test::QemuNbd;

my $KiB = 1 << 10;
my $device = 'drive-scsi0';
my $Chain = 'PBA::Test::Chain';
my $Server = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';
my $json = JSON::PP->new->utf8->canonical->pretty;

sub read_file ($file) {
    open(my $fh, '<:raw', $file) or die "$file: $!\n";
    local $/ = undef;
    return scalar(<$fh>);
}

sub write_file ($file, $content) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    print {$fh} $content;
    close($fh) or die "$file: $!\n";
    return;
}

subtest 'rot stays known through merges' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[1], "$device.qcow2"), 1024 * $KiB + 77);
    is(problems($chain, $names[0]), '', 'the archive before is whole');
    like(problems($chain, $names[1]), said_of_block(1024 * $KiB), 'the archive itself');
    like(
        problems($chain, $names[2]),
        said_of_block(1024 * $KiB),
        'the archive that builds on the damaged one'
    );
    eval { $chain->provider->prune(100, 1) };
    my ($last) = reverse($chain->names);
    like(
        problems($chain, $last),
        said_of_block(1024 * $KiB),
        'the damage stays known after a prune'
    );
};

# Like a file system that compresses: it shows a hole wherever a file has only zeroes.
subtest 'a store whose file system stores no zeroes' => sub {
    my $chain = $Chain->new;
    my $name = write_and_back_up($chain, map { [$_ * 64 * $KiB, 4 * $KiB, 0x11] } 1 .. 40);
    my $image = $chain->path_of($name, "$device.qcow2");
    is(system('cp', '--sparse=always', $image, "$image.sparse"), 0, 'the image got holes');
    rename("$image.sparse", $image) or die "rename: $!\n";
    my $archive = $chain->provider->_archive($name);
    my $check = \&PVE::BackupAccess::Provider::Qcow2Chain::Content::check_image;
    is(
        eval {
            $check->($archive, $device, sub { });
            'whole';
        } // $@,
        'whole',
        'the check of an image finds its data'
    );

    system($ENV{PBA_QEMU_IMG} // 'qemu-img',
        'create', '-q', '-f', 'qcow2', $image, $chain->disk($device)->size);
    eval {
        $check->($archive, $device, sub { });
    };
    like(
        $@,
        qr/its image lacks what was written to it - 2621440 bytes .*: 2621440 at offset 65536$/,
        'and finds what is missing'
    );
};

subtest 'rot that a later archive does not show' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[0], "$device.qcow2"), 1024 * $KiB);
    like(problems($chain, $names[0]), said_of_block(1024 * $KiB), 'the damaged archive itself');
    is(problems($chain, $names[2]), '', 'the later archive is not damaged');
};

subtest 'each image is read once' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[1], "$device.qcow2"), 1024 * $KiB);
    my (%started, %seen);
    my $start = $Server->can('start');
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Qcow2Chain::Server::start = sub (@arguments) {
        $started{ $arguments[1] }++;
        return $start->(@arguments);
    };
    my %damaged = map { $_ => scalar($chain->provider->verify($_, \%seen)->@*) } @names;
    is_deeply(
        \%damaged,
        { $names[0] => 0, $names[1] => 1, $names[2] => 1 },
        'all archives are judged'
    );
    is_deeply([grep { $_ != 1 } values %started], [], 'each image is served once');
    is(sum0(values %started), 3 * scalar(my @devices = $chain->devices), 'all images are served');
};

subtest 'a copy whose files have new times is read once' => sub {
    my ($chain, @names) = with_three_archives();
    my @images = map { $chain->path_of($_, "$device.qcow2") } @names;
    my %started;
    my $start = $Server->can('start');
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Qcow2Chain::Server::start = sub (@arguments) {
        $started{ $arguments[1] }++;
        return $start->(@arguments);
    };
    for my $code (sub () { $chain->provider->retention(100, 9) }, sub () { $chain->next_modes }) {
        utime(undef, undef, @images);
        for my $expected ({ map { $_ => 1 } @images }, {}) {
            %started = ();
            $code->();
            is_deeply(\%started, $expected, 'each image is read once, and not again');
        }
    }
};

# Does something to each image after it was written, before it is checked.
sub after_writing ($do, $code) {
    my $stop = $Server->can('stop');
    my $start = $Server->can('start');
    my %image;
    no warnings qw(once redefine);
    local *PVE::BackupAccess::Provider::Qcow2Chain::Server::start = sub ($class, $file, %options) {
        my $server = $start->($class, $file, %options);
        $image{$server} = $file;
        return $server;
    };
    local *PVE::BackupAccess::Provider::Qcow2Chain::Server::stop = sub ($server) {
        $stop->($server);
        $do->($image{$server}) if $image{$server} =~ m/\Q$device\E/;
    };
    return $code->();
}

# The device's image is served by a server that forgets everything that is written.
sub with_forgetful_server ($code) {
    my $arguments = $Server->can('_image_arguments');
    no warnings 'redefine';
    local *PVE::BackupAccess::Provider::Qcow2Chain::Server::_image_arguments
        = sub ($class, $file, %options) {
        return $class->$arguments($file, %options)
            if !$options{writable} || $file !~ m/\Q$device\E/;
        return ('--image-opts', 'driver=null-co,read-zeroes=on,size=4M');
        };
    return $code->();
}

subtest 'a target that loses a write' => sub {
    my ($chain, @names) = with_three_archives();
    $chain->disk($device)->write([512 * $KiB, 64 * $KiB, 0x44]);
    is(with_forgetful_server(sub { $chain->backup }), undef, 'is no backup');
    like(
        $chain->error,
        qr/device $device: the target lacks what was written to it - 65536 bytes .* at offset 524288/,
        'the error says so'
    );
    is($chain->error->class, 'ContentError', 'the error has a class');
    is_deeply([$chain->names], \@names, 'the archive does not exist');
    ok($chain->backup, 'the next backup works');
    $chain->check('the next archive contains everything');

    local $chain->provider->{'no-check'} = 1;
    $chain->disk($device)->write([512 * $KiB, 64 * $KiB, 0x55]);
    my $lose = sub ($image) { rot($image, 512 * $KiB) };
    my $name = after_writing($lose, sub { $chain->backup });
    ok($name, 'with no-check, the backup succeeds');
    like(problems($chain, $name), said_of_block(512 * $KiB), 'verify finds the damage');
};

subtest 'an image that is closed without all of its tables' => sub {
    my $found = qr/65536 bytes differ from what was read from the guest: 65536 at offset 524288$/m;
    my %losses = (
        'an entry that is lost' => [sub ($entries) { $entries->[8] = 0 }, $found],
        'one that says zeroes' => [sub ($entries) { $entries->[8] |= 1 }, $found],
        "one that is another's" => [sub ($entries) { $entries->[8] = $entries->[9] }, qr/ - \w/],
    );
    my ($chain, @names) = with_three_archives();
    for my $loss (sort keys %losses) {
        my ($lose, $said) = $losses{$loss}->@*;
        $chain->disk($device)->write([512 * $KiB, 128 * $KiB, 0x44], [768 * $KiB, 64 * $KiB, 0]);
        my $do = sub ($image) { with_entries($image, $lose) };
        is(after_writing($do, sub { $chain->backup }), undef, $loss);
        like($chain->error, qr/device $device: its image lacks what was written to it/, 'is told');
        like($chain->error, $said, 'the error names the offset');
        is($chain->error->class, 'ContentError', 'the error has a class');
        is_deeply([$chain->names], \@names, 'the archive does not exist');
    }
    ok($chain->backup, 'the next backup works');
    $chain->check('the next archive contains everything');
};

subtest 'a merge that loses a write' => sub {
    my ($chain, @names) = with_three_archives();
    my ($lost, $full) = (1, 0);
    {
        no warnings qw(redefine once);
        my $commit = \&PVE::BackupAccess::Provider::Qcow2Chain::Content::commit_image;
        local *PVE::BackupAccess::Provider::Qcow2Chain::Content::commit_image = sub ($image) {
            $commit->($image);
            rot($chain->path_of($names[0], "$device.qcow2"), 1024 * $KiB)
                if $image =~ m/scsi0/ && $lost;
            return;
        };
        eval { $chain->provider->remove($names[0]) };
        like($@, qr/the merged image .* lacks what was merged - 65536 .* offset 1048576/,
            'is found');
        $chain->forget($names[0]);
        is($chain->problem($_), '', 'the other archives are intact') for @names[1, 2];
    }
    $chain->provider->prune(100, 5);
    $chain->check('and the merge is ended later');

    my $free = 2 << 20;
    no warnings 'redefine';
    local *PVE::BackupAccess::_free_bytes = sub (@) { $free };
    $chain->disk($device)->write([3 << 20, 1 << 20, 0x66]);
    $chain->backup or die $chain->error;
    my @left = $chain->names;
    my $remove = sub { $chain->provider->remove($left[-2]) };
    ok(!eval { $remove->(); 1 }, 'a merge without enough space fails');
    like(
        $@,
        qr/may need 3\.0 MiB, but only 2\.0 MiB are free in .* - make room/,
        'the error names the space that a merge needs'
    );
    $chain->check('no merge was begun');
    $free = 4 << 20;
    $remove->();
    $chain->forget($left[-2]);
    $chain->check('with enough');
};

subtest 'the space for data that replaces zeroes' => sub {
    my $chain = $Chain->new;
    my ($first, $zeroes, $last) = map { write_and_back_up($chain, [0, 1 << 20, $_]) } 0x11, 0, 0x22;
    no warnings 'redefine';
    local *PVE::BackupAccess::_free_bytes = sub (@) { 2560 * $KiB };
    ok(!eval { $chain->provider->remove($zeroes); 1 }, 'a merge without enough space fails');
    like($@, qr/may need 3\.0 MiB/, 'the error names the space');
    $chain->check('no merge was begun');
};

# A file of digests of an increment of a volume of 8 GiB, with these numbers of blocks.
sub write_digests ($file, $slot, @blocks) {
    open(my $fh, '>:raw', $file) or die "$file: $!\n";
    truncate($fh, 4096 + (1 << 17) * 32);
    print {$fh} pack('a12 a4 a16 Q> N N', "PBA-DIGESTS\n", '1', 'SHA-256', 8 << 30, 65536, 0);
    for my $block (@blocks) {
        seek($fh, 4096 + $block * 32, 0);
        print {$fh} $slot;
    }
    close($fh) or die "$file: $!\n";
    return;
}

subtest 'the space for tables' => sub {
    my $dir = File::Temp->newdir('pba-digests-XXXXXXXX', TMPDIR => 1);
    my ($newer, $older) = ("$dir/newer", "$dir/older");
    my $count = sub () {
        PVE::BackupAccess::Provider::Store::Digests::bytes_to_add($newer, $older) >> 16;
    };
    write_digests($newer, 'a' x 32, map { $_ << 13 } 0 .. 15);
    write_digests($older, 'b' x 32);
    is($count->(), 32, 'each block needs a table');
    write_digests($older, 'b' x 32, map { ($_ << 13) + 1 } 0 .. 15);
    is($count->(), 16, 'the older image has all tables');
    write_digests($older, 'b' x 32, map { $_ << 13 } 0 .. 7);
    is($count->(), 16, 'and half of the blocks');
    write_digests($newer, Digest::SHA::sha256("\0" x 65536), map { $_ << 13 } 0 .. 15);
    is($count->(), 8, 'zeroes only need tables');
};

subtest 'a merge between two verifications' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[0], "$device.qcow2"), 256 * $KiB);
    my %seen;
    $chain->provider->verify($_, \%seen) for @names[0, 1];
    $chain->provider->remove($names[0]);
    like(
        join("\n", $chain->provider->verify($names[2], \%seen)->@*),
        said_of_block(256 * $KiB),
        'what was merged is read'
    );
    is($chain->next_modes->{$device}, 'new', 'the damage stays noted');
};

subtest 'a new bitmap that lacks bits' => sub {
    my $chain = $Chain->new;
    $chain->disk($device)->write([256 * $KiB, 64 * $KiB, 0x11]);
    no warnings 'redefine';
    local *PBA::Test::BitmapDisk::_new_bitmap = sub ($disk) {
        $disk->_bitmap('--add', '--disable');
        $disk->{has_bitmap} = 1;
    };
    is($chain->backup, undef, 'the backup fails');
    like($chain->error, qr/only 0 of [0-9]+ bytes were read/, 'the error says why');
    is_deeply([$chain->names], [], 'the archive does not exist');
};

subtest 'the maximum length of a chain' => sub {
    no warnings 'once';
    local $PVE::BackupAccess::Provider::Qcow2Chain::Guest::longest_chain = 3;
    my ($chain, @names) = with_three_archives();
    ok($chain->backup, 'another backup');
    is($chain->modes->{$device}, 'new', 'the backup over the limit is full');
    like(
        $chain->log,
        qr/full backup - the chain of archive \w+ has 3 archives, which is the limit/,
        'the log says why'
    );
    ok($chain->backup, 'the next backup');
    is($chain->modes->{$device}, 'reuse', 'the backup after that is incremental');
};

# Makes an archive look as if it was made by version 0.1.
sub make_old ($chain, $name) {
    my $dir = $chain->path_of($name);
    my $manifest = $json->decode(read_file("$dir/manifest.json"));
    $manifest->{format} = 1;
    for my $entry (values $manifest->{devices}->%*) {
        my $digests = delete($entry->{digests});
        delete($manifest->{files}{ $digests->{file} });
        unlink("$dir/$digests->{file}");
        $manifest->{files}{ $entry->{file} }{sha256}
            = Digest::SHA->new(256)->addfile("$dir/$entry->{file}", 'b')->hexdigest;
    }
    write_file("$dir/manifest.json", $json->encode($manifest));
    return;
}

subtest 'archives of version 0.1' => sub {
    my ($chain, @names) = with_three_archives();
    is_deeply($chain->provider->unproven($names[2]), [], 'others are proven');
    make_old($chain, $_) for @names;
    is(problems($chain, $_), '', 'are read as before') for @names;
    is_deeply($chain->provider->unproven($names[2]), [$chain->devices],
        'the content is not proven');
    is_deeply($chain->provider->digests($names[2], $device), [], 'there are no digests');
    $chain->provider->prune(100, 2);
    $chain->forget($names[0]);
    $chain->check('merged as before');
    $chain->log;
    is($chain->next_modes->{$device}, 'new', 'nothing builds on them');
    my $why = $names[2] =~ s{.*/}{}r . ' is of version 0.1: it has no digests';
    like($chain->log, qr/\Q$why\E/, 'the log says why');
    rot($chain->path_of($names[2], "$device.qcow2"), 2048 * $KiB);
    like(problems($chain, $names[2]), qr/SHA-256 differs/, 'damage is seen as before');
};

# A merge computes their SHA-256 anew.
subtest 'rot in archives of version 0.1' => sub {
    my ($chain, @names) = with_three_archives();
    make_old($chain, $_) for @names;
    for my $number (1, 0) {
        my $image = $chain->path_of($names[$number], "$device.qcow2");
        rot($image, 1024 * $KiB);
        ok(!eval { $chain->provider->remove($names[0]); 1 }, "archive $number: it is not merged");
        like($@, qr/ is damaged - its SHA-256 differs - remove \w+ first$/m, 'the error says why');
        like(problems($chain, $names[$number]), qr/SHA-256 differs/, 'verify still finds it');
        rot($image, 1024 * $KiB);    # flips the bit back
    }
    is_deeply([$chain->names], \@names, 'nothing is gone');
};

# qemu-img does not look whether it could print.
subtest 'a map that is cut off' => sub {
    my ($chain, @names) = with_three_archives();
    my $script = $chain->tmp . '/qemu-img';
    my $real = $ENV{PBA_QEMU_IMG} // 'qemu-img';
    write_file($script,
        qq{#!/bin/sh\n"$real" "\$@" | if [ "\$1" = map ]; then head -n 1; else cat; fi\n});
    chmod(0755, $script) or die "chmod: $!\n";
    my $cut_off = qr/ map prints about .*[.]qcow2 is cut off /;
    {
        local $PVE::BackupAccess::Provider::Qcow2Chain::Image::qemu_img = $script;
        $chain->disk($device)->write([3072 * $KiB, 64 * $KiB, 0x44]);
        is($chain->backup, undef, 'the backup fails');
        like($chain->error, $cut_off, 'and says why');
        ok(!eval { problems($chain, $names[2]); 1 }, 'so does verify');
        like($@, $cut_off, 'and says why');
    }
    $chain->check('the archives are as before');
};

subtest 'archives of a later version' => sub {
    my ($chain, @names) = with_three_archives();
    my $file = $chain->path_of($names[2], 'manifest.json');
    write_file($file, read_file($file) =~ s/"format" : \K2/3/r);
    my $newer = qr/\Aarchive \S+ was made by a newer version of this program - its format is 3, /;
    my $provider = $chain->provider;
    my %calls = (
        verify => sub () { $provider->verify($names[2]) },
        restore => sub () { $provider->restore_vm_init($names[2]) },
        'a restore of a device' =>
            sub () { $provider->restore_vm_volume_init($names[2], $device, {}) },
        'the configuration' => sub () { $provider->archive_get_guest_config($names[2]) },
    );
    for my $call (sort keys %calls) {
        ok(!eval { $calls{$call}->(); 1 }, "$call: it is refused");
        like($@, $newer, "$call: the error says why");
    }
    my ($entry) = reverse($provider->list(100)->@*);
    like($entry->{problem}, $newer, 'list says so');
    is_deeply([map { $_->{damaged} // () } $provider->list(100)->@*],
        [], 'and calls nothing damaged');
};

subtest 'a prune and a backup beside an archive of a later version' => sub {
    my ($chain, @names) = with_three_archives();
    my $provider = $chain->provider;
    my $file = $chain->path_of($names[2], 'manifest.json');
    write_file($file, read_file($file) =~ s/"format" : \K2/3/r);
    ok(!eval { $provider->prune(100, 1); 1 }, 'a prune fails');
    like(
        $@,
        qr/cannot be removed, since another one may build on it - archive \S+ was made by a newer /,
        'and says why'
    );
    is_deeply([$chain->names], \@names, 'no archive is gone');
    is_deeply([map { $_->{mark} } $provider->retention(100, 1)->@*],
        [qw(remove keep broken)], 'it neither counts nor is removed');
    $chain->log;
    is($chain->next_modes->{$device}, 'new', 'the next backup is full');
    like($chain->log,
        qr/^warn: all disks are backed up in full - archive \S+ was made by a newer /m,
        'and says why');

    write_file($file, read_file($file) =~ s/"format" : \K3/2/r =~ s/"digests" : \{/"x" : {/r);
    like(
        problems($chain, $names[2]),
        qr/has no valid digests/,
        'archives without digests are refused'
    );
};

subtest 'damage that a restore finds is stored again by the next backup' => sub {
    my ($chain, @names) = with_three_archives();
    rot($chain->path_of($names[1], "$device.qcow2"), 1024 * $KiB + 77);
    is($chain->next_modes->{$device}, 'use', 'nobody has read the damaged block yet');
    my ($status) = $chain->restored_by_command($names[2], $device);
    is($status, 1, 'a restore reports it');
    is_deeply(
        [map { $_->{damaged} ? 1 : 0 } $chain->provider->list->@*],
        [0, 1, 1],
        'the archive with it is noted, and with it what builds on it'
    );
    is($chain->next_modes->{$device}, 'new', 'the next backup is full');
};

subtest 'parts of ranges that are not in others' => sub {
    my $tebi = 1 << 40;
    for my $case (
        [[[0, $tebi]], [[0, $tebi]], []],
        [[[0, $tebi]], [], [[0, $tebi]]],
        [[[0, 10]], [[2, 3], [7, 1]], [[0, 2], [5, 2], [8, 2]]],
        [[[4, 4], [10, 2]], [[0, 5], [7, 4]], [[5, 2], [11, 1]]],
        [[[4, 4]], [[0, 4], [8, 4]], [[4, 4]]],
        [[], [[0, 4]], []],
        )
    {
        my ($ranges, $known, $left) = $case->@*;
        my @found = PVE::BackupAccess::Provider::Store::Content::beyond($ranges, $known);
        is_deeply(\@found, $left, $json->encode([$ranges, $known]));
    }
};

done_testing;
