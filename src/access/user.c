/* Whose process QEMU is. It opens the fleecing images and makes the NBD socket, in directories of
 * the user that backs up. */
#include "access.h"
#include "src/base/base.h"
#include "src/qmp/qmp.h"
#include <pwd.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char *read_proc(pid_t pid, const char *name)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/%s", (int)pid, name);
    char *text = NULL;

    return g_file_get_contents(path, &text, NULL, NULL) ? text : NULL;
}

/* Who listens at the QMP socket may be another process, as with libvirt, or have another user by
 * now, as with -runas: the process' name and effective user say. */
static bool find_user(pid_t pid, unsigned *uid)
{
    g_autofree char *name = pid > 0 ? read_proc(pid, "comm") : NULL;
    g_autofree char *status = name ? read_proc(pid, "status") : NULL;
    const char *line = status ? strstr(status, "\nUid:") : NULL;
    bool is_qemu = name && (strstr(name, "qemu") || strstr(name, "kvm"));

    return is_qemu && line && sscanf(line, "\nUid: %*u %u", uid) == 1;
}

void pba_user_add_hint(const PbaAccess *access, GError **error)
{
    unsigned uid;

    if (!strstr((*error)->message, "Permission denied")) {
        return;
    }
    if (!find_user(pba_qmp_peer(access->qmp), &uid)) {
        pba_error_add_hint(error, "QEMU's user must be able to use run-dir and fleecing-dir: back "
                                  "up as that user");
        return;
    }
    if (uid == geteuid()) {
        return;
    }
    const struct passwd *user = getpwuid(uid);
    g_autofree char *hint = g_strdup_printf(
        "QEMU runs as user '%s' (%u), and this program as %u: back up as that user, with a run-dir "
        "and a fleecing-dir that belong to it",
        user ? user->pw_name : "?", uid, (unsigned)geteuid());
    pba_error_add_hint(error, hint);
}
