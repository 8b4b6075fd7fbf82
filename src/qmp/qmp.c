/* The QMP client. It is connected only during a burst of commands. */
#define _GNU_SOURCE // NOLINT(bugprone-reserved-identifier): struct ucred
#include "qmp.h"
#include "src/base/base.h"
#include "wire.h"
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define READ_SIZE 65536
#define MAX_PAUSE_MS 1000
/* How long to wait silently while another client uses the monitor. */
#define PATIENCE_US (2 * G_TIME_SPAN_SECOND)
/* Less than a second, together with the time between two checks for signals. */
#define SETTLE_LIMIT_US (700 * G_TIME_SPAN_MILLISECOND)

struct PbaQmp {
    char *path;
    unsigned timeout_s;
    PbaHooks hooks;
    PbaHooks callers_hooks; /* the caller's, while hooks are replaced by pba_qmp_settle */
    gint64 pending_since;   /* when a signal was first seen since pba_qmp_settle; 0: none */
    PbaQmpTransport transport;
    void *transport_opaque;
    int fd; /* -1: not connected */
    pid_t peer;
    PbaQmpWire *wire;
    guint32 nonce; /* in the ID of a connection's first command */
    uint64_t last_id;
};

PbaQmp *pba_qmp_new(const char *path, unsigned timeout_s, const PbaHooks *hooks)
{
    PbaQmp *qmp = g_new0(PbaQmp, 1);
    qmp->path = g_strdup(path);
    qmp->timeout_s = timeout_s;
    qmp->hooks = qmp->callers_hooks = hooks ? *hooks : (PbaHooks){0};
    qmp->fd = -1;
    qmp->nonce = g_random_int();
    return qmp;
}

PbaQmp *pba_qmp_new_transport(PbaQmpTransport transport, void *opaque, const PbaHooks *hooks)
{
    PbaQmp *qmp = pba_qmp_new(NULL, 0, hooks);
    qmp->transport = transport;
    qmp->transport_opaque = opaque;
    return qmp;
}

void pba_qmp_free(PbaQmp *qmp)
{
    if (!qmp) {
        return;
    }
    pba_qmp_release(qmp);
    g_free(qmp->path);
    g_free(qmp);
}

/* The hook that ends calls, while signals are deferred (pba_qmp_settle): true once one has been
 * pending for a second. */
static bool is_out_of_time(void *opaque)
{
    PbaQmp *qmp = opaque;
    const PbaHooks *hooks = &qmp->callers_hooks;
    gint64 now = g_get_monotonic_time();

    if (qmp->pending_since == 0 && hooks->pending && hooks->pending(hooks->opaque)) {
        qmp->pending_since = now;
    }
    return qmp->pending_since > 0 && now - qmp->pending_since > SETTLE_LIMIT_US;
}

void pba_qmp_settle(PbaQmp *qmp, bool settles)
{
    qmp->pending_since = 0;
    qmp->hooks =
        settles ? (PbaHooks){.interrupted = is_out_of_time, .opaque = qmp} : qmp->callers_hooks;
}

void pba_qmp_release(PbaQmp *qmp)
{
    if (qmp->fd >= 0) {
        close(qmp->fd);
        qmp->fd = -1;
    }
    g_clear_pointer(&qmp->wire, pba_qmp_wire_free);
}

