# Everything that a provider does, in taint mode (perl -T) with all external data tainted: setup to teardown,
# recover, status and capabilities, on both backends.
#
# One QEMU is enough: the origin of data does not depend on QEMU.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use PBA::Test::Backend;

my $program = <<'PERL';
use v5.36;
use PVE::BackupAccess;
use PVE::BackupAccess::Volume;

my ($device, $backend, %options) = @ARGV;
my @places = $backend eq 'upstream' ? qw(run-dir fleecing-dir) : qw(run-dir);
my %local = map { $_ => $options{$_} } 'qmp', @places;
my %target = (%local, 'target-id' => $options{'target-id'});
say PVE::BackupAccess->capabilities(qmp => $options{qmp})->{backend};
my $access = PVE::BackupAccess->new(%options);
$access->setup([{ device => $device, 'bitmap-mode' => 'use' }]);
my $volumes = $access->volumes('nbd');
my $volume = PVE::BackupAccess::Volume->open($device, $volumes->{$device});
my $bytes = 0;
while (my ($offset, $length) = $volume->next_dirty_region) {
    $bytes += length($volume->pread($offset, $length > 65536 ? 65536 : $length));
}
my $statistics = $volume->copy(to => sub ($offset, $data) { return }, discard => 1);
say $bytes > 0 && $statistics->{'bytes-read'} > 0 ? 'data' : 'no data';
$volume->close;
PVE::BackupAccess->status(%local);
$access->teardown(1);
PVE::BackupAccess->recover(%target);
say 'done';
PERL

for my $name (PBA::Test::Backend->names) {
    my $backend = PBA::Test::Backend->start(
        name => $name,
        disks => [{ id => 'disk0', size => 16 << 20 }],
        guest => 0
    );
    my $outside = $backend->outside;
    my @arguments = ($backend->device('disk0'), $name, $backend->options);
    my @command = ($^X, '-T', '-Iblib/lib', '-Iblib/arch', '-e', $program, @arguments);
    open(my $pipe, '-|') || do {
        open(STDERR, '>&', \*STDOUT) or die "cannot redirect: $!\n";
        exec(@command) or die "cannot run perl: $!\n";
    };
    my $said = do { local $/; <$pipe> };
    close($pipe);
    is($?, 0, "backend $name: exit status");
    is($said, "$name\ndata\ndone\n", 'all steps are done');
    is_deeply($backend->outside, $outside, 'nothing is left');
}

done_testing();
