/* The private directory of an access. */
#include "access.h"
#include "error.h"
#include <errno.h>
#include <fcntl.h>
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

/* Makes or takes a directory at name below parent. One that exists must be the caller's own and
 * closed to writers other than him, or else its content could be swapped under us. */
static int open_private_dir(int parent, const char *name, const char *path, GError **error)
{
    struct stat status;

    if (mkdirat(parent, name, 0700) != 0 && errno != EEXIST) {
        set_system_error(error, "make", path);
        return -1;
    }
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) != 0) {
        set_system_error(error, "open", path);
        if (fd >= 0) {
            close(fd);
        }
        return -1;
    }
    if (status.st_uid != geteuid() || (status.st_mode & 022)) {
        pba_error_set(error, PBA_ERROR_SYSTEM,
                      "run directory '%s' belongs to another user or others may write to it", path);
        close(fd);
        return -1;
    }
    return fd;
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
    g_autofree char *path = g_build_filename(parent, name, NULL);
    g_autofree char *socket = g_build_filename(path, SOCKET_NAME, NULL);

    if (!socket_path_fits(socket, error)) {
        return false;
    }
    int parent_fd = open_private_dir(AT_FDCWD, parent, parent, error);
    if (parent_fd < 0) {
        return false;
    }
    int fd = open_private_dir(parent_fd, name, path, error);
    close(parent_fd);
    if (fd < 0) {
        return false;
    }
    bool closed = fchmod(fd, 0700) == 0 || set_system_error(error, "close", path);
    close(fd);
    if (closed) {
        access->socket_dir = g_steal_pointer(&path);
        access->socket = g_steal_pointer(&socket);
    }
    return closed;
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
