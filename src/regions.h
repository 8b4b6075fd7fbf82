/* A list of regions in little memory. Pure. */
#ifndef PBA_SRC_REGIONS_H
#define PBA_SRC_REGIONS_H

#include "pba.h"

/* A region is how far it is from the end of the one before, and its length, each in as few bytes
 * as it needs: 6 for the usual one. */
typedef struct {
    GByteArray *bytes;
    guint next;     /* of bytes, to be taken */
    uint64_t added; /* end of the last region that was added */
    uint64_t taken; /* end of the last region that was taken */
} PbaRegions;

PbaRegions *pba_regions_new(void);
void pba_regions_free(PbaRegions *regions);
/* Adds a region that begins where the one before ends, or later. */
void pba_regions_add(PbaRegions *regions, uint64_t offset, uint64_t length);
/* The next region in the order they were added; *length is 0 after the last one. */
void pba_regions_take(PbaRegions *regions, uint64_t *offset, uint64_t *length);

#endif
