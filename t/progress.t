# The progress that the command shows: the rate is that of the copy, also after other lines.

use v5.36;

use Test::More;

use PVE::BackupAccess::CLI::Progress;

my $mib = 1 << 20;
my $time = 1000;

# What is shown of a copy of 5 MiB/s. lines: { second => a line of the log }
sub shown (%lines) {
    no warnings 'redefine';
    local *PVE::BackupAccess::CLI::Progress::now = sub { return $time };
    open(my $kept, '>&', \*STDERR) or die "dup: $!\n";
    close(STDERR);
    open(STDERR, '>', \my $text) or die "open: $!\n";
    my $progress = PVE::BackupAccess::CLI::Progress->new;
    for my $second (0 .. 40) {
        $time++;
        $progress->tell($lines{$second}) if $lines{$second};
        $progress->update('disk0', 5 * $mib * $second, 200 * $mib);
    }
    $progress->end;
    close(STDERR);
    open(STDERR, '>&', $kept) or die "dup: $!\n";
    return split(m/\n/, $text);
}

for my $lines ({}, { 17 => 'disk1: stored' }, { map { $_ => 'a line' } 5 .. 30 }) {
    my $what = join(' ', 'with', scalar(keys $lines->%*), 'other lines');
    my @progress = grep { m/^disk0: / } shown($lines->%*);
    cmp_ok(scalar(@progress), '>=', 3, "$what: every ten seconds");
    is_deeply([grep { !m{ 5[.]0 MiB/s$} } @progress], [], "$what: the rate");
}

done_testing;
