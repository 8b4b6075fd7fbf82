/* The dirty regions for reading ahead: a thread goes through the map on a connection of its own, so
 * that a slow answer holds up nobody. */
#include "../volume.h"
#include "server.h"

/* Regions known ahead of the reader. */
#define RING_SIZE 1024u

typedef struct {
    uint64_t begin;
    uint64_t end;
} Region;

struct PbaRegions {
    char *device;
    char *path;
    char *bitmap;
    uint64_t size;
    GMutex mutex; /* of all below */
    GCond wanted;
    Region ring[RING_SIZE];
    unsigned head;
    unsigned used;
    uint64_t from; /* where the map is to be read from */
    unsigned seek; /* counts the times from was set */
    bool ended;    /* no more regions, until the next seek */
};

/* Waits until a region more is wanted; true if the thread is to go on with what it reads. */
static bool wait_wanted(PbaRegions *regions, unsigned seek)
{
    g_mutex_lock(&regions->mutex);
    while (regions->seek == seek && (regions->ended || regions->used == RING_SIZE)) {
        g_cond_wait(&regions->wanted, &regions->mutex);
    }
    bool same = regions->seek == seek;
    g_mutex_unlock(&regions->mutex);
    return same;
}

/* Adds a region; none (its end is 0) is the end of the map. */
static void push(PbaRegions *regions, unsigned seek, Region region)
{
    g_mutex_lock(&regions->mutex);
    if (regions->seek == seek && region.end == 0) {
        regions->ended = true;
    } else if (regions->seek == seek) {
        regions->ring[(regions->head + regions->used) % RING_SIZE] = region;
        regions->used++;
    }
    g_mutex_unlock(&regions->mutex);
}

/* A map that cannot be read is the end of reading ahead: the reader notices nothing. */
static void read_map(PbaRegions *regions, uint64_t from, unsigned seek)
{
    PbaVolumeOptions options = {
        .device = regions->device,
        .path = regions->path,
        .bitmap = regions->bitmap,
        .size = regions->size,
    };
    g_autoptr(PbaVolume) volume = pba_volume_open(&options, NULL, NULL);
    uint64_t offset;
    uint64_t length;

    if (volume) {
        volume->map->asked = from;
    }
    while (wait_wanted(regions, seek)) {
        bool more = volume && pba_volume_next_dirty_region(volume, &offset, &length, NULL);
        more = more && length > 0;
        push(regions, seek, more ? (Region){offset, offset + length} : (Region){0, 0});
    }
}

static gpointer run(gpointer opaque)
{
    PbaRegions *regions = opaque;
    for (;;) {
        g_mutex_lock(&regions->mutex);
        uint64_t from = regions->from;
        unsigned seek = regions->seek;
        g_mutex_unlock(&regions->mutex);
        read_map(regions, from, seek);
    }
    return NULL;
}

PbaRegions *pba_regions_start(const PbaVolumeOptions *options)
{
    PbaRegions *regions = g_new0(PbaRegions, 1);
    regions->device = g_strdup(options->device);
    regions->path = g_strdup(options->path);
    regions->bitmap = g_strdup(options->bitmap);
    regions->size = options->size;
    g_mutex_init(&regions->mutex);
    g_cond_init(&regions->wanted);
    g_thread_unref(g_thread_new("map", run, regions));
    return regions;
}

bool pba_regions_pop(PbaRegions *regions, uint64_t *begin, uint64_t *end)
{
    g_mutex_lock(&regions->mutex);
    bool found = regions->used > 0;
    if (found) {
        *begin = regions->ring[regions->head].begin;
        *end = regions->ring[regions->head].end;
        regions->head = (regions->head + 1) % RING_SIZE;
        if (regions->used-- == RING_SIZE) {
            g_cond_signal(&regions->wanted);
        }
    }
    g_mutex_unlock(&regions->mutex);
    return found;
}

void pba_regions_seek(PbaRegions *regions, uint64_t offset)
{
    g_mutex_lock(&regions->mutex);
    regions->from = offset;
    regions->seek++;
    regions->head = 0;
    regions->used = 0;
    regions->ended = false;
    g_cond_signal(&regions->wanted);
    g_mutex_unlock(&regions->mutex);
}
