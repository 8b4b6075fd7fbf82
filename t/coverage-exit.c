/* For t/coverage.pl alone, linked into what it builds: gcov writes its counters when a program
 * ends, but not by _exit(). */
#include <gcov.h>

void pba_coverage_dump(void);
void __real__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) __attribute__((noreturn));

/* For the test's own children, who end by POSIX::_exit. */
void pba_coverage_dump(void)
{
    __gcov_dump();
}

void __wrap__exit(int status)
{
    __gcov_dump();
    __real__exit(status);
}
