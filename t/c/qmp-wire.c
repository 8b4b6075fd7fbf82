/* qmp-wire.c: whatever a peer sends, the result is a complete message or an error. */
#include "src/qmp/qmp.h"
#include "src/qmp/wire.h"
#include "tap.h"
#include <string.h>

/* Messages that QEMU may send: pretty-printed, with strings that look like JSON structure. */
static const char stream[] =
    "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 0}}, \"capabilities\": [\"oob\"]}}\r\n"
    "{\r\n    \"return\": {\r\n\t\"a\": [\r\n\r\n1, [2, {}], {}], \"b\": {}\r\n    }\r\n}\r\n\r\n"
    "{\"event\": \"STOP\", \"data\": {\"}\": \"{[\\\"}]\\\\\"}}{\"return\":\"\\\\\\\\\"}\n \t\n"
    "{\"error\": {\"desc\": \"\\u00fc \xc3\xbc \\\" } %s%n \\/ \\b\\f\\n\\r\\t\"}}\r\n"
    "{}";

static const char *const first_keys[] = {"QMP", "return", "event", "return", "error", NULL};

/* Feeds the pieces. Returns the number of messages, or -1 after an error. */
static int count_messages(PbaQmpWire *wire, bool *in_order)
{
    int count = 0;
    for (;;) {
        g_autoptr(JsonObject) message = pba_qmp_wire_pop(wire);
        if (!message) {
            return count;
        }
        const char *key = count < 5 ? first_keys[count] : NULL;
        if (key && !json_object_has_member(message, key)) {
            *in_order = false;
        }
        count++;
    }
}

static void test_split_everywhere(void)
{
    size_t length = strlen(stream);
    unsigned bad = 0;

    for (size_t at = 0; at <= length; at++) {
        g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
        bool in_order = true;
        bool fed = pba_qmp_wire_feed(wire, stream, at, NULL) &&
                   pba_qmp_wire_feed(wire, stream + at, length - at, NULL);
        if (!fed || count_messages(wire, &in_order) != 6 || !in_order) {
            bad++;
        }
    }
    is_number(bad, 0, "cut in two at each of %zu places", length);

    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    bool fed = true;
    for (size_t i = 0; i < length; i++) {
        fed = fed && pba_qmp_wire_feed(wire, stream + i, 1, NULL);
    }
    bool in_order = true;
    ok(fed && count_messages(wire, &in_order) == 6 && in_order, "byte by byte");
}

static void test_contents(void)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    g_autoptr(JsonObject) nothing = pba_qmp_wire_pop(wire);

    ok(!nothing, "nothing fed, nothing there");
    ok(pba_qmp_wire_feed(wire, "", 0, NULL), "nothing fed");
    ok(pba_qmp_wire_feed(wire, stream, strlen(stream), NULL), "several messages in one go");
    g_autoptr(JsonObject) greeting = pba_qmp_wire_pop(wire);
    ok(pba_json_find_object(greeting, "QMP"), "greeting");
    g_autoptr(JsonObject) pretty = pba_qmp_wire_pop(wire);
    JsonObject *value = pba_json_find_object(pretty, "return");
    is_number(json_array_get_length(pba_json_find_array(value, "a")), 3, "pretty-printed");
    g_autoptr(JsonObject) event = pba_qmp_wire_pop(wire);
    is_text(pba_json_find_string(pba_json_find_object(event, "data"), "}"), "{[\"}]\\",
            "structure within strings");
    g_autoptr(JsonObject) slashes = pba_qmp_wire_pop(wire);
    is_text(pba_json_find_string(slashes, "return"), "\\\\", "backslashes before the end");
    g_autoptr(JsonObject) failure = pba_qmp_wire_pop(wire);
    is_text(pba_json_find_string(pba_json_find_object(failure, "error"), "desc"),
            "\xc3\xbc \xc3\xbc \" } %s%n / \b\f\n\r\t", "escapes");
    g_autoptr(JsonObject) empty = pba_qmp_wire_pop(wire);
    is_number(json_object_get_size(empty), 0, "the empty object");
    g_autoptr(JsonObject) end = pba_qmp_wire_pop(wire);
    ok(!end, "no more");
}

