/* The user that QEMU runs as. QEMU opens the fleecing images and creates the NBD socket, in
 * directories of the user that backs up. */
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

/* The listener of the QMP socket may be another process, as with libvirt, or may have another user
 * by now, as with -runas. So the process' name and effective user are checked. */
static bool find_user(pid_t pid, unsigned *uid, unsigned *gid)
{
    g_autofree char *name = pid > 0 ? read_proc(pid, "comm") : NULL;
    g_autofree char *status = name ? read_proc(pid, "status") : NULL;
    const char *line = status ? strstr(status, "\nUid:") : NULL;
    bool is_qemu = name && (strstr(name, "qemu") || strstr(name, "kvm"));

    return is_qemu && line && sscanf(line, "\nUid: %*u %u %*u %*u Gid: %*u %u", uid, gid) == 2;
}

char *pba_user_run_path(const PbaAccess *access, const char *path)
{
    g_autofree char *dir = g_path_get_basename(access->socket_dir);
    g_autofree char *name = g_path_get_basename(path);

    return access->options.qemu_run_dir
               ? g_build_filename(access->options.qemu_run_dir, dir, name, NULL)
               : g_strdup(path);
}

char *pba_user_fleecing_path(const PbaAccess *access, const char *path)
{
    g_autofree char *name = g_path_get_basename(path);

    return access->options.qemu_fleecing_dir
               ? g_build_filename(access->options.qemu_fleecing_dir, name, NULL)
               : g_strdup(path);
}

void pba_user_note(PbaAccess *access)
{
    unsigned uid = access->options.qemu_uid;
    unsigned gid = access->options.qemu_gid;

    access->has_qemu_user =
        geteuid() == 0 &&
        (access->options.has_qemu_user || find_user(pba_qmp_peer(access->qmp), &uid, &gid)) &&
        uid != 0;
    if (access->has_qemu_user) {
        access->qemu_uid = uid;
        access->qemu_gid = gid;
    }
}

bool pba_user_give_file(const PbaAccess *access, int fd)
{
    return !access->has_qemu_user || fchown(fd, access->qemu_uid, access->qemu_gid) == 0;
}

/* QEMU's group may add files and use them by name, but cannot list the directory or, because of the
 * sticky bit, remove or rename root's files. All other users can only enter the directory above. */
bool pba_user_open_dir(const PbaAccess *access, const char *dir)
{
    g_autofree char *above = g_path_get_dirname(dir);
    struct stat status;

    return !access->has_qemu_user ||
           (stat(above, &status) == 0 && chmod(above, (status.st_mode & 07777) | 0111) == 0 &&
            chown(dir, 0, access->qemu_gid) == 0 && chmod(dir, 01730) == 0);
}

static char *name_of(unsigned uid)
{
    const struct passwd *user = getpwuid(uid);
    return g_strdup_printf("user '%s' (%u)", user ? user->pw_name : "?", uid);
}

/* The directories have been opened to QEMU's user, so the cause is a directory above them, or a
 * rule of the host. */
static char *confined_hint(unsigned uid)
{
    g_autofree char *user = name_of(uid);
    return g_strdup_printf(
        "QEMU runs as %s: that user must be able to traverse the directories above run-dir and "
        "fleecing-dir; if AppArmor confines QEMU (dmesg says DENIED), add both as 'DIR/** rwk,' to "
        "/etc/apparmor.d/local/abstractions/libvirt-qemu and restart the guest",
        user);
}

static char *user_hint(const PbaAccess *access)
{
    unsigned uid, gid;

    if (access->options.has_qemu_user && geteuid() == 0) {
        return confined_hint(access->options.qemu_uid);
    }
    if (access->options.has_qemu_user) {
        uid = access->options.qemu_uid;
    } else if (!find_user(pba_qmp_peer(access->qmp), &uid, &gid)) {
        return g_strdup(geteuid() == 0
                            ? "QEMU's user must be able to use run-dir and fleecing-dir: give that "
                              "user as qemu-user"
                            : "QEMU's user must be able to use run-dir and fleecing-dir: back up "
                              "as that user");
    }
    if (uid == geteuid()) {
        return NULL;
    }
    g_autofree char *user = name_of(uid);
    return g_strdup_printf("QEMU runs as %s, and this program as %u: give a run-dir and a "
                           "fleecing-dir that QEMU's user can traverse%s",
                           user, (unsigned)geteuid(),
                           geteuid() == 0 ? "" : ", and back up as that user, or as root");
}

/* If QEMU does not find a directory that this program has just used. */
static const char path_hint[] =
    "QEMU sees other paths (a chroot, a container, a mount namespace): "
    "give a run-dir and a fleecing-dir that it can reach, and their paths there "
    "(--qemu-run-dir, --qemu-fleecing-dir; 'qemu-run-dir', 'qemu-fleecing-dir')";

void pba_user_add_hint(const PbaAccess *access, GError **error)
{
    const char *message = (*error)->message;
    bool is_of_qemu = g_error_matches(*error, PBA_ERROR, PBA_ERROR_QMP);
    g_autofree char *hint = strstr(message, "Permission denied") ? user_hint(access)
                            : is_of_qemu && strstr(message, "No such file or directory")
                                ? g_strdup(path_hint)
                                : NULL;

    if (hint) {
        pba_error_add_hint(error, hint);
    }
}
