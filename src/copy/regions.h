/* A list of regions in little memory. Pure. */
#ifndef PBA_SRC_REGIONS_H
#define PBA_SRC_REGIONS_H

#include "src/pba.h"

/* A region is how far it is from the end of the one before, and its length, each in as few bytes
 * as it needs: 2 for the usual one. */
typedef struct {
    GByteArray *bytes;
    uint64_t end; /* of the last region */
} PbaRegions;

/* How far a reader of the list is. It begins as all zeroes. */
typedef struct {
    guint next;   /* of bytes */
    uint64_t end; /* of the last region that was taken */
} PbaRegionsCursor;

PbaRegions *pba_regions_new(void);
void pba_regions_free(PbaRegions *regions);
/* Adds a region that begins where the one before ends, or later. */
void pba_regions_add(PbaRegions *regions, uint64_t offset, uint64_t length);
/* The next region in the order they were added; *length is 0 after the last one, until more are
 * added. */
void pba_regions_take(const PbaRegions *regions, PbaRegionsCursor *cursor, uint64_t *offset,
                      uint64_t *length);

#endif
