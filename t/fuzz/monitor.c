/* A monitor at a Unix socket. The first byte of the input chooses what the client does, the second
 * how many bytes the peer sends at once. Then there is a line for each thing the peer says: the
 * greeting, then one for each command. A line that begins with '+' is sent along with the one
 * before it; '!' closes, '?' says nothing. After the last line the peer agrees to everything if the
 * first byte says so, else it closes. */
#define _GNU_SOURCE
#include "fuzz.h"
#include "src/qmp/wire.h"
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CLIENT_CAPABILITIES, CLIENT_EXECUTE, CLIENT_RECOVER, CLIENT_COUNT };
#define AGREES 0x80

static char socket_path[128];
static int listener;

static struct {
    const char *next; /* line */
    const char *end;
    size_t portion;
    bool agrees;
    int fd; /* -1: no client */
    GString *received;
    GString *to_send;
    bool closing; /* when all is sent */
} peer;

static void remove_socket(void)
{
    unlink(socket_path);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    snprintf(socket_path, sizeof(socket_path), "%s/qmp", fake_dir());
    listener = fake_listen(socket_path);
    atexit(remove_socket);
    peer.received = g_string_new(NULL);
    peer.to_send = g_string_new(NULL);
    return 0;
}

static void close_client(void)
{
    if (peer.fd >= 0) {
        close(peer.fd);
    }
    peer.fd = -1;
    g_string_truncate(peer.received, 0);
    g_string_truncate(peer.to_send, 0);
    peer.closing = false;
}

/* The ID of the command; the caller frees it; NULL if there is none. */
static char *id_of(const char *command)
{
    static const char key[] = "\"id\":\"";
    const char *found = strstr(command, key);
    const char *id = found ? found + strlen(key) : NULL;

    return id ? g_strndup(id, strcspn(id, "\"")) : NULL;
}

static void agree(const char *command)
{
    g_autofree char *id = id_of(command);

    if (id) {
        g_string_append_printf(peer.to_send, "{\"return\": [], \"id\": \"%s\"}\r\n", id);
    } else {
        g_string_append(peer.to_send, "{\"QMP\": {}}\r\n");
    }
}

/* An ID in the input is a number, the last part of a command's ID. */
static void append_line(const char *command, const char *text, size_t length)
{
    g_autofree char *id = id_of(command);
    const char *number = id ? strrchr(id, '-') : NULL;
    g_autofree char *quoted = number ? g_strdup_printf("\"%s\"", number + 1) : NULL;
    const char *found = quoted ? g_strrstr_len(text, (gssize)length, quoted) : NULL;

    if (found) {
        g_string_append_len(peer.to_send, text, found - text);
        g_string_append_printf(peer.to_send, "\"%s\"", id);
        found += strlen(quoted);
        g_string_append_len(peer.to_send, found, text + length - found);
    } else {
        g_string_append_len(peer.to_send, text, (gssize)length);
    }
}

/* Sends the next line, and those that belong to it. */
static void say(const char *command)
{
    bool first = true;

    if (peer.next == peer.end) {
        peer.closing = !peer.agrees;
        if (peer.agrees) {
            agree(command);
        }
        return;
    }
    while (peer.next < peer.end && (first || *peer.next == '+')) {
        const char *newline = memchr(peer.next, '\n', (size_t)(peer.end - peer.next));
        const char *stop = newline ? newline + 1 : peer.end;
        if (*peer.next == '!') {
            peer.closing = true;
        } else if (*peer.next != '?') {
            const char *text = peer.next + (*peer.next == '+');
            append_line(command, text, (size_t)(stop - text));
        }
        peer.next = stop;
        first = false;
    }
}

static bool accept_client(void)
{
    peer.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (peer.fd >= 0) {
        say("");
    }
    return peer.fd >= 0;
}

static bool send_portion(void)
{
    size_t length = MIN(peer.portion, peer.to_send->len);
    ssize_t sent = send(peer.fd, peer.to_send->str, length, MSG_NOSIGNAL);

    if (sent < 0) {
        close_client();
    } else {
        g_string_erase(peer.to_send, 0, sent);
    }
    return true;
}

static bool receive(void)
{
    char buffer[4096];
    ssize_t got = recv(peer.fd, buffer, sizeof(buffer), 0);

    if (got == 0) {
        close_client();
    }
    if (got <= 0) {
        return got == 0;
    }
    g_string_append_len(peer.received, buffer, got);
    char *newline;
    while ((newline = strchr(peer.received->str, '\n'))) {
        g_autofree char *command = g_strndup(peer.received->str, newline - peer.received->str);
        g_string_erase(peer.received, 0, newline - peer.received->str + 1);
        say(command);
    }
    return true;
}

static bool take_turn(void)
{
    if (peer.fd < 0) {
        return accept_client();
    }
    if (peer.to_send->len > 0) {
        return send_portion();
    }
    if (peer.closing) {
        close_client();
        return true;
    }
    return receive();
}

static void run_execute(PbaQmp *qmp)
{
    static const char *const commands[] = {"query-block", "%s%n", "query-jobs"};

    for (size_t i = 0; i < 2 * G_N_ELEMENTS(commands); i++) {
        GError *error = NULL;
        JsonNode *value = pba_qmp_execute(qmp, commands[i % G_N_ELEMENTS(commands)], NULL, &error);
        check_outcome(value != NULL, &error);
        g_clear_pointer(&value, json_node_unref);
        if (i == G_N_ELEMENTS(commands)) {
            pba_qmp_release(qmp);
        }
    }
}

static void run_recover(PbaQmp *qmp)
{
    g_autofree char *run_dir = g_strdup_printf("%s/run", fake_dir());
    PbaAccessOptions options = {.target_id = "t", .run_dir = run_dir, .identity = "vm"};
    g_autoptr(PbaAccess) access = pba_access_new(qmp, &options, NULL, NULL);
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);
    GError *error = NULL;

    check_outcome(pba_access_recover(access, lines, &error), &error);
}

static void run_client(unsigned what)
{
    PbaQmp *qmp = pba_qmp_new(socket_path, 5, NULL);
    PbaCapabilities capabilities;
    GError *error = NULL;

    if (what == CLIENT_EXECUTE) {
        run_execute(qmp);
    } else if (what == CLIENT_RECOVER) {
        run_recover(qmp);
    } else {
        check_outcome(pba_capabilities(qmp, &capabilities, &error), &error);
    }
    pba_qmp_is_gone(qmp);
    pba_qmp_free(qmp);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) {
        return 0;
    }
    peer.next = (const char *)data + 2;
    peer.end = (const char *)data + size;
    peer.portion = data[1] == 0xff ? SIZE_MAX : data[1] + 1u;
    peer.agrees = data[0] & AGREES;
    peer.fd = -1;
    fake_begin(take_turn);
    run_client((data[0] & ~AGREES) % CLIENT_COUNT);
    /* Connections that were not accepted are still in the queue. */
    do {
        close_client();
        peer.fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    } while (peer.fd >= 0);
    fake_end();
    return 0;
}
