/* For t/coverage.pl only, linked into what it builds: gcov writes its counters when a program
 * exits, but not at _exit(). */
#include <gcov.h>

void pba_coverage_dump(void);
void __real__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) __attribute__((noreturn));

/* For child processes of the test, which end by POSIX::_exit. */
void pba_coverage_dump(void)
{
    __gcov_dump();
}

void __wrap__exit(int status)
{
    __gcov_dump();
    __real__exit(status);
}
