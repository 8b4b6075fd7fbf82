/* Zeroes as an NBD server reports them: block status. */
#include "holes.h"

typedef struct {
    PbaHoles holes;
    PbaNbdVolume *nbd;
    PbaNbdMap *map; /* owned; NULL until a region was asked about */
} NbdHoles;

/* Answers for an earlier region still write to the map that asked for them. */
static bool begin_map(PbaHoles *base)
{
    NbdHoles *holes = (NbdHoles *)base;

    if (holes->map && !pba_nbd_map_is_idle(holes->map)) {
        return false;
    }
    pba_nbd_map_free(holes->map);
    holes->map = pba_nbd_zeroes(holes->nbd, base->begin, base->end);
    return true;
}

static PbaHoleAnswer find_in_map(PbaHoles *base, uint64_t *offset, uint64_t *length)
{
    g_autoptr(GError) local = NULL;
    bool later = false;

    if (!pba_nbd_map_next(((NbdHoles *)base)->map, offset, length, &later, &local)) {
        return PBA_HOLE_NONE;
    }
    return later ? PBA_HOLE_LATER : *length > 0 ? PBA_HOLE_FOUND : PBA_HOLE_NONE;
}

static void free_map(PbaHoles *base)
{
    NbdHoles *holes = (NbdHoles *)base;

    pba_nbd_map_free(holes->map);
    g_free(holes);
}

static const PbaHolesKind nbd_holes = {
    .begin = begin_map,
    .find = find_in_map,
    .free = free_map,
};

PbaHoles *pba_holes_new_nbd(PbaNbdVolume *nbd, uint32_t align)
{
    NbdHoles *holes = g_new0(NbdHoles, 1);

    holes->holes = (PbaHoles){.kind = &nbd_holes, .align = align};
    holes->nbd = nbd;
    return &holes->holes;
}
