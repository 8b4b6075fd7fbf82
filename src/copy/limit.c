#include "limit.h"

/* What was not used may be made up for, but not for long: a limit protects others on the same disk
 * or network. */
#define SAVED_SECONDS 0.25
/* Requests are cut so that one of them is a small part of a second's worth. */
#define REQUESTS_PER_SECOND 20
/* The largest smallest block of NBD servers; also that of most disks. */
#define SMALLEST 4096u

void pba_limit_init(PbaLimit *limit, uint64_t rate, gint64 now)
{
    *limit = (PbaLimit){.rate = rate, .time = now};
}

bool pba_limit_take(PbaLimit *limit, uint64_t bytes, gint64 now)
{
    if (limit->rate == 0) {
        return true;
    }
    double rate = (double)limit->rate;
    limit->saved += rate * (double)(now - limit->time) / G_TIME_SPAN_SECOND;
    limit->saved = MIN(limit->saved, rate * SAVED_SECONDS);
    limit->time = now;
    if (limit->saved < 0) {
        return false;
    }
    limit->saved -= (double)bytes;
    return true;
}

gint64 pba_limit_ready_at(const PbaLimit *limit)
{
    if (limit->rate == 0 || limit->saved >= 0) {
        return limit->time;
    }
    return limit->time + 1 + (gint64)(-limit->saved * G_TIME_SPAN_SECOND / (double)limit->rate);
}

uint32_t pba_limit_request(const PbaLimit *limit, uint32_t max)
{
    if (limit->rate == 0) {
        return max;
    }
    uint64_t share = limit->rate / REQUESTS_PER_SECOND / SMALLEST * SMALLEST;
    /* Never more than max, the size of the buffers. */
    return (uint32_t)MIN(MAX(share, SMALLEST), max);
}