static void note_peer(PbaQmp *qmp)
{
    struct ucred peer;
    socklen_t length = sizeof(peer);

    if (getsockopt(qmp->fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0) {
        qmp->peer = peer.pid;
    }
}

pid_t pba_qmp_peer(const PbaQmp *qmp)
{
    return qmp->peer;
}

static bool connect_socket(PbaQmp *qmp, gint64 deadline, GError **error)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};

    if (strlen(qmp->path) >= sizeof(address.sun_path)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "QMP socket path '%s' is longer than %zu bytes",
                      qmp->path, sizeof(address.sun_path) - 1);
        return false;
    }
    g_strlcpy(address.sun_path, qmp->path, sizeof(address.sun_path));
    qmp->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (qmp->fd < 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot make a socket - %s", g_strerror(errno));
        return false;
    }
    while (connect(qmp->fd, (struct sockaddr *)&address, sizeof(address)) != 0) {
        /* EAGAIN: other clients are waiting for this monitor. */
        if (errno == EAGAIN || errno == EINTR) {
            if (!pba_wait_ms(10, deadline, &qmp->hooks, "connecting to the QMP socket", error)) {
                return false;
            }
            continue;
        }
        pba_error_set(error, PBA_ERROR_CONNECTION, "cannot connect to QMP socket '%s' - %s",
                      qmp->path, g_strerror(errno));
        return false;
    }
    note_peer(qmp);
    return true;
}

/* Closes the connection while it sleeps: a QMP monitor serves one client at a time, and what is
 * polled for may take minutes. */
bool pba_qmp_pause(PbaQmp *qmp, unsigned *pause_ms, gint64 deadline, const char *what,
                   GError **error)
{
    unsigned now_ms = *pause_ms;

    *pause_ms = MIN(2 * now_ms, MAX_PAUSE_MS);
    pba_qmp_release(qmp);
    return pba_wait_ms(now_ms, deadline, &qmp->hooks, what, error);
}

bool pba_qmp_is_gone(PbaQmp *qmp)
{
    return !qmp->transport && !pba_socket_answers(qmp->path);
}

static bool send_text(PbaQmp *qmp, const char *text, gint64 deadline, GError **error)
{
    size_t left = strlen(text);

    while (left > 0) {
        ssize_t sent = send(qmp->fd, text, left, MSG_NOSIGNAL);
        if (sent >= 0) {
            text += sent;
            left -= (size_t)sent;
        } else if (errno == EAGAIN || errno == EINTR) {
            short revents;
            if (!pba_wait_fd(qmp->fd, POLLOUT, &revents, deadline, &qmp->hooks,
                             "sending to the QMP socket", error)) {
                return false;
            }
        } else {
            pba_error_set(error, PBA_ERROR_CONNECTION, "cannot send to QMP socket '%s' - %s",
                          qmp->path, g_strerror(errno));
            return false;
        }
    }
    return true;
}

/* Reads what has arrived, waiting for at least one byte. This wait also keeps the time limit if a
 * peer never stops sending. */
static bool receive(PbaQmp *qmp, gint64 deadline, const char *what, GError **error)
{
    char buffer[READ_SIZE];
    short revents;

    while (pba_wait_fd(qmp->fd, POLLIN, &revents, deadline, &qmp->hooks, what, error)) {
        ssize_t got = recv(qmp->fd, buffer, sizeof(buffer), 0);
        if (got > 0) {
            return pba_qmp_wire_feed(qmp->wire, buffer, (size_t)got, error);
        }
        if (got == 0 || (errno != EAGAIN && errno != EINTR)) {
            pba_error_set(error, PBA_ERROR_CONNECTION,
                          "QEMU closed the QMP connection at '%s' - did it quit?", qmp->path);
            return false;
        }
    }
    return false;
}

/* What a wait is for, with advice: it is the end of the message of a timeout. */
static const char for_reply[] =
    "waiting for the reply - check that QEMU runs and that its storage answers";

/* The next message that is not an event. */
static JsonObject *receive_reply(PbaQmp *qmp, gint64 deadline, const char *what, GError **error)
{
    for (;;) {
        JsonObject *message = pba_qmp_wire_pop(qmp->wire);
        if (!message) {
            if (!receive(qmp, deadline, what, error)) {
                return NULL;
            }
        } else if (json_object_has_member(message, "event")) {
            json_object_unref(message);
        } else {
            return message;
        }
    }
}

