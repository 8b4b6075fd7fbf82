/* The connection of a volume that is read over NBD: libnbd, and what a server has to promise. */
#include "src/base/base.h"
#include "volume.h"
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <string.h>

#define CONNECT_LIMIT_S 30
/* Between two attempts at a socket whose queue is full. */
#define FIRST_PAUSE_MS 5u
#define LONGEST_PAUSE_MS 100u

void pba_volume_set_nbd_error(const PbaVolume *volume, const char *what, GError **error)
{
    const char *text = nbd_get_error();
    pba_error_set(error, PBA_ERROR_NBD, "%s failed - %s", what, text ? text : "unknown NBD error");
    pba_error_add_device(error, volume->device);
}

bool pba_volume_is_lost(const PbaVolume *volume)
{
    return !volume->nbd || nbd_aio_is_dead(volume->nbd) || nbd_aio_is_closed(volume->nbd);
}

void pba_volume_disconnect(PbaVolume *volume)
{
    if (volume->nbd) {
        volume->connection++;
        pba_connection_forget(volume);
        g_clear_pointer(&volume->nbd, nbd_close);
    }
}

short pba_nbd_events(struct nbd_handle *nbd)
{
    unsigned direction = nbd_aio_get_direction(nbd);

    return (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                   (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0));
}

int pba_nbd_notify(struct nbd_handle *nbd, short events, short revents)
{
    bool can_read = (revents & (POLLIN | POLLHUP | POLLERR)) != 0;

    return can_read && (events & POLLIN) ? nbd_aio_notify_read(nbd) : nbd_aio_notify_write(nbd);
}

bool pba_volume_turn(PbaVolume *volume, gint64 deadline, const char *what, GError **error)
{
    short events = pba_nbd_events(volume->nbd);
    short revents;

    if (!pba_wait_fd(nbd_aio_get_fd(volume->nbd), events, &revents, deadline, &volume->hooks, what,
                     error)) {
        pba_error_add_device(error, volume->device);
        /* Whatever is in flight still knows the caller's memory. */
        pba_volume_disconnect(volume);
        return false;
    }
    if (pba_nbd_notify(volume->nbd, events, revents) == -1) {
        pba_volume_set_nbd_error(volume, what, error);
        return false;
    }
    return true;
}

/* What a path of this kind may do is said to libnbd as well, where it can be said. */
static int limit_uris(struct nbd_handle *nbd, const char *path)
{
    uint32_t transports =
        LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX | LIBNBD_ALLOW_TRANSPORT_VSOCK;

    return nbd_set_uri_allow_transports(nbd, transports) == 0
               ? nbd_set_uri_allow_local_file(nbd, pba_uri_is_tls(path))
               : -1;
}

static bool call_connect(PbaVolume *volume, bool is_uri)
{
    volume->nbd = nbd_create();
    if (volume->nbd) {
        pba_connection_note(volume);
    }
    return volume->nbd && nbd_set_handle_name(volume->nbd, volume->device) == 0 &&
           nbd_set_full_info(volume->nbd, true) == 0 &&
           limit_uris(volume->nbd, volume->path) == 0 &&
           (!volume->context || nbd_add_meta_context(volume->nbd, volume->context) == 0) &&
           (is_uri || nbd_set_export_name(volume->nbd, volume->device) == 0) &&
           (is_uri ? nbd_aio_connect_uri(volume->nbd, volume->path)
                   : nbd_aio_connect_unix(volume->nbd, volume->path)) == 0;
}

/* A Unix socket whose queue is full does not let wait, it fails at once (connect(2): EAGAIN): the
 * server is there, but slower than those that connect. */
static bool start_connecting(PbaVolume *volume, gint64 deadline, GError **error)
{
    bool is_uri = pba_uri_is(volume->path);
    unsigned pause = FIRST_PAUSE_MS;

    if (is_uri && !pba_uri_check(volume->path, error)) {
        pba_error_add_device(error, volume->device);
        return false;
    }
    while (!call_connect(volume, is_uri)) {
        if (nbd_get_errno() != EAGAIN) {
            pba_volume_set_nbd_error(volume, "connecting", error);
            return false;
        }
        pba_volume_disconnect(volume);
        if (!pba_wait_ms(pause, deadline, &volume->hooks,
                         "waiting for room in the queue of the NBD server's socket", error)) {
            pba_error_add_device(error, volume->device);
            return false;
        }
        pause = MIN(2 * pause, LONGEST_PAUSE_MS);
    }
    return true;
}

static bool finish_connecting(PbaVolume *volume, gint64 deadline, GError **error)
{
    while (nbd_aio_is_connecting(volume->nbd)) {
        if (!pba_volume_turn(volume, deadline, "connecting", error)) {
            return false;
        }
    }
    if (!nbd_aio_is_ready(volume->nbd)) {
        pba_volume_set_nbd_error(volume, "connecting", error);
        return false;
    }
    return true;
}

/* The size is part of the contract; without the context every block would look clean. */
static bool check_contract(PbaVolume *volume, GError **error)
{
    if (volume->sizes.size != volume->size) {
        pba_error_set(error, PBA_ERROR_NBD,
                      "the NBD export has %" PRIu64 " bytes instead of %" PRIu64,
                      volume->sizes.size, volume->size);
        return false;
    }
    if (volume->context && nbd_can_meta_context(volume->nbd, volume->context) != 1) {
        pba_error_set(error, PBA_ERROR_INCOMPLETE, "the NBD export has no metadata context '%s'",
                      volume->context);
        return false;
    }
    return true;
}

static bool check_export(PbaVolume *volume, GError **error)
{
    char *description = nbd_get_export_description(volume->nbd);

    volume->by_cluster = g_strcmp0(description, PBA_BY_CLUSTER) == 0;
    free(description);
    bool read = pba_sizes_read(&volume->sizes, volume->nbd, error);
    if (volume->size == UINT64_MAX) {
        volume->size = volume->sizes.size;
    }
    if (read && check_contract(volume, error)) {
        return true;
    }
    pba_error_add_device(error, volume->device);
    return false;
}

bool pba_volume_connect(PbaVolume *volume, GError **error)
{
    if (!pba_volume_check(volume, error)) {
        return false;
    }
    if (volume->nbd) {
        return true;
    }
    gint64 deadline = pba_deadline(CONNECT_LIMIT_S);
    if (start_connecting(volume, deadline, error) && finish_connecting(volume, deadline, error) &&
        check_export(volume, error)) {
        return true;
    }
    pba_volume_disconnect(volume);
    return false;
}

uint64_t pba_volume_unit(const PbaVolume *volume, uint64_t offset, uint64_t length)
{
    uint64_t most = MIN(length, volume->sizes.request);

    return volume->by_cluster ? MIN(most, PBA_CLUSTER - offset % PBA_CLUSTER) : most;
}
