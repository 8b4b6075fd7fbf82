/* Decides what to read ahead. The cursor moves through the dirty regions ahead of a sequential
 * reader: to the end of each region, then to the beginning of the next one. */
#include "server.h"
#include "src/volume/volume.h"

/* A reader whose position is unexpected this many times in a row does not read in order. */
#define MAX_MISSES 4
#define MIN_MISSES 1
/* Discarded ranges ahead of the cursor; with more of them, there is no read-ahead. */
#define MAX_HOLES 256

struct PbaAhead {
    PbaScan *scan; /* NULL: the whole volume is one region */
    bool active;
    unsigned misses;
    uint64_t last_end; /* the end of the last read that was not in order */
    uint64_t cursor;   /* where to read next */
    PbaRange region;   /* the cursor is in it, or after it: then the next region is not known yet */
    GArray *holes;     /* PbaRange, ascending: discarded ranges from the cursor on */
    PbaSeeks *seeks;   /* NULL: readers are not told about zeroes */
    bool given_up;
};

PbaAhead *pba_ahead_new(const PbaVolumeOptions *options, PbaSeeks *seeks)
{
    PbaAhead *ahead = g_new0(PbaAhead, 1);
    ahead->holes = g_array_new(FALSE, FALSE, sizeof(PbaRange));
    ahead->last_end = UINT64_MAX;
    ahead->seeks = seeks;
    if (options->bitmap) {
        ahead->scan = pba_scan_start(options, pba_scan_dirty, 0, -1);
    } else {
        ahead->region.end = options->size;
    }
    return ahead;
}

/* The first hole at or after offset that the reader will skip, as far as it is known. */
static PbaRange zeroes_from(const PbaAhead *ahead, uint64_t offset)
{
    PbaRange zeroes;
    bool known = ahead->seeks && pba_seeks_find(ahead->seeks, offset, &zeroes);

    return known ? zeroes : (PbaRange){UINT64_MAX, UINT64_MAX};
}

/* Moves the cursor out of parts that are clean, discarded or skipped. False if there is nothing
 * more, or it is not known yet. */
static bool settle(PbaAhead *ahead)
{
    while (ahead->holes->len > 0) {
        const PbaRange *hole = &g_array_index(ahead->holes, PbaRange, 0);
        if (ahead->cursor < hole->begin) {
            break;
        }
        ahead->cursor = MAX(ahead->cursor, hole->end);
        g_array_remove_index(ahead->holes, 0);
    }
    PbaRange zeroes = zeroes_from(ahead, ahead->cursor);
    if (ahead->cursor >= zeroes.begin) {
        ahead->cursor = zeroes.end;
    }
    while (ahead->cursor >= ahead->region.end) {
        if (!ahead->scan || pba_scan_pop(ahead->scan, &ahead->region) != PBA_SCAN_FOUND) {
            return false;
        }
        ahead->cursor = MAX(ahead->cursor, ahead->region.begin);
    }
    return true;
}

/* Moves the cursor. True if it is then in a region that has not been discarded. */
static bool find_data(PbaAhead *ahead)
{
    uint64_t before;
    do {
        before = ahead->cursor;
        if (!settle(ahead)) {
            return false;
        }
    } while (ahead->cursor != before);
    return true;
}

void pba_ahead_stop(PbaAhead *ahead)
{
    ahead->active = false;
    ahead->misses = 0;
}

static void start(PbaAhead *ahead, uint64_t offset)
{
    if (offset < ahead->cursor) {
        if (ahead->scan) {
            pba_scan_seek(ahead->scan, offset);
            ahead->region = (PbaRange){0, 0};
        }
        /* Forgets discarded ranges there: at worst, read-ahead of them fails. */
        g_array_set_size(ahead->holes, 0);
    }
    ahead->cursor = offset;
    ahead->misses = 0;
    ahead->active = !ahead->given_up;
}

bool pba_ahead_note_read(PbaAhead *ahead, uint64_t begin, uint64_t end, bool known)
{
    if (ahead->seeks) {
        pba_seeks_note_read(ahead->seeks, begin);
    }
    bool at_cursor = find_data(ahead) && begin == ahead->cursor;
    bool follows = begin == ahead->last_end;

    if (ahead->active && (known || at_cursor)) {
        ahead->misses = 0;
        ahead->cursor = MAX(ahead->cursor, end);
        return true;
    }
    ahead->last_end = end;
    /* A reader at another position takes over once the old reader no longer reads. */
    if (ahead->active && ++ahead->misses <= (follows ? MIN_MISSES : MAX_MISSES)) {
        return true;
    }
    pba_ahead_stop(ahead);
    if (follows || at_cursor) {
        start(ahead, end);
    } else if (end > ahead->cursor) {
        /* This may be the first of several reads in order, so read ahead from here. */
        ahead->cursor = end;
    }
    return false;
}

bool pba_ahead_next(PbaAhead *ahead, uint64_t max, uint64_t *offset, uint64_t *length)
{
    if (!ahead->active || !find_data(ahead)) {
        return false;
    }
    uint64_t end = ahead->region.end;
    if (ahead->holes->len > 0) {
        end = MIN(end, g_array_index(ahead->holes, PbaRange, 0).begin);
    }
    end = MIN(end, zeroes_from(ahead, ahead->cursor).begin);
    *offset = ahead->cursor;
    *length = MIN(max, end - ahead->cursor);
    ahead->cursor += *length;
    return true;
}

void pba_ahead_note_discard(PbaAhead *ahead, uint64_t begin, uint64_t end)
{
    guint at = 0;

    if (end <= ahead->cursor || ahead->given_up) {
        return;
    }
    while (at < ahead->holes->len && g_array_index(ahead->holes, PbaRange, at).end < begin) {
        at++;
    }
    while (at < ahead->holes->len && g_array_index(ahead->holes, PbaRange, at).begin <= end) {
        const PbaRange *hole = &g_array_index(ahead->holes, PbaRange, at);
        begin = MIN(begin, hole->begin);
        end = MAX(end, hole->end);
        g_array_remove_index(ahead->holes, at);
    }
    g_array_insert_val(ahead->holes, at, ((PbaRange){begin, end}));
    if (ahead->holes->len > MAX_HOLES) {
        ahead->given_up = true;
        pba_ahead_stop(ahead);
    }
}
