#include "wire.h"

#include "qmp.h"
#include "src/base/base.h"
#include <string.h>

/* The reply to query-named-block-nodes of a big VM has a few MiB. json-glib's parser is recursive,
 * so nesting is checked before the parser is called. */
#define MAX_MESSAGE (64 << 20)

struct PbaQmpWire {
    GByteArray *message; /* the incomplete message that is arriving */
    GQueue messages;     /* JsonObject, complete */
    JsonParser *parser;
    unsigned depth;
    unsigned values; /* in the incomplete message so far */
    bool in_string;
    bool escaped;
};

PbaQmpWire *pba_qmp_wire_new(void)
{
    PbaQmpWire *wire = g_new0(PbaQmpWire, 1);
    wire->message = g_byte_array_new();
    wire->parser = json_parser_new();
    g_queue_init(&wire->messages);
    return wire;
}

void pba_qmp_wire_free(PbaQmpWire *wire)
{
    if (!wire) {
        return;
    }
    g_byte_array_unref(wire->message);
    g_queue_clear_full(&wire->messages, (GDestroyNotify)json_object_unref);
    g_object_unref(wire->parser);
    g_free(wire);
}

/* The number after a backslash and a u, or -1 if there is no such escape. */
static int unicode_escape(const char *text, const char *end)
{
    int value = 0;

    if (end - text < 6 || text[0] != '\\' || text[1] != 'u') {
        return -1;
    }
    for (int i = 2; i < 6; i++) {
        if (!g_ascii_isxdigit(text[i])) {
            return -1;
        }
        value = value * 16 + g_ascii_xdigit_value(text[i]);
    }
    return value;
}

/* Refuses what json-glib accepts beyond JSON: other escapes, for any byte, and \u with less than
 * four digits. It turns half a surrogate pair into bytes that are not UTF-8, and a NUL into the end
 * of the string. */
static bool escapes_are_text(const char *text, const char *end)
{
    while ((text = memchr(text, '\\', (size_t)(end - text)))) {
        if (end - text < 2 || !strchr("\"\\/bfnrtu", text[1])) {
            return false;
        }
        int value = text[1] == 'u' ? unicode_escape(text, end) : text[1];
        int low = value >= 0xd800 && value <= 0xdbff ? unicode_escape(text + 6, end) : -1;
        if (value <= 0 || (value >= 0xd800 && value <= 0xdfff && (low < 0xdc00 || low > 0xdfff))) {
            return false;
        }
        text += low >= 0 ? 12 : 2;
    }
    return true;
}

static bool finish_message(PbaQmpWire *wire, GError **error)
{
    const char *text = (const char *)wire->message->data;
    gssize length = wire->message->len;
    g_autoptr(GError) parse_error = NULL;

    if (!g_utf8_validate(text, length, NULL) || !escapes_are_text(text, text + length)) {
        pba_error_set(error, PBA_ERROR_PROTOCOL,
                      "the QMP peer sent text with invalid UTF-8 or an invalid escape");
        return false;
    }
    if (!json_parser_load_from_data(wire->parser, text, length, &parse_error)) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent text that is not JSON - %s",
                      parse_error->message);
        return false;
    }
    /* The text begins with a brace, so it is an object. */
    g_autoptr(JsonNode) root = json_parser_steal_root(wire->parser);
    g_queue_push_tail(&wire->messages, json_node_dup_object(root));
    /* The buffer of a big reply must not stay allocated for the rest of the connection. */
    g_byte_array_unref(wire->message);
    wire->message = g_byte_array_new();
    wire->values = 0;
    return true;
}

/* The characters that JSON has outside of strings. json-glib accepts more, and its comments and
 * other quotes would hide strings and nesting from this check. */
static bool is_json(char c)
{
    return c && strchr("{}[]:,\" \t\r\n0123456789+-.Eaeflnrstu", c);
}

/* Tracks one byte inside a message; false if no QMP message can have it there. */
static bool track_byte(PbaQmpWire *wire, char c, GError **error)
{
    if ((unsigned char)c < ' ' && c != '\r' && c != '\n' && c != '\t') {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent a control character");
        return false;
    }
    if (wire->in_string) {
        wire->in_string = wire->escaped || c != '"';
        wire->escaped = !wire->escaped && c == '\\';
        return true;
    }
    if (!is_json(c)) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent text that is not JSON");
        return false;
    }
    if (c == '"') {
        wire->in_string = true;
    } else if (c == '{' || c == '[') {
        wire->depth++;
    } else if (c == '}' || c == ']') {
        wire->depth--;
    }
    wire->values += c == '{' || c == '[' || c == ',';
    if (wire->depth > PBA_QMP_MAX_DEPTH) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent JSON nested deeper than %d",
                      PBA_QMP_MAX_DEPTH);
        return false;
    }
    if (wire->values > PBA_QMP_MAX_VALUES) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent a message of over %u values",
                      PBA_QMP_MAX_VALUES);
        return false;
    }
    return true;
}

bool pba_qmp_wire_feed(PbaQmpWire *wire, const char *bytes, size_t length, GError **error)
{
    size_t begin = 0; /* of the bytes that are not in wire->message yet */

    for (size_t i = 0; i < length; i++) {
        if (wire->depth == 0 && bytes[i] != '{') {
            if (!g_ascii_isspace(bytes[i])) {
                pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer does not speak QMP");
                return false;
            }
            begin = i + 1;
            continue;
        }
        if (!track_byte(wire, bytes[i], error)) {
            return false;
        }
        if (wire->depth == 0) {
            g_byte_array_append(wire->message, (const guint8 *)bytes + begin,
                                (guint)(i + 1 - begin));
            begin = i + 1;
            if (!finish_message(wire, error)) {
                return false;
            }
        }
    }
    if (wire->message->len + (length - begin) > MAX_MESSAGE) {
        pba_error_set(error, PBA_ERROR_PROTOCOL, "the QMP peer sent a message of over %d bytes",
                      MAX_MESSAGE);
        return false;
    }
    g_byte_array_append(wire->message, (const guint8 *)bytes + begin, (guint)(length - begin));
    return true;
}

JsonObject *pba_qmp_wire_pop(PbaQmpWire *wire)
{
    return g_queue_pop_head(&wire->messages);
}

char *pba_qmp_wire_command(const char *command, JsonNode *arguments, const char *id)
{
    g_autoptr(JsonNode) message = pba_json("{'execute': <%s>, 'id': <%s>}", command, id);
    if (arguments) {
        json_object_set_member(json_node_get_object(message), "arguments",
                               json_node_copy(arguments));
    }
    g_autofree char *text = json_to_string(message, FALSE);
    return g_strconcat(text, "\n", NULL);
}
