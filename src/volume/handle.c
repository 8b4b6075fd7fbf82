/* A volume behind an open file handle: the mechanism file-handle, as a provider is given it. */
#define _GNU_SOURCE
#include "handle.h"
#include "src/base/base.h"
#include "volume.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

struct PbaHandle {
    int fd;
    PbaNextRegion next_region;
    void *opaque;
    PbaRegions *given; /* each region is given once, but may be read again */
    bool ended;
};

/* The size is part of the contract. What is no regular file, or is one of /proc, does not tell it.
 */
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
        pba_error_set(error, PBA_ERROR_ARGUMENT, "no file has %" PRIu64 " bytes", size);
        return false;
    }
    return true;
}

/* A descriptor of our own for it; -1 on error. */
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

PbaHandle *pba_handle_new(int fd, uint64_t size, PbaNextRegion next_region, void *opaque,
                          GError **error)
{
    int own = own_descriptor(fd, size, error);

    if (own < 0) {
        return NULL;
    }
    PbaHandle *handle = g_new0(PbaHandle, 1);
    handle->fd = own;
    handle->next_region = next_region;
    handle->opaque = opaque;
    handle->given = pba_regions_new();
    return handle;
}

static void handle_free(PbaVolume *volume)
{
    close(volume->handle->fd);
    pba_regions_free(volume->handle->given);
    g_free(volume->handle);
}

int pba_handle_fd(const PbaHandle *handle)
{
    return handle->fd;
}

/* True if the call that errno is of is to be made again. */
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
        ssize_t got = pread(volume->handle->fd, at, length, (off_t)offset);
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
    while (fallocate(volume->handle->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                     (off_t)length) != 0) {
        if (!may_retry(volume, "discarding", offset, length, error)) {
            return false;
        }
    }
    return true;
}

/* Has the caller give one more region, unless it was the last. */
static bool ask_region(PbaVolume *volume, GError **error)
{
    PbaHandle *handle = volume->handle;
    GError *local = NULL;
    uint64_t offset = 0;
    uint64_t length = 0;

    if (!handle->next_region(handle->opaque, &offset, &length, &local)) {
        pba_error_add_device(&local, volume->device);
    } else if (length == 0) {
        handle->ended = true;
        return true;
    } else if (offset < handle->given->end || offset > volume->size ||
               length > volume->size - offset) {
        pba_error_set(&local, PBA_ERROR_INCOMPLETE,
                      "the next dirty region cannot begin at offset %" PRIu64
                      " with length %" PRIu64,
                      offset, length);
        pba_error_add_device(&local, volume->device);
    } else {
        pba_regions_add(handle->given, offset, length);
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
    const PbaHandle *handle = volume->handle;

    (void)later; /* the caller's function is waited for */
    pba_regions_take(handle->given, &map->given, offset, length);
    if (*length > 0 || handle->ended) {
        return true;
    }
    if (!ask_region(volume, error)) {
        return false;
    }
    pba_regions_take(handle->given, &map->given, offset, length);
    return true;
}

const PbaReader pba_handle_reader = {
    .pread = handle_pread,
    .discard = handle_discard,
    .next_region = handle_next_region,
    .free = handle_free,
    .error_code = PBA_ERROR_SYSTEM,
    .unreadable = EIO,
};
