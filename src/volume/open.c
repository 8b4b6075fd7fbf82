/* Opening a volume over NBD, and closing one, whatever it is read from. */
#include "src/base/base.h"
#include "volume.h"

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
