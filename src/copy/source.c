/* The source of a copy: from what the volume is read, and what is discarded when. */
#include "copy.h"
#include "src/base/base.h"
#include <inttypes.h>

#define DEFAULT_REQUEST (256u << 10)
/* A range this long is discarded at once, by its own request. */
#define GOOD_DISCARD (UINT64_C(1) << 20)

static const PbaSourceKind *const kinds[] = {&pba_source_nbd, &pba_source_file};

static const PbaSourceKind *choose_kind(const PbaVolume *volume)
{
    unsigned i = 0;

    while (kinds[i]->reader != volume->reader) {
        i++;
        g_assert(i < G_N_ELEMENTS(kinds)); /* each reader has one */
    }
    return kinds[i];
}

PbaSource *pba_source_open(PbaVolume *volume, unsigned connections, PbaLoop *loop, GError **error)
{
    const PbaSourceKind *kind = choose_kind(volume);
    PbaSource *source = g_malloc0(kind->size);

    source->kind = kind;
    source->volume = volume;
    source->align = 1;
    source->request = DEFAULT_REQUEST;
    if (!kind->open(source, connections, loop, error)) {
        pba_source_close(source, true);
        return NULL;
    }
    source->trims.size = volume->size;
    source->trims.cluster = volume->sizes.cluster; /* unknown until the volume was connected */
    return source;
}

bool pba_source_find_holes(PbaSource *source, uint32_t align)
{
    source->holes = source->kind->new_holes(source, align);
    return source->holes != NULL;
}

void pba_source_close(PbaSource *source, bool broken)
{
    if (!source) {
        return;
    }
    pba_holes_free(source->holes);
    source->kind->close(source, broken);
    g_free(source);
}

bool pba_source_read(PbaSource *source, PbaPiece *piece, GError **error)
{
    g_assert(piece->length <= piece->room);
    return source->kind->read(source, piece, error);
}

static bool trim(PbaSource *source, PbaRange range, GError **error)
{
    source->trimming++;
    return source->kind->trim(source, range, error);
}

static bool send_good_trims(PbaSource *source, uint64_t at_least, GError **error)
{
    PbaRange range;

    while (pba_trims_take(&source->trims, at_least, &range)) {
        if (!trim(source, range, error)) {
            return false;
        }
    }
    return true;
}

bool pba_source_release(PbaSource *source, uint64_t offset, uint64_t length, GError **error)
{
    PbaRange range;

    while (!pba_trims_add(&source->trims, offset, length)) {
        if (pba_trims_take_first(&source->trims, &range) && range.end > range.begin &&
            !trim(source, range, error)) {
            return false;
        }
    }
    return send_good_trims(source, GOOD_DISCARD, error);
}

bool pba_source_release_all(PbaSource *source, GError **error)
{
    return send_good_trims(source, 1, error);
}

bool pba_source_check_trims(const PbaSource *source, GError **error)
{
    const PbaRange *range = &source->trim_error_range;

    if (!source->trim_error) {
        return true;
    }
    pba_error_set(error, source->volume->reader->error_code,
                  "discarding %" PRIu64 " bytes at offset %" PRIu64 " failed - %s",
                  range->end - range->begin, range->begin, g_strerror(source->trim_error));
    return false;
}
