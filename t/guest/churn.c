/*
 * The test guest: the continuous writer that most tests use. Write number s goes to disk
 * (s - 1) % disks, and is flushed before write s + 1 begins. A generator chooses the block, and the
 * host has the same generator. So at any instant, the disks contain all writes up to some s, and
 * possibly the next one, and the host can find out which s it is.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Sixteen buckets for each power of two, up to 2^32 microseconds. */
#define BUCKETS (30 * 16)

struct churn {
    pthread_t thread;
    bool started; /* thread must be joined */
    volatile bool stop;
    uint32_t x;
    uint64_t blocks_limit;
    unsigned pause_us;
    int disk_count;
    int fds[MAX_DISKS];
    uint64_t blocks[MAX_DISKS];

    pthread_mutex_t lock; /* for the members below, which the command loop reads as well */
    uint64_t last;
    int error;
    int64_t started_us, stopped_us;
    uint64_t first;
    uint64_t count;
    int64_t longest_write_us, longest_flush_us, longest_us;
    uint64_t took[BUCKETS]; /* the number of writes by their duration */
};

static struct churn churn = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void put_be64(unsigned char *p, uint64_t value)
{
    for (int i = 7; i >= 0; i--, value >>= 8)
        p[i] = value & 0xff;
}

uint32_t churn_step(uint32_t x)
{
    return (uint32_t)(((uint64_t)x * 1103515245 + 12345) & 0x7fffffff);
}

