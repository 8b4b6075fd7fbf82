/* Shared by the bare loops. */
#ifndef BENCH_BARE_H
#define BENCH_BARE_H

#include <libnbd.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, nbd_get_error());
    exit(EXIT_FAILURE);
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

#endif
