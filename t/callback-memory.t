# A call of the core may run a callback millions of times, and memory must not grow.
#
# One QEMU is enough: none is started.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::ScriptedQEMU;
use PBA::Test::Watchdog;
use PVE::BackupAccess::Volume;

my $block = 4096;
my $regions = 500_000;
my $size = 2 * $block * $regions;

# Calls both code refs of copy half a million times each. A leak of 8 bytes per call would be 3,800 KiB; a huge
# page has 2,048 KiB.
subtest 'a copy' => sub {
    my $file = "$dir/source.raw";
    open(my $handle, '+>', $file) or die "$file: $!\n";
    truncate($handle, $size) or die "$file: $!\n";
    my ($asked, $written) = (0, 0);
    my $volume = PVE::BackupAccess::Volume->open(
        'disk',
        {
            size => $size,
            'bitmap-mode' => 'new',
            'file-handle' => $handle,
            'next-dirty-region' =>
                sub { return $asked++ < $regions ? (2 * $block * $asked - $block, $block) : () },
        },
    );
    my $before;
    my $write = sub ($offset, $data) {
        $written++;
        return if $written != 10_000;
        reset_peak();
        $before = peak_rss_kib();
    };
    $volume->copy(to => $write, discard => 0);
    my $grown = peak_rss_kib() - $before;
    cmp_ok($asked, '>=', $regions, 'next-dirty-region was called for each region');
    cmp_ok($written, '>=', $regions, 'the target was called for each region');
    cmp_ok($grown, '<', 3072, 'memory stays') or diag("$grown KiB more");
};

# A leak in callbacks that are called less often would show in the reference count of the object.
subtest 'code ref, log' => sub {
    my ($access, %counts);
    my $count = sub ($of) { push($counts{$of}->@*, Internals::SvREFCNT($$access)) if $access };
    my $answer = answers({ pve_returns() });
    my $qmp = sub ($command, $arguments) {
        $count->('qmp');
        return $answer->($command, $arguments);
    };
    $access = new_access($qmp, log => sub (@) { $count->('log') });
    $access->setup(\@one);
    $access->volumes('nbd');
    $access->teardown(0);
    cmp_ok(scalar($counts{qmp}->@*), '>', 10, 'commands were carried');
    for my $of (sort keys %counts) {
        my ($most) = sort { $b <=> $a } $counts{$of}->@*;
        cmp_ok($most, '<=', 4, "$of: no call adds a reference");
    }
};

done_testing;
