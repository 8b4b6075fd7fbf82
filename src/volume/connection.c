/* The connection of a volume that is read over NBD: libnbd, and what we require of a server. */
#include "src/base/base.h"
#include "volume.h"
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#define CONNECT_LIMIT_S 30
/* Between two attempts to connect to a socket whose queue is full. */
#define FIRST_PAUSE_MS 5u
#define LONGEST_PAUSE_MS 100u
/* For answers when a connection ends: a signal handler that died gets its way within a second. */
#define CUT_LIMIT_MS 500

void pba_nbd_set_error(const PbaNbdVolume *nbd, const char *what, GError **error)
{
    const char *text = nbd_get_error();
    pba_error_set(error, PBA_ERROR_NBD, "%s failed - %s", what, text ? text : "unknown NBD error");
    pba_error_add_device(error, nbd->volume.device);
}

bool pba_nbd_is_lost(const PbaNbdVolume *nbd)
{
    return !nbd->handle || nbd_aio_is_dead(nbd->handle) || nbd_aio_is_closed(nbd->handle);
}

/* Waits a moment for the answers to what is in flight; false if some still lack. */
static bool finish_in_flight(PbaNbdVolume *nbd)
{
    gint64 deadline = g_get_monotonic_time() + CUT_LIMIT_MS * G_TIME_SPAN_MILLISECOND;
    short revents;

    while (!pba_nbd_is_lost(nbd) && nbd_aio_in_flight(nbd->handle) > 0) {
        short events = pba_nbd_events(nbd->handle);
        if (!pba_wait_fd(nbd_aio_get_fd(nbd->handle), events, &revents, deadline, NULL, "finishing",
                         NULL) ||
            pba_nbd_notify(nbd->handle, events, revents) == -1) {
            break;
        }
    }
    return nbd_aio_in_flight(nbd->handle) <= 0;
}

/* QEMU carries out the requests in flight even after the connection has ended. With PBA_BY_CLUSTER
 * a second request for the same range must not reach it meanwhile, so this waits for the answers.
 * If some do not come, this process sends no more requests to the export. */
static void leave_nothing_behind(PbaNbdVolume *nbd)
{
    if (nbd->by_cluster && nbd->owner == getpid() && !pba_export_is_cut(nbd) &&
        !finish_in_flight(nbd)) {
        pba_export_note_cut(nbd);
    }
}

void pba_nbd_disconnect(PbaNbdVolume *nbd)
{
    if (nbd->handle) {
        leave_nothing_behind(nbd);
        nbd->connection++;
        pba_connection_forget(nbd);
        g_clear_pointer(&nbd->handle, nbd_close);
    }
}

bool pba_nbd_turn(PbaNbdVolume *nbd, gint64 deadline, const char *what, GError **error)
{
    short events = pba_nbd_events(nbd->handle);
    short revents;

    if (!pba_wait_fd(nbd_aio_get_fd(nbd->handle), events, &revents, deadline, &nbd->volume.hooks,
                     what, error)) {
        pba_error_add_device(error, nbd->volume.device);
        /* Requests in flight still refer to the caller's memory. */
        pba_nbd_disconnect(nbd);
        return false;
    }
    if (pba_nbd_notify(nbd->handle, events, revents) == -1) {
        pba_nbd_set_error(nbd, what, error);
        return false;
    }
    return true;
}

/* Also let libnbd restrict what a path of this kind may use, if it has such an option. */
static int limit_uris(struct nbd_handle *handle, const char *path)
{
    uint32_t transports =
        LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX | LIBNBD_ALLOW_TRANSPORT_VSOCK;

    return nbd_set_uri_allow_transports(handle, transports) == 0
               ? nbd_set_uri_allow_local_file(handle, pba_uri_is_tls(path))
               : -1;
}

static bool prepare(PbaNbdVolume *nbd)
{
    nbd->handle = nbd_create();
    nbd->owner = getpid();
    nbd->made = 0;
    if (nbd->handle) {
        pba_connection_note(nbd);
    }
    return nbd->handle && nbd_set_handle_name(nbd->handle, nbd->volume.device) == 0 &&
           nbd_set_full_info(nbd->handle, true) == 0 && limit_uris(nbd->handle, nbd->path) == 0 &&
           (!nbd->context || nbd_add_meta_context(nbd->handle, nbd->context) == 0) &&
           (pba_uri_is(nbd->path) || nbd_set_export_name(nbd->handle, nbd->volume.device) == 0);
}

static bool call_connect(const PbaNbdVolume *nbd)
{
    return (pba_uri_is(nbd->path) ? nbd_aio_connect_uri(nbd->handle, nbd->path)
                                  : nbd_aio_connect_unix(nbd->handle, nbd->path)) == 0;
}

/* Until then, others find no connection of the volume. */
static bool connect_aside(PbaNbdVolume *nbd, gint64 deadline, bool *is_full, GError **error)
{
    pba_connection_forget(nbd);
    nbd->handle = pba_connect_aside(g_steal_pointer(&nbd->handle), nbd->path, deadline,
                                    &nbd->volume.hooks, is_full, error);
    if (!nbd->handle) {
        pba_error_add_device(error, nbd->volume.device);
        return false;
    }
    pba_connection_note(nbd);
    return true;
}

