/* The server of nbd.c: its answers are the input's records, and then correct answers. */
#define _GNU_SOURCE
#include "nbd.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CONTEXT "qemu:dirty-bitmap:bitmap"
#define CONTEXT_ID 7u
#define MAX_CLIENTS 4
/* The limit for one input. */
#define MAX_REQUESTS 40

#define OPTION_REPLY UINT64_C(0x3e889045565a9)
#define OPTION_GO 7u
#define OPTION_STRUCTURED_REPLY 8u
#define OPTION_SET_META_CONTEXT 10u
#define REPLY_ACK 1u
#define REPLY_INFO 3u
#define REPLY_META_CONTEXT 4u
#define REPLY_UNSUPPORTED 0x80000001u
#define STRUCTURED_MAGIC 0x668e33efu
#define SIMPLE_MAGIC 0x67446698u
#define CHUNK_DONE 1u
#define CHUNK_NONE 0u
#define CHUNK_HOLE 2u
#define CHUNK_BLOCK_STATUS 5u
#define CHUNK_ERROR 0x8001u
#define COMMAND_READ 0u
#define COMMAND_WRITE 1u
#define COMMAND_DISCONNECT 2u
#define COMMAND_BLOCK_STATUS 7u

/* How the server presents itself. */
#define NO_CONTEXT 1u
#define ONLY_SIMPLE_REPLIES 2u
#define MULTI_CONN 4u
#define BY_CLUSTER 8u
#define RECORDS_FOR_OPTIONS 16u

typedef struct {
    int fd; /* -1: free */
    GByteArray *received;
    GByteArray *to_send;
    enum { GREETED, OPTIONS, TRANSMISSION } state;
    bool closing;
} Client;

/* One request of a client's. */
typedef struct {
    uint16_t command;
    uint64_t cookie;
    uint64_t offset;
    uint32_t length;
} Request;

Input input;
static char socket_path[128];
static int listener;
static Client clients[MAX_CLIENTS];

static void remove_socket(void)
{
    unlink(socket_path);
}

const char *nbd_listen(void)
{
    snprintf(socket_path, sizeof(socket_path), "%s/nbd", fake_dir());
    listener = fake_listen(socket_path);
    atexit(remove_socket);
    for (size_t i = 0; i < MAX_CLIENTS; i++) {
        clients[i] = (Client){-1, g_byte_array_new(), g_byte_array_new(), GREETED, false};
    }
    return socket_path;
}

/* Numbers on the wire are big-endian. */

static void put(GByteArray *bytes, uint64_t number, unsigned size)
{
    uint64_t wire = GUINT64_TO_BE(number);
    g_byte_array_append(bytes, (const guint8 *)&wire + sizeof(wire) - size, size);
}

static uint64_t get(const uint8_t *bytes, size_t size)
{
    uint64_t number = 0;
    for (size_t i = 0; i < size; i++) {
        number = number << 8 | bytes[i];
    }
    return number;
}

static void put_text(GByteArray *bytes, const char *text)
{
    g_byte_array_append(bytes, (const guint8 *)text, (guint)strlen(text));
}

/* Records */

/* The bytes of the next record; NULL after the last one. */
static const uint8_t *take_record(unsigned *kind, size_t *length)
{
    if (input.end - input.next < 2) {
        return NULL;
    }
    const uint8_t *record = input.next;
    *kind = record[0];
    *length = MIN((size_t)record[1], (size_t)(input.end - record - 2));
    input.next = record + 2 + *length;
    return record + 2;
}

/* Options */

static void put_option_reply(Client *client, uint32_t option, uint32_t type, const void *data,
                             size_t length)
{
    put(client->to_send, OPTION_REPLY, 8);
    put(client->to_send, option, 4);
    put(client->to_send, type, 4);
    put(client->to_send, length, 4);
    g_byte_array_append(client->to_send, data, (guint)length);
}

static void put_info(Client *client)
{
    g_autoptr(GByteArray) info = g_byte_array_new();
    /* has flags, can flush, can trim; and that several connections are safe */
    unsigned flags = 1u | 1u << 2 | 1u << 5 | (input.presents & MULTI_CONN ? 1u << 8 : 0);

    put(info, 0, 2); /* NBD_INFO_EXPORT */
    put(info, input.size, 8);
    put(info, flags, 2);
    put_option_reply(client, OPTION_GO, REPLY_INFO, info->data, info->len);
    if (input.presents & BY_CLUSTER) {
        g_byte_array_set_size(info, 0);
        put(info, 2, 2); /* NBD_INFO_DESCRIPTION */
        put_text(info, PBA_BY_CLUSTER);
        put_option_reply(client, OPTION_GO, REPLY_INFO, info->data, info->len);
    }
}

