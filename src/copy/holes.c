/* Where regions of a volume are zeroes: what a thin disk does not hold need not be read. Only
 * regions that are long are asked about, since each waits for an answer. */
#include "holes.h"

#define MIN_REGION (UINT64_C(16) << 20)
/* Shorter holes are read along with what is around them. */
#define MIN_HOLE (UINT64_C(256) << 10)

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
    holes->hole_left = 0;
}

/* What is read before and after a hole has to be aligned, too. */
static void trim_hole(PbaHoles *holes)
{
    uint64_t begin = pba_whole_blocks(holes->hole, holes->align);
    uint64_t end = (holes->hole + holes->hole_left) / holes->align * holes->align;

    holes->hole = begin;
    holes->hole_left = end > begin ? end - begin : 0;
}

/* Finds the next hole; false if the answer is under way. */
static bool find_hole(PbaHoles *holes)
{
    if (holes->state == PBA_HOLES_WANTED) {
        if (!holes->kind->begin(holes)) {
            return false;
        }
        holes->state = PBA_HOLES_BEGUN;
    }
    while (holes->state == PBA_HOLES_BEGUN && holes->hole_left < MIN_HOLE) {
        PbaHoleAnswer answer = holes->kind->find(holes, &holes->hole, &holes->hole_left);
        if (answer == PBA_HOLE_FOUND) {
            trim_hole(holes);
            continue;
        }
        holes->hole_left = 0;
        if (answer == PBA_HOLE_LATER) {
            return false;
        }
        holes->state = PBA_HOLES_OVER;
    }
    return true;
}

bool pba_holes_next(PbaHoles *holes, uint64_t offset, PbaStretch *stretch)
{
    if (!find_hole(holes)) {
        return false;
    }
    if (holes->hole_left == 0) {
        *stretch = (PbaStretch){holes->end - offset, false};
    } else if (offset < holes->hole) {
        *stretch = (PbaStretch){holes->hole - offset, false};
    } else {
        *stretch = (PbaStretch){holes->hole_left, true};
        holes->hole_left = 0;
    }
    return true;
}
