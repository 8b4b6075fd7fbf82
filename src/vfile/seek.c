/* Tells readers where the zeroes are, by what the server says of them. The map is read on from
 * where the last one asked: programs that copy a sparse file ask from its beginning to its end. */
#define _GNU_SOURCE /* SEEK_HOLE */
#include "server.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <unistd.h>

/* A shorter hole costs a reader more than to read it. */
#define MIN_HOLE (UINT64_C(256) << 10)

struct PbaSeeks {
    PbaVolumeOptions options;
    PbaAhead *ahead;
    int fd;
    PbaScan *scan;      /* NULL until the first one asks */
    uint64_t from;      /* what is known of lies behind it */
    PbaRange hole;      /* the first that ends behind from; empty at the end: there is none */
    fuse_req_t request; /* that waits; NULL: none */
    uint64_t offset;    /* of that */
    int whence;
};

PbaSeeks *pba_seeks_new(const PbaVolumeOptions *options, PbaAhead *ahead, GError **error)
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
    seeks->ahead = ahead;
    seeks->fd = fd;
    return seeks;
}

static void begin_at(PbaSeeks *seeks, uint64_t offset)
{
    if (seeks->scan && offset >= seeks->from) {
        return;
    }
    seeks->from = offset;
    seeks->hole = (PbaRange){0, 0};
    if (seeks->scan) {
        pba_scan_seek(seeks->scan, offset);
    } else {
        seeks->scan = pba_scan_start(&seeks->options, pba_scan_zeroes, offset, seeks->fd);
    }
}

/* Whole blocks, so that what is read between two holes is aligned; the last ends with the file. */
static PbaRange aligned(PbaRange run, uint64_t size)
{
    uint64_t begin = (run.begin + PBA_FILE_BLOCK - 1) / PBA_FILE_BLOCK * PBA_FILE_BLOCK;
    uint64_t end = run.end == size ? size : run.end / PBA_FILE_BLOCK * PBA_FILE_BLOCK;

    return (PbaRange){begin, MAX(begin, end)};
}

/* Finds the hole that offset is in or before. False: it is not known yet. */
static bool find_hole(PbaSeeks *seeks, uint64_t offset)
{
    uint64_t size = seeks->options.size;

    begin_at(seeks, offset);
    while (seeks->hole.end <= offset) {
        PbaRange run;
        PbaScanState state = pba_scan_pop(seeks->scan, &run);
        if (state == PBA_SCAN_LATER) {
            return false;
        }
        if (state == PBA_SCAN_ENDED) {
            seeks->hole = (PbaRange){size, size};
            return true;
        }
        run = aligned(run, size);
        if (run.end - run.begin >= MIN_HOLE) {
            seeks->from = MAX(seeks->from, seeks->hole.end);
            seeks->hole = run;
        }
    }
    return true;
}

/* Where there is a hole, reading goes on behind it. */
static void answer(PbaSeeks *seeks, fuse_req_t request, uint64_t offset, int whence)
{
    bool in_hole = offset >= seeks->hole.begin;

    pba_ahead_note_zeroes(seeks->ahead, seeks->hole);
    if (whence == SEEK_HOLE) {
        fuse_reply_lseek(request, (off_t)MAX(offset, seeks->hole.begin));
    } else if (in_hole && seeks->hole.end == seeks->options.size) {
        fuse_reply_err(request, ENXIO);
    } else {
        fuse_reply_lseek(request, (off_t)(in_hole ? seeks->hole.end : offset));
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
        /* Linux has one at a time (fuse_file_llseek). All may be data, for who else asks. */
        fuse_reply_lseek(request, (off_t)(whence == SEEK_HOLE ? seeks->options.size : offset));
    } else if (find_hole(seeks, offset)) {
        answer(seeks, request, offset, whence);
    } else {
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
    if (seeks->request && find_hole(seeks, seeks->offset)) {
        answer(seeks, g_steal_pointer(&seeks->request), seeks->offset, seeks->whence);
    }
}
