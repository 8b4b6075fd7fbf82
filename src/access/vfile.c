/* The files of the mechanism file-handle: one server process (src/vfile/) per device, from its
 * start to its end. */
#define _GNU_SOURCE
#include "vfile.h"
#include "src/base/base.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROGRAM_NAME "pba-vfile"
#define FUSE_DEVICE "/dev/fuse"
#define FUSERMOUNT "/usr/bin/fusermount3"
/* Linux: Documentation/admin-guide/devices.txt, include/uapi/linux/magic.h. */
#define FUSE_MAJOR 10
#define FUSE_MINOR 229
#define FUSE_SUPER_MAGIC 0x65735546

#define START_LIMIT_S 60
#define END_LIMIT_S 10
#define MAX_TEXT 4096

struct PbaVfile {
    char *device;
    char *path;
    uint64_t size;
    pid_t pid;
    int process; /* a descriptor of it (pidfd_open(2)); -1: there is none */
    int socket;  /* to the server, which ends when this is shut down. -1: it has ended */
};

/* pba-vfile is in the directory of the library that contains this code. Its path is determined when
 * the library is loaded, because it may be relative to the working directory at that time. */
static char program[PATH_MAX];

__attribute__((constructor)) static void find_program(void)
{
    Dl_info info;
    char library[PATH_MAX];

    if (dladdr(program, &info) && info.dli_fname && realpath(info.dli_fname, library)) {
        g_autofree char *dir = g_path_get_dirname(library);
        g_snprintf(program, sizeof(program), "%s/" PROGRAM_NAME, dir);
    }
}

static bool check_fuse(GError **error)
{
    struct stat status;
    int fd = open(FUSE_DEVICE, O_RDWR | O_CLOEXEC);
    int problem = fd < 0 ? errno : 0;

    if (fd >= 0 && (fstat(fd, &status) != 0 || !S_ISCHR(status.st_mode) ||
                    status.st_rdev != makedev(FUSE_MAJOR, FUSE_MINOR))) {
        problem = ENODEV;
    }
    if (fd >= 0) {
        close(fd);
    }
    if (problem) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "cannot open " FUSE_DEVICE " - %s - the mechanism 'file-handle' needs FUSE "
                      "('modprobe fuse' may help), 'nbd' does not",
                      g_strerror(problem));
    }
    return !problem;
}

/* The server inherits nothing from the caller: no descriptor but the socket, no environment, no
 * signal settings. A terminal's signals go to the caller, not to the server. */
static int spawn(char *const *words, int socket, pid_t *pid)
{
    /* libnbd loads GnuTLS. Without its initialization, the start takes a fifth less time. */
    static char *const environment[] = {(char *)"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                                        (char *)"GNUTLS_NO_IMPLICIT_INIT=1", NULL};
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    sigset_t none;
    sigset_t all;

    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes,
                             POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, socket, STDIN_FILENO);
    posix_spawn_file_actions_adddup2(&actions, STDIN_FILENO, STDERR_FILENO);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addclosefrom_np(&actions, STDERR_FILENO + 1);
    int result = posix_spawn(pid, words[0], &actions, &attributes, words, environment);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    return result;
}

static bool is_child(idtype_t type, id_t id)
{
    siginfo_t info;
    return waitid(type, id, &info, WEXITED | WNOHANG | WNOWAIT) == 0;
}

/* After a child was waited for, its PID may be reused, and a handler of the caller's for SIGCHLD
 * may wait at any time. A pidfd always refers to the same process, but may have been opened too
 * late. */