static void test_unfinished(void)
{
    static const char *const parts[] = {
        "{", "{\"", "{\"return\": {}", "{\"a\": \"}", "{\"a\\", "{\"a\": \"\\\"}", " ", "\r\n"};
    for (size_t i = 0; i < G_N_ELEMENTS(parts); i++) {
        g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
        bool fed = pba_qmp_wire_feed(wire, parts[i], strlen(parts[i]), NULL);
        g_autoptr(JsonObject) message = pba_qmp_wire_pop(wire);
        ok(fed && !message, "only begun: %s", parts[i]);
    }
}

/* Fed whole and byte by byte: the same error. */
static void check_refused(const char *bytes, size_t length, const char *what)
{
    for (int piecemeal = 0; piecemeal <= 1; piecemeal++) {
        g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
        g_autoptr(GError) error = NULL;
        size_t step = piecemeal ? 1 : length;
        bool fed = true;
        for (size_t at = 0; fed && at < length; at += step) {
            fed = pba_qmp_wire_feed(wire, bytes + at, step, &error);
        }
        ok(!fed && g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "%s%s", what,
           piecemeal ? ", byte by byte" : "");
        if (error) {
            ok(g_utf8_validate(error->message, -1, NULL) && !strpbrk(error->message, "\n\r\033"),
               "its message is one clean line");
        }
    }
}

static void test_refused(void)
{
#define REFUSED(bytes, what) check_refused(bytes, sizeof(bytes) - 1, what)
    REFUSED("SSH-2.0-OpenSSH\r\n", "text instead of QMP");
    REFUSED("HTTP/1.1 200 OK\r\n\r\n{}", "text before a message");
    REFUSED("{}\r\nx{}", "text between messages");
    REFUSED("[]", "an array");
    REFUSED("\"text\"", "a string");
    REFUSED("17", "a number");
    REFUSED("null", "null");
    REFUSED("}", "an end without a beginning");
    REFUSED("{}}", "one end too many");
    REFUSED("\xef\xbb\xbf{}", "a byte order mark");
    REFUSED("\0", "NUL");
    REFUSED("{}\0{}", "NUL between messages");
    REFUSED("{\"a\0b\": 1}", "NUL within a string");
    REFUSED("{\0}", "NUL within a message");
    REFUSED("{\"a\": \"\\u0000\"}", "an escaped NUL");
    REFUSED("{\"a\": \"\\u12\"}", "an escape that is too short");
    REFUSED("{\"a\": \"\\ud83dx\"}", "half of one");
    REFUSED("{\"a\": \"\\u00g0\"}", "an escape that is no number");
    REFUSED("{\"a\": \"\\377\"}", "an octal escape");
    REFUSED("{\"a\": \"\\x41\"}", "an escape of another language");
    REFUSED("{\"a\": /*\"*/[/*\"*/]}", "comments");
    REFUSED("{\"a\": 1 // \"\n}", "a comment to the end of the line");
    REFUSED("{'a': 1}", "other quotes");
    REFUSED("{\"a\": 0x1f}", "a hexadecimal number");
    REFUSED("{\"a\": NaN}", "what is no number");
    REFUSED("{\"a\\u0000\": 1}", "an escaped NUL in a name");
    REFUSED("{\"a\": \"\001\"}", "a control character within a string");
    REFUSED("{\"a\": \"\033[31m\"}", "an escape sequence");
    REFUSED("{\"a\": \"\xff\"}", "bytes that are no UTF-8");
    REFUSED("{\"a\": \"\xc0\x80\"}", "overlong UTF-8");
    REFUSED("{\"a\": \"\xed\xa0\x80\"}", "a surrogate in UTF-8");
    REFUSED("{\"a\": \"\xe2\x82\"}", "a cut off character");
    REFUSED("{\"a\": \"\xf4\x90\x80\x80\"}", "beyond Unicode");
    REFUSED("{\"a\" 1}", "no colon");
    REFUSED("{\"a\":}", "no value");
    REFUSED("{\"a\": tru}", "half a word");
    REFUSED("{\"a\": [1, 2}}", "an array that ends as an object");
    REFUSED("{\"a\": \"%s%n%n\" \"b\"}", "format directives in what is no JSON");
    REFUSED("\x16\x03\x01\x02\x00\x01\x00\x01", "a TLS greeting");
    REFUSED("NBDMAGICIHAVEOPT", "an NBD greeting");
#undef REFUSED
}