/* Unwraps QMP's reply: returns the "return" value, or NULL and the peer's error. */
static JsonNode *unwrap_reply(JsonObject *reply, const char *command, const char *id,
                              GError **error)
{
    JsonObject *failure = pba_json_find_object(reply, "error");
    const char *reply_id = pba_json_find_string(reply, "id");

    if (failure && !json_object_has_member(reply, "id")) {
        reply_id = id; /* QEMU could not parse the command far enough to see its ID */
    }
    if (g_strcmp0(reply_id, id) != 0) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "QEMU sent the reply to another command");
        return NULL;
    }
    if (failure) {
        const char *klass = pba_json_find_string(failure, "class");
        const char *description = pba_json_find_string(failure, "desc");
        pba_error_set_qmp(error, command, klass ? klass : "GenericError",
                          description ? description : "error without a description");
        return NULL;
    }
    JsonNode *value = json_object_get_member(reply, "return");
    if (!value) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent a reply without a result");
        return NULL;
    }
    return json_node_copy(value);
}

/* An ID that no other client uses: a reply to such a client may come first (see receive_own_reply).
 * A forked process has its parent's random numbers. */
static char *first_id(PbaQmp *qmp)
{
    return g_strdup_printf("%08x-%" PRIu64, qmp->nonce ^ (guint32)getpid(), ++qmp->last_id);
}

/* After the first reply, all others are to commands of this connection. The ID is short because
 * QEMU reads commands byte by byte. */
static char *next_id(PbaQmp *qmp)
{
    return g_strdup_printf("%" PRIu64, ++qmp->last_id);
}

static JsonNode *converse(PbaQmp *qmp, const char *command, JsonNode *arguments, gint64 deadline,
                          GError **error)
{
    g_autofree char *id = next_id(qmp);
    g_autofree char *text = pba_qmp_wire_command(command, arguments, id);

    if (!send_text(qmp, text, deadline, error)) {
        return NULL;
    }
    g_autoptr(JsonObject) reply = receive_reply(qmp, deadline, for_reply, error);
    return reply ? unwrap_reply(reply, command, id, error) : NULL;
}

/* If the previous client disconnected in the middle of a command, QEMU sends us its reply when the
 * command is done. Commands run one after the other, so this reply comes before ours. */
static JsonObject *receive_own_reply(PbaQmp *qmp, const char *id, gint64 deadline, GError **error)
{
    JsonObject *reply;

    while ((reply = receive_reply(qmp, deadline, for_reply, error)) &&
           g_strcmp0(pba_json_find_string(reply, "id"), id) != 0) {
        json_object_unref(reply);
    }
    return reply;
}

/* "oob" is not requested: commands run one after the other here. */
static bool agree(PbaQmp *qmp, gint64 deadline, GError **error)
{
    static const char command[] = "qmp_capabilities";
    g_autofree char *id = first_id(qmp);
    g_autofree char *text = pba_qmp_wire_command(command, NULL, id);

    if (!send_text(qmp, text, deadline, error)) {
        return false;
    }
    g_autoptr(JsonObject) reply = receive_own_reply(qmp, id, deadline, error);
    g_autoptr(JsonNode) value = reply ? unwrap_reply(reply, command, id, error) : NULL;
    return value != NULL;
}

static bool greet(PbaQmp *qmp, gint64 deadline, GError **error)
{
    const char *what = "waiting for the QMP greeting - does another client hold the monitor?";
    struct pollfd poll = {.fd = qmp->fd, .events = POLLIN};
    gint64 soon = g_get_monotonic_time() + PATIENCE_US;

    if (!pba_wait_fds(&poll, 1, soon, deadline, &qmp->hooks, what, error)) {
        return false;
    }
    if (!poll.revents) {
        pba_log(&qmp->hooks, PBA_LOG_INFO,
                "waiting for the QMP monitor '%s': another client uses it, or QEMU is busy",
                qmp->path);
    }
    g_autoptr(JsonObject) greeting = receive_reply(qmp, deadline, what, error);
    if (!greeting) {
        return false;
    }
    if (!pba_json_find_object(greeting, "QMP")) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the peer at '%s' did not send a QMP greeting",
                      qmp->path);
        return false;
    }
    return agree(qmp, deadline, error);
}

