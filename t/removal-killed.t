# A removal is killed at each call that changes the store, and so is the next one, which completes it. After each kill, every
# archive that is listed can be read, also if nothing may be completed: the store is read-only, or another process reads.
#
# One QEMU is enough: qemu-img and qemu-nbd only use files.
#
# A plain run tries some of the calls, chosen by a seed; PBA_FULL=1 all of them.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";
use PBA::Test::Strike qw(strike_at);

use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);

use PBA::Test::Chain;
use PBA::Test::Container qw(in_own_mounts);
use PVE::BackupAccess::Provider::Store::DirectoryLock qw(try_lock);

my $seed = 20261130;
srand($seed);
note("seed $seed");

my $chain = PBA::Test::Chain->new->add_archives(4);
my @names = $chain->names;
my $store = $chain->store;
my %expected = $chain->{expected}->%*;
my $can_mount = $> == 0 && in_own_mounts();

sub content ($file) {
    open(my $fh, '<', $file) or return '';
    return <$fh> // '';
}

# Waits for the programs of a killed process, which end with it.
sub wait_for_programs ($text) {
    for (1 .. 1000) {
        return if !grep { content($_) =~ m/\Q$text\E/ } glob('/proc/[0-9]*/cmdline');
        sleep(0.02);
    }
    die "programs go on\n";
}

# Runs code in a process that is killed at a call. Returns whether it was.
sub is_killed_at ($number, $code) {
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        $ENV{TMPDIR} = $chain->tmp;
        strike_at($number, sub ($where) { kill(KILL => $$) });
        my $done = eval { $code->(); 1 };
        print {*STDERR} $@ if !$done;
        POSIX::_exit($done ? 0 : 1);
    }
    waitpid($pid, 0);
    die "the code failed\n" if $? == 1 << 8;
    wait_for_programs($chain->store);
    return $? == 9;
}

# What is wrong with the listed archives, as texts.
sub problems () {
    my $provider = $chain->provider;
    my @problems;
    for my $entry ($provider->list(100)->@*) {
        my $name = $entry->{volname};
        my $look = sub () {
            my $problem = $chain->problem($name);
            return ($problem || (), $provider->verify($name)->@*);
        };
        my @found = eval { $look->() };
        push(@problems, map { "$name: $_" } $@ || (), @found, ($entry->{damaged} // [])->@*);
    }
    return @problems if $chain->{'is read-only'};
    my $modes = eval { $chain->next_modes } // { all => $@ };
    return (@problems,
        map { "the next backup of $_: $modes->{$_}" }
        grep { $modes->{$_} ne 'use' } keys $modes->%*);
}

# The same beside a reader, so that nothing can be completed.
sub problems_beside_reader () {
    my $reading = try_lock($chain->guest_dir, 'read');
    return problems();
}

# The same in a store that is read-only.
sub problems_of_read_only () {
    my $path = $chain->store;
    system("mount --bind $path $path && mount -o remount,bind,ro $path") == 0 or die "mount: $?\n";
    local $chain->{'is read-only'} = 1;
    my @problems = eval { problems() };
    push(@problems, $@) if $@;
    system('umount', $path) == 0 or die "umount: $?\n";
    return @problems;
}

my %ways = (
    'beside a reader' => \&problems_beside_reader,
    $can_mount ? ('read-only' => \&problems_of_read_only) : (),
);

sub prune () { $chain->provider->prune(100, 2) }
sub remove () { $chain->provider->remove($names[2]) }

my %actions = (
    'a removal' => [\&remove, $names[2]],
    'a prune' => [\&prune, @names[0, 1]],
);

# Begins with a new copy. What may be gone is expected only if it is listed.
sub start_again () {
    $chain->use_copy($store);
    $chain->{expected} = {%expected};
    return;
}

sub check_readable ($text, @may_be_gone) {
    my %there = map { $_ => 1 } $chain->names;
    my @lost = grep { !$there{$_} } sort keys $chain->{expected}->%*;
    my %may = map { $_ => 1 } @may_be_gone;
    is_deeply([grep { !$may{$_} } @lost], [], "$text: none is lost");
    for my $way (sort keys %ways) {
        $chain->log;
        is_deeply([$ways{$way}->()], [], "$text: all can be read, $way") or diag($chain->log);
    }
    return;
}

for my $action (sort keys %actions) {
    my ($code, @gone) = $actions{$action}->@*;
    subtest $action => sub {
        for (my $number = 1;; $number++) {
            next if !$ENV{PBA_FULL} && $number > 1 && rand() > 0.006;
            start_again();
            my $text = "call $number";
            is_killed_at($number, $code) or last;
            check_readable($text, @gone);
            if (rand() < 0.5) {    # also the one that completes it
                my $second = 1 + int(rand(20));
                is_killed_at($second, sub () { $chain->provider->prune(100, 9) });
                check_readable("$text, and $second of the next prune", @gone);
            }
            $chain->provider->prune(100, 9);
            my %there = map { $_ => 1 } $chain->names;
            $chain->forget(grep { !$there{$_} } @gone);
            $chain->check($text);
        }
    };
}

done_testing;
