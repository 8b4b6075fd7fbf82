# A bitmap belongs to one backup and one disk (I8). Whatever happens to disks, bitmaps and archives between two
# backups, each restored archive must equal the disk byte by byte, and a backup is incremental unless something
# prevents it.
#
# PBA_FULL=1 runs lives with each kind of mismatch; all sequences of up to three events (PBA_LENGTH=4: up to
# four) in one long walk, or as many of its lives as PBA_LIVES says; and many random lives (PBA_SEED). A plain
# run has one on each QEMU, chosen by the seed and QEMU's version. PBA_STATES=N runs only lives with N events that
# try every event in every state that they reach.

use v5.36;

use FindBin;
use List::Util qw(min shuffle);
use lib "$FindBin::Bin/lib";
use Test::More;

use PBA::Test::Life;
use PBA::Test::VM;

my $Life = 'PBA::Test::Life';

# The random numbers differ between QEMUs.
my $qemu = PBA::Test::VM->qemu;
my $seed = $ENV{PBA_SEED} // 20261128 + unpack('%16C*', qx($qemu --version));
my $random_length = $ENV{PBA_FULL} ? 12 : 10;
my $piece = 300;    # events of the walk in one life

# An event, and after a colon the mode that the first disk's backup must have.
my @known = (
    [
        'the hands of others',
        { provider => 'chain', persistent => 1, naming => 'qdev' },
        qw(ok hand-remove ok:new ok:reuse hand-disable ok:new hand-untie ok:new hand-record ok:new),
        qw(hand-second-companion ok:new hand-rename ok:reuse hand-odd-names ok:reuse),
        qw(move-disk:new ok overlay:new ok ok:reuse full:new ok:reuse prune ok:reuse one-disk ok:reuse audit:new ok:reuse),
    ],
    [
        'the hands of others, bitmaps in memory',
        { provider => 'raw' },
        qw(ok hand-remove ok:new ok:reuse hand-disable ok:new hand-untie ok:new hand-record ok:new),
        qw(hand-second-companion ok:new hand-rename ok:reuse hand-odd-names ok:reuse),
        qw(other-guest:new ok:new ok:reuse one-disk ok ok:reuse odd-notes ok ok ok:reuse),
    ],
    [
        'other guests',
        { provider => 'raw', persistent => 1, naming => 'qdev' },
        qw(ok ok:reuse other-guest:new ok:new ok:reuse twin ok:reuse twin ok:new twin ok:new),
        qw(one-disk ok ok:reuse odd-notes ok ok ok:reuse grow-offline ok:new shrink-grow-offline ok:new),
    ],
    [
        'nothing speaks against an incremental backup',
        { provider => 'chain', persistent => 1 },
        qw(ok:new ok:reuse failed ok:reuse failed-late ok:new ok:reuse killed ok:reuse ram ok:reuse),
        qw(host ok:reuse restart ok:reuse replug ok:reuse second-target:new ok:reuse),
        qw(second-target:reuse ok:reuse copied-store ok:reuse),
    ],
    [
        'other guests, with a provider that knows no IDs',
        { provider => 'raw', naming => 'drive', persistent => 1 },
        qw(ok:new ok:reuse failed ok:reuse failed-late ok:reuse ram ok:reuse restart ok:reuse),
        qw(second-target:new ok:reuse),
    ],
    [
        'back in time',
        { provider => 'chain', persistent => 1 },
        qw(ok ram ok rollback-ram ok:new ok:reuse host ok rollback-host ok:new ok:reuse),
        qw(savevm ok loadvm ok ok:reuse crash ok:new),
    ],
    [
        'back in time, with a provider that knows no IDs',
        { provider => 'raw' },
        qw(ok ram ok rollback-ram ok:new ok:reuse ram killed-late rollback-ram ok migrate ok ok:reuse),
    ],
    [
        'back in time, disks in slots',
        { provider => 'raw', naming => 'qdev', persistent => 1 },
        qw(ok host ok rollback-host ok:new swap ok:new ok:reuse)
    ],
    [
        'another disk',
        { provider => 'chain', naming => 'qdev' },
        qw(ok swap ok:new ok:reuse alias:reuse ok:reuse swap failed swap ok replug ok),
    ],
    [
        'one disk under all its names',
        { provider => 'chain', persistent => 1 },
        qw(ok alias:reuse alias:reuse ok:reuse rename ok:reuse failed ok:reuse prune ok:reuse),
        qw(rename killed ok:reuse renumber ok:reuse ok:reuse alias:reuse renumber alias:reuse),
        qw(swap ok:new renumber ok:reuse rename replug ok:reuse removed ok:new audit alias:reuse),
        qw(old-manifests ok:new ok:reuse old-manifests ok:reuse prune full ok:reuse),
    ],
    [
        'one disk under all its names, with a provider that identifies disks by name',
        { provider => 'blind', persistent => 1 },
        qw(ok ok:reuse alias:new alias:reuse ok:new ok:reuse renumber ok:new ok:reuse rename ok:new),
        qw(ok:reuse swap ok:new renumber ok:reuse audit rename renumber ok:new prune ok:reuse),
    ],
    [
        'one disk under all its names, with a provider that knows no IDs',
        { provider => 'raw', persistent => 1 },
        qw(ok ok:reuse alias:new alias:reuse ok:new ok:reuse renumber ok:new ok:reuse rename ok:new),
        qw(ok:reuse swap ok:new renumber ok:reuse rename renumber ok:new odd-notes ok ok ok:reuse),
    ],
    [
        'another disk, with programs that know no IDs',
        { provider => 'chain', persistent => 1, naming => 'qdev' },
        qw(ok unaware swap unaware ok:new unaware swap unaware rename unaware rename unaware ok),
    ],
    [
        'another guest with disks of its own',
        { provider => 'chain', persistent => 1, naming => 'qdev' },
        qw(ok ok:reuse stranger ok:reuse ram stranger rollback-ram ok:reuse stranger prune ok:reuse),
        qw(failed-kept stranger ok:new ok:reuse),
    ],
    [
        'another guest with disks of its own, with a provider that knows no IDs',
        { provider => 'raw', persistent => 1, naming => 'qdev' },
        qw(ok ok:reuse stranger ok:new ok:reuse stranger stranger ok:new ok:reuse),
        qw(failed-kept ok:reuse shared-store:reuse ok:reuse),
    ],
    [
        'another guest, or data that remains, and back in time, with a provider that knows no IDs',
        { provider => 'raw' },
        qw(ok ram stranger rollback-ram ok:new ok:reuse ram other-guest rollback-ram ok:new ok:reuse),
        qw(ram failed-kept rollback-ram ok:new ok:reuse ram shared-store rollback-ram ok:new),
        qw(ram failed-late rollback-ram ok:new ok:reuse ram failed-late ok:reuse rollback-ram ok:new),
    ],
    [
        'a guest that is off',
        { provider => 'chain', persistent => 1, naming => 'qdev' },
        qw(ok off:reuse ok:reuse off:reuse off:reuse ok:reuse killed off:reuse ok:reuse swap off:new),
        qw(ok:reuse crash off:new ok:reuse host off rollback-host off ok:reuse rename off ok:new),
        qw(persistence ok:reuse restart ok:reuse written-off ok:reuse committed-off ok:reuse off:reuse),
    ],
    [
        'the provider of the documentation',
        { provider => 'example', persistent => 1, naming => 'qdev' },
        qw(ok ok:reuse failed ok:reuse failed-late ok killed ok stranger:new ok:new ok:reuse unaware),
        qw(ok:new ok:reuse ram ok rollback-ram ok:new ok:reuse removed ok:new ok:reuse store-saved ok),
        qw(store-back ok:new ok:reuse other-store:new ok:new ok:reuse swap ok:new rename ok:new),
        qw(off asked-swap ok asked-other-store:new ok:reuse second-target-here:new ok:new ok:reuse),
    ],
    [
        'the store and its targets',
        { provider => 'chain' },
        qw(ok store-saved ok:reuse store-back ok:new ok:reuse second-target-here:new ok:new ok:reuse),
        qw(shared-store:reuse ok:reuse ram shared-store rollback-ram ok:new ok:reuse),
    ],
    [
        'while the provider is asked',
        { provider => 'chain', persistent => 1, naming => 'qdev' },
        qw(ok asked-second-target ok:reuse asked-other-store:new ok:reuse asked-hand-remove:new),
        qw(ok:reuse ram ok asked-rollback-ram:new ok:reuse host ok asked-rollback-host:new ok:reuse),
        qw(asked-hand-untie:new ok:reuse asked-swap ok asked-replug ok asked-restart ok asked-crash),
        qw(ok asked-shrink-grow ok asked-migrate ok asked-renumber ok ok:reuse),
    ],
    [
        'while the provider is asked, disks by the names of nodes',
        { provider => 'raw' },
        qw(ok asked-second-target ok:reuse asked-swap ok asked-replug ok asked-hand-remove:new ok),
        qw(asked-shrink-grow ok asked-migrate ok ok:reuse),
    ],

    # Not on Proxmox VE, where fleecing images are attached before: a VM that is stopped does not have them any more.
    [
        'back in time while the provider is asked, with a provider that knows no IDs',
        { provider => 'raw', persistent => 1 },
        qw(ok ram ok asked-rollback-ram:new ok:reuse),
    ],
    [
        'another disk after a restart',
        { provider => 'chain', persistent => 1, naming => 'drive' },
        qw(ok swap ok:new ok:reuse replug ok swap ok),
    ],
    [
        'another size',
        { provider => 'raw' },
        qw(ok shrink-grow ok:new ok:reuse grow ok:new shrink ok:new ok:reuse),
    ],
    [
        'another store',
        { provider => 'chain' },
        qw(ok other-store:new ok:new ok:reuse migrate ok:new removed ok:new ok:reuse unaware ok),
        qw(ram unaware rollback-ram ok),
    ],
);

