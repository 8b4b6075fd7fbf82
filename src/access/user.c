/* Whose process QEMU is. It opens the fleecing images and makes the NBD socket, in directories of
 * the user that backs up. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char *read_proc(pid_t pid, const char *name)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/%s", (int)pid, name);
    char *text = NULL;

    return g_file_get_contents(path, &text, NULL, NULL) ? text : NULL;
}

/* Who listens at the QMP socket may be another process, as with libvirt, or have another user by
 * now, as with -runas: the process' name and effective user say. */
static bool find_user(pid_t pid, unsigned *uid, unsigned *gid)
{
    g_autofree char *name = pid > 0 ? read_proc(pid, "comm") : NULL;
    g_autofree char *status = name ? read_proc(pid, "status") : NULL;
    const char *line = status ? strstr(status, "\nUid:") : NULL;
    bool is_qemu = name && (strstr(name, "qemu") || strstr(name, "kvm"));

    return is_qemu && line && sscanf(line, "\nUid: %*u %u %*u %*u Gid: %*u %u", uid, gid) == 2;
}

void pba_user_note(PbaAccess *access)
{
    unsigned uid, gid;

    access->has_qemu_user =
        geteuid() == 0 && find_user(pba_qmp_peer(access->qmp), &uid, &gid) && uid != 0;
    if (access->has_qemu_user) {
        access->qemu_uid = uid;
        access->qemu_gid = gid;
    }
}

bool pba_user_give_file(const PbaAccess *access, int fd)
{
    return !access->has_qemu_user || fchown(fd, access->qemu_uid, access->qemu_gid) == 0;
}

/* QEMU's group may add something and use it by its name, and neither list nor, for the sticky bit,
 * remove or rename what is root's. All others may go through the directory above only. */
bool pba_user_open_dir(const PbaAccess *access, const char *dir)
{
    g_autofree char *above = g_path_get_dirname(dir);
    struct stat status;

    return !access->has_qemu_user ||
           (stat(above, &status) == 0 && chmod(above, (status.st_mode & 07777) | 0111) == 0 &&
            chown(dir, 0, access->qemu_gid) == 0 && chmod(dir, 01730) == 0);
}

void pba_user_add_hint(const PbaAccess *access, GError **error)
{
    unsigned uid, gid;

    if (!strstr((*error)->message, "Permission denied")) {
        return;
    }
    if (!find_user(pba_qmp_peer(access->qmp), &uid, &gid)) {
        pba_error_add_hint(error, "QEMU's user must be able to use run-dir and fleecing-dir: back "
                                  "up as that user");
        return;
    }
    if (uid == geteuid()) {
        return;
    }
    const struct passwd *user = getpwuid(uid);
    g_autofree char *hint = g_strdup_printf(
        "QEMU runs as user '%s' (%u), and this program as %u: give a run-dir and a fleecing-dir "
        "that user can go through%s",
        user ? user->pw_name : "?", uid, (unsigned)geteuid(),
        geteuid() == 0 ? "" : ", and back up as that user, or as root");
    pba_error_add_hint(error, hint);
}
