# pve-backup-access and archives: damage, typing errors, and paths that mean something other than the user
# intended.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use JSON::PP ();
use Test::More;

use PBA::Test::Chain;
use PBA::Test::Command qw(run_command);
use PBA::Test::Container qw(in_own_mounts);
use PVE::BackupAccess::File qw(read_file write_file);

my $json = JSON::PP->new->utf8;

sub new_chain ($count) {
    my $chain = PBA::Test::Chain->new;
    add_to($chain, $count);
    return $chain;
}

sub add_to ($chain, $count) {
    for (1 .. $count) {
        $chain->write_random;
        $chain->disk('drive-scsi0')->write([0, 65536, 1 + int(rand(255))]);
        $chain->backup or die $chain->error;
    }
    return;
}

# [exit status, standard output, standard error]
sub run_of (@arguments) {
    my $run = run_command(@arguments);
    return [$run->@{qw(status out err)}];
}

# Changes the disk's data at offset 0 in that archive, without changing the file's times and size.
sub rot ($chain, $name) {
    PBA::Test::Chain::rot($chain->path_of($name, 'drive-scsi0.qcow2'), 0);
    return;
}

# Destroys the middle of the archive's image of that disk.
sub break_image ($chain, $name) {
    my $file = $chain->path_of($name, 'drive-scsi0.qcow2');
    truncate($file, 70_000) or die "$file: $!\n";
    return;
}

# The archives of the chain still contain the data of the other disk.
subtest 'a damaged chain of which nothing is kept' => sub {
    my $chain = new_chain(3);
    my @names = $chain->names;
    break_image($chain, $names[1]);
    add_to($chain, 1);
    my ($last) = ($chain->names)[3];
    is_deeply(
        $chain->modes,
        { 'drive-scsi0' => 'new', 'drive-efidisk0' => 'reuse' },
        'the damaged disk alone is stored in full'
    );
    my $run = run_of('remove', $chain->path_of($names[0]));
    my ($bad) = $names[1] =~ m!([^/]+)\z!;
    is($run->[0], 1, 'remove of what a damaged one builds on: exit status');
    like(
        $run->[2],
        qr/ cannot be merged into .* - remove $bad first$/m,
        'the error says what to do'
    );
    my @prune = ('prune', $chain->store, '--keep-last', 1);
    like(run_of(@prune, '--dry-run')->[1], qr/^remove +\Q$_\E/m, "a dry run: $_") for @names;
    is_deeply(
        run_of(@prune),
        [0, join('', map { "removed $_\n" } @names), ''],
        'all archives of the damaged chain are removed'
    );
    $chain->forget(@names);
    $chain->check('the other archives restore after prune');
    is_deeply([$chain->names], [$last], 'the intact archive is left');
};

subtest 'list and prune show what verify found' => sub {
    my $chain = new_chain(3);
    my @names = $chain->names;
    rot($chain, $names[1]);
    is(run_of('verify', $chain->store)->[0], 1, 'verify reports the damage');
    my $text = run_of('list', $chain->store)->[1];
    my ($old, $bad) = map { s!.*/!!r } @names;
    my $own = 'drive-scsi0: damage was found in it';
    my $built = "drive-scsi0: it builds on $bad, in which damage was found";
    my @shown = $text =~ m/^    DAMAGED: (.*)$/mg;
    is_deeply(\@shown, [$own, $built], 'list: where, and what builds on it') or diag($text);
    my $list = $json->decode(run_of('list', $chain->store, '--json')->[1]);
    is_deeply([map { $_->{damaged} } $list->@*], [undef, [$own], [$built]], 'the damage in JSON');
    my $dry = run_of('prune', $chain->store, qw(--keep-last 1 --dry-run))->[1];
    like($dry, qr/^keep +\Q$names[0]\E$/m, 'prune keeps the last intact archive');
    like(
        $dry,
        qr/^keep +\Q$names[2]\E - damaged: \Q$built\E$/m,
        'for the other disk, prune keeps the newest'
    );
    like(
        $dry,
        qr/^broken +\Q$names[1]\E - damaged: \Q$own\E$/m,
        'prune says which archive is damaged'
    );
};

my %lost = (
    'has a manifest that is no JSON' => sub ($dir) { write_file("$dir/manifest.json", 'x') },
    'is missing' => sub ($dir) { rename($dir, "$dir.lost") or die "$dir: $!\n" },
);

for my $how (sort keys %lost) {
    subtest "list, if an archive $how" => sub {
        my $chain = new_chain(4);
        my @names = $chain->names;
        $lost{$how}->($chain->path_of($names[1]));
        my ($lost) = $names[1] =~ m!([^/]+)\z!;
        my $built = "it builds on $lost, which is missing or cannot be used";
        my @expected = map { "$_: $built" } $chain->devices;
        my %damaged = map { $_->{volname} => $_->{damaged} }
            $json->decode(run_of('list', $chain->store, '--json')->[1])->@*;
        is_deeply(
            [@damaged{ @names[0, 2, 3] }],
            [undef, \@expected, \@expected],
            'shows which archives cannot be restored'
        );
    };
}

subtest 'a removal that was killed' => sub {
    my $chain = new_chain(3);
    my $dir = $chain->path_of(($chain->names)[1]);
    rename("$dir/manifest.json", "$dir/removed.json") or die "$dir: $!\n";
    unlike(run_of('list', $chain->store)->[1], qr/DAMAGED/, 'list shows no damage');
};

