/* json.c: members of replies that are missing or have an unexpected type. */
#include "src/qmp/qmp.h"
#include "tap.h"

static JsonObject *parse(const char *text)
{
    g_autoptr(JsonNode) node = json_from_string(text, NULL);
    g_assert(node && JSON_NODE_HOLDS_OBJECT(node));
    return json_object_ref(json_node_get_object(node));
}

/* Frees the error. */
static void check_refused(bool got, GError *error, const char *key, const char *what)
{
    g_autofree char *quoted = g_strconcat("'", key, "'", NULL);
    ok(!got && g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "%s: refused", what);
    ok(error && g_strstr_len(error->message, -1, quoted), "%s: the message names it", what);
    g_clear_error(&error);
}

static void test_wrong_types(void)
{
    static const char *const values[] = {
        "null", "true", "\"text\"", "17", "17.5", "-17", "[]", "[1]", "{}", "{\"k\": 1}",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(values); i++) {
        const char *value = values[i];
        g_autofree char *text = g_strdup_printf("{\"k\": %s}", value);
        g_autoptr(JsonObject) object = parse(text);
        GError *error = NULL;
        uint64_t size = 4711;

        if (value[0] != '"') {
            bool got = pba_json_string(object, "k", &error) != NULL;
            check_refused(got, g_steal_pointer(&error), "k", value);
            ok(!pba_json_find_string(object, "k"), "%s: found as no string", value);
        }
        if (g_strcmp0(value, "17") != 0) {
            bool got = pba_json_size(object, "k", &size, &error);
            check_refused(got, g_steal_pointer(&error), "k", value);
            is_number(size, 4711, "%s: nothing is stored", value);
        }
        if (value[0] != '[') {
            ok(!pba_json_find_array(object, "k"), "%s: found as no array", value);
        }
        if (value[0] != '{') {
            bool got = pba_json_object(object, "k", &error) != NULL;
            check_refused(got, g_steal_pointer(&error), "k", value);
            ok(!pba_json_find_object(object, "k"), "%s: found as no object", value);
        }
        ok(pba_json_find_bool(object, "k") == (g_strcmp0(value, "true") == 0), "%s: as a boolean",
           value);
    }
}

static void test_missing(void)
{
    g_autoptr(JsonObject) object = parse("{}");
    GError *error = NULL;
    uint64_t size;

    bool got = pba_json_string(object, "node-name", &error) != NULL;
    check_refused(got, g_steal_pointer(&error), "node-name", "missing string");
    got = pba_json_size(object, "size", &size, &error);
    check_refused(got, g_steal_pointer(&error), "size", "missing size");
    got = pba_json_object(object, "qemu", &error) != NULL;
    check_refused(got, g_steal_pointer(&error), "qemu", "missing object");
    ok(!pba_json_find_string(object, "k") && !pba_json_find_bool(object, "k") &&
           !pba_json_find_array(object, "k") && !pba_json_find_object(object, "k"),
       "nothing is found");
    ok(!pba_json_string(object, "k", NULL), "an error nobody wants to see");
}

static void test_sizes(void)
{
    static const struct {
        const char *text;
        bool valid;
        uint64_t size;
    } sizes[] = {
        {"0", true, 0},
        {"1", true, 1},
        {"4294967296", true, UINT64_C(1) << 32},
        {"9007199254740993", true, UINT64_C(9007199254740993)},
        {"9223372036854775806", true, INT64_MAX - 1},
        {"9223372036854775807", false, 0},
        {"9223372036854775808", false, 0},
        {"18446744073709551615", false, 0},
        {"18446744073709551616", false, 0},
        {"99999999999999999999999", false, 0},
        {"-1", false, 0},
        {"-9223372036854775808", false, 0},
        {"1e3", false, 0},
        {"1.0", false, 0},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(sizes); i++) {
        g_autofree char *text = g_strdup_printf("{\"size\": %s}", sizes[i].text);
        g_autoptr(JsonObject) object = parse(text);
        uint64_t size = 4711;
        bool got = pba_json_size(object, "size", &size, NULL);
        ok(got == sizes[i].valid && size == (got ? sizes[i].size : 4711), "size %s", sizes[i].text);
    }
}

