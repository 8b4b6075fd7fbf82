/* A limit of bytes per second. The caller tells the time, in microseconds. */
#ifndef PBA_SRC_LIMIT_H
#define PBA_SRC_LIMIT_H

#include "src/pba.h"
#include <stdatomic.h>

/* What several copies may share, also of several processes: when all that was taken is paid for, in
 * nanoseconds. */
typedef _Atomic int64_t PbaLimitState;

typedef struct {
    uint64_t rate; /* bytes per second; 0: no limit */
    PbaLimitState own;
    PbaLimitState *state; /* own, or one that is shared */
    bool is_mapped;
} PbaLimit;

/* From now on. The state is in a file, in its first 8 bytes, zeroes at first; -1: it is not shared.
 */
bool pba_limit_init(PbaLimit *limit, uint64_t rate, int fd, GError **error);
void pba_limit_clear(PbaLimit *limit);
/* Takes so many bytes, which may be more than were saved, unless an earlier take has to be waited
 * for: false then. */
bool pba_limit_take(PbaLimit *limit, uint64_t bytes, gint64 now);
/* When bytes can be taken again. */
gint64 pba_limit_ready_at(const PbaLimit *limit);
/* How long a request may be so that the limit holds over short times, too: at most max. */
uint32_t pba_limit_request(const PbaLimit *limit, uint32_t max);

#endif
