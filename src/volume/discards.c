/* Many discards at a time over NBD. */
#include "src/base/base.h"
#include "volume.h"

/* Under way at once. */
#define MAX_DISCARDS 32

/* Discards under way. */
typedef struct {
    PbaNbdVolume *nbd;
    unsigned count;
    int error; /* errno of the first that failed, 0 if none did */
} Discards;

static int on_discarded(void *opaque, int *error)
{
    Discards *discards = opaque;

    discards->count--;
    if (*error && !discards->error) {
        discards->error = *error;
    }
    return 1;
}

static bool wait_for_discards(Discards *discards, unsigned at_most, GError **error)
{
    static const char what[] = "discarding";
    gint64 deadline = pba_deadline(PBA_NBD_LIMIT_S);

    while (discards->count > at_most) {
        if (!pba_nbd_turn(discards->nbd, deadline, what, error)) {
            return false;
        }
    }
    if (discards->error) {
        pba_error_set(error, PBA_ERROR_NBD, "%s failed - %s", what, g_strerror(discards->error));
        pba_error_add_device(error, discards->nbd->volume.device);
        return false;
    }
    return true;
}

static bool start_discards(Discards *discards, PbaRange range, GError **error)
{
    nbd_completion_callback done = {.callback = on_discarded, .user_data = discards};

    for (uint64_t at = range.begin; at < range.end; at += PBA_MAX_DISCARD) {
        if (!wait_for_discards(discards, MAX_DISCARDS - 1, error)) {
            return false;
        }
        discards->count++; /* first, because it may be answered at once */
        if (nbd_aio_trim(discards->nbd->handle, MIN(range.end - at, PBA_MAX_DISCARD), at, done, 0) <
            0) {
            discards->count--;
            pba_nbd_set_error(discards->nbd, "discarding", error);
            return false;
        }
    }
    return true;
}

bool pba_nbd_discard_ranges(PbaNbdVolume *nbd, const PbaRange *ranges, unsigned count,
                            GError **error)
{
    Discards discards = {.nbd = nbd};
    bool ok = pba_nbd_connect(nbd, error);

    for (unsigned i = 0; ok && i < count; i++) {
        ok = start_discards(&discards, pba_volume_whole_clusters(&nbd->volume, ranges[i]), error);
    }
    ok = ok && wait_for_discards(&discards, 0, error);
    if (discards.count > 0) {
        pba_nbd_disconnect(nbd); /* discards in flight still refer to this function's memory */
    }
    return ok;
}