/* The text of an escape must be valid UTF-8, too, because GLib requires it. */
static void test_surrogates(void)
{
    static const char *const texts[] = {
        "{\"a\": \"\\ud800\"}",        "{\"a\": \"\\udc00\"}",    "{\"a\": \"\\ud800x\"}",
        "{\"a\": \"\\ud800\\ud800\"}", "{\"a\": \"\\ud800\\n\"}", "{\"a\": \"\\ud800\\u0041\"}",
        "{\"a\": \"\\udfff\\ud800\"}", "{\"\\ud800\": \"name\"}", "{\"a\": \"\\ufffe\\uffff\"}",
        "{\"a\": \"\\ud83d\\ude00\"}",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
        g_autoptr(GError) error = NULL;
        bool fed = pba_qmp_wire_feed(wire, texts[i], strlen(texts[i]), &error);
        if (!fed) {
            ok(g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "%s: refused", texts[i]);
            continue;
        }
        g_autoptr(JsonObject) message = pba_qmp_wire_pop(wire);
        g_autoptr(GList) names = json_object_get_members(message);
        const char *value = pba_json_find_string(message, names->data);
        ok(g_utf8_validate(names->data, -1, NULL) && g_utf8_validate(value, -1, NULL),
           "%s: valid UTF-8 comes out", texts[i]);
    }
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    pba_qmp_wire_feed(wire, texts[9], strlen(texts[9]), NULL);
    g_autoptr(JsonObject) message = pba_qmp_wire_pop(wire);
    is_text(message ? pba_json_find_string(message, "a") : NULL, "\xf0\x9f\x98\x80",
            "a pair of surrogates");
}

static void test_backslash_u0000(void)
{
    static const char text[] = "{\"a\": \"C:\\\\u0000\"}";
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    bool fed = pba_qmp_wire_feed(wire, text, strlen(text), NULL);
    g_autoptr(JsonObject) message = fed ? pba_qmp_wire_pop(wire) : NULL;
    is_text(message ? pba_json_find_string(message, "a") : NULL, "C:\\u0000",
            "a backslash before u0000 is no NUL");
}

static bool feed_depth(unsigned depth, char open, char close, GError **error)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    g_autoptr(GString) text = g_string_new("{\"return\":");

    for (unsigned i = 1; i < depth; i++) {
        g_string_append_c(text, open);
        if (open == '{') {
            g_string_append(text, "\"k\":");
        }
    }
    g_string_append_c(text, '0');
    for (unsigned i = 1; i < depth; i++) {
        g_string_append_c(text, close);
    }
    g_string_append_c(text, '}');
    if (!pba_qmp_wire_feed(wire, text->str, text->len, error)) {
        return false;
    }
    g_autoptr(JsonObject) message = pba_qmp_wire_pop(wire);
    return message != NULL;
}

static void test_depth(void)
{
    static const char brackets[][2] = {{'[', ']'}, {'{', '}'}};
    for (size_t i = 0; i < G_N_ELEMENTS(brackets); i++) {
        g_autoptr(GError) error = NULL;
        ok(feed_depth(30, brackets[i][0], brackets[i][1], NULL), "30 deep");
        ok(feed_depth(128, brackets[i][0], brackets[i][1], NULL), "128 deep");
        ok(!feed_depth(129, brackets[i][0], brackets[i][1], &error), "129 deep is refused");
        ok(g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "as an error of the protocol");
        ok(!feed_depth(1000000, brackets[i][0], brackets[i][1], NULL), "a million deep is, too");
    }
}

