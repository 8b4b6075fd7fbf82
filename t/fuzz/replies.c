/* A QEMU whose replies come from the input. The letters of the first line say what the client does
 * (see take_letter). Each other line has a command and the complete message that is its reply:
 *
 *   query-jobs {"return": []}
 *
 * The lines of a command are used in order, the last one repeatedly; a command without a line gets
 * a good reply. If a line is not a message, the connection is lost. */
#include "replies.h"
#include "src/access/access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_COMMANDS 2000

typedef struct {
    const char *command; /* not ended by a NUL */
    size_t command_length;
    const char *text;
    size_t length;
    JsonObject *message; /* NULL until it is used */
    bool used;
} Reply;

static GHashTable *own_fleecing;
static char run_dir[128];
static char fleecing_dir[128];

/* The contents of an input. */
static struct {
    GArray *replies;
    GArray *requests;
    bool pve;
    bool early;
    bool persistent;
    bool own_fleecing;
    bool other_name;
    bool listens;
    bool successful; /* the client is told so */
    bool interrupts;
    int listener; /* QEMU's NBD server; -1: none */
    unsigned count;
    char *socket;
    PbaQmp *qmp;
    PbaAccess *access;
} state;

static void remove_dirs(void)
{
    rmdir(fleecing_dir);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    replies_prepare();
    own_fleecing = g_hash_table_new(g_str_hash, g_str_equal);
    g_hash_table_insert(own_fleecing, (char *)"drive-scsi0", (char *)"drive-scsi0-fleecing");
    snprintf(run_dir, sizeof(run_dir), "%s/run", fake_dir());
    snprintf(fleecing_dir, sizeof(fleecing_dir), "%s/fleecing", fake_dir());
    CHECK(mkdir(fleecing_dir, 0700) == 0);
    atexit(remove_dirs);
    state.replies = g_array_new(FALSE, TRUE, sizeof(Reply));
    state.requests = g_array_new(FALSE, TRUE, sizeof(PbaDeviceRequest));
    return 0;
}

/* Replies */

static Reply *find_reply(const char *command)
{
    Reply *last = NULL;

    for (guint i = 0; i < state.replies->len; i++) {
        Reply *reply = &g_array_index(state.replies, Reply, i);
        if (strlen(command) == reply->command_length &&
            strncmp(command, reply->command, reply->command_length) == 0) {
            last = reply;
            if (!reply->used) {
                break;
            }
        }
    }
    return last;
}

/* The reply, borrowed; NULL if it is not a message. */
static JsonObject *reply_to(const char *command)
{
    Reply *reply = find_reply(command);

    if (reply) {
        if (!reply->used) {
            reply->message = replies_parse(reply->text, reply->length);
            reply->used = true;
        }
        return reply->message;
    }
    return replies_good(command, state.pve, state.early);
}

static void stop_listening(void)
{
    if (state.listener >= 0) {
        close(state.listener);
        unlink(state.socket);
        g_clear_pointer(&state.socket, g_free);
        state.listener = -1;
    }
}

static void follow_nbd_server(const char *command, JsonObject *arguments)
{
    if (strcmp(command, "nbd-server-start") == 0 && state.listens && state.listener < 0) {
        JsonObject *address = pba_json_find_object(arguments, "addr");
        JsonObject *data = pba_json_find_object(address, "data");
        state.socket = g_strdup(pba_json_find_string(data, "path"));
        state.listener = fake_listen(state.socket);
    } else if (strcmp(command, "nbd-server-stop") == 0) {
        stop_listening();
    }
}

/* Whatever QEMU replies, some commands must never be sent. */
static void check_command(const char *command, JsonObject *arguments)
{
    CHECK(++state.count < MAX_COMMANDS);
    CHECK(strcmp(command, "stop") != 0 && strcmp(command, "quit") != 0);
    if (strcmp(command, "backup-access-setup") == 0) {
        JsonArray *devices = pba_json_find_array(arguments, "devices");
        const char *list = pba_json_find_string(arguments, "devlist");
        CHECK(devices ? json_array_get_length(devices) > 0 : list && *list);
    } else if (strcmp(command, "backup-access-teardown") == 0) {
        CHECK(state.successful || !pba_json_find_bool(arguments, "success"));
    } else if (strcmp(command, "transaction") == 0) {
        JsonArray *actions = pba_json_find_array(arguments, "actions");
        CHECK(json_array_get_length(actions) > 0);
        for (guint i = 0; i < json_array_get_length(actions); i++) {
            const char *type = pba_json_find_string(pba_json_element(actions, i), "type");
            CHECK(state.successful || strcmp(type, "block-dirty-bitmap-clear") != 0);
        }
    }
}

