/* Connects in a thread of its own where libnbd may block: in getaddrinfo(3), as long as name
 * servers let it wait; while it reads the files of TLS; and in a TLS handshake that the server
 * stalls, where libnbd (1.14.2) asks GnuTLS again and again. To abandon the thread, the caller
 * shuts its socket down, which ends that loop. */
#include "src/base/base.h"
#include "volume.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

/* How long a thread has to end after its socket was shut down. */
#define END_LIMIT_MS 200

short pba_nbd_events(struct nbd_handle *handle)
{
    unsigned direction = nbd_aio_get_direction(handle);

    return (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                   (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0));
}

int pba_nbd_notify(struct nbd_handle *handle, short events, short revents)
{
    bool can_read = (revents & (POLLIN | POLLHUP | POLLERR)) != 0;

    return can_read && (events & POLLIN) ? nbd_aio_notify_read(handle)
                                         : nbd_aio_notify_write(handle);
}

typedef struct {
    gatomicrefcount references; /* the caller's and the thread's */
    struct nbd_handle *handle;  /* owned by the thread until done is readable */
    char *uri;
    gint64 deadline;
    GError *error; /* why it is not connected; NULL: it is */
    bool is_full;  /* the queue of the socket is */
    int done;
    pid_t owner;
    GMutex mutex; /* of what follows */
    bool is_left; /* the caller has stopped waiting */
    int socket;   /* a copy of the handle's, which the handle may close at any time; -1: none */
} Connecting;

static void connecting_unref(Connecting *connecting)
{
    if (!g_atomic_ref_count_dec(&connecting->references)) {
        return;
    }
    g_clear_pointer(&connecting->handle, nbd_close);
    g_clear_error(&connecting->error);
    close(connecting->done);
    if (connecting->socket != -1) {
        close(connecting->socket);
    }
    g_mutex_clear(&connecting->mutex);
    g_free(connecting->uri);
    g_free(connecting);
}

/* ---- in the thread ---- */

static bool is_left(void *opaque)
{
    Connecting *connecting = opaque;

    g_mutex_lock(&connecting->mutex);
    bool is_left = connecting->is_left;
    g_mutex_unlock(&connecting->mutex);
    return is_left;
}

/* False if the caller has stopped waiting. */
static bool note_socket(Connecting *connecting, int fd)
{
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

    g_mutex_lock(&connecting->mutex);
    int old = connecting->socket;
    bool is_left = connecting->is_left;
    connecting->socket = copy;
    g_mutex_unlock(&connecting->mutex);
    if (old != -1) {
        close(old);
    }
    return !is_left;
}

/* libnbd stores its error for each thread, so it must be read here. */
static void set_error(GError **error)
{
    const char *text = nbd_get_error();

    pba_error_set(error, PBA_ERROR_NBD, "connecting failed - %s",
                  text ? text : "unknown NBD error");
}

static bool take_turn(Connecting *connecting, GError **error)
{
    const PbaHooks hooks = {.interrupted = is_left, .opaque = connecting};
    struct nbd_handle *handle = connecting->handle;
    short events = pba_nbd_events(handle);
    int fd = nbd_aio_get_fd(handle);
    short revents;

    if (!pba_wait_fd(fd, events, &revents, connecting->deadline, &hooks, "connecting", error)) {
        return false;
    }
    if (!note_socket(connecting, fd)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "interrupted while connecting");
        return false;
    }
    if (pba_nbd_notify(handle, events, revents) == -1) {
        set_error(error);
        return false;
    }
    return true;
}

/* Until the end of the handshake, because the files of TLS are read in the middle of it. */
static bool make_connection(Connecting *connecting, GError **error)
{
    struct nbd_handle *handle = connecting->handle;

    if (!pba_uri_check_files(connecting->uri, error)) {
        return false;
    }
    if (nbd_aio_connect_uri(handle, connecting->uri) == -1) {
        connecting->is_full = nbd_get_errno() == EAGAIN;
        set_error(error);
        return false;
    }
    while (nbd_aio_is_connecting(handle)) {
        if (!take_turn(connecting, error)) {
            return false;
        }
    }
    if (!nbd_aio_is_ready(handle)) {
        set_error(error);
        return false;
    }
    return true;
}

static void *run(void *opaque)
{
    Connecting *connecting = opaque;

    make_connection(connecting, &connecting->error);
    pba_wake(connecting->done);
    connecting_unref(connecting);
    return NULL;
}

/* ---- the caller's ---- */

static bool wait_done(Connecting *connecting, const PbaHooks *hooks, bool *is_full, GError **error)
{
    short revents;

    if (!pba_wait_fd(connecting->done, POLLIN, &revents, connecting->deadline, hooks, "connecting",
                     error)) {
        return false;
    }
    /* Perl code that ran in the meantime may have forked, and this may be the child. */
    if (connecting->owner != getpid()) {
        pba_error_set(error, PBA_ERROR_STATE, "the connection belongs to another process");
        return false;
    }
    *is_full = connecting->is_full;
    if (connecting->error) {
        g_propagate_error(error, g_steal_pointer(&connecting->error));
        return false;
    }
    return true;
}

/* The process may end next: the thread should not be in GnuTLS then, whose state is freed first. */
static void leave(Connecting *connecting)
{
    struct pollfd done = {.fd = connecting->done, .events = POLLIN};

    if (connecting->owner != getpid()) {
        return; /* the mutex may be locked forever here, and the socket is the parent's, too */
    }
    g_mutex_lock(&connecting->mutex);
    connecting->is_left = true;
    bool is_shut = connecting->socket != -1 && shutdown(connecting->socket, SHUT_RDWR) == 0;
    g_mutex_unlock(&connecting->mutex);
    if (is_shut) {
        poll(&done, 1, END_LIMIT_MS);
    }
}

struct nbd_handle *pba_connect_aside(struct nbd_handle *handle, const char *uri, gint64 deadline,
                                     const PbaHooks *hooks, bool *is_full, GError **error)
{
    struct nbd_handle *connected = NULL;
    int done = pba_wake_new(error);

    if (done == -1) {
        nbd_close(handle);
        return NULL;
    }
    Connecting *connecting = g_new0(Connecting, 1);
    *connecting = (Connecting){.handle = handle,
                               .uri = g_strdup(uri),
                               .deadline = deadline,
                               .done = done,
                               .owner = getpid(),
                               .socket = -1};
    g_mutex_init(&connecting->mutex);
    g_atomic_ref_count_init(&connecting->references);
    g_atomic_ref_count_inc(&connecting->references);
    if (!pba_thread_start(run, connecting, error)) {
        connecting_unref(connecting);
    } else if (wait_done(connecting, hooks, is_full, error)) {
        connected = g_steal_pointer(&connecting->handle);
    } else {
        leave(connecting);
    }
    connecting_unref(connecting); // NOLINT(clang-analyzer-unix.Malloc): one of two references
    return connected;
}
