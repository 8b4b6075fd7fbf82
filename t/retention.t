# Which archives are kept: by each rule, by several rules together, with several devices, and with broken
# archives.

use v5.36;

use List::Util qw(max uniq);
use POSIX qw(mktime strftime);
use Test::More;

use PVE::BackupAccess::Retention qw(check_keep marks periods);

$ENV{TZ} = 'Europe/Vienna';
POSIX::tzset();

# An archive with one intact disk, made at that local time: "2026-11-29 12:30".
sub archive ($when, %more) {
    my ($year, $month, $day, $hour, $minute) = $when =~ m/\A(\d+)-(\d+)-(\d+)(?: (\d+):(\d+))?\z/;
    my $time = mktime(0, $minute // 0, $hour // 0, $day, $month - 1, $year - 1900, 0, 0, -1);
    return { name => $when, time => $time, devices => { disk => 1 }, %more };
}

sub kept ($archives, %keep) {
    my $marks = marks($archives, \%keep);
    return join(' ', sort grep { $marks->{$_} eq 'keep' } keys $marks->%*);
}

subtest 'each rule' => sub {
    my @hours = map { archive("2026-11-29 $_") } qw(10:00 10:30 11:00 12:00 12:59);
    is(
        kept(\@hours, 'keep-last' => 2),
        '2026-11-29 12:00 2026-11-29 12:59',
        'keep-last counts archives of the same hour'
    );
    is(
        kept(\@hours, 'keep-hourly' => 2),
        '2026-11-29 11:00 2026-11-29 12:59',
        'the last of each hour'
    );
    my @days = map { archive($_) } qw(2025-12-28 2025-12-29 2025-12-31 2026-01-01 2026-01-04);
    is(kept(\@days, 'keep-daily' => 2), '2026-01-01 2026-01-04', 'days');
    is(
        kept(\@days, 'keep-weekly' => 9),
        '2025-12-28 2026-01-04',
        'a week begins on Monday, and is of the year that most of it is in'
    );
    is(kept(\@days, 'keep-monthly' => 9), '2025-12-31 2026-01-04', 'months');
    is(kept(\@days, 'keep-yearly' => 9), '2025-12-31 2026-01-04', 'years');
    is(kept(\@days, 'keep-yearly' => 1), '2026-01-04', 'the last year');
};

subtest 'rules together' => sub {
    my @all = map { archive($_) }
        map { ("2026-11-$_ 01:00", "2026-11-$_ 13:00") } map { sprintf('%02d', $_) } 20 .. 29;
    is(
        kept(\@all, 'keep-last' => 1, 'keep-daily' => 2),
        '2026-11-27 13:00 2026-11-28 13:00 2026-11-29 13:00',
        'a day that an earlier rule covers does not count'
    );
    is(
        kept(\@all, 'keep-last' => 3, 'keep-daily' => 1),
        '2026-11-27 13:00 2026-11-28 01:00 2026-11-28 13:00 2026-11-29 01:00 2026-11-29 13:00'
            =~ s/2026-11-28 01:00 //r,
        'keep-daily keeps an archive of a day without kept archives'
    );

    # The week of Tuesday the 30th also contains Thursday the 2nd.
    my @weeks = map { archive($_) } qw(2026-06-21 2026-06-28 2026-06-30 2026-07-02);
    is(
        kept(\@weeks, 'keep-weekly' => 1, 'keep-monthly' => 1),
        '2026-06-28 2026-07-02',
        'an archive that a weekly rule removes is not the last of its month'
    );
    @weeks = map { archive($_) } qw(2025-12-21 2025-12-28 2025-12-31 2026-01-02);
    is(
        kept(\@weeks, 'keep-weekly' => 1, 'keep-yearly' => 1),
        '2025-12-28 2026-01-02',
        'an archive that a weekly rule removes is not the last of its year'
    );
};

subtest 'an hour that the clock has twice' => sub {
    my $first = archive('2026-10-25 01:59')->{time} + 1800;
    my @twice = map { { name => $_, time => $first + $_ * 3600, devices => { disk => 1 } } } 0, 1;
    is(kept(\@twice, 'keep-hourly' => 2), '1', "the clock's repeated hour counts as one");
};

subtest 'devices' => sub {
    my @archives = (
        archive('2026-11-01', devices => { a => 1, b => 1 }),
        archive('2026-11-02', devices => { a => 1 }),
        archive('2026-11-03', devices => { a => 1 }),
    );
    is(
        kept(\@archives, 'keep-last' => 1),
        '2026-11-01 2026-11-03',
        "a device's only archive is not removed by others'"
    );
};

subtest 'broken archives' => sub {
    my @archives = (
        archive('2026-11-01'),
        archive('2026-11-02', devices => { disk => 0 }),
        archive('2026-11-03'),
        archive('2026-11-04', devices => { disk => 0 }),
        archive('2026-11-05', devices => {}),
    );
    is_deeply(
        marks(\@archives, { 'keep-last' => 1 }),
        {
            '2026-11-01' => 'remove',
            '2026-11-02' => 'remove',
            '2026-11-03' => 'keep',
            '2026-11-04' => 'broken',
            '2026-11-05' => 'broken',
        },
        'is not counted, and not removed before a newer one replaces it'
    );
    @archives = (
        archive('2026-11-01', devices => { a => 1, b => 1 }),
        archive('2026-11-02', devices => { a => 1, b => 0 }),
        archive('2026-11-03', devices => { a => 0, b => 0 }),
    );
    is(
        kept(\@archives, 'keep-last' => 1),
        '2026-11-01 2026-11-02',
        'the last archive of each device is kept'
    );
};

subtest 'protected archives' => sub {
    my @archives = map { archive("2026-11-0$_", protected => $_ == 2 || $_ == 3) } 1 .. 3;
    is_deeply(
        marks(\@archives, { 'keep-last' => 1 }),
        {
            '2026-11-01' => 'keep',
            '2026-11-02' => 'protected',
            '2026-11-03' => 'protected',
        },
        'stays, and is not counted'
    );
};

# Random archives and rules, compared with properties that always hold.
subtest 'random archives and rules' => sub {
    my $seed = $ENV{PBA_SEED} // time;
    diag("PBA_SEED=$seed");
    srand($seed);
    for my $round (1 .. 300) {
        my %keep = map { $_ => int(rand(4)) } grep { rand() < 0.5 } periods();
        $keep{'keep-last'} = 1 if !grep { $_ } values %keep;
        my $time = 1_790_000_000;
        my @archives = map {
            {
                name => $_,
                time => $time += int(rand(86_400 * 10)),
                protected => rand() < 0.1 ? 1 : 0,
                devices => { map { $_ => rand() < 0.8 ? 1 : 0 } grep { rand() < 0.7 } qw(a b c) },
            }
        } 'A' .. 'Z';
        my $problem = problem_of(\@archives, \%keep);
        is($problem, undef, "round $round") or last;
    }
};

sub problem_of ($archives, $keep) {
    my $marks = marks($archives, $keep);
    my %of = map { $_->{name} => $_ } $archives->@*;
    my $most = 0;
    $most += $_ for values $keep->%*;
    for my $device (qw(a b c)) {
        my @whole = grep { $_->{devices}{$device} && !$_->{protected} } $archives->@*;
        next if !@whole;
        return "the last of $device is not kept" if $marks->{ $whole[-1]{name} } ne 'keep';
        my @others = grep { !$_->{devices}{$device} } $archives->@*;
        my $alone = marks(
            [
                map {
                    { $_->%*, devices => { $device => 1 } }
                } @whole
            ],
            $keep
        );
        my @kept = grep { $alone->{$_} eq 'keep' } keys $alone->%*;
        return "too many of $device are kept" if @kept > $most;
        return "one of $device is lost, since others are there"
            if grep { $marks->{$_} ne 'keep' } @kept;
    }
    for my $name (grep { $marks->{$_} eq 'remove' } keys $marks->%*) {
        for my $device (keys $of{$name}{devices}->%*) {
            return "$name is removed, and no newer one has $device" if !grep {
                       $_->{devices}{$device}
                    && $_->{time} > $of{$name}{time}
                    && $marks->{ $_->{name} } =~ m/\A(?:keep|protected)\z/
            } $archives->@*;
        }
    }
    return undef;
}

subtest 'invalid rules' => sub {
    for my $keep (
        {},
        { 'keep-last' => 0 },
        { 'keep-last' => -1 },
        { 'keep-hours' => 1 },
        { 'keep-last' => 'all' }
        )
    {
        ok(!eval { check_keep($keep); 1 }, 'refused') or next;
        is($@->class, 'ArgumentError', 'class');
        like($@, qr/keep/, 'the message names the rule');
    }
};

done_testing();