static void put_context(Client *client)
{
    g_autoptr(GByteArray) context = g_byte_array_new();

    put(context, CONTEXT_ID, 4);
    put_text(context, CONTEXT);
    put_option_reply(client, OPTION_SET_META_CONTEXT, REPLY_META_CONTEXT, context->data,
                     context->len);
}

/* The kind is the reply's type; with its highest bit the bytes are sent as they are. */
static bool answer_option_by_record(Client *client, uint32_t option)
{
    unsigned kind;
    size_t length;
    const uint8_t *bytes =
        input.presents & RECORDS_FOR_OPTIONS ? take_record(&kind, &length) : NULL;

    if (!bytes || kind == 0) {
        return false;
    }
    if (kind & 0x80) {
        g_byte_array_append(client->to_send, bytes, (guint)length);
    } else {
        put_option_reply(client, option, kind & 0x40 ? 0x80000000u | (kind & 0x3f) : kind, bytes,
                         length);
    }
    return true;
}

static void answer_option(Client *client, uint32_t option)
{
    uint32_t type = REPLY_ACK;

    if (answer_option_by_record(client, option)) {
        return;
    }
    if (option == OPTION_GO) {
        put_info(client);
        client->state = TRANSMISSION;
    } else if (option == OPTION_SET_META_CONTEXT && !(input.presents & NO_CONTEXT)) {
        put_context(client);
    } else if (option == OPTION_STRUCTURED_REPLY ? input.presents & ONLY_SIMPLE_REPLIES
                                                 : option != OPTION_SET_META_CONTEXT) {
        type = REPLY_UNSUPPORTED;
    }
    put_option_reply(client, option, type, NULL, 0);
}

/* Requests */

static void put_chunk(Client *client, const Request *request, unsigned flags, unsigned type,
                      const GByteArray *payload)
{
    put(client->to_send, STRUCTURED_MAGIC, 4);
    put(client->to_send, flags, 2);
    put(client->to_send, type, 2);
    put(client->to_send, request->cookie, 8);
    put(client->to_send, payload->len, 4);
    g_byte_array_append(client->to_send, payload->data, payload->len);
}

/* Extents of two bytes each: flags in the first, length by powers of two in the second. */
static void put_small_extents(GByteArray *payload, const uint8_t *bytes, size_t length)
{
    for (size_t i = 0; i + 1 < length; i += 2) {
        put(payload, (bytes[i] >> 4 | 1u) << (bytes[i + 1] % 29), 4);
        put(payload, bytes[i] & 15, 4);
    }
}

static void put_error(GByteArray *payload, const uint8_t *bytes, size_t length)
{
    put(payload, length > 0 ? bytes[0] : 5, 4);
    put(payload, length, 2);
    g_byte_array_append(payload, bytes, (guint)length);
}

static void answer_good(Client *client, const Request *request)
{
    g_autoptr(GByteArray) payload = g_byte_array_new();
    unsigned type = CHUNK_NONE;

    if (input.presents & ONLY_SIMPLE_REPLIES) {
        put(client->to_send, SIMPLE_MAGIC, 4);
        put(client->to_send, 0, 4);
        put(client->to_send, request->cookie, 8);
        if (request->command == COMMAND_READ) {
            guint old = client->to_send->len;
            g_byte_array_set_size(client->to_send, old + request->length);
            memset(client->to_send->data + old, 'x', request->length);
        }
        return;
    }
    if (request->command == COMMAND_BLOCK_STATUS) {
        put(payload, CONTEXT_ID, 4);
        put(payload, request->length, 4);
        put(payload, request->offset >> 28 & 1, 4);
        type = CHUNK_BLOCK_STATUS;
    } else if (request->command == COMMAND_READ) {
        put(payload, request->offset, 8);
        put(payload, request->length, 4);
        type = CHUNK_HOLE;
    }
    put_chunk(client, request, CHUNK_DONE, type, payload);
}

/* A chunk of any type: type, flags, a cookie that is wrong or not, payload. */
static void put_any_chunk(Client *client, const Request *request, const uint8_t *bytes,
                          size_t length, GByteArray *payload)
{
    Request odd = *request;

    if (length < 4) {
        client->closing = true;
        return;
    }
    odd.cookie += bytes[3];
    g_byte_array_append(payload, bytes + 4, (guint)(length - 4));
    put_chunk(client, &odd, bytes[2], (unsigned)get(bytes, 2), payload);
}

