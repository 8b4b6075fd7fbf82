/* Which NBD URIs are accepted. Newer versions of libnbd support some that run programs (nbd+ssh),
 * and others may follow, so only known kinds of connections are accepted. */
#include "src/base/base.h"
#include "volume.h"
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>

/* The size limit for a list of keys or certificates: libnbd reads files of any size into memory. */
#define MAX_FILE (INT64_C(16) << 20)

static const char *const schemes[] = {"nbd",       "nbd+unix",   "nbd+vsock", "nbds",
                                      "nbds+unix", "nbds+vsock", NULL};
static const char *const parameters[] = {"socket", NULL};
/* Keys and certificates in a URI must belong to the caller. */
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

/* A host's name is looked up, or files are read. */
bool pba_uri_may_block(const char *uri)
{
    return g_str_has_prefix(uri, "nbd://") || pba_uri_is_tls(uri);
}

/* Strings: name=value. */
static char **parameters_of(const char *uri)
{
    g_autofree char *text = g_strndup(uri, strcspn(uri, "#"));
    const char *query = strchr(text, '?');

    return g_strsplit_set(query ? query + 1 : "", "&;", -1);
}

static bool check_parameter(const char *parameter, bool is_tls, GError **error)
{
    g_autofree char *name = g_strndup(parameter, strcspn(parameter, "="));

    if (!*name || g_strv_contains(parameters, name) ||
        (is_tls && g_strv_contains(tls_parameters, name))) {
        return true;
    }
    pba_error_set(
        error, PBA_ERROR_ARGUMENT,
        "the NBD URI has the parameter '%s', which is not supported - use 'socket', and with nbds: "
        "'tls-certificates', 'tls-hostname', 'tls-psk-file', 'tls-username' and 'tls-verify-peer'",
        name);
    return false;
}

static bool check_parameters(const char *uri, GError **error)
{
    g_auto(GStrv) list = parameters_of(uri);

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
                      "a URI that begins with '%s:' is not supported - use nbd: or nbds: (TCP), "
                      "nbd+unix: or nbds+unix:, nbd+vsock: or nbds+vsock:",
                      scheme);
        return false;
    }
    return check_parameters(uri, error);
}

/* If the file does not exist, libnbd reports this. */
static bool check_file(const char *path, GError **error)
{
    struct stat about;

    if (stat(path, &about) != 0) {
        return true;
    }
    if (!S_ISREG(about.st_mode)) {
        pba_error_set(
            error, PBA_ERROR_ARGUMENT,
            "'%s' is not a regular file - keys and certificates for TLS must be regular files",
            path);
        return false;
    }
    if (about.st_size > MAX_FILE) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "'%s' has %" PRIi64
                      " bytes - a key or certificate for TLS may have at most %" PRIi64,
                      path, (int64_t)about.st_size, MAX_FILE);
        return false;
    }
    return true;
}

/* The files that libnbd looks for (nbd_set_tls_certificates(3)). */
static bool check_certificates(const char *dir, GError **error)
{
    static const char *const names[] = {"ca-cert.pem", "ca-crl.pem", "client-cert.pem",
                                        "client-key.pem"};

    for (size_t i = 0; i < G_N_ELEMENTS(names); i++) {
        g_autofree char *path = g_build_filename(dir, names[i], NULL);
        if (!check_file(path, error)) {
            return false;
        }
    }
    return true;
}

bool pba_uri_check_files(const char *uri, GError **error)
{
    g_auto(GStrv) list = parameters_of(uri);
    bool good = true;

    for (char **parameter = list; *parameter && good; parameter++) {
        const char *value = strchr(*parameter, '=');
        g_autofree char *path = g_uri_unescape_string(value ? value + 1 : "", NULL);
        if (path && g_str_has_prefix(*parameter, "tls-psk-file=")) {
            good = check_file(path, error);
        } else if (path && g_str_has_prefix(*parameter, "tls-certificates=")) {
            good = check_certificates(path, error);
        }
    }
    return good;
}
