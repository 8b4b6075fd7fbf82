/* error.c: an error is one line that begins with our own text; a peer's text is never a format. */
#include "src/base/base.h"
#include "tap.h"
#include <string.h>

typedef struct {
    unsigned count;
    PbaLogLevel level;
    char *message;
} Logged;

static void note_log(void *opaque, PbaLogLevel level, const char *message)
{
    Logged *logged = opaque;
    logged->count++;
    logged->level = level;
    g_free(logged->message);
    logged->message = g_strdup(message);
}

static void test_prefixes(void)
{
    g_autoptr(GError) error = NULL;

    pba_error_set_qmp(&error, "blockdev-add", "DeviceNotFound", "no such node");
    is_text(error->message, "qmp command 'blockdev-add' failed - no such node", "with its command");
    is_text(pba_error_command(error), "blockdev-add", "the command");
    is_text(pba_error_device(error), NULL, "no device");
    pba_error_add_device(&error, "drive-scsi0");
    is_text(error->message, "device drive-scsi0: qmp command 'blockdev-add' failed - no such node",
            "the device comes first");
    pba_error_add_command(&error, "another");
    pba_error_add_device(&error, "another");
    is_text(error->message, "device drive-scsi0: qmp command 'blockdev-add' failed - no such node",
            "each is noted once");
    is_text(pba_error_command(error), "blockdev-add", "the command stays");
    is_text(pba_error_device(error), "drive-scsi0", "the device stays");
    is_text(pba_error_class(error), "DeviceNotFound", "QEMU's class");
    is_number(error->code, PBA_ERROR_QMP, "code");
}

static void test_copy(void)
{
    g_autoptr(GError) error = NULL;

    pba_error_set_qmp(&error, "stop", "GenericError", "text");
    pba_error_add_device(&error, "d");
    g_autoptr(GError) copy = g_error_copy(error);
    g_clear_error(&error);
    is_text(copy->message, "device d: qmp command 'stop' failed - text", "a copy's message");
    is_text(pba_error_class(copy), "GenericError", "a copy's class");
    is_text(pba_error_command(copy), "stop", "a copy's command");
    is_text(pba_error_device(copy), "d", "a copy's device");
}

static void test_classes(void)
{
    static const struct {
        PbaErrorCode code;
        const char *klass;
        bool fatal;
    } codes[] = {
        {PBA_ERROR_ARGUMENT, "ArgumentError", false},
        {PBA_ERROR_STATE, "StateError", false},
        {PBA_ERROR_UNSUPPORTED, "UnsupportedError", false},
        {PBA_ERROR_QMP, "GenericError", false},
        {PBA_ERROR_CONNECTION, "ConnectionError", true},
        {PBA_ERROR_TIMEOUT, "TimeoutError", true},
        {PBA_ERROR_PROTOCOL, "ProtocolError", true},
        {PBA_ERROR_INTERRUPTED, "InterruptedError", true},
        {PBA_ERROR_NBD, "NbdError", false},
        {PBA_ERROR_INCOMPLETE, "IncompleteError", false},
        {PBA_ERROR_SYSTEM, "SystemError", false},
        {PBA_ERROR_CONTENT, "ContentError", false},
    };
    for (size_t i = 0; i < G_N_ELEMENTS(codes); i++) {
        g_autoptr(GError) error = NULL;
        pba_error_set(&error, codes[i].code, "number %zu", i);
        is_text(pba_error_class(error), codes[i].klass, "class of code %d", codes[i].code);
        ok(pba_error_is_fatal(error) == codes[i].fatal, "whether it is fatal");
        is_text(pba_error_command(error), NULL, "no command");
    }
    ok(!pba_error_is_fatal(NULL), "no error is not fatal");
    g_autoptr(GError) foreign = g_error_new_literal(g_quark_from_static_string("test"), 5, "text");
    ok(!pba_error_is_fatal(foreign), "another library's error is not fatal");
    is_text(pba_error_class(foreign), "SystemError", "its class");
    is_text(pba_error_command(foreign), NULL, "its command");
    is_text(pba_error_device(foreign), NULL, "its device");
    pba_error_add_device(&foreign, "d");
    is_text(foreign->message, "text", "it is left alone");
}

static bool is_one_line(const char *text)
{
    for (const char *c = text; *c; c++) {
        if (g_ascii_iscntrl(*c)) {
            return false;
        }
    }
    return g_utf8_validate(text, -1, NULL);
}