/* A message without end is refused at 64 MiB, not much later, and in linear time. */
static void test_endless(void)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    g_autoptr(GError) error = NULL;
    g_autofree char *chunk = g_strnfill(65536, 'x');
    gint64 start = g_get_monotonic_time();
    size_t total = 0;

    bool fed = pba_qmp_wire_feed(wire, "{\"return\": \"", 12, &error);
    while (fed && total < (size_t)200 << 20) {
        fed = pba_qmp_wire_feed(wire, chunk, 65536, &error);
        total += 65536;
    }
    ok(!fed && g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "refused");
    ok(total >= (size_t)60 << 20 && total <= (size_t)70 << 20, "at about 64 MiB");
    ok(g_get_monotonic_time() - start < 60 * G_TIME_SPAN_SECOND, "in bounded time");
}

/* In memory, a value is much larger than in the message. */
static void test_values(void)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    g_autoptr(GError) error = NULL;
    bool fed = pba_qmp_wire_feed(wire, "{\"return\": [0", 13, &error);
    unsigned count = 0;

    while (fed && count < 4000000) {
        fed = pba_qmp_wire_feed(wire, ",[],{}", 6, &error);
        count += 2;
    }
    ok(!fed && g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "refused");
    ok(count > 500000 && count < 1100000, "at about a million values");
}

static void test_big(void)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    g_autofree char *chunk = g_strnfill(1 << 20, 'x');
    bool fed = pba_qmp_wire_feed(wire, "{\"return\": \"", 12, NULL);

    for (int i = 0; i < 20; i++) {
        fed = fed && pba_qmp_wire_feed(wire, chunk, 1 << 20, NULL);
    }
    fed = fed && pba_qmp_wire_feed(wire, "\"}", 2, NULL);
    g_autoptr(JsonObject) message = pba_qmp_wire_pop(wire);
    const char *text = message ? pba_json_find_string(message, "return") : NULL;
    ok(fed && text && strlen(text) == 20 << 20, "20 MiB in one message");
}

static void test_many(void)
{
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    g_autoptr(GString) text = g_string_new(NULL);
    bool in_order = true;

    for (int i = 0; i < 20000; i++) {
        g_string_append(text, "{\"event\": \"BLOCK_JOB_READY\"}\r\n");
    }
    ok(pba_qmp_wire_feed(wire, text->str, text->len, NULL), "20,000 messages in one go");
    is_number(count_messages(wire, &in_order), 20000, "all there");
}

static void test_command(void)
{
    g_autoptr(JsonNode) arguments = pba_json("{'path': <%s>}", "a\nb\"c\\");
    g_autofree char *with = pba_qmp_wire_command("qom-get", arguments, "pba-1");
    g_autofree char *without = pba_qmp_wire_command("stop", NULL, "pba-\"2");

    ok(g_str_has_suffix(with, "\n") && strchr(with, '\n') == with + strlen(with) - 1, "one line");
    g_autoptr(PbaQmpWire) wire = pba_qmp_wire_new();
    ok(pba_qmp_wire_feed(wire, with, strlen(with), NULL) &&
           pba_qmp_wire_feed(wire, without, strlen(without), NULL),
       "our own commands are JSON");
    g_autoptr(JsonObject) command = pba_qmp_wire_pop(wire);
    is_text(pba_json_find_string(command, "execute"), "qom-get", "command");
    is_text(pba_json_find_string(command, "id"), "pba-1", "id");
    is_text(pba_json_find_string(pba_json_find_object(command, "arguments"), "path"), "a\nb\"c\\",
            "arguments");
    g_autoptr(JsonObject) plain = pba_qmp_wire_pop(wire);
    is_text(pba_json_find_string(plain, "id"), "pba-\"2", "an id to be quoted");
    ok(!json_object_has_member(plain, "arguments"), "no arguments");
}

int main(void)
{
    test_split_everywhere();
    test_contents();
    test_unfinished();
    test_refused();
    test_surrogates();
    test_backslash_u0000();
    test_depth();
    test_endless();
    test_values();
    test_big();
    test_many();
    test_command();
    return done_testing();
}
