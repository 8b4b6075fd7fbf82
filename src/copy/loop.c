/* A single wait for all connections and threads of a copy. */
#include "copy.h"
#include "src/base/base.h"
#include <unistd.h>

void pba_loop_add(PbaLoop *loop, struct nbd_handle *handle)
{
    for (unsigned i = 0; i < loop->count; i++) {
        if (loop->handles[i] == handle) {
            return;
        }
    }
    g_assert(loop->count < G_N_ELEMENTS(loop->handles));
    loop->handles[loop->count++] = handle;
}

void pba_loop_watch(PbaLoop *loop, int watched, bool (*on_ready)(void *opaque, GError **error),
                    void *opaque)
{
    loop->watched = watched;
    loop->on_ready = on_ready;
    loop->opaque = opaque;
}

PbaPool *pba_loop_pool(PbaLoop *loop, unsigned threads, GError **error)
{
    if (!loop->pool) {
        loop->pool = pba_pool_new(error);
    }
    return loop->pool && pba_pool_grow(loop->pool, threads, error) ? loop->pool : NULL;
}

/* A dead connection waits for nothing: its requests in flight were completed as failed. */
static struct pollfd poll_entry(struct nbd_handle *handle)
{
    short events = pba_nbd_events(handle);

    return (struct pollfd){.fd = events ? nbd_aio_get_fd(handle) : -1, .events = events};
}

bool pba_loop_check_owner(const PbaLoop *loop, GError **error)
{
    if (loop->owner == getpid()) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_STATE, "the copy belongs to another process");
    return false;
}

bool pba_loop_turn(PbaLoop *loop, gint64 until, gint64 deadline, GError **error)
{
    struct pollfd entries[G_N_ELEMENTS(loop->handles) + 2];
    unsigned count = loop->count;

    for (unsigned i = 0; i < loop->count; i++) {
        entries[i] = poll_entry(loop->handles[i]);
    }
    if (loop->pool) {
        entries[count++] = (struct pollfd){.fd = pba_pool_fd(loop->pool), .events = POLLIN};
    }
    if (loop->on_ready) {
        entries[count++] = (struct pollfd){.fd = loop->watched, .events = POLLIN};
    }
    if (!pba_wait_fds(entries, count, until, deadline, &loop->hooks, "copying", error) ||
        !pba_loop_check_owner(loop, error)) {
        return false;
    }
    for (unsigned i = 0; i < loop->count; i++) {
        /* An error here ends the connection and all its requests in flight. Their completions say
         * more than libnbd's message. */
        if (entries[i].revents) {
            pba_nbd_notify(loop->handles[i], entries[i].events, entries[i].revents);
        }
    }
    if (loop->pool) {
        pba_pool_reap(loop->pool);
    }
    return !loop->on_ready || loop->on_ready(loop->opaque, error);
}
