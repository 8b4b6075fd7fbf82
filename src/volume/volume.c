/* A volume, whatever it is read from. */
#include "volume.h"
#include "src/base/base.h"
#include <inttypes.h>
#include <string.h>

/* Of the context qemu:dirty-bitmap (QEMU: docs/interop/nbd). */
#define STATE_DIRTY 1u
#define MAX_READ (32u << 20)

void pba_volume_break(PbaVolume *volume, const GError *error)
{
    if (!volume->broken) {
        volume->broken = g_strdup(error->message);
    }
}

bool pba_volume_check(const PbaVolume *volume, GError **error)
{
    if (!volume->broken) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_NBD, "an earlier error left no connection - %s", volume->broken);
    return false;
}

static PbaVolume *open_context(const PbaVolumeOptions *options, const char *context,
                               const PbaHooks *hooks, GError **error)
{
    PbaVolume *volume = g_new0(PbaVolume, 1);

    volume->hooks = hooks ? *hooks : (PbaHooks){0};
    volume->device = g_strdup(options->device);
    volume->path = g_strdup(options->path);
    volume->context = g_strdup(context);
    volume->size = options->size;
    volume->reader = &pba_nbd_reader;
    if (!pba_volume_connect(volume, error)) {
        pba_volume_free(volume);
        return NULL;
    }
    return volume;
}

PbaVolume *pba_volume_open(const PbaVolumeOptions *options, const PbaHooks *hooks, GError **error)
{
    g_autofree char *context =
        options->bitmap ? g_strconcat("qemu:dirty-bitmap:", options->bitmap, NULL) : NULL;

    PbaVolume *volume = open_context(options, context, hooks, error);
    if (volume) {
        volume->map = pba_volume_map(volume, 0);
    }
    return volume;
}

PbaVolume *pba_volume_open_allocation(const PbaVolumeOptions *options, const PbaHooks *hooks,
                                      GError **error)
{
    g_autoptr(GError) local = NULL;
    PbaVolume *volume = open_context(options, LIBNBD_CONTEXT_BASE_ALLOCATION, hooks, &local);

    if (volume) {
        return volume;
    }
    if (!g_error_matches(local, PBA_ERROR, PBA_ERROR_INCOMPLETE)) {
        g_propagate_error(error, g_steal_pointer(&local));
        return NULL;
    }
    return open_context(options, NULL, hooks, error);
}

PbaVolume *pba_volume_new_handle(PbaHandle *handle, const char *device, uint64_t size,
                                 const PbaHooks *hooks)
{
    PbaVolume *volume = g_new0(PbaVolume, 1);

    volume->hooks = hooks ? *hooks : (PbaHooks){0};
    volume->device = g_strdup(device);
    volume->size = size;
    pba_sizes_read_file(&volume->sizes, pba_handle_fd(handle), size);
    volume->handle = handle;
    volume->reader = &pba_handle_reader;
    volume->map = pba_volume_map(volume, 0);
    return volume;
}

void pba_volume_free(PbaVolume *volume)
{
    if (!volume) {
        return;
    }
    volume->reader->free(volume);
    pba_map_free(volume->map);
    g_free(volume->device);
    g_free(volume->path);
    g_free(volume->context);
    g_free(volume->broken);
    g_free(volume);
}

uint64_t pba_volume_size(const PbaVolume *volume)
{
    return volume->size;
}

static bool check_range(const PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (length > 0 && offset <= volume->size && length <= volume->size - offset) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "the range at offset %" PRIu64 " of length %" PRIu64
                  " is empty or not inside the volume of %" PRIu64 " bytes",
                  offset, length, volume->size);
    pba_error_add_device(error, volume->device);
    return false;
}

bool pba_volume_pread(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                      GError **error)
{
    if (!check_range(volume, offset, length, error)) {
        return false;
    }
    if (length > MAX_READ) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "a single read has at most %u bytes, not %" PRIu64,
                      MAX_READ, length);
        pba_error_add_device(error, volume->device);
        return false;
    }
    return volume->reader->pread(volume, buffer, offset, length, error);
}

PbaRange pba_volume_whole_clusters(const PbaVolume *volume, PbaRange range)
{
    return pba_whole_clusters(range, volume->size, volume->sizes.cluster);
}

bool pba_volume_discard(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (!check_range(volume, offset, length, error)) {
        return false;
    }
    PbaRange range = pba_volume_whole_clusters(volume, (PbaRange){offset, offset + length});
    for (uint64_t at = range.begin; at < range.end; at += PBA_MAX_DISCARD) {
        if (!volume->reader->discard(volume, at, MIN(range.end - at, PBA_MAX_DISCARD), error)) {
            return false;
        }
    }
    return true;
}

PbaMap *pba_volume_map(PbaVolume *volume, uint64_t begin)
{
    return pba_map_new(volume, STATE_DIRTY, begin, volume->size);
}

PbaMap *pba_volume_zeroes(PbaVolume *volume, uint64_t begin, uint64_t end)
{
    return pba_map_new(volume, LIBNBD_STATE_ZERO, begin, end);
}

bool pba_volume_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                            bool *later, GError **error)
{
    if (later) {
        *later = false;
    }
    return pba_volume_check(volume, error) &&
           volume->reader->next_region(volume, map, offset, length, later, error);
}

bool pba_volume_next_dirty_region(PbaVolume *volume, uint64_t *offset, uint64_t *length,
                                  GError **error)
{
    return pba_volume_next_region(volume, volume->map, offset, length, NULL, error);
}