static int open_process(pid_t pid)
{
    int fd = pidfd_open(pid, 0);

    if (fd >= 0 && !is_child(P_PIDFD, (id_t)fd)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* Without pidfds (before Linux 5.4): the PID cannot be reused until the child is waited for. */
static void kill_server(const PbaVfile *vfile)
{
    if (vfile->process >= 0) {
        pidfd_send_signal(vfile->process, SIGKILL, NULL, 0);
    } else if (is_child(P_PID, (id_t)vfile->pid)) {
        kill(vfile->pid, SIGKILL);
    }
}

/* The signal that ended it; 0 if it ended by itself, or if other code has waited for it. */
static int wait_for_server(const PbaVfile *vfile)
{
    bool by_descriptor = vfile->process >= 0;
    siginfo_t info = {0};
    int result;

    do {
        result = waitid(by_descriptor ? P_PIDFD : P_PID,
                        (id_t)(by_descriptor ? vfile->process : vfile->pid), &info, WEXITED);
    } while (result != 0 && errno == EINTR);
    bool killed = info.si_code == CLD_KILLED || info.si_code == CLD_DUMPED;
    return result == 0 && killed ? info.si_status : 0;
}

PbaVfile *pba_vfile_start(const char *path, const PbaVolumeOptions *options, bool is_whole,
                          GError **error)
{
    int sockets[2];

    if (!check_fuse(error)) {
        return NULL;
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM,
                      "cannot make sockets for the server of a virtual file - %s",
                      g_strerror(errno));
        return NULL;
    }
    PbaVfile *vfile = g_new0(PbaVfile, 1);
    vfile->device = g_strdup(options->device);
    vfile->path = g_strdup(path);
    vfile->size = options->size;
    vfile->process = -1;
    vfile->socket = sockets[0];
    g_autofree char *size = g_strdup_printf("%" PRIu64, options->size);
    char *words[] = {program,
                     vfile->path,
                     (char *)options->path,
                     vfile->device,
                     size,
                     (char *)(is_whole ? "whole" : "part"),
                     (char *)options->bitmap,
                     NULL};
    int result = spawn(words, sockets[1], &vfile->pid);
    close(sockets[1]);
    if (result != 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot run '%s' - %s", program, g_strerror(result));
        close(vfile->socket);
        vfile->socket = -1;
        pba_vfile_free(vfile);
        return NULL;
    }
    vfile->process = open_process(vfile->pid);
    return vfile;
}

/* If the server has ended, the code that waits for it notices. */
void pba_vfile_serve(PbaVfile *vfile)
{
    ssize_t sent = send(vfile->socket, "", 1, MSG_NOSIGNAL);
    (void)sent;
}

/* One read of the server's output; 0 at its end. */
static ssize_t hear(PbaVfile *vfile, char *buffer, size_t size, gint64 deadline,
                    const PbaHooks *hooks, GError **error)
{
    short revents;

    if (!pba_wait_fd(vfile->socket, POLLIN, &revents, deadline, hooks,
                     "waiting for the server of a virtual file", error)) {
        return -1;
    }
    ssize_t got = recv(vfile->socket, buffer, size, MSG_DONTWAIT);
    return got < 0 ? 0 : got;
}

bool pba_vfile_wait_ready(PbaVfile *vfile, const PbaHooks *hooks, GError **error)
{
    gint64 deadline = pba_deadline(START_LIMIT_S);
    g_autoptr(GString) text = g_string_new(NULL);
    char buffer[512];
    ssize_t got;

    while ((got = hear(vfile, buffer, sizeof(buffer), deadline, hooks, error)) > 0) {
        if (memchr(buffer, '\0', (size_t)got)) {
            return true;
        }
        g_string_append_len(text, buffer, text->len < MAX_TEXT ? got : 0);
    }
    if (got == 0) {
        g_autofree char *prefix = g_strdup_printf("device %s: ", vfile->device);
        const char *said = text->len > 0 ? text->str : "the server of its virtual file ended";
        pba_error_set(error, PBA_ERROR_SYSTEM, "%s",
                      said + (g_str_has_prefix(said, prefix) ? strlen(prefix) : 0));
    }
    pba_error_add_device(error, vfile->device);
    return false;
}

int pba_vfile_open(PbaVfile *vfile, GError **error)
{
    struct stat status;
    struct statfs fs;
    int fd = open(vfile->path, O_RDWR | O_DIRECT | O_CLOEXEC | O_NOFOLLOW);

    if (fd < 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot open virtual file '%s' - %s", vfile->path,
                      g_strerror(errno));
    } else if (fstatfs(fd, &fs) != 0 || fs.f_type != FUSE_SUPER_MAGIC || fstat(fd, &status) != 0 ||
               (uint64_t)status.st_size != vfile->size) {
        /* At the mount point, the file system shows that there is no mount any more. */
        pba_error_set(error, PBA_ERROR_SYSTEM, "the server of virtual file '%s' has ended",
                      vfile->path);
        close(fd);
        fd = -1;
    }
    pba_error_add_device(error, vfile->device);
    return fd;
}