static void test_good(void)
{
    g_autoptr(JsonObject) object =
        parse("{\"s\": \"\\u00fc\\n%n\", \"b\": true, \"a\": [1, {\"k\": 2}], \"o\": {\"k\": 3}}");
    GError *error = NULL;
    uint64_t size;

    is_text(pba_json_string(object, "s", &error), "\xc3\xbc\n%n", "string");
    ok(pba_json_find_bool(object, "b"), "boolean");
    JsonArray *array = pba_json_find_array(object, "a");
    is_number(json_array_get_length(array), 2, "array");
    ok(!pba_json_element(array, 0), "an element that is no object");
    ok(pba_json_size(pba_json_element(array, 1), "k", &size, &error) && size == 2,
       "an element that is one");
    ok(pba_json_size(pba_json_object(object, "o", &error), "k", &size, &error) && size == 3,
       "object");
    ok(!error, "no error");
}

static void test_make(void)
{
    g_autoptr(JsonNode) node =
        pba_json("{'s': <%s>, 'n': <%t>, 'i': <%x>, 'b': <%b>, 'o': <{'k': <'v'>}>, 'a': <[<1>]>}",
                 "a\"b\\c{}%n\n", UINT64_C(1) << 40, (gint64)-1, TRUE);
    g_autofree char *text = json_to_string(node, FALSE);
    g_autoptr(JsonObject) object = parse(text);
    uint64_t size;

    is_text(pba_json_find_string(object, "s"), "a\"b\\c{}%n\n", "any text");
    ok(pba_json_size(object, "n", &size, NULL) && size == UINT64_C(1) << 40, "a big number");
    is_number(json_object_get_int_member(object, "i"), -1, "a negative one");
    ok(pba_json_find_bool(object, "b"), "boolean");
    is_text(pba_json_find_string(pba_json_find_object(object, "o"), "k"), "v", "object");
    is_number(json_array_get_length(pba_json_find_array(object, "a")), 1, "array");

    JsonArray *array = json_array_new();
    json_array_add_element(array, pba_json("%s", "x"));
    g_autoptr(JsonNode) wrapped = pba_json_wrap_array("list", array);
    g_autofree char *wrapped_text = json_to_string(wrapped, FALSE);
    is_text(wrapped_text, "{\"list\":[\"x\"]}", "an array in an object");
}

/* The caller's transport, for the three ways to run a command. */

typedef struct {
    const char *reply; /* JSON; NULL: an error */
    char *arguments;
} Transport;

static JsonNode *transport(void *opaque, const char *command, JsonNode *arguments, GError **error)
{
    Transport *self = opaque;
    g_free(self->arguments);
    self->arguments = json_to_string(arguments, FALSE);
    if (!self->reply) {
        g_set_error(error, PBA_ERROR, PBA_ERROR_QMP, "no %s here", command);
        return NULL;
    }
    return json_from_string(self->reply, NULL);
}

static void test_queries(void)
{
    Transport self = {0};
    g_autoptr(PbaQmp) qmp = pba_qmp_new_transport(transport, &self, NULL);
    static const char *const values[] = {"{}", "[]", "null", "1", "\"x\"", "true", "1.5"};

    for (size_t i = 0; i < G_N_ELEMENTS(values); i++) {
        g_autoptr(GError) error = NULL;
        self.reply = values[i];
        g_autoptr(JsonArray) array = pba_qmp_query_array(qmp, "query-x", NULL, &error);
        ok((array != NULL) == (values[i][0] == '['), "%s as an array", values[i]);
        ok(array || g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "error's code");
        ok(array || g_str_has_prefix(error->message, "qmp command 'query-x' failed - "),
           "error names the command");
        g_clear_error(&error);
        g_autoptr(JsonObject) object =
            pba_qmp_query_object(qmp, "query-x", pba_json("{'k': <1>}"), &error);
        ok((object != NULL) == (values[i][0] == '{'), "%s as an object", values[i]);
        ok(object || g_error_matches(error, PBA_ERROR, PBA_ERROR_PROTOCOL), "error's code");
        is_text(self.arguments, "{\"k\":1}", "arguments");
        g_clear_error(&error);
        ok(pba_qmp_run(qmp, "stop", NULL, &error) && !error, "%s where nothing is wanted",
           values[i]);
        is_text(self.arguments, "{}", "no arguments");
    }
    g_autoptr(GError) error = NULL;
    self.reply = NULL;
    ok(!pba_qmp_run(qmp, "stop", NULL, &error), "an error");
    is_text(error->message, "qmp command 'stop' failed - no stop here", "its message");
    g_free(self.arguments);
}

int main(void)
{
    test_wrong_types();
    test_missing();
    test_sizes();
    test_good();
    test_make();
    test_queries();
    return done_testing();
}
