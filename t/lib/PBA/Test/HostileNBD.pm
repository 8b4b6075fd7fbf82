package PBA::Test::HostileNBD;

# Shared by the tests that read volumes from NBD servers that behave correctly, unusually or maliciously.

use v5.36;

use Exporter qw(import);
use POSIX ();
use Test::More;
use Time::HiRes qw(alarm sleep time);

use PBA::Test::NBDServer qw(open_volume);

our @EXPORT = qw(
    $KiB $MiB $GiB @blocks
    start open_volume map_of expected_map error_class map_dies pattern in_child interrupted status_of
    dies_by_alarm
);

our $KiB = 1 << 10;
our $MiB = 1 << 20;
our $GiB = 1 << 30;
our @blocks = map { [$_ * 128 * $KiB, 64 * $KiB] } 0 .. 63;

# A server ends with its object; these servers must outlive the volumes that a test opens on them.
my @servers;

sub start (%options) {
    push @servers, PBA::Test::NBDServer->start(size => 8 * $MiB, export => 'disk', %options);
    shift(@servers) if @servers > 4;
    return $servers[-1];
}

sub map_of ($volume) {
    my @map;
    while (my ($offset, $length) = $volume->next_dirty_region) {
        push @map, [$offset, $length];
        die "the map does not end\n" if @map > 1_000_000;
    }
    return \@map;
}

# The canonical map: adjacent ranges are joined, and the map ends at the size.
sub expected_map ($size, @ranges) {
    my @map;
    for my $range (@ranges) {
        my ($offset, $length) = @$range;
        $length = $size - $offset if $offset + $length > $size;
        if (@map && $map[-1][0] + $map[-1][1] == $offset) {
            $map[-1][1] += $length;
        }
        else {
            push @map, [$offset, $length];
        }
    }
    return \@map;
}

sub error_class ($error) {
    return ref($error)
        && $error->isa('PVE::BackupAccess::Error') ? $error->class : "no object: $error";
}

# The map must die, and every later call too: nothing after the error may look like the end of the map.
sub map_dies ($server, $class, $name, $pattern = qr/./) {
    my $volume = open_volume($server);
    my @map;
    my $done = eval {
        while (my ($offset, $length) = $volume->next_dirty_region) {
            push @map, [$offset, $length];
            die "the map does not end\n" if @map > 1_000_000;
        }
        1;
    };
    my $error = $@;
    ok(!$done, "$name: dies");
    like(error_class($error), $class, "$name: class") or diag($error);
    like("$error", qr/\Adevice disk: .*$pattern.*\n\z/, "$name: message");
    for my $method (qw(next_dirty_region dirty_regions)) {
        my @regions = eval { $volume->$method($method eq 'dirty_regions' ? 10 : ()) };
        my $again = $@;
        ok($again && !@regions, "$name: $method dies again");
        like(error_class($again), qr/Error\z/, "$name: with an error of ours") or diag($again);
    }
    ok(eval { $volume->close; 1 }, "$name: closing");
    return @map;
}

sub pattern ($offset, $length) { return PBA::Test::NBDServer::pattern($offset, $length) }

sub in_child ($code) {
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        open(STDERR, '>', '/dev/null') or POSIX::_exit(126);
        my $status = eval { $code->() ? 0 : 1 } // 2;

        # Global destruction is part of the test.
        Test::More->builder->no_ending(1);
        exit($status);
    }
    return status_of($pid);
}

# Checks in a separate process that a signal ends the code with the exception of its handler, and that the
# process then ends. Its exit status is 7 in this case.
sub interrupted ($code, $seconds) {
    my $pid = fork() // die "cannot fork: $!\n";
    if (!$pid) {
        my $object = bless({}, 'Interrupted');
        local $SIG{ALRM} = sub { die $object };
        alarm(1);
        my $done = eval { $code->(); 1 };
        my $error = $@;
        exit(!$done && ref($error) eq 'Interrupted' && $error == $object ? 7 : 8);
    }
    return status_of($pid, $seconds) >> 8;
}

# The exit status of the child, which is killed if it hangs.
sub status_of ($pid, $seconds = 20) {
    my $deadline = time + $seconds;
    while (waitpid($pid, POSIX::WNOHANG()) == 0) {
        kill('KILL', $pid) if time > $deadline;
        sleep(0.01);
    }
    return $?;
}

sub dies_by_alarm ($code, $name) {
    local $SIG{ALRM} = sub { die { from => 'handler' } };
    my $started = time;
    alarm(0.3);
    my $done = eval { $code->(); 1 };
    my $error = $@;
    alarm(0);
    ok(!$done, "$name: dies");
    is_deeply($error, { from => 'handler' }, "$name: with what the handler died with");
    cmp_ok(time - $started, '<', 1.3, "$name: within a second");
    return;
}

1;
