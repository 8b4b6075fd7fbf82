/* The dirty regions for reading ahead: a thread goes through the map on a connection of its own, so
 * that a slow answer holds up no reader. */
#include "server.h"
#include "src/volume/volume.h"

/* Regions known ahead of the reader. */
#define RING_SIZE 1024u

struct PbaScan {
    char *device;
    char *path;
    char *bitmap;
    uint64_t size;
    GMutex mutex; /* of all below */
    GCond wanted;
    PbaRange ring[RING_SIZE];
    unsigned head;
    unsigned used;
    uint64_t from; /* where the map is to be read from */
    unsigned seek; /* counts the times from was set */
    bool ended;    /* no more regions, until the next seek */
};

/* Waits until a region more is wanted; true if the thread is to go on with what it reads. */
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

/* Adds a region; none (its end is 0) is the end of the map. */
static void push(PbaScan *scan, unsigned seek, PbaRange region)
{
    g_mutex_lock(&scan->mutex);
    if (scan->seek == seek && region.end == 0) {
        scan->ended = true;
    } else if (scan->seek == seek) {
        scan->ring[(scan->head + scan->used) % RING_SIZE] = region;
        scan->used++;
    }
    g_mutex_unlock(&scan->mutex);
}

/* A map that cannot be read is the end of reading ahead: the reader notices nothing. */
static void read_map(PbaScan *scan, uint64_t from, unsigned seek)
{
    PbaVolumeOptions options = {
        .device = scan->device,
        .path = scan->path,
        .bitmap = scan->bitmap,
        .size = scan->size,
    };
    g_autoptr(PbaVolume) volume = pba_volume_open(&options, NULL, NULL);
    uint64_t offset;
    uint64_t length;

    PbaMap *map = volume ? pba_volume_map(volume, from) : NULL;
    while (wait_wanted(scan, seek)) {
        bool more = volume && pba_volume_next_region(volume, map, &offset, &length, NULL, NULL);
        more = more && length > 0;
        push(scan, seek, more ? (PbaRange){offset, offset + length} : (PbaRange){0, 0});
    }
    g_clear_pointer(&volume, pba_volume_free);
    pba_map_free(map);
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

PbaScan *pba_scan_start(const PbaVolumeOptions *options)
{
    PbaScan *scan = g_new0(PbaScan, 1);
    scan->device = g_strdup(options->device);
    scan->path = g_strdup(options->path);
    scan->bitmap = g_strdup(options->bitmap);
    scan->size = options->size;
    g_mutex_init(&scan->mutex);
    g_cond_init(&scan->wanted);
    g_thread_unref(g_thread_new("map", run, scan));
    return scan;
}

bool pba_scan_pop(PbaScan *scan, uint64_t *begin, uint64_t *end)
{
    g_mutex_lock(&scan->mutex);
    bool found = scan->used > 0;
    if (found) {
        *begin = scan->ring[scan->head].begin;
        *end = scan->ring[scan->head].end;
        scan->head = (scan->head + 1) % RING_SIZE;
        if (scan->used-- == RING_SIZE) {
            g_cond_signal(&scan->wanted);
        }
    }
    g_mutex_unlock(&scan->mutex);
    return found;
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
