/* Beginning a connection to a host that has a name. libnbd looks the name up within that call
 * (getaddrinfo(3)), for as long as name servers let it wait: many seconds where they do not answer.
 * So the call is made in a thread, which is left behind if it is not waited for any more. */
#include "src/base/base.h"
#include "volume.h"
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

typedef struct {
    gatomicrefcount references; /* the caller's and the thread's */
    struct nbd_handle *handle;  /* the thread's, until done is readable */
    char *uri;
    char *problem; /* NULL: none */
    int done;
    pid_t owner;
} Lookup;

static void lookup_unref(Lookup *lookup)
{
    if (!g_atomic_ref_count_dec(&lookup->references)) {
        return;
    }
    g_clear_pointer(&lookup->handle, nbd_close);
    close(lookup->done);
    g_free(lookup->uri);
    g_free(lookup->problem);
    g_free(lookup);
}

static void *look_up(void *opaque)
{
    const uint64_t one = 1;
    Lookup *lookup = opaque;

    if (nbd_aio_connect_uri(lookup->handle, lookup->uri) == -1) {
        /* Of this thread: it goes with it. */
        const char *text = nbd_get_error();
        lookup->problem = g_strdup(text ? text : "unknown NBD error");
    }
    if (write(lookup->done, &one, sizeof(one)) != sizeof(one)) {
        g_warn_if_reached();
    }
    lookup_unref(lookup);
    return NULL;
}

static bool wait_done(const Lookup *lookup, gint64 deadline, const PbaHooks *hooks, GError **error)
{
    short revents;

    if (!pba_wait_fd(lookup->done, POLLIN, &revents, deadline, hooks, "connecting", error)) {
        return false;
    }
    /* Perl code that ran meanwhile may have forked, and come back in the child. */
    if (lookup->owner != getpid()) {
        pba_error_set(error, PBA_ERROR_STATE, "the connection belongs to another process");
        return false;
    }
    if (lookup->problem) {
        pba_error_set(error, PBA_ERROR_NBD, "connecting failed - %s", lookup->problem);
    }
    return !lookup->problem;
}

struct nbd_handle *pba_connect_by_name(struct nbd_handle *handle, const char *uri, gint64 deadline,
                                       const PbaHooks *hooks, GError **error)
{
    struct nbd_handle *connecting = NULL;
    int done = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    if (done == -1) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "eventfd failed - %s", g_strerror(errno));
        nbd_close(handle);
        return NULL;
    }
    Lookup *lookup = g_new0(Lookup, 1);
    *lookup = (Lookup){.handle = handle, .uri = g_strdup(uri), .done = done, .owner = getpid()};
    g_atomic_ref_count_init(&lookup->references);
    g_atomic_ref_count_inc(&lookup->references);
    if (!pba_thread_start(look_up, lookup, error)) {
        lookup_unref(lookup);
    } else if (wait_done(lookup, deadline, hooks, error)) {
        connecting = g_steal_pointer(&lookup->handle);
    }
    lookup_unref(lookup);
    return connecting;
}
