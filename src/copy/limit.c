#include "limit.h"
#include "src/base/base.h"
#include <errno.h>
#include <sys/mman.h>
#include <sys/stat.h>

/* Unused bandwidth may be made up for, but only briefly: a limit protects others on the same disk
 * or network. */
#define SAVED_NS (G_GINT64_CONSTANT(250) * 1000 * 1000)
#define NS_PER_SECOND 1e9
#define NS_PER_US 1000
/* A request has at most the bytes of one second, divided by this. */
#define REQUESTS_PER_SECOND 20
/* The smallest request: the block size of most disks. A server with larger blocks gets larger
 * requests. */
#define SMALLEST 4096u

static bool map_state(PbaLimit *limit, int fd, GError **error)
{
    struct stat stat;

    int problem = fstat(fd, &stat) == -1 ? errno : 0;
    if (!problem && stat.st_size < (off_t)sizeof(PbaLimitState)) {
        problem = EINVAL; /* a read of what is behind the end would be a signal */
    }
    void *memory =
        problem ? MAP_FAILED
                : mmap(NULL, sizeof(PbaLimitState), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot map the file of a shared limit - %s",
                      g_strerror(problem ? problem : errno));
        return false;
    }
    limit->state = memory;
    limit->is_mapped = true;
    return true;
}

bool pba_limit_init(PbaLimit *limit, uint64_t rate, int fd, GError **error)
{
    *limit = (PbaLimit){.rate = rate};
    atomic_init(&limit->own, g_get_monotonic_time() * NS_PER_US);
    limit->state = &limit->own;
    return rate == 0 || fd == -1 || map_state(limit, fd, error);
}

void pba_limit_clear(PbaLimit *limit)
{
    if (limit->is_mapped) {
        munmap((void *)limit->state, sizeof(PbaLimitState));
        limit->is_mapped = false;
    }
}

bool pba_limit_take(PbaLimit *limit, uint64_t bytes, gint64 now)
{
    if (limit->rate == 0) {
        return true;
    }
    int64_t now_ns = now * NS_PER_US;
    int64_t price = (int64_t)((double)bytes * NS_PER_SECOND / (double)limit->rate);
    int64_t before = atomic_load(limit->state);
    int64_t after;
    do {
        if (before > now_ns) {
            return false;
        }
        after = MAX(before, now_ns - SAVED_NS) + price;
    } while (!atomic_compare_exchange_weak(limit->state, &before, after));
    return true;
}

gint64 pba_limit_ready_at(const PbaLimit *limit)
{
    return limit->rate == 0 ? 0 : atomic_load(limit->state) / NS_PER_US + 1;
}

uint32_t pba_limit_request(const PbaLimit *limit, uint32_t max)
{
    if (limit->rate == 0) {
        return max;
    }
    uint64_t share = limit->rate / REQUESTS_PER_SECOND / SMALLEST * SMALLEST;
    /* max is the size of the buffers. */
    return (uint32_t)MIN(MAX(share, SMALLEST), max);
}