static JsonNode *transport(void *opaque, const char *command, JsonNode *arguments, GError **error)
{
    (void)opaque;
    JsonObject *object = json_node_get_object(arguments);

    check_command(command, object);
    JsonObject *message = reply_to(command);
    JsonNode *value = message ? json_object_get_member(message, "return") : NULL;
    JsonObject *failure = message ? pba_json_find_object(message, "error") : NULL;
    if (value) {
        follow_nbd_server(command, object);
        return json_node_copy(value);
    }
    if (failure) {
        const char *klass = pba_json_find_string(failure, "class");
        const char *description = pba_json_find_string(failure, "desc");
        pba_error_set_qmp(error, command, klass ? klass : "", description ? description : "");
    } else {
        pba_error_set(error, PBA_ERROR_CONNECTION, "the connection is lost");
    }
    return NULL;
}

/* The client */

static bool interrupted(void *opaque)
{
    (void)opaque;
    return state.interrupts;
}

static void take_log(void *opaque, PbaLogLevel level, const char *message)
{
    (void)opaque;
    (void)level;
    CHECK(g_utf8_validate(message, -1, NULL) && !strpbrk(message, "\r\n\033"));
}

static const PbaHooks hooks = {.interrupted = interrupted, .log = take_log};

static PbaAccessOptions access_options(void)
{
    return (PbaAccessOptions){
        .target_id = TARGET,
        .run_dir = run_dir,
        .fleecing_dir = fleecing_dir,
        .fleecing = state.own_fleecing ? own_fleecing : NULL,
        .bitmap_name = state.other_name ? "gen-2" : NULL,
        .persistent = state.persistent,
    };
}

static PbaAccess *get_access(void)
{
    if (!state.access) {
        PbaAccessOptions options = access_options();
        GError *error = NULL;
        state.qmp = pba_qmp_new_transport(transport, NULL, &hooks);
        state.access = pba_access_new(state.qmp, &options, &hooks, &error);
        check_outcome(state.access != NULL, &error);
    }
    return state.access;
}

static bool set_up(PbaAccess *access, GError **error)
{
    const PbaDeviceRequest *requests = (PbaDeviceRequest *)(void *)state.requests->data;

    if (!pba_access_prepare(access, requests, state.requests->len, error)) {
        return false;
    }
    bool done = pba_access_cut(access, error) && pba_access_finish(access, error);
    if (!done) {
        pba_access_undo_setup(access);
    }
    return done;
}

static void run_setup(PbaAccess *access)
{
    GError *error = NULL;
    bool done = set_up(access, &error);
    for (size_t i = 0; done && i < pba_access_device_count(access); i++) {
        PbaDeviceInfo info;
        pba_access_device_info(access, i, &info);
        CHECK(info.device && info.node_name && !info.bitmap_name == !info.bitmap_node_name);
        CHECK(!info.bitmap_name == (pba_bitmap_status(info.action) == PBA_BITMAP_STATUS_NONE));
    }
    CHECK(!done || pba_access_is_up(access));
    check_outcome(done, &error);
}

static void run_teardown(PbaAccess *access, bool success)
{
    GError *error = NULL;

    state.successful = success;
    check_outcome(pba_access_teardown(access, success, NULL, &error), &error);
    state.successful = false;
}

static void run_recover(PbaAccess *access)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);
    GError *error = NULL;

    check_outcome(pba_access_recover(access, lines, &error), &error);
    for (guint i = 0; i < lines->len; i++) {
        for (const char *c = lines->pdata[i]; *c; c++) {
            CHECK(!g_ascii_iscntrl(*c));
        }
    }
}

static void run_status(PbaQmp *qmp)
{
    PbaAccessOptions options = access_options();
    GError *error = NULL;
    JsonNode *status = pba_status(qmp, &options, NULL, &hooks, &error);

    check_outcome(status != NULL, &error);
    g_clear_pointer(&status, json_node_unref);
}

/* Creates what a dead client with the same target and guest would leave on disk. */
static void leave_paths(void)
{
    g_autofree char *run = pba_own_name(TARGET, "run", ":");
    g_autofree char *fleece = pba_own_name(TARGET, "fleece", ":");
    g_autofree char *dir = g_strdup_printf("%s/%s-abcdef", run_dir, run);
    g_autofree char *image = g_strdup_printf("%s/%s-abcdef", fleecing_dir, fleece);
    FILE *file;

    mkdir(run_dir, 0700);
    mkdir(dir, 0700);
    if ((file = fopen(image, "wxe"))) {
        fchmod(fileno(file), 0600);
        fclose(file);
    }
}