my (%count, @failed);

sub new_life ($backend, %how) {
    return $Life->new(backend => $backend, %how);
}

# Returns the first problem of a life, or undef.
sub live ($life, @events) {
    for my $text (@events) {
        my ($event, $mode) = split(m/:/, $text);
        my $problem = $life->run($event);
        return $problem if defined($problem);
        my $got = $life->modes->{disk0} // '';
        return "$text: the mode is $got\n" . join("\n", $life->log->@*)
            if defined($mode) && $got ne $mode;
    }
    my @wrong = $life->check_disks;
    return @wrong ? "the model is wrong: @wrong" : undef;
}

sub note_counts ($life) {
    $count{$_} += $life->counts->{$_} for keys $life->counts->%*;
}

sub one_life ($name, $backend, $how, @events) {
    my $life = new_life($backend, $how->%*);
    my $problem = live($life, @events);
    is($problem, undef, $name) or push(@failed, "$backend, $name");
    note_counts($life);
}

# Chooses the names of the disks in backups, the provider, and whether bitmaps survive a restart.
sub some_way ($backend, $number) {
    my @namings = $backend eq 'pve' ? qw(node drive) : qw(node qdev drive);
    my @kinds = qw(blind chain chain example);
    my %way = (
        provider => $number % 2 ? 'raw' : $kinds[$number / 2 % @kinds],
        naming => $namings[$number % @namings],
        persistent => $backend eq 'upstream' && $number % 3 != 2 ? 1 : 0,
    );
    return (\%way, join(', ', map { "$_ $way{$_}" } sort keys %way));
}

