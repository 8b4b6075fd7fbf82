/* A volume's NBD connection, and reading and discarding over it. */
#include "volume.h"
#include "src/base/base.h"
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <string.h>

#define CONNECT_LIMIT_S 30
/* Of the context qemu:dirty-bitmap (QEMU: docs/interop/nbd). */
#define STATE_DIRTY 1u
#define MAX_READ (32u << 20)
/* Under way at once. */
#define MAX_DISCARDS 32

void pba_volume_set_nbd_error(const PbaVolume *volume, const char *what, GError **error)
{
    const char *text = nbd_get_error();
    pba_error_set(error, PBA_ERROR_NBD, "%s failed - %s", what, text ? text : "unknown NBD error");
    pba_error_add_device(error, volume->device);
}

void pba_volume_break(PbaVolume *volume, const GError *error)
{
    if (!volume->broken) {
        volume->broken = g_strdup(error->message);
    }
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

static bool start_connecting(PbaVolume *volume, GError **error)
{
    bool is_uri = strstr(volume->path, "://") != NULL;

    volume->nbd = nbd_create();
    if (volume->nbd) {
        pba_connection_note(volume);
    }
    if (volume->nbd && nbd_set_handle_name(volume->nbd, volume->device) == 0 &&
        nbd_set_full_info(volume->nbd, true) == 0 &&
        /* Keys and certificates that the URI names are the caller's own. */
        nbd_set_uri_allow_local_file(volume->nbd, true) == 0 &&
        (!volume->context || nbd_add_meta_context(volume->nbd, volume->context) == 0) &&
        (is_uri || nbd_set_export_name(volume->nbd, volume->device) == 0) &&
        (is_uri ? nbd_aio_connect_uri(volume->nbd, volume->path)
                : nbd_aio_connect_unix(volume->nbd, volume->path)) == 0) {
        return true;
    }
    pba_volume_set_nbd_error(volume, "connecting", error);
    return false;
}

static bool finish_connecting(PbaVolume *volume, GError **error)
{
    gint64 deadline = pba_deadline(CONNECT_LIMIT_S);

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
static bool check_export(PbaVolume *volume, GError **error)
{
    int64_t size = nbd_get_size(volume->nbd);
    char *description = nbd_get_export_description(volume->nbd);

    volume->by_cluster = g_strcmp0(description, PBA_BY_CLUSTER) == 0;
    free(description);
    if (size < 0) {
        pba_volume_set_nbd_error(volume, "asking for the size", error);
        return false;
    }
    if (volume->size == UINT64_MAX) {
        volume->size = (uint64_t)size;
    }
    if ((uint64_t)size != volume->size) {
        pba_error_set(error, PBA_ERROR_NBD,
                      "the NBD export has %" PRIi64 " bytes instead of %" PRIu64, size,
                      volume->size);
    } else if (volume->context && nbd_can_meta_context(volume->nbd, volume->context) != 1) {
        pba_error_set(error, PBA_ERROR_INCOMPLETE, "the NBD export has no metadata context '%s'",
                      volume->context);
    } else {
        return true;
    }
    pba_error_add_device(error, volume->device);
    return false;
}

bool pba_volume_connect(PbaVolume *volume, GError **error)
{
    if (volume->broken) {
        pba_error_set(error, PBA_ERROR_NBD, "an earlier error left no connection - %s",
                      volume->broken);
        return false;
    }
    if (volume->handle) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED, "a file handle has no NBD connection");
        pba_error_add_device(error, volume->device);
        return false;
    }
    if (volume->nbd) {
        return true;
    }
    if (start_connecting(volume, error) && finish_connecting(volume, error) &&
        check_export(volume, error)) {
        return true;
    }
    pba_volume_disconnect(volume);
    return false;
}

static PbaVolume *open_context(const PbaVolumeOptions *options, const char *context, uint32_t flag,
                               const PbaHooks *hooks, GError **error)
{
    PbaVolume *volume = g_new0(PbaVolume, 1);

    volume->hooks = hooks ? *hooks : (PbaHooks){0};
    volume->device = g_strdup(options->device);
    volume->path = g_strdup(options->path);
    volume->context = g_strdup(context);
    volume->flag = flag;
    volume->size = options->size;
    volume->map = pba_map_new(volume, 0, volume->size);
    if (!pba_volume_connect(volume, error)) {
        pba_volume_free(volume);
        return NULL;
    }
    volume->map->end = volume->size; /* by now it is known */
    return volume;
}

PbaVolume *pba_volume_open(const PbaVolumeOptions *options, const PbaHooks *hooks, GError **error)
{
    g_autofree char *context =
        options->bitmap ? g_strconcat("qemu:dirty-bitmap:", options->bitmap, NULL) : NULL;

    return open_context(options, context, STATE_DIRTY, hooks, error);
}

PbaVolume *pba_volume_open_holes(const PbaVolumeOptions *options, const PbaHooks *hooks,
                                 GError **error)
{
    g_autoptr(GError) local = NULL;
    PbaVolume *volume =
        open_context(options, LIBNBD_CONTEXT_BASE_ALLOCATION, LIBNBD_STATE_ZERO, hooks, &local);

    if (volume) {
        return volume;
    }
    if (!g_error_matches(local, PBA_ERROR, PBA_ERROR_INCOMPLETE)) {
        g_propagate_error(error, g_steal_pointer(&local));
        return NULL;
    }
    return open_context(options, NULL, 0, hooks, error);
}

PbaVolume *pba_volume_new_handle(PbaHandle *handle, const char *device, uint64_t size,
                                 const PbaHooks *hooks)
{
    PbaVolume *volume = g_new0(PbaVolume, 1);

    volume->hooks = hooks ? *hooks : (PbaHooks){0};
    volume->device = g_strdup(device);
    volume->size = size;
    volume->handle = handle;
    volume->map = pba_map_new(volume, 0, size);
    return volume;
}

