/* Which NBD URIs are taken. libnbd's newer versions know some that run programs (nbd+ssh), and
 * others may come: only what is known to be a connection, and nothing else, is. */
#include "src/base/base.h"
#include "volume.h"
#include <string.h>

static const char *const schemes[] = {"nbd",       "nbd+unix",   "nbd+vsock", "nbds",
                                      "nbds+unix", "nbds+vsock", NULL};
static const char *const parameters[] = {"socket", NULL};
/* Keys and certificates that a URI names are the caller's own. */
static const char *const tls_parameters[] = {"tls-certificates", "tls-hostname",    "tls-psk-file",
                                             "tls-username",     "tls-verify-peer", NULL};

static size_t scheme_length(const char *path)
{
    return strspn(path, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+.-");
}

bool pba_uri_is(const char *path)
{
    return g_ascii_isalpha(*path) && g_str_has_prefix(path + scheme_length(path), "://");
}

bool pba_uri_is_tls(const char *uri)
{
    return g_str_has_prefix(uri, "nbds");
}

bool pba_uri_is_tcp(const char *uri)
{
    return g_str_has_prefix(uri, "nbd://") || g_str_has_prefix(uri, "nbds://");
}

static bool check_parameter(const char *parameter, bool is_tls, GError **error)
{
    g_autofree char *name = g_strndup(parameter, strcspn(parameter, "="));

    if (!*name || g_strv_contains(parameters, name) ||
        (is_tls && g_strv_contains(tls_parameters, name))) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "the NBD URI has the parameter '%s' - 'socket' can be given, and with nbds: "
                  "'tls-certificates', 'tls-hostname', 'tls-psk-file', 'tls-username' and "
                  "'tls-verify-peer'",
                  name);
    return false;
}

static bool check_parameters(const char *uri, GError **error)
{
    g_autofree char *text = g_strndup(uri, strcspn(uri, "#"));
    const char *query = strchr(text, '?');
    g_auto(GStrv) list = g_strsplit_set(query ? query + 1 : "", "&;", -1);

    for (char **parameter = list; *parameter; parameter++) {
        if (!check_parameter(*parameter, pba_uri_is_tls(uri), error)) {
            return false;
        }
    }
    return true;
}

bool pba_uri_check(const char *uri, GError **error)
{
    g_autofree char *scheme = g_strndup(uri, scheme_length(uri));

    if (!g_strv_contains(schemes, scheme)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "a URI that begins with '%s:' is not taken - use nbd: or nbds: (TCP), "
                      "nbd+unix: or nbds+unix:, nbd+vsock: or nbds+vsock:",
                      scheme);
        return false;
    }
    return check_parameters(uri, error);
}
