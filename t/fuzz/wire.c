/* QMP's wire parser. The first byte says in which portions the others arrive; the messages must not
 * depend on that. */
#include "src/qmp/wire.h"
#include "fuzz.h"
#include <string.h>

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    return 0;
}

/* Feeds everything in portions of that size, and appends the messages as text. */
static bool parse(const char *bytes, size_t length, size_t portion, GString *messages)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    GError *error = NULL;
    JsonObject *message;
    bool done = true;

    for (size_t at = 0; done && at < length; at += portion) {
        /* A copy, so that a read beyond the portion is detected. */
        size_t size = MIN(portion, length - at);
        g_autofree char *copy = g_malloc(size);
        memcpy(copy, bytes + at, size);
        done = pba_qmp_wire_feed(wire, copy, size, &error);
        check_outcome(done, &error);
    }
    while ((message = pba_qmp_wire_pop(wire))) {
        JsonNode *node = json_node_init_object(json_node_alloc(), message);
        g_autofree char *text = json_to_string(node, FALSE);
        CHECK(g_utf8_validate(text, -1, NULL));
        g_string_append(messages, text);
        json_node_unref(node);
        json_object_unref(message);
    }
    return done;
}

/* The parser must be able to read the commands that we send. */
static void check_command(const char *bytes, size_t length)
{
    g_autofree char *name = g_utf8_make_valid(bytes, (gssize)MIN(length, 32));
    g_autofree char *text = pba_qmp_wire_command(name, NULL, "1");
    g_autoptr(GString) messages = g_string_new(NULL);
    bool can_be_said = *name || length == 0;

    CHECK(strchr(text, '\n') == text + strlen(text) - 1);
    for (const char *c = name; *c; c++) {
        can_be_said = can_be_said && !g_ascii_iscntrl(*c);
    }
    if (can_be_said) {
        CHECK(parse(text, strlen(text), strlen(text), messages));
        CHECK(messages->len > 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0) {
        return 0;
    }
    const char *bytes = (const char *)data + 1;
    g_autoptr(GString) at_once = g_string_new(NULL);
    g_autoptr(GString) in_portions = g_string_new(NULL);
    bool done = parse(bytes, size - 1, size, at_once);
    bool done_too = parse(bytes, size - 1, data[0] % 16 + 1u, in_portions);

    CHECK(done == done_too && g_string_equal(at_once, in_portions));
    if (data[0] >= 128) {
        check_command(bytes, size - 1);
    }
    return 0;
}