static unsigned bucket_of(int64_t us)
{
    if (us < 16)
        return us < 0 ? 0 : us;
    unsigned top = 63 - __builtin_clzll(us);
    unsigned bucket = (top - 3) * 16 + (us >> (top - 4) & 15);
    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

/* The longest time that belongs to the bucket. */
static int64_t bucket_end(unsigned bucket)
{
    return bucket < 16 ? bucket : ((int64_t)(16 + bucket % 16 + 1) << (bucket / 16 - 1)) - 1;
}

/* The longest time of the fastest N % of the writes. The caller has the lock. */
static int64_t churn_percentile(unsigned percent)
{
    uint64_t seen = 0;
    unsigned bucket = 0;

    for (; bucket < BUCKETS - 1; bucket++) {
        seen += churn.took[bucket];
        if (seen * 100 >= churn.count * percent)
            break;
    }
    return bucket_end(bucket);
}

static void churn_record(uint64_t s, int error, int64_t start, int64_t written, int64_t flushed)
{
    pthread_mutex_lock(&churn.lock);
    if (error) {
        churn.error = error;
    } else {
        churn.last = s;
        churn.count++;
        churn.took[bucket_of(flushed - start)]++;
        if (written - start > churn.longest_write_us)
            churn.longest_write_us = written - start;
        if (flushed - written > churn.longest_flush_us)
            churn.longest_flush_us = flushed - written;
        if (flushed - start > churn.longest_us)
            churn.longest_us = flushed - start;
    }
    pthread_mutex_unlock(&churn.lock);
}

static void churn_fill(unsigned char *block, uint64_t s, uint64_t offset)
{
    put_be64(block, s);
    put_be64(block + 8, offset);
    for (size_t done = 16; done < BLOCK; done *= 2)
        memcpy(block + done, block, done);
}

static void *churn_run(void *opaque)
{
    unsigned char *block = opaque;
    uint64_t s = churn.first;

    for (; !churn.stop; s++) {
        int i = (s - 1) % churn.disk_count, error = 0;
        churn.x = churn_step(churn.x);
        uint64_t offset = (churn.x >> 8) % churn.blocks[i] * BLOCK;

        churn_fill(block, s, offset);
        int64_t start = now_us(), written = start;
        ssize_t n = pwrite(churn.fds[i], block, BLOCK, offset);
        if (n != BLOCK) {
            error = n < 0 ? errno : EIO;
        } else {
            written = now_us();
            error = fdatasync(churn.fds[i]) ? errno : 0;
        }
        churn_record(s, error, start, written, now_us());
        if (error)
            break;
        if (churn.pause_us)
            usleep(churn.pause_us);
    }
    free(block);
    return NULL;
}

/* Parses a list of disks, such as "disk0,disk1". False: an error was sent. */
static bool churn_disks(char *list)
{
    char *save, *id;

    churn.disk_count = 0;
    for (id = strtok_r(list, ",", &save); id; id = strtok_r(NULL, ",", &save)) {
        struct disk *d = need_disk(id);
        if (!d)
            return false;
        uint64_t blocks = disk_size(d) / BLOCK;
        if (churn.blocks_limit && churn.blocks_limit < blocks)
            blocks = churn.blocks_limit;
        if (!blocks || churn.disk_count == MAX_DISKS) {
            fail("disk '%s' is too small, or too many disks", id);
            return false;
        }
        churn.fds[churn.disk_count] = d->fd;
        churn.blocks[churn.disk_count++] = blocks;
    }
    if (!churn.disk_count)
        fail("no disk given");
    return churn.disk_count > 0;
}

void cmd_churn_start(int n, char **w)
{
    uint64_t seed, limit = 0, first = 1, pause = 0;
    void *block;

    if (churn.started) {
        fail("churn is already running");
        return;
    }
    if (n < 3 || !parse_u64(w[1], &seed) || (n > 3 && !parse_u64(w[3], &limit)) ||
        (n > 4 && (!parse_u64(w[4], &first) || !first)) || (n > 5 && !parse_u64(w[5], &pause))) {
        fail("usage: churn-start SEED DISK[,DISK...] [BLOCKS [FIRST [PAUSE_US]]]");
        return;
    }
    churn.blocks_limit = limit;
    if (!churn_disks(w[2]))
        return;
    churn.x = seed & 0x7fffffff;
    for (uint64_t s = 1; s < first; s++)
        churn.x = churn_step(churn.x);
    churn.first = first;
    churn.last = first - 1;
    churn.pause_us = pause;
    churn.stop = false;
    churn.error = 0;
    churn.started_us = now_us();
    if (posix_memalign(&block, BLOCK, BLOCK)) {
        fail("out of memory");
        return;
    }
    if ((errno = pthread_create(&churn.thread, NULL, churn_run, block))) {
        free(block);
        fail("thread: %s", strerror(errno));
        return;
    }
    churn.started = true;
    ok_nothing();
}

static void churn_report(int64_t until_us)
{
    pthread_mutex_lock(&churn.lock);
    uint64_t last = churn.last;
    int error = churn.error;
    pthread_mutex_unlock(&churn.lock);

    int64_t time = until_us - churn.started_us;
    double rate = time > 0 ? (last + 1 - churn.first) * 1e6 / time : 0;
    if (error)
        fail("churn write %" PRIu64 ": %s", last + 1, strerror(error));
    else
        ok("%" PRIu64 " %.1f", last, rate);
}

void cmd_churn_status(int n, char **w)
{
    (void)n, (void)w;
    if (churn.started)
        churn_report(now_us());
    else
        fail("churn does not run");
}

void cmd_churn_stop(int n, char **w)
{
    (void)n, (void)w;
    if (!churn.started) {
        fail("churn does not run");
        return;
    }
    churn.stop = true;
    pthread_join(churn.thread, NULL);
    churn.started = false;
    churn_report(now_us());
}

void cmd_latency(int n, char **w)
{
    (void)n, (void)w;
    pthread_mutex_lock(&churn.lock);
    uint64_t count = churn.count;
    int64_t longest = churn.longest_us, wr = churn.longest_write_us, fl = churn.longest_flush_us;
    int64_t p50 = churn_percentile(50), p99 = churn_percentile(99);
    churn.count = 0;
    memset(churn.took, 0, sizeof(churn.took));
    churn.longest_us = churn.longest_write_us = churn.longest_flush_us = 0;
    pthread_mutex_unlock(&churn.lock);
    ok("longest_us=%" PRId64 " write_us=%" PRId64 " flush_us=%" PRId64 " count=%" PRIu64
       " p50_us=%" PRId64 " p99_us=%" PRId64,
       longest, wr, fl, count, p50, p99);
}
