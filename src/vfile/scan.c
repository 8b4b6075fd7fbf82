/* The runs of a map: dirty regions or zeroes. A thread reads the map on a connection of its own, so
 * that a slow answer does not delay readers. */
#include "server.h"
#include "src/base/base.h"
#include "src/volume/volume.h"

/* Runs known ahead of the reader. */
#define RING_SIZE 1024u

struct PbaScan {
    PbaScanBegin begin;
    int found_fd; /* -1: the consumer does not poll */
    char *device;
    char *path;
    char *bitmap;
    uint64_t size;
    GMutex mutex; /* protects all members below */
    GCond wanted;
    PbaRange ring[RING_SIZE];
    unsigned head;
    unsigned used;
    uint64_t from;       /* where the map is to be read from */
    unsigned seek;       /* counts the times from was set */
    bool ended;          /* no more runs, until the next seek */
    bool consumer_waits; /* wants found_fd to be written to */
};

PbaMap *pba_scan_dirty(const PbaVolumeOptions *options, uint64_t from, PbaVolume **volume)
{
    *volume = pba_volume_open(options, NULL, NULL);
    return *volume ? pba_volume_map(*volume, from) : NULL;
}

PbaMap *pba_scan_zeroes(const PbaVolumeOptions *options, uint64_t from, PbaVolume **volume)
{
    PbaNbdVolume *nbd = pba_nbd_open_allocation(options, NULL, NULL);

    *volume = nbd ? &nbd->volume : NULL;
    /* QEMU before 9.2 (6475155d51) aborts on a query for data that it is reading. */
    if (nbd && (!nbd->context || nbd->by_cluster)) {
        g_clear_pointer(volume, pba_volume_free);
    }
    return *volume ? &pba_nbd_zeroes(nbd, from, (*volume)->size)->map : NULL;
}

/* Waits until another run is needed. False if the thread must begin elsewhere. */
static bool wait_wanted(PbaScan *scan, unsigned seek)
{
    g_mutex_lock(&scan->mutex);
    while (scan->seek == seek && (scan->ended || scan->used == RING_SIZE)) {
        g_cond_wait(&scan->wanted, &scan->mutex);
    }
    bool same = scan->seek == seek;
    g_mutex_unlock(&scan->mutex);
    return same;
}

/* Adds a run; an empty one (its end is 0) is the end of the map. */
static void push(PbaScan *scan, unsigned seek, PbaRange run)
{
    g_mutex_lock(&scan->mutex);
    if (scan->seek == seek && run.end == 0) {
        scan->ended = true;
    } else if (scan->seek == seek) {
        scan->ring[(scan->head + scan->used) % RING_SIZE] = run;
        scan->used++;
    }
    if (scan->seek == seek && scan->consumer_waits) {
        scan->consumer_waits = false;
        pba_wake(scan->found_fd);
    }
    g_mutex_unlock(&scan->mutex);
}

/* If the map cannot be read, it ends here: the reader loses speed, but no data. */
static void read_map(PbaScan *scan, uint64_t from, unsigned seek)
{
    PbaVolumeOptions options = {
        .device = scan->device,
        .path = scan->path,
        .bitmap = scan->bitmap,
        .size = scan->size,
    };
    PbaVolume *volume;
    uint64_t offset;
    uint64_t length;

    PbaMap *map = scan->begin(&options, from, &volume);
    while (wait_wanted(scan, seek)) {
        bool more = volume && pba_volume_next_region(volume, map, &offset, &length, NULL, NULL);
        more = more && length > 0;
        push(scan, seek, more ? (PbaRange){offset, offset + length} : (PbaRange){0, 0});
    }
    pba_map_free(map);
    pba_volume_free(volume);
}

static gpointer run(gpointer opaque)
{
    PbaScan *scan = opaque;
    for (;;) {
        g_mutex_lock(&scan->mutex);
        uint64_t from = scan->from;
        unsigned seek = scan->seek;
        g_mutex_unlock(&scan->mutex);
        read_map(scan, from, seek);
    }
    return NULL;
}

PbaScan *pba_scan_start(const PbaVolumeOptions *options, PbaScanBegin begin, uint64_t from,
                        int found_fd)
{
    PbaScan *scan = g_new0(PbaScan, 1);
    scan->begin = begin;
    scan->from = from;
    scan->found_fd = found_fd;
    scan->device = g_strdup(options->device);
    scan->path = g_strdup(options->path);
    scan->bitmap = g_strdup(options->bitmap);
    scan->size = options->size;
    g_mutex_init(&scan->mutex);
    g_cond_init(&scan->wanted);
    g_thread_unref(g_thread_new("map", run, scan));
    return scan;
}

PbaScanState pba_scan_pop(PbaScan *scan, PbaRange *run)
{
    g_mutex_lock(&scan->mutex);
    PbaScanState state = scan->used > 0 ? PBA_SCAN_FOUND
                         : scan->ended  ? PBA_SCAN_ENDED
                                        : PBA_SCAN_LATER;
    if (state == PBA_SCAN_FOUND) {
        *run = scan->ring[scan->head];
        scan->head = (scan->head + 1) % RING_SIZE;
        if (scan->used-- == RING_SIZE) {
            g_cond_signal(&scan->wanted);
        }
    }
    scan->consumer_waits = state == PBA_SCAN_LATER && scan->found_fd >= 0;
    g_mutex_unlock(&scan->mutex);
    return state;
}

void pba_scan_seek(PbaScan *scan, uint64_t offset)
{
    g_mutex_lock(&scan->mutex);
    scan->from = offset;
    scan->seek++;
    scan->head = 0;
    scan->used = 0;
    scan->ended = false;
    g_cond_signal(&scan->wanted);
    g_mutex_unlock(&scan->mutex);
}