subtest 'a manifest that was changed' => sub {
    my $chain = new_chain(1);
    my ($name) = $chain->names;
    my $file = $chain->path_of($name, 'manifest.json');
    write_file($file, read_file($file) =~ s/"time" : 1/"time" : 2/r);
    like(
        run_of('list', $chain->store)->[1],
        qr/^    DAMAGED: the manifest .* is damaged/m,
        'list reports the damage'
    );
    my $list = $json->decode(run_of('list', $chain->store, '--json')->[1]);
    like($list->[0]{damaged}[0], qr/the manifest .* is damaged/, 'the damage in JSON');
    write_file($file, read_file($file) =~ s/"files" : \{/"files" : { "x" : " ",/r);
    my $odd = run_of('list', $chain->store);
    is($odd->[0], 0, 'an odd entry: list works');
    like($odd->[1], qr/: cannot be used - .* the entry of one of its files/, 'and says so');
};

subtest "a guest's path" => sub {
    my $chain = new_chain(1);
    my $store = $chain->store;
    my ($name) = $chain->names;
    write_file($chain->guest_dir . '/name', "web1\n");
    for my $path (qw(web1 100 vm/100 vm/100/)) {
        my $run = run_of('remove', "$store/$path");
        is($run->[0], 1, "remove $path: exit status");
        like(
            $run->[2],
            qr/is a guest, .*give the archive.*\Q$name\E/,
            'the error says that the path is a guest'
        );
    }
    is_deeply([$chain->names], [$name], 'nothing is removed');
    for my $path (qw(web1 100 vm/100)) {
        my @backup = ('backup', "$store/$path", '--qmp', '/none', '--guest', 'web2');
        like(run_of(@backup)->[2], qr/is a guest - give .*: \Q$store\E --/, "backup to $path");
    }
    my $run = run_of('list', "$store/web1");
    like($run->[2], qr/is a guest - give .*: \Q$store\E --guest web1$/, 'list of a guest');
    like(
        run_of('list', "$store/vm/100")->[2],
        qr/: \Q$store\E --vmid 100$/,
        'list of a guest, by its number'
    );
};

subtest 'a guest that is called latest' => sub {
    my $chain = new_chain(1);
    my $store = $chain->store;
    my $path = $chain->path_of(($chain->names)[0]);
    write_file($chain->guest_dir . '/name', "latest\n");
    is_deeply(run_of('verify', "$store/$_"), [0, "$path: ok\n", ''], $_)
        for qw(latest latest/ latest/latest 100/latest);
};

subtest 'verify of selected archives' => sub {
    my $chain = new_chain(2);
    my $store = $chain->store;
    my ($first, $second) = map { $chain->path_of($_) } $chain->names;
    write_file($chain->guest_dir . '/name', "web1\n");
    my $all = [0, "$first: ok\n$second: ok\n", ''];
    is_deeply(run_of('verify', $store, '--guest', 'web1'), $all, 'verify of a guest, by its name');
    is_deeply(run_of('verify', $store, '--vmid', 100), $all, 'verify of a guest, by its number');
    is(run_of('verify', $store, '--vmid', 101)->[0], 1, 'verify of a guest without archives');
    like(
        run_of('verify', $store, '--guest', 'wbe1')->[2],
        qr/no guest 'wbe1'/,
        'verify of an unknown guest'
    );
    my $none = $first =~ s/T[0-9]{6}Z/T000000Z/r;
    my $run = run_of('verify', $none);
    is_deeply([$run->@[0, 1]], [1, ''], 'verify of a missing archive: no result');
    like(
        $run->[2],
        qr/\Apve-backup-access verify: there is no archive /,
        'verify of a missing archive: an error'
    );
};

subtest 'errors name what does not exist' => sub {
    my $chain = new_chain(1);
    my ($store, $out) = ($chain->store, $chain->tmp . '/none');
    like(
        run_of('restore', "$store/wbe1", $out)->[2],
        qr/there is no guest 'wbe1' in \Q$store\E/,
        'the guest'
    );
    like(
        run_of('restore', "$store/101", $out)->[2],
        qr/there is no guest '101' in \Q$store\E/,
        'the number'
    );
    like(
        run_of('restore', "$out/web1", $out)->[2],
        qr!\Q$out\E/web1 is not an archive - give !,
        'the directory'
    );
};

subtest 'a read-only store' => sub {
    plan(skip_all => 'needs root, for mounts') if $> != 0 || !in_own_mounts();
    my $chain = new_chain(2);
    my ($store, $path) = ($chain->store, $chain->path_of(($chain->names)[-1]));
    system("mount --bind $store $store && mount -o remount,bind,ro $store") == 0
        or die "mount: $?\n";
    is(run_command('verify', $store)->{status}, 0, 'verify: exit status');
    for my $command ([qw(prune --keep-last 1), $store], ['remove', $path]) {
        my $run = run_command($command->@*);
        is($run->{status}, 1, "$command->[0]: exit status");
        like($run->{err}, qr/Read-only file system\n.*remount it/, "$command->[0]: what to do");
    }
    system('umount', $store) == 0 or die "umount: $?\n";
};

done_testing;
