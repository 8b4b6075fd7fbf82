/* Which parts of a volume are copied. */
#ifndef PBA_SRC_COURSE_H
#define PBA_SRC_COURSE_H

#include "digest.h"

typedef struct {
    PbaVolume *volume;         /* borrowed, as all of these */
    PbaMap *map;               /* does not move the volume's own position */
    const PbaDigests *digests; /* NULL: none are wanted */
    PbaHoles *holes;           /* NULL: everything is read */
    bool only_known;           /* the blocks that have a digest, not the dirty ones */
    uint64_t known_end;        /* with only_known: the end of the part that was searched */
    uint64_t offset;           /* the rest of the current region */
    uint64_t left;
    PbaNext next;         /* what the rest begins with */
    uint64_t next_length; /* of data or zeroes */
    uint64_t regions;     /* so far */
} PbaCourse;

/* Finds the next part. */
bool pba_course_next(PbaCourse *course, GError **error);
/* The length of the next piece: next_length, or at most max of it, up to the end of a target's
 * block, a cluster, or a block with a digest. */
uint32_t pba_course_length(const PbaCourse *course, const PbaSink *sink, uint32_t max,
                           uint32_t align);
/* Takes this much of next_length. */
void pba_course_take(PbaCourse *course, uint32_t length);
/* The total number of bytes. Does not advance. */
bool pba_course_total(const PbaCourse *course, uint64_t *total, GError **error);

#endif
