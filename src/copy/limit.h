/* A limit of bytes per second. The caller passes the time, in microseconds. */
#ifndef PBA_SRC_LIMIT_H
#define PBA_SRC_LIMIT_H

#include "src/pba.h"
#include <stdatomic.h>

/* Shared by several copies, also in several processes: the time, in nanoseconds, at which all taken
 * bytes are paid for. */
typedef _Atomic int64_t PbaLimitState;

typedef struct {
    uint64_t rate; /* bytes per second; 0: no limit */
    PbaLimitState own;
    PbaLimitState *state; /* own, or one that is shared */
    bool is_mapped;
} PbaLimit;

/* Starts the limit. The first 8 bytes of the file hold its state, initially zeroes. -1: the state
 * is not shared. */
bool pba_limit_init(PbaLimit *limit, uint64_t rate, int fd, GError **error);
void pba_limit_clear(PbaLimit *limit);
/* Takes this many bytes, also more than were saved. Returns false, and takes none, if an earlier
 * take must be waited for. */
bool pba_limit_take(PbaLimit *limit, uint64_t bytes, gint64 now);
/* The time at which bytes can be taken again. */
gint64 pba_limit_ready_at(const PbaLimit *limit);
/* The longest request, up to max, with which the limit also holds over short times. */
uint32_t pba_limit_request(const PbaLimit *limit, uint32_t max);

#endif
