package PVE::BackupAccess::Retention;

# Decides which archives of a guest are kept. Removes nothing.

use v5.36;

use Exporter qw(import);
use POSIX ();

use PVE::BackupAccess::Argument qw(bad_argument);

our @EXPORT_OK = qw(check_keep marks periods);

# The period of an archive, in local time. For keep-last, every archive is a period of its own.
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

# Dies if the rules keep nothing.
sub check_keep ($keep) {
    my %known = map { $_ => 1 } periods();
    for my $name (sort keys $keep->%*) {
        bad_argument("unknown retention rule '$name'") if !$known{$name};
        bad_argument("$name must be a whole number from 0 on, not '$keep->{$name}'")
            if ($keep->{$name} // '') !~ m/\A[0-9]{1,9}\z/;
    }
    bad_argument('the retention rules keep nothing - set at least one of ' . join(', ', periods()))
        if !grep { $_ } values $keep->%*;
    return;
}

my sub period_of ($format, $archive) {
    return $archive->{name} if !defined($format);
    return POSIX::strftime($format, localtime($archive->{time}));
}

# Applies one rule: keeps the newest archive of each of the newest $count periods of which no
# archive is kept yet, and does away with the others of these periods: no later rule keeps one of
# those, although a month may begin in the middle of a week. An archive of a period of which an
# earlier rule keeps one is covered by that.
my sub keep_by ($count, $format, $is_kept, @newest_first) {
    my %covered
        = map { period_of($format, $_) => 1 } grep { $is_kept->{ $_->{name} } } @newest_first;
    my %taken;
    for my $archive (grep { !defined($is_kept->{ $_->{name} }) } @newest_first) {
        my $period = period_of($format, $archive);
        next if $covered{$period};
        last if !$taken{$period} && keys %taken >= $count;
        $is_kept->{ $archive->{name} } = $taken{$period}++ ? 0 : 1;
    }
    return;
}

# { name => 1 } of the archives of one device that the rules keep.
my sub kept_of_device ($keep, @newest_first) {
    my %is_kept;
    for my $rule (@periods) {
        my ($name, $format) = $rule->@*;
        keep_by($keep->{$name} // 0, $format, \%is_kept, @newest_first);
    }
    return { map { $_ => 1 } grep { $is_kept{$_} } keys %is_kept };
}

# Whether each device of the archive is also in a newer, intact archive that is kept.
my sub is_replaced ($archive, $newest_kept) {
    my @devices = keys $archive->{devices}->%*;
    my @held = grep { ($newest_kept->{$_} // -1) <= $archive->{time} } @devices;
    return @devices && !@held;
}

# { name => 'keep' | 'remove' | 'protected' | 'broken' } of one guest's archives. Each is a hash ref
# with name, time, protected, and devices: { device => whether it can be restored }. The archives of
# each device are counted separately, and only those count that can be restored and are not
# protected. A broken archive is only removed when newer, intact archives of each of its devices are
# kept.
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

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Retention - which archives of a guest to keep

=head1 SYNOPSIS

=for run store

    use PVE::BackupAccess::Retention qw(marks);

    my $marks = marks(
        [
            { name => 'monday', time => 1_764_547_200, protected => 0, devices => { 'drive-scsi0' => 1 } },
            { name => 'tuesday', time => 1_764_633_600, protected => 0, devices => { 'drive-scsi0' => 1 } },
        ],
        { 'keep-last' => 1 }
    );
    say "$_: $marks->{$_}" for sort keys $marks->%*;    # monday: remove, tuesday: keep

=head1 DESCRIPTION

The retention rules of Proxmox VE (C<prune-backups>), applied to a list of archives. The functions read and remove
nothing. L<PVE::BackupAccess::Provider::Qcow2Chain/prune> uses them; another provider can use them too.

=head1 FUNCTIONS

=head2 periods

=for run store

    use PVE::BackupAccess::Retention qw(periods);

    say for periods();

Returns the names of the rules in the order in which they apply: C<keep-last>, C<keep-hourly>, C<keep-daily>,
C<keep-weekly>, C<keep-monthly>, C<keep-yearly>. Takes no arguments.

=head2 check_keep

=for run store

    use PVE::BackupAccess::Retention qw(check_keep);

    check_keep({ 'keep-last' => 3, 'keep-daily' => 7 });

Takes a hash ref of rules to numbers. Returns nothing.

Errors: C<ArgumentError> if a rule does not exist, a number is not a whole number from 0 on, or the rules keep nothing.

=head2 marks

=for run store

    use PVE::BackupAccess::Retention qw(marks);

    my @archives = ({ name => 'monday', time => 1_764_547_200, devices => { 'drive-scsi0' => 1 } });
    say marks(\@archives, { 'keep-last' => 1 })->{monday};    # keep

Takes an array ref of the archives of one guest, and a hash ref of rules. An archive is a hash ref with C<name>, C<time>
(seconds since 1970), C<protected>, and C<devices>, a hash that says for each device whether it can be restored. Returns a
hash ref of names to marks:

=over

=item C<keep> - a rule keeps the archive

=item C<remove> - no rule keeps it

=item C<protected> - it is protected; it is kept and not counted

=item C<broken> - it cannot be restored, but no newer intact archive that is kept replaces it

=back

The archives of each device are counted separately. Only archives that are not protected and can be restored are counted.

Errors: those of L</check_keep>.

=cut