static void request(PbaBitmapMode mode)
{
    static const char *const devices[] = {"drive-scsi0", "drive-scsi1", "#block1", "scsi0"};
    PbaDeviceRequest request = {.device = devices[state.requests->len % G_N_ELEMENTS(devices)],
                                .mode = mode};

    if (state.requests->len < 2 * G_N_ELEMENTS(devices)) {
        g_array_append_val(state.requests, request);
    }
}

static void take_option(char letter)
{
    switch (letter) {
    case 'p': /* Proxmox' commands */
        state.pve = true;
        break;
    case 'e': /* in their early form */
        state.pve = state.early = true;
        break;
    case 'n': /* one more device, by its bitmap's mode */
        request(PBA_BITMAP_MODE_NONE);
        break;
    case 'N':
        request(PBA_BITMAP_MODE_NEW);
        break;
    case 'U':
        request(PBA_BITMAP_MODE_USE);
        break;
    case 'P':
        state.persistent = true;
        break;
    case 'f': /* the caller's own fleecing node */
        state.own_fleecing = true;
        break;
    case 'b': /* another bitmap's name */
        state.other_name = true;
        break;
    case 'l': /* QEMU's NBD server listens */
        state.listens = true;
        break;
    case 'i': /* a signal arrives */
        state.interrupts = !state.interrupts;
        break;
    default:
        break;
    }
}

static void take_letter(char letter)
{
    GError *error = NULL;
    PbaCapabilities capabilities;

    switch (letter) {
    case 'c':
        get_access();
        check_outcome(pba_capabilities(state.qmp, &capabilities, &error), &error);
        break;
    case 's':
        run_setup(get_access());
        break;
    case 'x':
        check_outcome(pba_access_export(get_access(), &error), &error);
        break;
    case 't':
    case 'T':
        run_teardown(get_access(), letter == 'T');
        break;
    case 'r':
        run_recover(get_access());
        break;
    case 'q':
        get_access();
        run_status(state.qmp);
        break;
    case 'L':
        leave_paths();
        break;
    default:
        take_option(letter);
    }
}

/* Input */

static void take_reply(const char *line, size_t length)
{
    const char *space = memchr(line, ' ', length);

    if (space) {
        size_t command_length = (size_t)(space - line);
        Reply reply = {
            .command = line,
            .command_length = command_length,
            .text = space + 1,
            .length = length - command_length - 1,
        };
        g_array_append_val(state.replies, reply);
    }
}

/* The rest after a line, and that line's length. */
static const char *split_line(const char *text, const char *end, size_t *length)
{
    const char *newline = memchr(text, '\n', (size_t)(end - text));

    *length = (size_t)((newline ? newline : end) - text);
    return newline ? newline + 1 : end;
}

static void clear_state(void)
{
    for (guint i = 0; i < state.replies->len; i++) {
        JsonObject *message = g_array_index(state.replies, Reply, i).message;
        g_clear_pointer(&message, json_object_unref);
    }
    g_array_set_size(state.replies, 0);
    g_array_set_size(state.requests, 0);
    GArray *replies = state.replies;
    GArray *requests = state.requests;
    memset(&state, 0, sizeof(state));
    state.replies = replies;
    state.requests = requests;
    state.listener = -1;
}

/* Removes the contents of a directory, recursively. */
static void empty_dir(const char *path)
{
    GDir *dir = g_dir_open(path, 0, NULL);
    const char *name;

    while (dir && (name = g_dir_read_name(dir))) {
        g_autofree char *entry = g_build_filename(path, name, NULL);
        if (unlink(entry) != 0) {
            empty_dir(entry);
            CHECK(rmdir(entry) == 0);
        }
    }
    g_clear_pointer(&dir, g_dir_close);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *text = (const char *)data;
    const char *end = text + size;
    const char *letters = text;
    size_t letter_count;
    size_t length;

    clear_state();
    fake_begin(NULL);
    text = split_line(text, end, &letter_count);
    while (text < end) {
        const char *line = text;
        text = split_line(text, end, &length);
        take_reply(line, length);
    }
    bool may_leave = memchr(letters, 'L', letter_count) || memchr(letters, 'l', letter_count);
    for (size_t i = 0; i < MIN(letter_count, 12); i++) {
        take_letter(letters[i]);
    }
    g_clear_pointer(&state.access, pba_access_free);
    g_clear_pointer(&state.qmp, pba_qmp_free);
    stop_listening();
    if (may_leave) {
        empty_dir(run_dir);
        empty_dir(fleecing_dir);
    }
    /* Only expected files may be there. */
    CHECK(rmdir(run_dir) == 0 || errno == ENOENT);
    clear_state();
    fake_end();
    return 0;
}
