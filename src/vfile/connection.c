/* The NBD connection of the file's server. A thread sends requests and receives their data while
 * the main thread answers readers. If a request is urgent and the only one, the submitting thread
 * itself sends it and receives the reply; otherwise each random read would wait for two thread
 * wakeups. */
#include "server.h"
#include "src/base/base.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <poll.h>

/* Bytes of one request to a server other than a guest's QEMU: see pba_nbd_ask_for_status. */
#define SERVER_REQUEST (512u << 10)

struct PbaConnection {
    PbaSizes sizes;
    uint32_t read_flags;
    int wake_fd;           /* there are new requests */
    int done_fd;           /* there are done requests */
    GMutex nbd_mutex;      /* protects the next four; locked before mutex */
    PbaNbdVolume *nbd;     /* NULL: lost */
    GQueue in_flight;      /* PbaRequest.link */
    GQueue unfinished;     /* trims with a piece still to be sent, PbaRequest.link */
    gint64 deadline;       /* by which the server must answer while requests are in flight */
    gint64 answered;       /* when the last answer came */
    gint64 late;           /* from then on, QEMU may be waiting for a map's connection to end */
    gint is_threads;       /* the thread receives the requests in flight; atomic */
    GMutex mutex;          /* protects all members below */
    PbaRequest *submitted; /* newest first */
    PbaRequest *done;      /* newest first */
    bool thread_waits;     /* wants wake_fd to be written to */
    bool consumer_waits;   /* wants done_fd to be written to */
    bool wake_for_all;     /* even for requests that are not urgent */
};

static PbaRequest *reverse(PbaRequest *list)
{
    PbaRequest *reversed = NULL;
    while (list) {
        PbaRequest *next = list->next;
        list->next = reversed;
        reversed = list;
        list = next;
    }
    return reversed;
}

PbaRequest *pba_connection_take_done(PbaConnection *connection, bool all)
{
    g_mutex_lock(&connection->mutex);
    PbaRequest *done = connection->done;
    connection->done = NULL;
    connection->consumer_waits = !done;
    connection->wake_for_all = all;
    g_mutex_unlock(&connection->mutex);
    return reverse(done);
}

static void give_back(PbaConnection *connection, PbaRequest *request)
{
    g_mutex_lock(&connection->mutex);
    request->next = connection->done;
    connection->done = request;
    bool wake = connection->consumer_waits &&
                (g_atomic_int_get(&request->urgent) || connection->wake_for_all);
    connection->consumer_waits = connection->consumer_waits && !wake;
    g_mutex_unlock(&connection->mutex);
    if (wake) {
        pba_wake(connection->done_fd);
    }
}

static void finish(PbaConnection *connection, PbaRequest *request)
{
    g_queue_unlink(&connection->in_flight, &request->link);
    if (request->is_trim && !request->error) {
        uint64_t piece = MIN(request->length, PBA_MAX_DISCARD);
        request->offset += piece;
        request->length -= piece;
    }
    if (request->is_trim && !request->error && request->length > 0) {
        g_queue_push_tail_link(&connection->unfinished, &request->link);
    } else {
        give_back(connection, request);
    }
}

static int on_chunk(void *opaque, const void *data, size_t count, uint64_t offset, unsigned status,
                    int *error)
{
    (void)data;
    (void)offset;
    (void)status;
    (void)error;
    PbaRequest *request = opaque;
    request->seen += count;
    return 0;
}

/* libnbd calls this with the connection locked, so nothing is sent from here. */
static int on_answered(void *opaque, int *error)
{
    PbaRequest *request = opaque;

    request->error = request->error ? request->error : *error;
    if (--request->pending == 0) {
        if (!request->is_trim && !request->error && request->seen != request->length) {
            request->error = EIO; /* the server omitted a part */
        }
        finish(request->connection, request);
    }
    return 1; /* retire the command */
}

static int64_t send_piece(PbaConnection *connection, PbaRequest *request, uint64_t done,
                          uint64_t length)
{
    struct nbd_handle *handle = connection->nbd->handle;
    nbd_completion_callback completion = {.callback = on_answered, .user_data = request};
    nbd_chunk_callback chunk = {.callback = on_chunk, .user_data = request};
    uint64_t offset = request->offset + done;

    return request->is_trim
               ? nbd_aio_trim(handle, length, offset, completion, 0)
               : nbd_aio_pread_structured(handle, (char *)request->buffer + done, length, offset,
                                          chunk, completion, connection->read_flags);
}

static void expect_answer(PbaConnection *connection)
{
    connection->deadline = pba_deadline(PBA_NBD_LIMIT_S);
    connection->late = pba_deadline(PBA_NBD_LATE_S);
}