static bool ensure_connected(PbaQmp *qmp, gint64 deadline, GError **error)
{
    if (qmp->fd >= 0) {
        return true;
    }
    qmp->wire = pba_qmp_wire_new();
    if (connect_socket(qmp, deadline, error) && greet(qmp, deadline, error)) {
        return true;
    }
    pba_qmp_release(qmp);
    return false;
}

/* Runs the command through the caller's transport. Its error text is as untrusted as QEMU's. */
static JsonNode *carry(PbaQmp *qmp, const char *command, JsonNode *arguments, GError **error)
{
    g_autoptr(JsonNode) none = arguments ? NULL : pba_json("@a{sv} {}");
    g_autoptr(GError) raw = NULL;
    JsonNode *value =
        qmp->transport(qmp->transport_opaque, command, arguments ? arguments : none, &raw);

    if (!value) {
        pba_error_set(error, (PbaErrorCode)raw->code, "%s", raw->message);
    }
    return value;
}

/* Which of a host's many monitors failed. Does nothing if the message says it already. */
static void add_socket(const PbaQmp *qmp, GError **error)
{
    g_autofree char *where = qmp->path ? pba_line("QMP socket '%s'", qmp->path) : NULL;

    if (where && !strstr((*error)->message, qmp->path)) {
        g_prefix_error(error, "%s: ", where);
    }
}

JsonNode *pba_qmp_execute(PbaQmp *qmp, const char *command, JsonNode *arguments, GError **error)
{
    g_autoptr(JsonNode) owned_arguments = arguments;
    g_autoptr(GError) local = NULL;
    JsonNode *value = NULL;

    if (qmp->transport) {
        value = carry(qmp, command, arguments, &local);
    } else {
        gint64 deadline = pba_deadline(qmp->timeout_s);
        if (ensure_connected(qmp, deadline, &local)) {
            value = converse(qmp, command, arguments, deadline, &local);
        }
    }
    if (!value) {
        if (pba_error_is_fatal(local)) {
            pba_qmp_release(qmp); /* a late reply must not be mistaken for the next command's */
            add_socket(qmp, &local);
        }
        pba_error_add_command(&local, command);
        g_propagate_error(error, g_steal_pointer(&local));
    }
    return value;
}

static JsonNode *query(PbaQmp *qmp, const char *command, JsonNode *arguments, JsonNodeType type,
                       GError **error)
{
    g_autoptr(JsonNode) reply = pba_qmp_execute(qmp, command, arguments, error);

    if (reply && JSON_NODE_TYPE(reply) != type) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the reply is not an %s",
                      type == JSON_NODE_ARRAY ? "array" : "object");
        pba_error_add_command(error, command);
        return NULL;
    }
    return g_steal_pointer(&reply);
}

JsonArray *pba_qmp_query_array(PbaQmp *qmp, const char *command, JsonNode *arguments,
                               GError **error)
{
    g_autoptr(JsonNode) reply = query(qmp, command, arguments, JSON_NODE_ARRAY, error);
    return reply ? json_node_dup_array(reply) : NULL;
}

JsonObject *pba_qmp_query_object(PbaQmp *qmp, const char *command, JsonNode *arguments,
                                 GError **error)
{
    g_autoptr(JsonNode) reply = query(qmp, command, arguments, JSON_NODE_OBJECT, error);
    return reply ? json_node_dup_object(reply) : NULL;
}

bool pba_qmp_run(PbaQmp *qmp, const char *command, JsonNode *arguments, GError **error)
{
    g_autoptr(JsonNode) reply = pba_qmp_execute(qmp, command, arguments, error);
    return reply != NULL;
}
