/* Where regions of a volume are zeroes, from NBD block status: what a thin disk does not hold need
 * not be read. Only regions that are long are asked about, since each waits for an answer. */
#include "copy.h"

#define MIN_REGION (UINT64_C(16) << 20)
/* Shorter holes are read along with what is around them. */
#define MIN_HOLE (UINT64_C(256) << 10)

struct PbaHoles {
    PbaVolume *volume;
    uint32_t align;
    uint64_t begin; /* of the region */
    uint64_t end;
    bool asks;      /* there may be more holes */
    PbaNbdMap *map; /* owned; NULL until a region was asked about */
    bool has_map;   /* it is that of the region */
    uint64_t hole;  /* the next one; its length is 0 while it is not known */
    uint64_t hole_left;
};

PbaHoles *pba_holes_new(PbaVolume *volume, uint32_t align)
{
    PbaHoles *holes = g_new0(PbaHoles, 1);

    holes->volume = volume;
    holes->align = align;
    return holes;
}

void pba_holes_free(PbaHoles *holes)
{
    if (holes) {
        pba_nbd_map_free(holes->map);
        g_free(holes);
    }
}

void pba_holes_begin(PbaHoles *holes, uint64_t offset, uint64_t length)
{
    holes->begin = offset;
    holes->end = offset + length;
    holes->asks = length >= MIN_REGION;
    holes->has_map = false;
    holes->hole_left = 0;
}

/* Answers that nobody waits for still want the map that asked. */
static bool begin_map(PbaHoles *holes)
{
    if (!holes->has_map && (!holes->map || pba_nbd_map_is_idle(holes->map))) {
        pba_nbd_map_free(holes->map);
        holes->map = pba_nbd_zeroes(holes->volume, holes->begin, holes->end);
        holes->has_map = true;
    }
    return holes->has_map;
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
    bool later = false;

    if (holes->asks && !begin_map(holes)) {
        return false;
    }
    while (holes->asks && holes->hole_left < MIN_HOLE) {
        g_autoptr(GError) local = NULL;
        if (!pba_nbd_map_next(holes->map, &holes->hole, &holes->hole_left, &later, &local)) {
            holes->hole_left = 0;
            holes->asks = false; /* whatever is wrong, a read will tell */
        } else if (later) {
            holes->hole_left = 0;
            return false;
        } else if (holes->hole_left == 0) {
            holes->asks = false;
        } else {
            trim_hole(holes);
        }
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
