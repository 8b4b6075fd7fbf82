/* The private directory of an access. */
#include "access.h"
#include "error.h"
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET_NAME "nbd.sock"

static char *default_run_dir(void)
{
    if (geteuid() == 0) {
        return g_strdup("/run/pve-backup-access");
    }
    const char *runtime_dir = g_getenv("XDG_RUNTIME_DIR");
    if (runtime_dir && g_path_is_absolute(runtime_dir)) {
        return g_build_filename(runtime_dir, "pve-backup-access", NULL);
    }
    return g_strdup_printf("/tmp/pve-backup-access-%u", (unsigned)geteuid());
}

static bool set_system_error(GError **error, const char *what, const char *path)
{
    pba_error_set(error, PBA_ERROR_SYSTEM, "cannot %s run directory '%s' - %s", what, path,
                  g_strerror(errno));
    return false;
}

/* Makes or takes the directory. One that exists must be the caller's own and closed to writers other
 * than him, or else its content could be swapped under us. */
static bool ensure_private_dir(const char *path, GError **error)
{
    struct stat status;

    if (mkdir(path, 0700) != 0 && errno != EEXIST) {
        return set_system_error(error, "make", path);
    }
    if (lstat(path, &status) != 0) {
        return set_system_error(error, "look at", path);
    }
    if (!S_ISDIR(status.st_mode) || status.st_uid != geteuid() || (status.st_mode & 022)) {
        pba_error_set(error, PBA_ERROR_SYSTEM,
                      "run directory '%s' is not a directory of this user that only he may write to",
                      path);
        return false;
    }
    return true;
}

static bool socket_path_fits(const char *path, GError **error)
{
    struct sockaddr_un address;
    if (strlen(path) < sizeof(address.sun_path)) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_ARGUMENT,
                  "NBD socket path '%s' is longer than %zu bytes - give a shorter 'run-dir'", path,
                  sizeof(address.sun_path) - 1);
    return false;
}

bool pba_run_dir_make(PbaAccess *access, GError **error)
{
    g_autofree char *parent = access->run_dir ? g_strdup(access->run_dir) : default_run_dir();
    g_autofree char *name = pba_own_name(access, "run", access->identity);
    g_autofree char *path = g_strdup_printf("%s/%s-XXXXXX", parent, name);
    g_autofree char *longest = g_build_filename(path, SOCKET_NAME, NULL);

    if (!socket_path_fits(longest, error) || !ensure_private_dir(parent, error)) {
        return false;
    }
    /* One of its own for each access: a socket is never taken over. */
    if (!g_mkdtemp_full(path, 0700)) {
        return set_system_error(error, "make", path);
    }
    access->socket = g_build_filename(path, SOCKET_NAME, NULL);
    access->socket_dir = g_steal_pointer(&path);
    return true;
}

void pba_run_dir_remove(PbaAccess *access)
{
    if (access->socket_dir) {
        unlink(access->socket);
        rmdir(access->socket_dir);
    }
    g_clear_pointer(&access->socket_dir, g_free);
    g_clear_pointer(&access->socket, g_free);
}
