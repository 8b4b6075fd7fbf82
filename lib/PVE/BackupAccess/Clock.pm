package PVE::BackupAccess::Clock;

# The clock for time limits and durations. The system's time is for people, and for names and times of archives: it may be
# set while something waits, and would then end the wait too early, or hours too late. "./run check clocks" finds uses of it.

use v5.36;

use Exporter qw(import);
use Time::HiRes qw(CLOCK_MONOTONIC clock_gettime);

our @EXPORT_OK = qw(now);

# Seconds since some moment of the past, with a fraction.
sub now () { return clock_gettime(CLOCK_MONOTONIC) }

1;
