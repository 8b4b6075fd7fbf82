/* Another connection to an export that already has one.
 *
 * If a client connects to QEMU (10.0, 10.2) while QEMU drains the disk, as it does when the guest
 * resets the disk's controller, QEMU waits until this client disconnects: the guest and the monitor
 * stand still. QEMU then does not read from the clients that connected earlier. */
#include "src/base/base.h"
#include "volume.h"
#include <poll.h>

static int on_answered(void *opaque, int *error)
{
    bool *answered = opaque;

    (void)error; /* an error is an answer */
    *answered = true;
    return 1; /* retire the command */
}

/* Also returns true at the time until, after which it may be called again. */
static bool wait_answer(PbaNbdVolume *nbd, const bool *answered, gint64 until, gint64 deadline,
                        GError **error)
{
    g_autofree char *what =
        g_strdup_printf("reading %u bytes at offset 0", (unsigned)nbd->volume.sizes.block);

    while (!*answered && g_get_monotonic_time() < until) {
        struct pollfd fd = {nbd_aio_get_fd(nbd->handle), pba_nbd_events(nbd->handle), 0};
        if (!pba_wait_fds(&fd, 1, until, deadline, &nbd->volume.hooks, what, error)) {
            pba_error_add_device(error, nbd->volume.device);
            return false;
        }
        if (fd.revents && pba_nbd_notify(nbd->handle, fd.events, fd.revents) == -1) {
            pba_nbd_set_error(nbd, what, error);
            return false;
        }
    }
    return true;
}

bool pba_nbd_keep_newer(PbaNbdVolume *nbd, PbaNbdVolume **newer, GError **error)
{
    g_autofree char *block = g_malloc(nbd->volume.sizes.block);
    nbd_completion_callback done = {.callback = on_answered};
    bool answered = false;

    done.user_data = &answered;
    if (nbd->volume.size < nbd->volume.sizes.block) {
        return true;
    }
    if (nbd_aio_pread(nbd->handle, block, nbd->volume.sizes.block, 0, done, 0) == -1) {
        pba_nbd_set_error(nbd, "reading", error);
        return false;
    }
    gint64 deadline = pba_deadline(PBA_NBD_LIMIT_S);
    bool done_waiting = wait_answer(nbd, &answered, pba_deadline(PBA_NBD_LATE_S), deadline, error);
    if (done_waiting && !answered) {
        pba_volume_free(&(*newer)->volume);
        *newer = NULL;
        done_waiting = wait_answer(nbd, &answered, G_MAXINT64, deadline, error);
    }
    if (!answered) {
        pba_nbd_disconnect(nbd); /* the answer would be written to freed memory */
    }
    return done_waiting;
}