void pba_volume_free(PbaVolume *volume)
{
    if (!volume) {
        return;
    }
    pba_volume_disconnect(volume);
    pba_map_free(volume->map);
    g_free(volume->device);
    g_free(volume->path);
    g_free(volume->context);
    g_free(volume->broken);
    pba_handle_free(volume->handle);
    g_free(volume);
}

uint64_t pba_volume_size(const PbaVolume *volume)
{
    return volume->size;
}

static bool check_range(const PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (length > 0 && offset <= volume->size && length <= volume->size - offset) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "the range at offset %" PRIu64 " of length %" PRIu64
                  " is empty or not inside the volume of %" PRIu64 " bytes",
                  offset, length, volume->size);
    pba_error_add_device(error, volume->device);
    return false;
}

/* Waits for one request. A lost connection ends the volume; a refused request does not. */
static bool finish_request(PbaVolume *volume, int64_t cookie, const char *what, GError **error)
{
    gint64 deadline = pba_deadline(PBA_NBD_LIMIT_S);
    GError *local = NULL;
    int state = -1;

    while (cookie >= 0 && (state = nbd_aio_command_completed(volume->nbd, (uint64_t)cookie)) == 0) {
        if (!pba_volume_turn(volume, deadline, what, &local)) {
            break;
        }
    }
    if (state == 1) {
        return true;
    }
    if (!local) {
        pba_volume_set_nbd_error(volume, what, &local);
    }
    if (local->code != PBA_ERROR_INTERRUPTED && pba_volume_is_lost(volume)) {
        pba_volume_break(volume, local);
    }
    if (state == 0) {
        pba_volume_disconnect(volume); /* the request still knows the caller's memory */
    }
    g_propagate_error(error, local);
    return false;
}

uint64_t pba_volume_unit(const PbaVolume *volume, uint64_t offset, uint64_t length)
{
    return volume->by_cluster ? MIN(length, PBA_CLUSTER - offset % PBA_CLUSTER) : length;
}

static bool read_piece(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                       GError **error)
{
    g_autofree char *what =
        g_strdup_printf("reading %" PRIu64 " bytes at offset %" PRIu64, length, offset);
    int64_t cookie =
        nbd_aio_pread(volume->nbd, buffer, (size_t)length, offset, NBD_NULL_COMPLETION, 0);

    if (finish_request(volume, cookie, what, error)) {
        return true;
    }
    if (nbd_get_errno() == EINVAL && !pba_volume_is_lost(volume)) {
        pba_error_add_hint(error, PBA_HINT_UNREADABLE);
    }
    return false;
}

bool pba_volume_pread(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                      GError **error)
{
    if (!check_range(volume, offset, length, error)) {
        return false;
    }
    if (length > MAX_READ) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "a single read has at most %u bytes, not %" PRIu64,
                      MAX_READ, length);
        pba_error_add_device(error, volume->device);
        return false;
    }
    if (volume->handle) {
        return pba_handle_pread(volume, buffer, offset, length, error);
    }
    if (!pba_volume_connect(volume, error)) {
        return false;
    }
    for (uint64_t done = 0; done < length;) {
        uint64_t size = pba_volume_unit(volume, offset + done, length - done);
        if (!read_piece(volume, (char *)buffer + done, offset + done, size, error)) {
            return false;
        }
        done += size;
    }
    return true;
}

static bool discard_piece(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (volume->handle) {
        return pba_handle_discard(volume, offset, length, error);
    }
    g_autofree char *what =
        g_strdup_printf("discarding %" PRIu64 " bytes at offset %" PRIu64, length, offset);
    if (!pba_volume_connect(volume, error)) {
        return false;
    }
    int64_t cookie = nbd_aio_trim(volume->nbd, length, offset, NBD_NULL_COMPLETION, 0);
    return finish_request(volume, cookie, what, error);
}

bool pba_volume_discard(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    if (!check_range(volume, offset, length, error)) {
        return false;
    }
    PbaRange range = pba_whole_clusters((PbaRange){offset, offset + length}, volume->size);
    for (uint64_t at = range.begin; at < range.end; at += PBA_MAX_DISCARD) {
        if (!discard_piece(volume, at, MIN(range.end - at, PBA_MAX_DISCARD), error)) {
            return false;
        }
    }
    return true;
}

/* Discards under way. */
typedef struct {
    PbaVolume *volume;
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
        if (!pba_volume_turn(discards->volume, deadline, what, error)) {
            return false;
        }
    }
    if (discards->error) {
        pba_error_set(error, PBA_ERROR_NBD, "%s failed - %s", what, g_strerror(discards->error));
        pba_error_add_device(error, discards->volume->device);
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
        discards->count++; /* first, since it may be answered at once */
        if (nbd_aio_trim(discards->volume->nbd, MIN(range.end - at, PBA_MAX_DISCARD), at, done, 0) <
            0) {
            discards->count--;
            pba_volume_set_nbd_error(discards->volume, "discarding", error);
            return false;
        }
    }
    return true;
}

bool pba_volume_discard_ranges(PbaVolume *volume, const PbaRange *ranges, unsigned count,
                               GError **error)
{
    Discards discards = {.volume = volume};
    bool ok = pba_volume_connect(volume, error);

    for (unsigned i = 0; ok && i < count; i++) {
        ok = start_discards(&discards, pba_whole_clusters(ranges[i], volume->size), error);
    }
    ok = ok && wait_for_discards(&discards, 0, error);
    if (discards.count > 0) {
        pba_volume_disconnect(volume); /* what is under way still knows this function's memory */
    }
    return ok;
}
