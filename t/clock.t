# The machine's clock is set while something waits: nothing waits for a shorter or much longer time.
#
# One QEMU is enough: none is started.

use v5.36;

use Test::More;
use Time::HiRes qw(CLOCK_MONOTONIC clock_gettime);

my ($step, $set) = (0, 0);

# Before a module can import it. Whoever looks at the clock sees that it has been set once more.
BEGIN {
    my $time = \&Time::HiRes::time;
    no warnings qw(once redefine);
    *Time::HiRes::time = sub : prototype() { return $time->() + ($set += $step) };
    *CORE::GLOBAL::time = sub : prototype() { return int($time->() + ($set += $step)) };
}

use PVE::BackupAccess::Libvirt::Shell;
use PVE::BackupAccess::Wait qw(keep_trying pause);

my $hour = 3600;
my $seconds = 0.3;
my $enough = 20;

sub virsh ($code) {
    my $shell = PVE::BackupAccess::Libvirt::Shell->new(undef, $seconds);
    $shell->{command} = ['sleep'];
    eval { $code->($shell) };
    die $@ if $@ !~ m/did not answer within/;
    return;
}

my %waits = (
    'a pause' => sub () { pause($seconds) },
    'a limited number of tries' => sub () {
        keep_trying($seconds, sub () { 0 });
    },
    'virsh' => sub () {
        virsh(sub ($shell) { $shell->run('1000') });
    },
    'virsh for many commands' => sub () {
        virsh(
            sub ($shell) {
                push($shell->{command}->@*, '1000');
                $shell->ask('list');
            }
        );
    },
);

for my $direction (-1, 1) {
    for my $name (sort keys %waits) {
        my $what = "$name, and the clock is set " . ($direction < 0 ? 'back' : 'forward');
        local $SIG{ALRM} = sub { die "it does not end\n" };
        my $began = clock_gettime(CLOCK_MONOTONIC);
        $step = $direction * $hour;
        alarm($enough);
        my $error = eval { $waits{$name}->(); 1 } ? '' : $@;
        alarm(0);
        $step = 0;
        is($error, '', "$what: the wait ends");
        cmp_ok(clock_gettime(CLOCK_MONOTONIC) - $began, '>=', $seconds, "$what: but not before");
    }
}

done_testing;
