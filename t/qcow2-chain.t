# Chains of archives by Qcow2Chain: each archive is restored and compared byte by byte, after failures, after a
# move of the directory, and after the removal of any archives.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Chain;

my $Chain = 'PBA::Test::Chain';

my $seed = 20261122;
my $length = $ENV{PBA_FULL} ? 30 : 6;
srand($seed);
note("seed $seed");

sub all ($chain, $mode) {
    return { map { $_ => $mode } $chain->devices };
}

# ---- a chain, with failures in between ----

# Each makes a backup fail; the bitmaps keep their bits, except in the last case, in which the archive stays.
my %failures = (
    'before the data' => sub ($chain) {
        $chain->backup(during => sub () { die "enough\n" });
    },
    'in the data' => sub ($chain) {
        $chain->provider->on_progress(sub (@) { die "enough\n" });
        $chain->backup;
    },
    'the server of the new image is killed' => sub ($chain) {
        no warnings qw(once redefine);
        my $class = 'PVE::BackupAccess::Provider::Qcow2Chain::Server';
        my $start = $class->can('start');
        local *PVE::BackupAccess::Provider::Qcow2Chain::Server::start = sub (@arguments) {
            my $server = $start->(@arguments);
            kill(KILL => $server->pid);
            return $server;
        };
        $chain->backup;
    },
    'a volume of another size' => sub ($chain) {
        my $open = PBA::Test::BitmapDisk->can('open');
        no warnings 'redefine';
        local *PBA::Test::BitmapDisk::open = sub (@arguments) {
            my $volume = $open->(@arguments);
            return { $volume->%*, size => $volume->{size} + 65536 };
        };
        $chain->backup;
    },
    'the bitmaps have been cleared' => sub ($chain) { $chain->backup(late => 1) },
);

subtest "$length archives, and failures" => sub {
    my $chain = $Chain->new;
    my @failures = sort keys %failures;
    my $mode = 'new';
    for my $number (1 .. $length) {
        $chain->write_random;
        my $name = $chain->backup or die $chain->error;
        is_deeply($chain->modes, all($chain, $mode), "archive $number: mode $mode");
        $mode = 'reuse';
        next if $number % 2;
        $chain->write_random;
        my $failure = $failures[($number / 2 - 1) % @failures];
        is($failures{$failure}->($chain), undef, "a failure: $failure");
        $chain->use_store($chain->store);
    }
    $chain->check('all');

    rename($chain->store, $chain->tmp . '/moved') or die "rename: $!\n";
    $chain->use_store($chain->tmp . '/moved');
    $chain->write_random;
    $chain->backup or die $chain->error;
    is_deeply($chain->modes, all($chain, 'reuse'), 'a moved directory: the chain continues');
    $chain->check('moved');
};

# A bitmap is relative to the last backup to the storage with this name, whatever its directory was.
subtest 'another directory in its place' => sub {
    my $chain = $Chain->new;
    my $first = $chain->store;
    my $second = $chain->tmp . '/second';
    mkdir($second) or die "mkdir: $!\n";
    my %expected;
    my $back_up = sub ($text, $store, $mode) {
        $chain->{expected} = $expected{$store} //= {};
        $chain->use_store($store);
        $chain->write_random;
        $chain->backup or die $chain->error;
        is_deeply($chain->modes, all($chain, $mode), "$text: mode $mode");
        $chain->check($text);
    };
    $back_up->('the first', $first, 'new');
    $back_up->('the first again', $first, 'reuse');
    $back_up->('another disk', $second, 'new');
    $back_up->('the first disk comes back', $first, 'new');
    $back_up->('and stays', $first, 'reuse');
    my $copy = $chain->use_copy($first);
    $expected{$copy} = { $expected{$first}->%* };
    $back_up->('a copy of it', $copy, 'reuse');
    $back_up->('what it was copied from', $first, 'new');
    $chain->{state_dir} = $chain->tmp . '/other-host';
    $back_up->('another host', $first, 'new');
    delete($chain->{state_dir});
    $back_up->('the first host, later', $first, 'new');
};

# Version 0.1 stored in the directory to which archive the bitmaps are relative.
subtest 'a directory of version 0.1' => sub {
    my $chain = $Chain->new;
    my $name = $chain->backup or die $chain->error;
    my $note = $chain->guest_dir . '/bitmaps.json';
    my $id = $chain->provider->_archive($name)->id;
    my $entry = qq({ "archive": ") . $name =~ s{.*/}{}r . qq(", "id": "$id" });
    open(my $fh, '>', $note) or die "$note: $!\n";
    print {$fh} qq({ "test": { "drive-efidisk0": $entry, "drive-scsi0": $entry } });
    close($fh);
    $chain->{state_dir} = $chain->tmp . '/empty';
    $chain->use_store($chain->store);
    is_deeply($chain->next_modes, all($chain, 'new'), 'no backup builds on it');
    ok(-e $note, 'as long as there is no other archive, it is left to that version');
    $chain->write_random;
    $chain->backup or die $chain->error;
    ok(!-e $note, 'then that version must make a full backup, too');
    $chain->check('version 0.1 must then make a full backup, too');
};

# ---- removal of archives ----

sub new_chain ($count) {
    return $Chain->new->add_archives($count);
}

subtest 'remove at every position' => sub {
    my $chain = new_chain(4);
    my $store = $chain->store;
    my @names = $chain->names;
    for my $position (0 .. $#names) {
        $chain->use_copy($store);
        my $content = delete($chain->{expected}{ $names[$position] });
        $chain->provider->remove($names[$position]);
        $chain->check("without archive $position");
        $chain->{expected}{ $names[$position] } = $content;
    }

    # The bitmaps are relative to the last one.
    $chain->forget($names[-1]);
    $chain->write_random;
    $chain->backup or die $chain->error;
    is_deeply($chain->modes, all($chain, 'new'), 'without the last: full');
    like(
        $chain->log,
        qr/warn: drive-scsi0: full backup - the archive that its bitmap is relative to, ID \w+, is not in this store/,
        'the log says why'
    );
    $chain->check('the archives without the last, after another backup');
};

subtest 'prune' => sub {
    my $chain = new_chain(5);
    my @names = $chain->names;
    is_deeply($chain->provider->prune(100, 5), [], 'nothing to remove');
    is_deeply($chain->provider->prune(100, 2), [@names[0 .. 2]], 'removes the oldest');
    $chain->forget(@names[0 .. 2]);
    $chain->check('two of five');
    $chain->write_random;
    $chain->backup or die $chain->error;
    is_deeply($chain->modes, all($chain, 'reuse'), 'the chain continues');
    $chain->provider->prune(100, 1);
    $chain->forget(@names[3, 4]);
    $chain->check('one archive of three is kept');
    ok(!eval { $chain->provider->prune(100, 0); 1 }, 'a prune that keeps no archive is refused');
    is_deeply($chain->provider->prune(101, 1), [], 'a guest without archives');
};

done_testing;
