#include "base.h"

typedef struct {
    char *klass;
    char *command;
    char *device;
} PbaErrorPrivate;

static void pba_error_private_init(PbaErrorPrivate *priv)
{
    *priv = (PbaErrorPrivate){0};
}

static void pba_error_private_copy(const PbaErrorPrivate *source, PbaErrorPrivate *target)
{
    target->klass = g_strdup(source->klass);
    target->command = g_strdup(source->command);
    target->device = g_strdup(source->device);
}

static void pba_error_private_clear(PbaErrorPrivate *priv)
{
    g_free(priv->klass);
    g_free(priv->command);
    g_free(priv->device);
}

G_DEFINE_EXTENDED_ERROR(PbaError, pba_error)

static const char *const code_classes[] = {
    [PBA_ERROR_ARGUMENT] = "ArgumentError",
    [PBA_ERROR_STATE] = "StateError",
    [PBA_ERROR_UNSUPPORTED] = "UnsupportedError",
    [PBA_ERROR_QMP] = "GenericError",
    [PBA_ERROR_CONNECTION] = "ConnectionError",
    [PBA_ERROR_TIMEOUT] = "TimeoutError",
    [PBA_ERROR_PROTOCOL] = "ProtocolError",
    [PBA_ERROR_INTERRUPTED] = "InterruptedError",
    [PBA_ERROR_NBD] = "NbdError",
    [PBA_ERROR_INCOMPLETE] = "IncompleteError",
    [PBA_ERROR_SYSTEM] = "SystemError",
    [PBA_ERROR_CONTENT] = "ContentError",
};

/* Peers' text goes into one-line messages: valid UTF-8, no control characters. */
static char *clean_text(const char *text)
{
    char *clean = g_utf8_make_valid(text, -1);
    for (char *c = clean; *c; c++) {
        if (g_ascii_iscntrl(*c)) {
            *c = ' ';
        }
    }
    return g_strchomp(clean);
}

static char *line_of(const char *format, va_list args)
{
    g_autofree char *raw = g_strdup_vprintf(format, args);
    return clean_text(raw);
}

char *pba_line(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    char *line = line_of(format, args);
    va_end(args);
    return line;
}

void pba_error_set(GError **error, PbaErrorCode code, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    g_autofree char *message = line_of(format, args);
    va_end(args);
    g_set_error_literal(error, PBA_ERROR, code, message);
}

void pba_error_set_qmp(GError **error, const char *command, const char *klass,
                       const char *description)
{
    if (!error) {
        return;
    }
    pba_error_set(error, PBA_ERROR_QMP, "%s", description);
    PbaErrorPrivate *priv = pba_error_get_private(*error);
    g_autofree char *clean = clean_text(klass);
    priv->klass = *clean ? g_steal_pointer(&clean) : NULL;
    pba_error_add_command(error, command);
}

void pba_error_add_command(GError **error, const char *command)
{
    if (!error || !*error || (*error)->domain != PBA_ERROR) {
        return;
    }
    PbaErrorPrivate *priv = pba_error_get_private(*error);
    if (!priv->command) {
        priv->command = g_strdup(command);
        g_autofree char *clean = clean_text(command);
        g_prefix_error(error, "qmp command '%s' failed - ", clean);
    }
}

void pba_error_add_device(GError **error, const char *device)
{
    if (!error || !*error || (*error)->domain != PBA_ERROR) {
        return;
    }
    PbaErrorPrivate *priv = pba_error_get_private(*error);
    if (!priv->device) {
        priv->device = g_strdup(device);
        g_autofree char *clean = clean_text(device);
        g_prefix_error(error, "device %s: ", clean);
    }
}

void pba_error_add_hint(GError **error, const char *hint)
{
    if (error && *error) {
        char *message = g_strconcat((*error)->message, " - ", hint, NULL);
        g_free((*error)->message);
        (*error)->message = message;
    }
}

void pba_error_keep_first(GError **first, GError *step, const PbaHooks *hooks)
{
    if (!step) {
        return;
    }
    if (first && !*first) {
        *first = step;
        return;
    }
    pba_log(hooks, PBA_LOG_WARN, "%s", step->message);
    g_error_free(step);
}

bool pba_error_is_fatal(const GError *error)
{
    return error && error->domain == PBA_ERROR &&
           (error->code == PBA_ERROR_CONNECTION || error->code == PBA_ERROR_TIMEOUT ||
            error->code == PBA_ERROR_PROTOCOL || error->code == PBA_ERROR_INTERRUPTED);
}

const char *pba_error_class(GError *error)
{
    if (error->domain != PBA_ERROR) {
        return "SystemError";
    }
    const PbaErrorPrivate *priv = pba_error_get_private(error);
    return priv->klass ? priv->klass : code_classes[error->code];
}

const char *pba_error_command(GError *error)
{
    return error->domain == PBA_ERROR ? ((PbaErrorPrivate *)pba_error_get_private(error))->command
                                      : NULL;
}

const char *pba_error_device(GError *error)
{
    return error->domain == PBA_ERROR ? ((PbaErrorPrivate *)pba_error_get_private(error))->device
                                      : NULL;
}

void pba_log(const PbaHooks *hooks, PbaLogLevel level, const char *format, ...)
{
    if (!hooks || !hooks->log) {
        return;
    }
    va_list args;
    va_start(args, format);
    g_autofree char *message = line_of(format, args);
    va_end(args);
    hooks->log(hooks->opaque, level, message);
}