sub random_lives ($backend, $lives) {
    for my $number (1 .. $lives) {
        my ($how, $text) = some_way($backend, $number);
        my @all = $Life->all_events($how->{provider});
        srand($seed + $number);
        my @events = ('ok', map { $all[rand(@all)] } 1 .. $random_length);
        one_life(
            "made up, number $number, $text",
            $backend, { $how->%*, seed => $number },
            @events, 'ok'
        );
    }
}

# A sequence of letters 0 .. $letters - 1 that contains every word of that length once.
sub walk ($letters, $length) {
    my (@word, @walk);
    my $add = sub ($self, $at, $period) {
        if ($at > $length) {
            push(@walk, @word[1 .. $period]) if $length % $period == 0;
            return;
        }
        $word[$at] = $word[$at - $period] // 0;
        $self->($self, $at + 1, $period);
        for my $letter (($word[$at - $period] // 0) + 1 .. $letters - 1) {
            $word[$at] = $letter;
            $self->($self, $at + 1, $at);
        }
    };
    $add->($add, 1, 1);
    return @walk;
}

# Each life ends with a backup, and the next one begins with the events that the cut would separate.
sub pieces ($length, @walk) {
    my @pieces;
    while (@walk) {
        push(@pieces, [splice(@walk, 0, $piece)]);
        unshift(@walk, $pieces[-1]->@[-$length + 1 .. -1]) if @walk;
    }
    return @pieces;
}

sub all_sequences ($backend, $number) {
    my ($how, $text) = some_way($backend, $number);
    my @all = $Life->events($how->{provider});
    my $length = $ENV{PBA_LENGTH} // 3;
    my @pieces = pieces($length, map { $all[$_] } walk(scalar(@all), $length));
    my @chosen = 1 .. @pieces;
    srand($seed + $number);
    @chosen = (shuffle(@chosen))[0 .. $ENV{PBA_LIVES} - 1] if $ENV{PBA_LIVES};
    for my $life (@chosen) {
        my $name = "all of length $length, life $life of " . @pieces . ", $text";
        one_life($name, $backend, $how, 'ok', $pieces[$life - 1]->@*, 'ok');
    }
    return;
}

# Chooses what was tried least in this state. Every second time, a backup follows at once, so that nothing else can
# hide what the event has damaged.
sub next_events ($tried, @all) {
    my $least = min(map { $tried->{$_} // 0 } @all);
    my @least = grep { ($tried->{$_} // 0) == $least } @all;
    my $event = $least[rand(@least)];
    return $tried->{$event}++ % 2 ? $event : ($event, 'ok');
}

# Lives that try every event in every state which they reach. The provider must support IDs.
sub all_states ($backend, $number) {
    my ($how) = some_way($backend, $number);
    $how->{provider} = 'chain';
    my $text = join(', ', map { "$_ $how->{$_}" } qw(naming persistent));
    my @all = $Life->events('chain');
    srand($seed + $number);
    my ($events, $lives, %tried) = (0, 0);
    while ($events < $ENV{PBA_STATES}) {
        my $life = new_life($backend, $how->%*, seed => $seed + $lives++);
        my $problem = $life->run('ok');
        my $end = $life->counts->{events} + 60;
        $problem = $life->run(next_events($tried{ $life->state } //= {}, @all))
            while !defined($problem) && $life->counts->{events} < $end;
        $problem //= live($life, 'ok');
        is($problem, undef, "life $lives of $number, $text")
            or push(@failed, "states, life $lives");
        note_counts($life);
        $events += $life->counts->{events};
    }
    my @pairs = map { values $_->%* } values %tried;
    diag(
        "$backend, $number: ",
        scalar(keys %tried),
        ' states, ', scalar(@pairs), ' pairs of state and event'
    );
    return;
}

# The known lives that are possible with this backend, or a part of them.
sub known_lives ($backend) {
    my @lives = grep {
        my $how = $_->[1];
        $backend ne 'pve' || !($how->{persistent} || ($how->{naming} // '') eq 'qdev');
    } @known;
    srand($seed);
    return $ENV{PBA_FULL} ? @lives : $lives[rand(@lives)];
}

# All lives, or one.
sub lives ($backend, $is_known) {
    for my $life ($is_known || $ENV{PBA_FULL} ? known_lives($backend) : ()) {
        my ($name, $how, @events) = $life->@*;
        one_life($name, $backend, $how, @events);
    }
    random_lives($backend, $ENV{PBA_FULL} ? 60 : 1) if !$is_known || $ENV{PBA_FULL};
    all_sequences($backend, $_) for $ENV{PBA_FULL} ? 1 .. 6 : ();
    return;
}

my @backends = PBA::Test::Backend->names;
srand($seed);
@backends = $backends[rand(@backends)] if !$ENV{PBA_FULL};
my $is_known = rand() < 0.5;
for my $backend (@backends) {
    subtest "backend $backend" => sub {
        return lives($backend, $is_known) if !$ENV{PBA_STATES};
        all_states($backend, $_) for 1 .. 3;
    };
}

diag("seed $seed", $ENV{PBA_FULL} ? '' : ', a part of them',
    ': ', join(', ', map { "$count{$_} $_" } sort keys %count));
diag("wrong: $_") for @failed;

done_testing;
