/* Finds zeroes in regions of a volume: unallocated parts of a thin disk need not be read. Only long
 * regions are asked for, because each request waits for its answer. */
#include "holes.h"

#define MIN_REGION (UINT64_C(16) << 20)

void pba_holes_free(PbaHoles *holes)
{
    if (holes) {
        holes->kind->free(holes);
    }
}

void pba_holes_begin(PbaHoles *holes, uint64_t offset, uint64_t length)
{
    holes->begin = offset;
    holes->end = offset + length;
    holes->state = length >= MIN_REGION ? PBA_HOLES_WANTED : PBA_HOLES_OVER;
}

/* Finds the next hole. Returns false while the answer is outstanding. */
static bool find_hole(PbaHoles *holes)
{
    if (holes->state == PBA_HOLES_WANTED) {
        if (!holes->kind->begin(holes)) {
            return false;
        }
        holes->state = PBA_HOLES_SOUGHT;
    }
    while (holes->state == PBA_HOLES_SOUGHT) {
        uint64_t offset;
        uint64_t length;
        PbaHoleAnswer answer = holes->kind->find(holes, &offset, &length);
        if (answer == PBA_HOLE_LATER) {
            return false;
        }
        if (answer == PBA_HOLE_NONE) {
            holes->state = PBA_HOLES_OVER;
            break;
        }
        /* The reads before and after a hole must be aligned too. */
        holes->hole =
            pba_whole_clusters((PbaRange){offset, offset + length}, UINT64_MAX, holes->align);
        if (holes->hole.end - holes->hole.begin >= PBA_MIN_HOLE) {
            holes->state = PBA_HOLES_FOUND;
        }
    }
    return true;
}

PbaNext pba_holes_next(PbaHoles *holes, uint64_t offset, uint64_t *length)
{
    if (!find_hole(holes)) {
        return PBA_NEXT_LATER;
    }
    uint64_t data_end = holes->state == PBA_HOLES_FOUND ? holes->hole.begin : holes->end;
    if (offset < data_end) {
        *length = data_end - offset;
        return PBA_NEXT_DATA;
    }
    *length = holes->hole.end - holes->hole.begin;
    holes->state = PBA_HOLES_SOUGHT;
    return PBA_NEXT_ZEROES;
}
