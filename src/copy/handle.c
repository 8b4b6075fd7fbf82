/* A volume that is an open file handle, as a provider gets it with the mechanism file-handle. */
#define _GNU_SOURCE
#include "copy.h"
#include "regions.h"
#include "src/base/base.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    PbaVolume volume;
    int fd; /* our own */
    PbaNextRegion next_region;
    void *opaque;
    PbaRegions *given; /* each region is given once, but may be read again */
    bool ended;
} HandleVolume;

typedef struct {
    PbaMap map;
    PbaRegionsCursor cursor; /* in what was given */
} HandleMap;

/* Checks the size, which is part of the contract. Files that are not regular, or in /proc, do not
 * report it. */
static bool check_size(int fd, uint64_t size, GError **error)
{
    struct stat stat;
    bool known = fstat(fd, &stat) == 0 && S_ISREG(stat.st_mode) && stat.st_size > 0;

    if (known && (uint64_t)stat.st_size != size) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "the file has %" PRIi64 " bytes instead of %" PRIu64, (int64_t)stat.st_size,
                      size);
        return false;
    }
    if (size > G_MAXINT64) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "a file cannot have %" PRIu64 " bytes", size);
        return false;
    }
    return true;
}

/* Our own descriptor for the file; -1 on error. */
static int own_descriptor(int fd, uint64_t size, GError **error)
{
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    if (own < 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot use the file handle - %s",
                      g_strerror(errno));
    } else if (!check_size(own, size, error)) {
        close(own);
        own = -1;
    }
    return own;
}

PbaVolume *pba_volume_open_handle(const char *device, int fd, uint64_t size,
                                  PbaNextRegion next_region, void *opaque, const PbaHooks *hooks,
                                  GError **error)
{
    int own = own_descriptor(fd, size, error);

    if (own < 0) {
        pba_error_add_device(error, device);
        return NULL;
    }
    HandleVolume *self = g_new0(HandleVolume, 1);
    self->volume = (PbaVolume){
        .reader = &pba_handle_reader,
        .hooks = hooks ? *hooks : (PbaHooks){0},
        .device = g_strdup(device),
        .size = size,
    };
    self->fd = own;
    self->next_region = next_region;
    self->opaque = opaque;
    self->given = pba_regions_new();
    pba_sizes_read_file(&self->volume.sizes, own, size);
    self->volume.map = pba_volume_map(&self->volume, 0);
    return &self->volume;
}

static void handle_free(PbaVolume *volume)
{
    HandleVolume *self = (HandleVolume *)volume;

    close(self->fd);
    pba_regions_free(self->given);
}

int pba_handle_fd(const PbaVolume *volume)
{
    return ((const HandleVolume *)volume)->fd;
}

/* True if the call that set errno must be repeated. */
static bool may_retry(PbaVolume *volume, const char *what, uint64_t offset, uint64_t length,
                      GError **error)
{
    const PbaHooks *hooks = &volume->hooks;
    int problem = errno;

    if (problem == EINTR && !(hooks->interrupted && hooks->interrupted(hooks->opaque))) {
        return true;
    }
    if (problem == EINTR) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "interrupted while %s at offset %" PRIu64, what,
                      offset);
    } else {
        pba_error_set(error, PBA_ERROR_SYSTEM,
                      "%s %" PRIu64 " bytes at offset %" PRIu64 " failed - %s", what, length,
                      offset, g_strerror(problem));
        if (problem == EIO) {
            pba_error_add_hint(error, PBA_HINT_UNREADABLE);
        }
    }
    pba_error_add_device(error, volume->device);
    return false;
}

static bool handle_pread(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                         GError **error)
{
    char *at = buffer;

    while (length > 0) {
        ssize_t got = pread(pba_handle_fd(volume), at, length, (off_t)offset);
        if (got == 0) {
            pba_error_set(error, PBA_ERROR_INCOMPLETE,
                          "the file ends at offset %" PRIu64 " instead of %" PRIu64, offset,
                          volume->size);
            pba_error_add_device(error, volume->device);
            return false;
        }
        if (got < 0 && !may_retry(volume, "reading", offset, length, error)) {
            return false;
        }
        if (got > 0) {
            at += got;
            offset += (uint64_t)got;
            length -= (uint64_t)got;
        }
    }
    return true;
}

static bool handle_discard(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    while (fallocate(pba_handle_fd(volume), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (off_t)offset, (off_t)length) != 0) {
        if (!may_retry(volume, "discarding", offset, length, error)) {
            return false;
        }
    }
    return true;
}

/* Gets one more region from the caller, unless there are no more. */
static bool ask_region(PbaVolume *volume, GError **error)
{
    HandleVolume *self = (HandleVolume *)volume;
    GError *local = NULL;
    uint64_t offset = 0;
    uint64_t length = 0;

    if (!self->next_region(self->opaque, &offset, &length, &local)) {
        pba_error_add_device(&local, volume->device);
    } else if (length == 0) {
        self->ended = true;
        return true;
    } else if (offset < self->given->end || offset > volume->size ||
               length > volume->size - offset) {
        pba_error_set(&local, PBA_ERROR_INCOMPLETE,
                      "the next dirty region cannot begin at offset %" PRIu64
                      " with length %" PRIu64,
                      offset, length);
        pba_error_add_device(&local, volume->device);
    } else {
        pba_regions_add(self->given, offset, length);
        return true;
    }
    if (local->code != PBA_ERROR_INTERRUPTED) {
        pba_volume_break(volume, local);
    }
    g_propagate_error(error, local);
    return false;
}

static bool handle_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                               bool *later, GError **error)
{
    const HandleVolume *self = (const HandleVolume *)volume;
    PbaRegionsCursor *cursor = &((HandleMap *)map)->cursor;

    (void)later; /* the caller's function is waited for */
    pba_regions_take(self->given, cursor, offset, length);
    if (*length > 0 || self->ended) {
        return true;
    }
    if (!ask_region(volume, error)) {
        return false;
    }
    pba_regions_take(self->given, cursor, offset, length);
    return true;
}

/* Searches from the first region on, because the list has no index. */
static PbaMap *handle_new_map(PbaVolume *volume, uint64_t begin)
{
    HandleMap *map = g_new0(HandleMap, 1);

    (void)volume;
    (void)begin;
    map->map.reader = &pba_handle_reader;
    return &map->map;
}

static void handle_free_map(PbaMap *map)
{
    g_free(map);
}

const PbaReader pba_handle_reader = {
    .pread = handle_pread,
    .discard = handle_discard,
    .new_map = handle_new_map,
    .free_map = handle_free_map,
    .next_region = handle_next_region,
    .free = handle_free,
    .error_code = PBA_ERROR_SYSTEM,
    .unreadable = EIO,
};