void pba_vfile_tell_end(PbaVfile *vfile)
{
    if (vfile->socket >= 0) {
        shutdown(vfile->socket, SHUT_WR);
    }
}

/* Waits until the server closes its end of the socket, which it does when it ends. If the wait
 * fails or is interrupted, the server is killed. */
static void wait_end(PbaVfile *vfile, const PbaHooks *hooks, GError **error)
{
    gint64 deadline = pba_deadline(END_LIMIT_S);
    g_autoptr(GError) local = NULL;
    char buffer[512];

    while (hear(vfile, buffer, sizeof(buffer), deadline, hooks, &local) > 0) {
    }
    if (local) {
        kill_server(vfile);
    }
    close(vfile->socket);
    vfile->socket = -1;
    int killed_by = wait_for_server(vfile);
    if (local && local->code == PBA_ERROR_INTERRUPTED) {
        g_propagate_error(error, g_steal_pointer(&local));
    } else if (local || killed_by) {
        pba_log(hooks, PBA_LOG_WARN, "device %s: the server of its virtual file %s%s",
                vfile->device, local ? "had to be killed" : "died of signal ",
                local ? "" : g_strsignal(killed_by));
    }
}

/* Only a set-uid root program may unmount for other users. It prints nothing and ends when it is
 * done. */
static void run_fusermount(const char *path, const PbaHooks *hooks)
{
    char *words[] = {(char *)FUSERMOUNT, (char *)"-u", (char *)"-q", (char *)"-z",
                     (char *)"--",       (char *)path, NULL};
    int sockets[2];
    pid_t pid;
    short revents;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) {
        return;
    }
    int result = spawn(words, sockets[1], &pid);
    close(sockets[1]);
    if (result == 0) {
        pba_wait_fd(sockets[0], POLLIN, &revents, pba_deadline(END_LIMIT_S), hooks,
                    "unmounting a virtual file", NULL);
        waitpid(pid, NULL, 0); /* by PID, because no signal is sent to it */
    }
    close(sockets[0]);
}

/* Cleans up after a server that died. A server that ended regularly has done this itself. */
static bool remove_file(const char *path, const PbaHooks *hooks, GError **error)
{
    if (unlink(path) == 0 || errno == ENOENT) {
        return true;
    }
    if (geteuid() == 0) {
        umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW);
    } else {
        run_fusermount(path, hooks);
    }
    if (unlink(path) == 0 || errno == ENOENT) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_SYSTEM, "cannot unmount and remove virtual file '%s' - %s", path,
                  g_strerror(errno));
    return false;
}

void pba_vfiles_remove_stale(const char *dir)
{
    GDir *entries = g_dir_open(dir, 0, NULL);
    const char *name;

    while (entries && (name = g_dir_read_name(entries))) {
        g_autofree char *path = g_build_filename(dir, name, NULL);
        if (g_str_has_prefix(name, PBA_VFILE_PREFIX)) {
            remove_file(path, NULL, NULL);
        }
    }
    g_clear_pointer(&entries, g_dir_close);
}

bool pba_vfile_end(PbaVfile *vfile, const PbaHooks *hooks, GError **error)
{
    GError *first = NULL;
    GError *step = NULL;

    pba_vfile_tell_end(vfile);
    if (vfile->socket >= 0) {
        wait_end(vfile, hooks, &first);
    }
    if (!remove_file(vfile->path, hooks, &step)) {
        pba_error_add_device(&step, vfile->device);
    }
    pba_error_keep_first(&first, step, hooks);
    if (first) {
        g_propagate_error(error, first);
        return false;
    }
    return true;
}

void pba_vfile_free(PbaVfile *vfile)
{
    if (vfile->socket >= 0) {
        close(vfile->socket);
    }
    if (vfile->process >= 0) {
        close(vfile->process);
    }
    g_free(vfile->device);
    g_free(vfile->path);
    g_free(vfile);
}