/* Sends the next piece of a trim, or a whole read. libnbd may complete a request before the call
 * returns, so the request counts as pending until everything is sent. */
static void send_request(PbaConnection *connection, PbaRequest *request)
{
    uint64_t length = request->is_trim ? MIN(request->length, PBA_MAX_DISCARD) : request->length;

    if (connection->in_flight.length == 0) {
        expect_answer(connection);
    }
    request->link = (GList){.data = request};
    g_queue_push_tail_link(&connection->in_flight, &request->link);
    request->pending = 1;
    request->seen = 0;
    for (uint64_t done = 0; done < length && !request->error;) {
        uint64_t piece = length;
        if (!connection->nbd) {
            request->error = ENOTCONN;
            break;
        }
        if (!request->is_trim) {
            piece = pba_nbd_unit(connection->nbd, request->offset + done, length - done);
        }
        request->pending++;
        if (send_piece(connection, request, done, piece) == -1) {
            request->pending--;
            request->error = nbd_get_errno() ? nbd_get_errno() : EIO;
        }
        done += piece;
    }
    if (--request->pending == 0) {
        finish(connection, request);
    }
}

static bool has_submitted(PbaConnection *connection)
{
    g_mutex_lock(&connection->mutex);
    bool has = connection->submitted != NULL;
    g_mutex_unlock(&connection->mutex);
    return has;
}

/* False if the thread must send it. */
static bool send_alone(PbaConnection *connection, PbaRequest *request)
{
    if (!g_mutex_trylock(&connection->nbd_mutex)) {
        return false;
    }
    bool alone = connection->in_flight.length == 0 && connection->unfinished.length == 0 &&
                 !has_submitted(connection);
    if (alone) {
        g_atomic_int_set(&connection->is_threads, false);
        send_request(connection, request);
    }
    g_mutex_unlock(&connection->nbd_mutex);
    return alone;
}

void pba_connection_submit(PbaConnection *connection, PbaRequest *request)
{
    g_assert(request->is_trim || request->length <= request->capacity);
    request->connection = connection;
    request->error = 0;
    if (g_atomic_int_get(&request->urgent) && send_alone(connection, request)) {
        return;
    }
    g_mutex_lock(&connection->mutex);
    request->next = connection->submitted;
    connection->submitted = request;
    bool wake = connection->thread_waits;
    connection->thread_waits = false;
    g_mutex_unlock(&connection->mutex);
    if (wake) {
        pba_wake(connection->wake_fd);
    }
}

static void send_requests(PbaConnection *connection)
{
    GList *link;

    g_mutex_lock(&connection->mutex);
    PbaRequest *requests = connection->submitted;
    connection->submitted = NULL;
    g_mutex_unlock(&connection->mutex);
    requests = reverse(requests);
    while (requests) {
        PbaRequest *request = requests;
        requests = request->next;
        send_request(connection, request);
    }
    while ((link = g_queue_pop_head_link(&connection->unfinished))) {
        send_request(connection, link->data);
    }
}

/* Makes all requests in flight, and all later ones, fail. */
static void lose(PbaConnection *connection)
{
    GList *link;

    pba_volume_free(&connection->nbd->volume);
    connection->nbd = NULL;
    while ((link = g_queue_pop_head_link(&connection->in_flight))) {
        PbaRequest *request = link->data;
        request->error = ENOTCONN;
        give_back(connection, request);
    }
}

/* True if the thread may sleep until wake_fd reports more work. */
static bool may_wait(PbaConnection *connection)
{
    g_mutex_lock(&connection->mutex);
    connection->thread_waits = !connection->submitted;
    bool waits = connection->thread_waits;
    g_mutex_unlock(&connection->mutex);
    return waits && connection->unfinished.length == 0;
}

static void watch(PbaConnection *connection, struct pollfd *fd)
{
    if (connection->nbd) {
        fd->fd = nbd_aio_get_fd(connection->nbd->handle);
        fd->events = pba_nbd_events(connection->nbd->handle);
    }
}

/* Milliseconds for poll(). */
static int time_left(const PbaConnection *connection)
{
    gint64 until = MIN(connection->deadline, connection->late);

    return (int)(MAX(until - g_get_monotonic_time(), 0) / 1000) + 1;
}

/* Without their maps, readers are only slower. */
static void end_new_maps(PbaConnection *connection)
{
    /* QEMU may have bound the socket below another path, so its path is not compared. */
    pba_connections_cut(NULL, connection->answered);
    connection->late = pba_deadline(PBA_NBD_LATE_S);
}

