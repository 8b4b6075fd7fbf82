/* Opening a volume: here is chosen what it is read from. */
#include "src/base/base.h"
#include "volume.h"

/* Of the context qemu:dirty-bitmap (QEMU: docs/interop/nbd). */
#define STATE_DIRTY 1u

PbaMap *pba_volume_map(PbaVolume *volume, uint64_t begin)
{
    return pba_map_new(volume, STATE_DIRTY, begin, volume->size);
}

PbaMap *pba_volume_zeroes(PbaVolume *volume, uint64_t begin, uint64_t end)
{
    return pba_map_new(volume, LIBNBD_STATE_ZERO, begin, end);
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

PbaVolume *pba_volume_open_handle(const char *device, int fd, uint64_t size,
                                  PbaNextRegion next_region, void *opaque, const PbaHooks *hooks,
                                  GError **error)
{
    PbaHandle *handle = pba_handle_new(fd, size, next_region, opaque, error);

    if (!handle) {
        pba_error_add_device(error, device);
        return NULL;
    }
    PbaVolume *volume = g_new0(PbaVolume, 1);
    volume->reader = &pba_handle_reader;
    volume->handle = handle;
    volume->hooks = hooks ? *hooks : (PbaHooks){0};
    volume->device = g_strdup(device);
    volume->size = size;
    pba_sizes_read_file(&volume->sizes, pba_handle_fd(handle), size);
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