/* *is_full: it failed because the socket's queue is full. */
static bool try_to_connect(PbaNbdVolume *nbd, gint64 deadline, bool *is_full, GError **error)
{
    bool is_prepared = prepare(nbd);

    *is_full = false;
    if (is_prepared && pba_uri_may_block(nbd->path)) {
        return connect_aside(nbd, deadline, is_full, error);
    }
    if (is_prepared && call_connect(nbd)) {
        return true;
    }
    *is_full = nbd_get_errno() == EAGAIN;
    pba_nbd_set_error(nbd, "connecting", error);
    return false;
}

/* If the queue of a Unix socket is full, connect(2) does not wait but fails with EAGAIN: the server
 * exists, but is slower than its clients. */
static bool start_connecting(PbaNbdVolume *nbd, gint64 deadline, GError **error)
{
    unsigned pause = FIRST_PAUSE_MS;
    GError *local = NULL;
    bool is_full;

    if (pba_uri_is(nbd->path) && !pba_uri_check(nbd->path, error)) {
        pba_error_add_device(error, nbd->volume.device);
        return false;
    }
    while (!try_to_connect(nbd, deadline, &is_full, &local)) {
        if (!is_full) {
            g_propagate_error(error, local);
            return false;
        }
        g_clear_error(&local);
        pba_nbd_disconnect(nbd);
        if (!pba_wait_ms(pause, deadline, &nbd->volume.hooks,
                         "waiting for room in the queue of the NBD server's socket", error)) {
            pba_error_add_device(error, nbd->volume.device);
            return false;
        }
        pause = MIN(2 * pause, LONGEST_PAUSE_MS);
    }
    return true;
}

static bool finish_connecting(PbaNbdVolume *nbd, gint64 deadline, GError **error)
{
    while (nbd_aio_is_connecting(nbd->handle)) {
        if (!pba_nbd_turn(nbd, deadline, "connecting", error)) {
            return false;
        }
    }
    if (!nbd_aio_is_ready(nbd->handle)) {
        pba_nbd_set_error(nbd, "connecting", error);
        return false;
    }
    return true;
}

/* The size is part of the contract; without the context, every block would look clean. */
static bool check_contract(PbaNbdVolume *nbd, GError **error)
{
    if (nbd->volume.sizes.size != nbd->volume.size) {
        pba_error_set(error, PBA_ERROR_NBD,
                      "the NBD export has %" PRIu64 " bytes instead of %" PRIu64,
                      nbd->volume.sizes.size, nbd->volume.size);
        return false;
    }
    if (nbd->context && nbd_can_meta_context(nbd->handle, nbd->context) != 1) {
        pba_error_set(error, PBA_ERROR_INCOMPLETE, "the NBD export has no metadata context '%s'",
                      nbd->context);
        return false;
    }
    return true;
}

static bool check_export(PbaNbdVolume *nbd, GError **error)
{
    char *description = nbd_get_export_description(nbd->handle);

    nbd->by_cluster = g_strcmp0(description, PBA_BY_CLUSTER) == 0;
    free(description);
    bool read = pba_sizes_read(&nbd->volume.sizes, nbd->handle, error);
    if (nbd->volume.size == UINT64_MAX) {
        nbd->volume.size = nbd->volume.sizes.size;
    }
    if (read && check_contract(nbd, error)) {
        return true;
    }
    pba_error_add_device(error, nbd->volume.device);
    return false;
}

static bool check_not_cut(const PbaNbdVolume *nbd, GError **error)
{
    if (!pba_export_is_cut(nbd)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_NBD,
                  "cannot be used any more, because a call ended while QEMU was reading for it: a "
                  "QEMU before 9.2 would abort, and end the guest, if it read the same range twice "
                  "at a time - tear the access down and set it up again");
    pba_error_add_device(error, nbd->volume.device);
    return false;
}

bool pba_nbd_connect(PbaNbdVolume *nbd, GError **error)
{
    if (!pba_volume_check(&nbd->volume, error) || !check_not_cut(nbd, error)) {
        return false;
    }
    if (nbd->handle) {
        return true;
    }
    gint64 deadline = pba_deadline(CONNECT_LIMIT_S);
    if (start_connecting(nbd, deadline, error) && finish_connecting(nbd, deadline, error) &&
        check_export(nbd, error)) {
        pba_connection_made(nbd);
        return true;
    }
    pba_nbd_disconnect(nbd);
    return false;
}

static int ignore_extents(void *opaque, const char *context, uint64_t offset, uint32_t *entries,
                          size_t count, int *error)
{
    (void)opaque;
    (void)context;
    (void)offset;
    (void)entries;
    (void)count;
    (void)error;
    return 0;
}

void pba_nbd_ask_for_status(const PbaNbdVolume *nbd)
{
    nbd_extent_callback callback = {.callback = ignore_extents};

    if (nbd->context && !nbd->by_cluster && nbd->volume.size >= PBA_CLUSTER) {
        nbd_aio_block_status(nbd->handle, PBA_CLUSTER, 0, callback, NBD_NULL_COMPLETION, 0);
    }
}

uint64_t pba_nbd_unit(const PbaNbdVolume *nbd, uint64_t offset, uint64_t length)
{
    uint64_t most = MIN(length, nbd->volume.sizes.request);

    return nbd->by_cluster ? MIN(most, PBA_CLUSTER - offset % PBA_CLUSTER) : most;
}

PbaNbdVolume *pba_nbd_least_busy(PbaNbdVolume *const *connections, unsigned count)
{
    PbaNbdVolume *best = connections[0];

    for (unsigned i = 1; i < count; i++) {
        if (nbd_aio_in_flight(connections[i]->handle) < nbd_aio_in_flight(best->handle)) {
            best = connections[i];
        }
    }
    return best;
}
