/* A compact list of regions. Pure. */
#ifndef PBA_SRC_REGIONS_H
#define PBA_SRC_REGIONS_H

#include "src/pba.h"

/* A region is stored as its distance from the end of the previous one and its length, each in as
 * few bytes as possible: usually 2 in total. */
typedef struct {
    GByteArray *bytes;
    uint64_t end; /* of the last region */
} PbaRegions;

/* The position of a reader of the list, initially all zeroes. */
typedef struct {
    guint next;   /* of bytes */
    uint64_t end; /* of the last region that was taken */
} PbaRegionsCursor;

PbaRegions *pba_regions_new(void);
void pba_regions_free(PbaRegions *regions);
/* Adds a region that starts at the end of the previous one, or later. */
void pba_regions_add(PbaRegions *regions, uint64_t offset, uint64_t length);
/* The next region, in the order of addition. *length is 0 after the last one, until more are added.
 */
void pba_regions_take(const PbaRegions *regions, PbaRegionsCursor *cursor, uint64_t *offset,
                      uint64_t *length);

#endif
