/* A limit of bytes per second. Pure: the caller tells the time, in microseconds. */
#ifndef PBA_SRC_LIMIT_H
#define PBA_SRC_LIMIT_H

#include "src/pba.h"

typedef struct {
    uint64_t rate; /* bytes per second; 0: no limit */
    double saved;  /* bytes that may be taken; below 0: were taken ahead */
    gint64 time;   /* up to when they were counted */
} PbaLimit;

void pba_limit_init(PbaLimit *limit, uint64_t rate, gint64 now);
/* Takes so many bytes, which may be more than were saved, unless an earlier take has to be waited
 * for: false then. */
bool pba_limit_take(PbaLimit *limit, uint64_t bytes, gint64 now);
/* When bytes can be taken again. */
gint64 pba_limit_ready_at(const PbaLimit *limit);
/* How long a request may be so that the limit holds over short times, too: at most max. */
uint32_t pba_limit_request(const PbaLimit *limit, uint32_t max);

#endif