static void receive(PbaConnection *connection, short revents)
{
    PbaNbdVolume *nbd = connection->nbd;
    bool late = connection->in_flight.length > 0 && g_get_monotonic_time() >= connection->deadline;
    /* A server that is silent for this long counts as lost. */
    int result = late ? -1 : 0;

    if (nbd && !revents && connection->in_flight.length > 0 &&
        g_get_monotonic_time() >= connection->late) {
        end_new_maps(connection);
    }
    if (nbd && revents) {
        connection->answered = g_get_monotonic_time();
        expect_answer(connection);
        result = pba_nbd_notify(nbd->handle, pba_nbd_events(nbd->handle), revents);
    }
    if (nbd && (result == -1 || pba_nbd_is_lost(nbd))) {
        lose(connection);
    }
}

static void turn(PbaConnection *connection)
{
    struct pollfd fds[] = {
        {.fd = connection->wake_fd, .events = POLLIN},
        {.fd = -1},
    };

    g_mutex_lock(&connection->nbd_mutex);
    send_requests(connection);
    bool busy = connection->in_flight.length > 0;
    int limit = !may_wait(connection) ? 0 : busy ? time_left(connection) : -1;
    g_atomic_int_set(&connection->is_threads, busy);
    if (busy) {
        watch(connection, &fds[1]);
    }
    g_mutex_unlock(&connection->nbd_mutex);
    poll(fds, G_N_ELEMENTS(fds), limit);
    if (fds[0].revents) {
        pba_wake_clear(connection->wake_fd);
    }
    g_mutex_lock(&connection->nbd_mutex);
    receive(connection, fds[1].revents);
    g_mutex_unlock(&connection->nbd_mutex);
}

int pba_connection_watch(PbaConnection *connection, struct pollfd fds[2])
{
    int limit = -1;

    fds[0] = (struct pollfd){.fd = connection->done_fd, .events = POLLIN};
    fds[1] = (struct pollfd){.fd = -1};
    if (g_atomic_int_get(&connection->is_threads)) {
        return limit; /* the other thread may hold the mutex until a whole request has arrived */
    }
    g_mutex_lock(&connection->nbd_mutex);
    if (connection->in_flight.length > 0) {
        watch(connection, &fds[1]);
        limit = time_left(connection);
    }
    g_mutex_unlock(&connection->nbd_mutex);
    return limit;
}

void pba_connection_turn(PbaConnection *connection, const struct pollfd fds[2])
{
    if (fds[0].revents) {
        pba_wake_clear(connection->done_fd);
    }
    if (fds[1].fd == -1) {
        return; /* the other thread receives */
    }
    g_mutex_lock(&connection->mutex);
    connection->consumer_waits = false;
    g_mutex_unlock(&connection->mutex);
    g_mutex_lock(&connection->nbd_mutex);
    if (!g_atomic_int_get(&connection->is_threads) && connection->in_flight.length > 0) {
        receive(connection, fds[1].revents);
        send_requests(connection);
    }
    g_mutex_unlock(&connection->nbd_mutex);
}

static gpointer run(gpointer opaque)
{
    PbaConnection *connection = opaque;
    for (;;) {
        turn(connection);
    }
    return NULL;
}

const PbaSizes *pba_connection_sizes(const PbaConnection *connection)
{
    return &connection->sizes;
}

PbaConnection *pba_connection_start(PbaNbdVolume *nbd, GError **error)
{
    PbaConnection *connection = g_new0(PbaConnection, 1);
    connection->nbd = nbd;
    connection->answered = nbd->made + 1;
    /* Only the snapshot of a guest can be discarded. */
    if (nbd_can_trim(nbd->handle) != 1) {
        nbd->volume.sizes.request = MIN(nbd->volume.sizes.request, SERVER_REQUEST);
    }
    connection->sizes = nbd->volume.sizes;
    connection->wake_fd = pba_wake_new(error);
    connection->done_fd = connection->wake_fd < 0 ? -1 : pba_wake_new(error);
    if (connection->done_fd < 0) {
        g_free(connection);
        return NULL;
    }
    /* In one piece: a server that looks for holes first may query the block status, which QEMU
     * before 9.2 (6475155d51) cannot do twice at a time on a snapshot. */
    nbd_set_pread_initialize(nbd->handle, false); /* unfilled parts must not contain old data */
    connection->read_flags = nbd_can_df(nbd->handle) == 1 ? LIBNBD_CMD_FLAG_DF : 0;
    pba_nbd_ask_for_status(nbd);
    g_mutex_init(&connection->nbd_mutex);
    g_mutex_init(&connection->mutex);
    g_thread_unref(g_thread_new("nbd", run, connection));
    return connection;
}
