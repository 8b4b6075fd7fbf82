# As many NBD clients at a time as come: by default a QEMU lets in 100.

use v5.36;

use lib 't/lib';

use Test::More;

use PBA::Test::Backend;

my $count = 120;

for my $name (PBA::Test::Backend->names) {
    subtest $name => sub {
        my $backend = PBA::Test::Backend->start(
            name => $name,
            disks => [{ id => 'disk0', size => 1 << 20 }],
            guest => 0,
        );
        my $access = $backend->access;
        $access->setup($backend->devices('new'));
        my $device = $backend->device('disk0');
        my $volumes = $access->volumes('nbd');
        my @open;
        for my $n (1 .. $count) {
            local $SIG{ALRM} = sub { die "no answer\n" };
            alarm(10);
            my $volume = eval { PVE::BackupAccess::Volume->open($device, $volumes->{$device}) }
                or last;
            alarm(0);
            push(@open, $volume);
        }
        is(scalar(@open), $count, "$count clients at a time");
        is(length($_->pread(0, 4096)), 4096, 'each is served') for $open[0], $open[-1];
        undef(@open);
        $access->teardown(1);
        $backend->check_manners;
    };
}

done_testing();
