package PVE::BackupAccess::Retention;

# Which archives of a guest are kept. Pure: it looks at what it is given, and removes nothing.

use v5.36;

use Exporter qw(import);
use POSIX ();

use PVE::BackupAccess::Argument qw(bad_argument);

our @EXPORT_OK = qw(check_keep marks periods);

# By what the archives of one period are known, in local time. Every archive is a period for keep-last.
my @periods = (
    ['keep-last', undef],
    ['keep-hourly', '%Y-%m-%d %H'],
    ['keep-daily', '%Y-%m-%d'],
    ['keep-weekly', '%G-%V'],
    ['keep-monthly', '%Y-%m'],
    ['keep-yearly', '%Y'],
);

sub periods () {
    return map { $_->[0] } @periods;
}

# Dies unless it keeps something.
sub check_keep ($keep) {
    my %known = map { $_ => 1 } periods();
    for my $name (sort keys $keep->%*) {
        bad_argument("there is no rule '$name' for what is kept") if !$known{$name};
        bad_argument("$name must be a whole number from 0 on, not '$keep->{$name}'")
            if ($keep->{$name} // '') !~ m/\A[0-9]{1,9}\z/;
    }
    bad_argument('what is kept must be said, and be something: ' . join(', ', periods()))
        if !grep { $_ } values $keep->%*;
    return;
}

my sub period_of ($format, $archive) {
    return $archive->{name} if !defined($format);
    return POSIX::strftime($format, localtime($archive->{time}));
}

# One rule: of each of the newest $count periods that no archive is kept of yet, the newest archive.
# Those of a period that an earlier rule has kept one of are covered by it.
my sub keep_by ($count, $format, $kept, @newest_first) {
    my %covered = map { period_of($format, $_) => 1 } grep { $kept->{ $_->{name} } } @newest_first;
    for my $archive (@newest_first) {
        my $period = period_of($format, $archive);
        next if $covered{$period}++;
        last if $count-- <= 0;
        $kept->{ $archive->{name} } = 1;
    }
    return;
}

# { name => 1 } of those that the rules keep of one device's archives.
my sub kept_of_device ($keep, @newest_first) {
    my %kept;
    for my $rule (@periods) {
        my ($name, $format) = $rule->@*;
        keep_by($keep->{$name} // 0, $format, \%kept, @newest_first);
    }
    return \%kept;
}

# Whether each device of the archive is in a whole archive that is newer and kept.
my sub is_replaced ($archive, $newest_kept) {
    my @devices = keys $archive->{devices}->%*;
    my @held = grep { ($newest_kept->{$_} // -1) <= $archive->{time} } @devices;
    return @devices && !@held;
}

# { name => 'keep' | 'remove' | 'protected' | 'broken' } of one guest's archives. Each is a hash ref with
# name, time, protected, and devices: { device => whether it can be restored }. A device's archives
# are counted apart from others', and only those that can be restored count, and are not protected. One
# that is broken is removed only when whole ones that are newer are kept of each of its devices.
sub marks ($archives, $keep) {
    check_keep($keep);
    my @newest_first
        = sort { $b->{time} <=> $a->{time} || $b->{name} cmp $a->{name} } $archives->@*;
    my (%kept, %newest_kept);
    for my $device (map { keys $_->{devices}->%* } @newest_first) {
        next if exists($newest_kept{$device});
        my @whole = grep { $_->{devices}{$device} } @newest_first;
        my $of_device = kept_of_device($keep, grep { !$_->{protected} } @whole);
        %kept = (%kept, $of_device->%*);
        ($newest_kept{$device})
            = map { $_->{time} } grep { $of_device->{ $_->{name} } || $_->{protected} } @whole;
    }
    return {
        map {
                  $_->{name} => $_->{protected} ? 'protected'
                : $kept{ $_->{name} } ? 'keep'
                : is_replaced($_, \%newest_kept) ? 'remove'
                : 'broken'
        } @newest_first
    };
}

1;
