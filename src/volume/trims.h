/* Ranges to be discarded. Pure. */
#ifndef PBA_SRC_TRIMS_H
#define PBA_SRC_TRIMS_H

#include "src/pba.h"

/* copy-before-write's smallest cluster, which is also the least that a discard frees. */
#define PBA_CLUSTER UINT64_C(65536)
/* Of one request: below its limit of 32 bits, and whole clusters. */
#define PBA_MAX_DISCARD (UINT64_C(1) << 30)

#define PBA_TRIMS_MAX 64

typedef struct {
    uint64_t begin;
    uint64_t end;
} PbaRange;

/* The whole clusters of a range, the last one up to the end of a volume of that size. Empty if
 * there are none. */
PbaRange pba_whole_clusters(PbaRange range, uint64_t size, uint64_t cluster);

/* The ranges that may be discarded but were not yet. Adjacent ranges are joined, so that requests
 * are few, and clusters whose parts were added one by one become whole. */
typedef struct {
    PbaRange ranges[PBA_TRIMS_MAX]; /* ascending, apart from each other */
    unsigned count;
    uint64_t size;    /* of the volume */
    uint64_t cluster; /* what is freed as a whole */
} PbaTrims;

/* Adds a range that overlaps no other. False if there is no room: then take a range first. */
bool pba_trims_add(PbaTrims *trims, uint64_t offset, uint64_t length);
/* Removes whole clusters of a range of at least that many bytes, for one request. False: none. */
bool pba_trims_take(PbaTrims *trims, uint64_t at_least, PbaRange *range);
/* Makes room: removes the first range, which is least likely to grow. *range is empty if it has no
 * whole cluster. False: nothing is left. */
bool pba_trims_take_first(PbaTrims *trims, PbaRange *range);

#endif
