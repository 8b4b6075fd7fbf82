#include "base.h"

#include <errno.h>

/* A signal that arrives just before poll() does not end it, so the hook is asked this often. */
#define SLICE_MS 200

gint64 pba_deadline(unsigned seconds)
{
    return g_get_monotonic_time() + seconds * G_TIME_SPAN_SECOND;
}

static bool may_go_on(gint64 deadline, const PbaHooks *hooks, const char *what, GError **error)
{
    if (hooks && hooks->interrupted && hooks->interrupted(hooks->opaque)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "interrupted while %s", what);
        return false;
    }
    if (g_get_monotonic_time() >= deadline) {
        pba_error_set(error, PBA_ERROR_TIMEOUT, "timeout while %s", what);
        return false;
    }
    return true;
}

bool pba_wait_fds(struct pollfd *fds, unsigned count, gint64 until, gint64 deadline,
                  const PbaHooks *hooks, const char *what, GError **error)
{
    while (may_go_on(deadline, hooks, what, error)) {
        gint64 left_us = MIN(deadline, until) - g_get_monotonic_time();
        gint64 left_ms = left_us > 0 ? left_us / 1000 + 1 : 0;
        int ready = poll(fds, count, (int)MIN(left_ms, SLICE_MS));
        if (ready > 0) {
            return true;
        }
        if (ready < 0 && errno != EINTR) {
            pba_error_set(error, PBA_ERROR_SYSTEM, "poll failed while %s - %s", what,
                          g_strerror(errno));
            return false;
        }
        if (g_get_monotonic_time() >= until) {
            for (unsigned i = 0; i < count; i++) {
                fds[i].revents = 0;
            }
            return true;
        }
    }
    return false;
}

bool pba_wait_fd(int fd, short events, short *revents, gint64 deadline, const PbaHooks *hooks,
                 const char *what, GError **error)
{
    struct pollfd pollfd = {.fd = fd, .events = events};

    if (!pba_wait_fds(&pollfd, 1, G_MAXINT64, deadline, hooks, what, error)) {
        return false;
    }
    *revents = pollfd.revents;
    return true;
}

bool pba_wait_ms(unsigned milliseconds, gint64 deadline, const PbaHooks *hooks, const char *what,
                 GError **error)
{
    gint64 until = g_get_monotonic_time() + milliseconds * G_TIME_SPAN_MILLISECOND;
    return pba_wait_fds(NULL, 0, until, deadline, hooks, what, error);
}
