/* Opens a volume over NBD, and closes a volume of any kind. */
#include "src/base/base.h"
#include "volume.h"

static PbaNbdVolume *open_context(const PbaVolumeOptions *options, const char *context,
                                  const PbaHooks *hooks, GError **error)
{
    PbaNbdVolume *nbd = g_new0(PbaNbdVolume, 1);

    nbd->volume = (PbaVolume){
        .reader = &pba_nbd_reader,
        .hooks = hooks ? *hooks : (PbaHooks){0},
        .device = g_strdup(options->device),
        .size = options->size,
    };
    nbd->path = g_strdup(options->path);
    nbd->context = g_strdup(context);
    if (!pba_nbd_connect(nbd, error)) {
        pba_volume_free(&nbd->volume);
        return NULL;
    }
    return nbd;
}

PbaNbdVolume *pba_nbd_open(const PbaVolumeOptions *options, const PbaHooks *hooks, GError **error)
{
    g_autofree char *context =
        options->bitmap ? g_strconcat("qemu:dirty-bitmap:", options->bitmap, NULL) : NULL;

    PbaNbdVolume *nbd = open_context(options, context, hooks, error);
    if (nbd) {
        nbd->volume.map = pba_volume_map(&nbd->volume, 0);
    }
    return nbd;
}

PbaVolume *pba_volume_open(const PbaVolumeOptions *options, const PbaHooks *hooks, GError **error)
{
    PbaNbdVolume *nbd = pba_nbd_open(options, hooks, error);

    return nbd ? &nbd->volume : NULL;
}

PbaNbdVolume *pba_nbd_open_allocation(const PbaVolumeOptions *options, const PbaHooks *hooks,
                                      GError **error)
{
    g_autoptr(GError) local = NULL;
    PbaNbdVolume *nbd = open_context(options, LIBNBD_CONTEXT_BASE_ALLOCATION, hooks, &local);

    if (nbd) {
        return nbd;
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
    pba_map_free(volume->map);
    volume->reader->free(volume);
    g_free(volume->device);
    g_free(volume->broken);
    g_free(volume);
}
