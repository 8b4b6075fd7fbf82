/* One wait for all of a copy's connections and threads. */
#include "copy.h"
#include "error.h"
#include "wait.h"
#include <poll.h>

void pba_loop_add(PbaLoop *loop, struct nbd_handle *handle)
{
    g_assert(loop->count < G_N_ELEMENTS(loop->handles));
    loop->handles[loop->count++] = handle;
}

PbaPool *pba_loop_pool(PbaLoop *loop, GError **error)
{
    if (!loop->pool) {
        loop->pool = pba_pool_new(error);
    }
    return loop->pool;
}

static struct pollfd poll_entry(struct nbd_handle *handle)
{
    unsigned direction = nbd_aio_get_direction(handle);
    short events = 0;

    if (direction & LIBNBD_AIO_DIRECTION_READ) {
        events |= POLLIN;
    }
    if (direction & LIBNBD_AIO_DIRECTION_WRITE) {
        events |= POLLOUT;
    }
    /* A connection that has died has no direction; what was in flight was completed as failed. */
    return (struct pollfd){.fd = direction ? nbd_aio_get_fd(handle) : -1, .events = events};
}

/* An error here ends the connection, and with it every request in flight: their completions say
 * more than libnbd's message would. */
static void notify(struct nbd_handle *handle, const struct pollfd *entry)
{
    bool can_read = (entry->revents & (POLLIN | POLLHUP | POLLERR)) != 0;

    if (can_read && (entry->events & POLLIN)) {
        nbd_aio_notify_read(handle);
    } else if (entry->revents) {
        nbd_aio_notify_write(handle);
    }
}

bool pba_loop_turn(PbaLoop *loop, gint64 until, gint64 deadline, GError **error)
{
    struct pollfd entries[G_N_ELEMENTS(loop->handles) + 1];
    unsigned count = loop->count;

    for (unsigned i = 0; i < loop->count; i++) {
        entries[i] = poll_entry(loop->handles[i]);
    }
    if (loop->pool) {
        entries[count++] = (struct pollfd){.fd = pba_pool_fd(loop->pool), .events = POLLIN};
    }
    if (!pba_wait_fds(entries, count, until, deadline, &loop->hooks, "copying", error)) {
        return false;
    }
    for (unsigned i = 0; i < loop->count; i++) {
        if (entries[i].revents) {
            notify(loop->handles[i], &entries[i]);
        }
    }
    if (loop->pool) {
        pba_pool_reap(loop->pool);
    }
    return true;
}
