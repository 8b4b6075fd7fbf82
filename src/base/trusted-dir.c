/* Directories in which only root and this user can replace or rename entries. */
#include "base.h"
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* In a directory that others may write to, the sticky bit prevents them from renaming the entries
 * of other users. */
static bool is_trusted(const char *path)
{
    struct stat status;

    return lstat(path, &status) == 0 && S_ISDIR(status.st_mode) &&
           (status.st_uid == 0 || status.st_uid == geteuid()) &&
           (!(status.st_mode & 022) || status.st_mode & S_ISVTX);
}

char *pba_trusted_dir(const char *what, const char *path, GError **error)
{
    char resolved[PATH_MAX];

    if (!realpath(path, resolved)) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot use %s '%s' - %s", what, path,
                      g_strerror(errno));
        return NULL;
    }
    g_autofree char *at = g_strdup(resolved);
    while (is_trusted(at)) {
        if (strcmp(at, "/") == 0) {
            return g_strdup(resolved);
        }
        char *above = g_path_get_dirname(at);
        g_free(at);
        at = above;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM,
                  "%s '%s' is not safe - users other than root and this user may change what is in "
                  "'%s': forbid "
                  "that, or give another directory",
                  what, path, at);
    return NULL;
}