/* True if the request needs one more answer. */
static bool answer_record(Client *client, const Request *request, unsigned kind,
                          const uint8_t *bytes, size_t length)
{
    g_autoptr(GByteArray) payload = g_byte_array_new();
    unsigned flags = kind & 0x80 ? 0 : CHUNK_DONE;

    switch (kind & 7) {
    case 0: /* extents */
        put(payload, CONTEXT_ID, 4);
        put_small_extents(payload, bytes, length);
        put_chunk(client, request, flags, CHUNK_BLOCK_STATUS, payload);
        break;
    case 1: /* extents as they are, of any context */
        g_byte_array_append(payload, bytes, (guint)length);
        put_chunk(client, request, flags, CHUNK_BLOCK_STATUS, payload);
        break;
    case 2:
        put_error(payload, bytes, length);
        put_chunk(client, request, flags, CHUNK_ERROR, payload);
        break;
    case 3:
        put_any_chunk(client, request, bytes, length, payload);
        break;
    case 4: /* bytes that may be anything */
        g_byte_array_append(client->to_send, bytes, (guint)length);
        break;
    case 5: /* silence */
        break;
    case 6:
        client->closing = true;
        break;
    default:
        answer_good(client, request);
        return false;
    }
    return kind & 0x80;
}

static void answer(Client *client, const Request *request)
{
    unsigned kind;
    size_t length;
    const uint8_t *bytes;
    bool more = true;

    if (request->command == COMMAND_DISCONNECT || ++input.requests > MAX_REQUESTS) {
        client->closing = true;
        return;
    }
    while (more) {
        if (!(bytes = take_record(&kind, &length))) {
            answer_good(client, request);
            return;
        }
        more = answer_record(client, request, kind, bytes, length);
    }
}

/* The connections */

/* How many bytes were a whole message; 0: more are needed. */
static size_t take_message(Client *client)
{
    const uint8_t *bytes = client->received->data;
    size_t size = client->received->len;

    if (client->state == GREETED) {
        client->state = size >= 4 ? OPTIONS : GREETED;
        return size >= 4 ? 4 : 0;
    }
    if (client->state == OPTIONS) {
        size_t whole = size >= 16 ? 16 + get(bytes + 12, 4) : SIZE_MAX;
        if (size >= whole) {
            answer_option(client, (uint32_t)get(bytes + 8, 4));
            return whole;
        }
        return 0;
    }
    if (size < 28) {
        return 0;
    }
    Request request = {
        .command = (uint16_t)get(bytes + 6, 2),
        .cookie = get(bytes + 8, 8),
        .offset = get(bytes + 16, 8),
        .length = (uint32_t)get(bytes + 24, 4),
    };
    CHECK(get(bytes, 4) == 0x25609513 && request.command != COMMAND_WRITE);
    CHECK(request.length > 0 && request.offset <= input.size &&
          request.length <= input.size - request.offset);
    answer(client, &request);
    return 28;
}

static bool receive(Client *client)
{
    uint8_t buffer[4096];
    ssize_t got = recv(client->fd, buffer, sizeof(buffer), 0);
    size_t taken;

    if (got == 0) {
        client->closing = true;
    }
    if (got <= 0) {
        return got == 0;
    }
    g_byte_array_append(client->received, buffer, (guint)got);
    while (!client->closing && (taken = take_message(client)) > 0) {
        g_byte_array_remove_range(client->received, 0, (guint)taken);
    }
    return true;
}

static void close_client(Client *client)
{
    if (client->fd >= 0) {
        close(client->fd);
    }
    client->fd = -1;
    client->state = GREETED;
    client->closing = false;
    g_byte_array_set_size(client->received, 0);
    g_byte_array_set_size(client->to_send, 0);
}

static bool accept_client(void)
{
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

    if (fd < 0) {
        return false;
    }
    for (size_t i = 0; i < MAX_CLIENTS; i++) {
        Client *client = &clients[i];
        if (client->fd < 0) {
            client->fd = fd;
            put_text(client->to_send, "NBDMAGICIHAVEOPT");
            put(client->to_send, 3, 2); /* fixed newstyle, no zeroes */
            return true;
        }
    }
    close(fd);
    return true;
}

/* True if something was done. */
static bool serve(Client *client)
{
    if (client->fd < 0) {
        return false;
    }
    if (client->to_send->len > 0) {
        ssize_t sent = send(client->fd, client->to_send->data, client->to_send->len, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            return false;
        }
        if (sent < 0) {
            close_client(client);
        } else {
            g_byte_array_remove_range(client->to_send, 0, (guint)sent);
        }
        return true;
    }
    if (client->closing) {
        close_client(client);
        return true;
    }
    return receive(client);
}

bool nbd_take_turn(void)
{
    bool busy = accept_client();

    for (size_t i = 0; i < MAX_CLIENTS; i++) {
        busy |= serve(&clients[i]);
    }
    return busy;
}

void nbd_end_clients(void)
{
    for (size_t i = 0; i < MAX_CLIENTS; i++) {
        close_client(&clients[i]);
    }
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0;) {
        close(fd);
    }
}
