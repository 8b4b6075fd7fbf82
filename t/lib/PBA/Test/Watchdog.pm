package PBA::Test::Watchdog;

# A test that loads this module is limited to five minutes, so that a test that hangs fails.

use v5.36;

use POSIX ();

my $limit = 300;
my $main = $$;
my $watchdog = fork() // die "cannot fork: $!\n";
_watch(getppid()) if !$watchdog;

sub _watch ($test) {
    for (1 .. $limit) {
        sleep(1);
        POSIX::_exit(0) if getppid() != $test;
    }
    kill('KILL', $test);
    POSIX::_exit(0);
}

END { kill('KILL', $watchdog) if defined($main) && $$ == $main }

1;
