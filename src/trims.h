/* What may be discarded but was not yet. Pure. */
#ifndef PBA_SRC_TRIMS_H
#define PBA_SRC_TRIMS_H

#include "pba.h"

#define PBA_TRIMS_MAX 64

typedef struct {
    uint64_t begin;
    uint64_t end;
} PbaRange;

/* Joins ranges, so that requests are few, and clusters whose parts came one by one become whole. */
typedef struct {
    PbaRange ranges[PBA_TRIMS_MAX]; /* ascending, apart from each other */
    unsigned count;
    uint64_t cluster; /* only whole ones are given out... */
    uint64_t size;    /* ...and the last one up to here */
} PbaTrims;

void pba_trims_init(PbaTrims *trims, uint64_t cluster, uint64_t size);
/* Adds a range that overlaps no other. False if there is no room: take one first. */
bool pba_trims_add(PbaTrims *trims, uint64_t offset, uint64_t length);
/* Takes out whole clusters of a range of at least so many bytes, of at most max. False: none. */
bool pba_trims_take(PbaTrims *trims, uint64_t at_least, uint64_t max, PbaRange *range);
/* Makes room: takes the range that is least likely to grow, the first. *range is empty where it
 * has no whole cluster. False: nothing is left. */
bool pba_trims_take_first(PbaTrims *trims, uint64_t max, PbaRange *range);

#endif
