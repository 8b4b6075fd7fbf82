/* Tells readers where zeroes are, according to the server. The map is read further from the end of
 * the last query, because programs that copy a sparse file query it from its beginning to its
 * end. */
#define _GNU_SOURCE /* SEEK_HOLE */
#include "server.h"
#include "src/base/base.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <unistd.h>

/* Zeroes ahead of the reader; read-ahead skips them. */
#define MAX_HOLES 64

struct PbaSeeks {
    PbaVolumeOptions options;
    int fd;
    PbaScan *scan;      /* NULL until the first query */
    bool is_followed;   /* since the last query, no reader has read in a hole */
    uint64_t from;      /* where the known part begins */
    GArray *holes;      /* PbaRange, ascending: all holes of the known part */
    fuse_req_t request; /* the query that waits; NULL: none */
    uint64_t offset;    /* of this query */
    int whence;
};

PbaSeeks *pba_seeks_new(const PbaVolumeOptions *options, GError **error)
{
    int fd = pba_wake_new(error);

    if (fd < 0) {
        return NULL;
    }
    PbaSeeks *seeks = g_new0(PbaSeeks, 1);
    seeks->options = *options;
    seeks->options.device = g_strdup(options->device);
    seeks->options.path = g_strdup(options->path);
    seeks->options.bitmap = NULL;
    seeks->holes = g_array_new(FALSE, FALSE, sizeof(PbaRange));
    seeks->fd = fd;
    return seeks;
}

static void begin_at(PbaSeeks *seeks, uint64_t offset)
{
    if (seeks->scan && offset >= seeks->from) {
        return;
    }
    seeks->from = offset;
    g_array_set_size(seeks->holes, 0);
    if (seeks->scan) {
        pba_scan_seek(seeks->scan, offset);
    } else {
        seeks->scan = pba_scan_start(&seeks->options, pba_scan_zeroes, offset, seeks->fd);
    }
}

/* Reads further until one more hole is known; the last hole is an empty one at the end. */
static bool next_hole(PbaSeeks *seeks)
{
    uint64_t size = seeks->options.size;
    PbaScanState state;
    PbaRange run;

    while ((state = pba_scan_pop(seeks->scan, &run)) == PBA_SCAN_FOUND) {
        /* Whole blocks only, so that reads between two holes are aligned. */
        run = pba_whole_clusters(run, size, PBA_FILE_BLOCK);
        if (run.end - run.begin >= PBA_MIN_HOLE) {
            g_array_append_val(seeks->holes, run);
            return true;
        }
    }
    if (state == PBA_SCAN_ENDED) {
        g_array_append_val(seeks->holes, ((PbaRange){size, size}));
    }
    return state == PBA_SCAN_ENDED;
}

/* The first hole that ends after offset, which must be before the part that next_hole continues
 * with; NULL if the hole is not known yet. */
static const PbaRange *find_hole(PbaSeeks *seeks, uint64_t offset)
{
    guint i = 0;

    do {
        for (; i < seeks->holes->len; i++) {
            const PbaRange *hole = &g_array_index(seeks->holes, PbaRange, i);
            if (hole->end > offset) {
                return hole;
            }
        }
    } while (seeks->holes->len < MAX_HOLES && next_hole(seeks));
    return NULL;
}

/* Holes before offset are queried again if they are needed. */
static void forget_before(PbaSeeks *seeks, uint64_t offset)
{
    guint passed = 0;

    while (passed < seeks->holes->len &&
           g_array_index(seeks->holes, PbaRange, passed).end <= offset) {
        seeks->from = g_array_index(seeks->holes, PbaRange, passed).end;
        passed++;
    }
    g_array_remove_range(seeks->holes, 0, passed);
}

/* False: the answer is not known yet. */
static bool answer(PbaSeeks *seeks, fuse_req_t request, uint64_t offset, int whence)
{
    const PbaRange *hole;

    begin_at(seeks, offset);
    seeks->is_followed = true;
    do {
        forget_before(seeks, offset);
        hole = find_hole(seeks, offset);
    } while (!hole && seeks->holes->len == MAX_HOLES);
    if (!hole) {
        return false;
    }
    bool in_hole = offset >= hole->begin;
    if (whence == SEEK_HOLE) {
        fuse_reply_lseek(request, (off_t)MAX(offset, hole->begin));
    } else if (in_hole && hole->end == seeks->options.size) {
        fuse_reply_err(request, ENXIO);
    } else {
        fuse_reply_lseek(request, (off_t)(in_hole ? hole->end : offset));
    }
    return true;
}

bool pba_seeks_find(PbaSeeks *seeks, uint64_t offset, PbaRange *hole)
{
    bool may_ask = seeks->is_followed && offset >= seeks->from && offset < seeks->options.size;
    const PbaRange *found = may_ask ? find_hole(seeks, offset) : NULL;

    if (found) {
        *hole = *found;
    }
    return found != NULL;
}

void pba_seeks_note_read(PbaSeeks *seeks, uint64_t offset)
{
    PbaRange hole;

    if (pba_seeks_find(seeks, offset, &hole) && offset >= hole.begin) {
        seeks->is_followed = false;
    }
}

static void on_interrupt(fuse_req_t request, void *opaque)
{
    PbaSeeks *seeks = opaque;

    if (seeks->request == request) {
        seeks->request = NULL;
        fuse_reply_err(request, EINTR);
    }
}

void pba_seeks_ask(PbaSeeks *seeks, fuse_req_t request, uint64_t offset, int whence)
{
    if (offset >= seeks->options.size) {
        fuse_reply_err(request, ENXIO);
    } else if (seeks->request) {
        /* Linux sends one such request at a time (fuse_file_llseek). The answer to a second one may
         * be that everything is data. */
        fuse_reply_lseek(request, (off_t)(whence == SEEK_HOLE ? seeks->options.size : offset));
    } else if (!answer(seeks, request, offset, whence)) {
        seeks->request = request;
        seeks->offset = offset;
        seeks->whence = whence;
        fuse_req_interrupt_func(request, on_interrupt, seeks);
    }
}

struct pollfd pba_seeks_watch(const PbaSeeks *seeks)
{
    return (struct pollfd){.fd = seeks ? seeks->fd : -1, .events = POLLIN};
}

void pba_seeks_turn(PbaSeeks *seeks)
{
    pba_wake_clear(seeks->fd);
    if (seeks->request && answer(seeks, seeks->request, seeks->offset, seeks->whence)) {
        seeks->request = NULL;
    }
}