static void test_peers_text(void)
{
    static const char *const texts[] = {
        "%s%s%s%n%n",
        "100%",
        "%*.*f %5$s",
        "two\nlines\r\n",
        "\033[31mred\033[0m \a\b\f\v",
        "not \xff\xfe UTF-8",
        "cut \xe2\x82",
        "\n\n\n",
        "",
    };
    for (size_t i = 0; i < G_N_ELEMENTS(texts); i++) {
        g_autoptr(GError) error = NULL;
        pba_error_set_qmp(&error, "stop", texts[i], texts[i]);
        pba_error_add_device(&error, "drive-scsi0");
        ok(is_one_line(error->message), "text %zu: one line of UTF-8", i);
        ok(is_one_line(pba_error_class(error)), "text %zu: its class, too", i);
        g_autofree char *line = pba_line("node '%s'", texts[i]);
        ok(is_one_line(line) && g_str_has_prefix(line, "node '"), "text %zu: a line with it", i);
        ok(g_str_has_prefix(error->message, "device drive-scsi0: qmp command 'stop' failed - "),
           "text %zu: our words are in front", i);
    }
    g_autoptr(GError) error = NULL;
    pba_error_set_qmp(&error, "stop", "GenericError", "%s%n 100% \t done \n");
    is_text(error->message, "qmp command 'stop' failed - %s%n 100%   done", "directives are text");
    pba_error_set_qmp(NULL, "stop", "GenericError", "%n");
    ok(true, "an error nobody wants to see");
}

static void test_our_prefix_is_no_format(void)
{
    g_autoptr(GError) error = NULL;

    pba_error_set(&error, PBA_ERROR_STATE, "%s", "%n");
    pba_error_add_command(&error, "%s-command-%n");
    pba_error_add_device(&error, "%s-device-%n");
    is_text(error->message, "device %s-device-%n: qmp command '%s-command-%n' failed - %n",
            "names with directives");
}

static void test_keep_first(void)
{
    Logged logged = {0};
    PbaHooks hooks = {.log = note_log, .opaque = &logged};
    GError *first = NULL;
    GError *step = NULL;

    pba_error_keep_first(&first, NULL, &hooks);
    ok(!first && logged.count == 0, "no error, nothing kept");
    pba_error_set(&step, PBA_ERROR_STATE, "one");
    pba_error_keep_first(&first, g_steal_pointer(&step), &hooks);
    is_text(first->message, "one", "the first is kept");
    is_number(logged.count, 0, "and not logged");
    pba_error_set(&step, PBA_ERROR_STATE, "two %%s%%n");
    pba_error_keep_first(&first, g_steal_pointer(&step), &hooks);
    is_text(first->message, "one", "the second does not replace it");
    is_text(logged.message, "two %s%n", "but is logged");
    is_number(logged.level, PBA_LOG_WARN, "as a warning");
    pba_error_set(&step, PBA_ERROR_STATE, "three");
    pba_error_keep_first(NULL, g_steal_pointer(&step), &hooks);
    is_text(logged.message, "three", "nowhere to keep it: logged");
    pba_error_set(&step, PBA_ERROR_STATE, "four");
    pba_error_keep_first(&first, g_steal_pointer(&step), NULL);
    is_text(first->message, "one", "without hooks");
    g_clear_error(&first);
    g_free(logged.message);
}

static void test_log(void)
{
    Logged logged = {0};
    PbaHooks hooks = {.log = note_log, .opaque = &logged};

    pba_log(&hooks, PBA_LOG_INFO, "%s", "a\nb\xff%n");
    ok(is_one_line(logged.message), "one line of UTF-8");
    ok(g_str_has_prefix(logged.message, "a b"), "the text");
    is_number(logged.level, PBA_LOG_INFO, "level");
    hooks.log = NULL;
    pba_log(&hooks, PBA_LOG_INFO, "nobody listens");
    pba_log(NULL, PBA_LOG_INFO, "nobody listens");
    is_number(logged.count, 1, "without a hook nothing happens");
    g_free(logged.message);
}

int main(void)
{
    test_prefixes();
    test_copy();
    test_classes();
    test_peers_text();
    test_our_prefix_is_no_format();
    test_keep_first();
    test_log();
    return done_testing();
}
