/* pba-vfile: serves one volume of an access as a file, until it is told to end or its parent dies.
 *
 *   pba-vfile FILE SOCKET DEVICE SIZE image|whole|part [BITMAP]
 *
 * An image is a whole volume whose file cannot be opened for writing; others are, to discard.
 *
 * The file of a whole volume reports its zeroes as holes (lseek(2): SEEK_HOLE). The file of a part
 * must not: a reader that writes over an older copy would skip the hole and keep the old data.
 *
 * The server creates FILE, and removes it at the end. Standard input is a socket to the parent. The
 * parent writes a byte to it when the volume can be read, so the server can be started earlier. The
 * server writes its errors to it (standard error goes there, too), or a NUL character once the file
 * can be opened. When the parent shuts the socket down or dies, the server unmounts and ends. */
#include "server.h"
#include "src/base/base.h"
#include "src/volume/volume.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#define PARENT_FD STDIN_FILENO

static bool told_to_end(void *opaque)
{
    (void)opaque;
    struct pollfd parent = {.fd = PARENT_FD, .events = POLLIN};
    sigset_t pending;

    sigpending(&pending);
    return poll(&parent, 1, 0) != 0 || sigismember(&pending, SIGTERM) == 1;
}

/* The parent's death arrives as a signal, or closes the socket. Neither suffices alone: another
 * child of the parent may still have the socket, and no signal is sent if the parent died before it
 * was requested. */
static int watch_signals(GError **error)
{
    sigset_t signals;

    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    int fd = signalfd(-1, &signals, SFD_CLOEXEC);
    if (fd < 0 || prctl(PR_SET_PDEATHSIG, SIGTERM) != 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot watch the parent - %s", g_strerror(errno));
        return -1;
    }
    return fd;
}

/* False if the parent ends the server before that. */
static bool wait_for_volume(int signal_fd)
{
    struct pollfd fds[] = {
        {.fd = PARENT_FD, .events = POLLIN},
        {.fd = signal_fd, .events = POLLIN},
    };
    char byte;

    while (poll(fds, G_N_ELEMENTS(fds), -1) < 0 && errno == EINTR) {
    }
    return !fds[1].revents && read(PARENT_FD, &byte, 1) == 1;
}

static bool make_file(const char *path, GError **error)
{
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot make '%s' - %s", path, g_strerror(errno));
        return false;
    }
    close(fd);
    return true;
}

/* If the mount fails, libfuse itself prints the reason on standard error. */
static struct fuse_session *mount_file(const char *path, PbaFile *file, bool is_image,
                                       GError **error)
{
    const char *options = is_image ? "-oro,fsname=pve-backup-access" : "-ofsname=pve-backup-access";
    char *words[] = {(char *)"pba-vfile", (char *)options};
    struct fuse_args arguments = FUSE_ARGS_INIT(G_N_ELEMENTS(words), words);
    struct fuse_session *session =
        fuse_session_new(&arguments, &pba_file_operations, sizeof(pba_file_operations), file);

    if (!session || fuse_session_mount(session, path) != 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot mount a FUSE file at '%s'", path);
        return NULL;
    }
    int fd = fuse_session_fd(session);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return session;
}

/* From now on, the parent only notices our end. */
static bool report_ready(void)
{
    int null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    bool done = null_fd >= 0 && dup2(null_fd, STDERR_FILENO) >= 0;

    close(null_fd);
    return write(PARENT_FD, "", 1) == 1 && done;
}

static void serve(struct fuse_session *session, PbaFile *file, PbaConnection *connection,
                  int signal_fd)
{
    struct fuse_buf buffer = {0};
    struct pollfd fds[] = {
        {.fd = fuse_session_fd(session), .events = POLLIN},
        {.fd = PARENT_FD, .events = POLLIN},
        {.fd = signal_fd, .events = POLLIN},
        {.fd = -1}, /* these are the connection's */
        {.fd = -1},
        pba_seeks_watch(pba_file_seeks(file)),
    };

    while (!fuse_session_exited(session)) {
        pba_file_turn(file);
        int limit = pba_connection_watch(connection, &fds[3]);
        int ready = poll(fds, G_N_ELEMENTS(fds), limit);
        if ((ready < 0 && errno != EINTR) || (ready > 0 && (fds[1].revents || fds[2].revents))) {
            break;
        }
        if (ready < 0) {
            continue;
        }
        pba_connection_turn(connection, &fds[3]);
        if (fds[5].revents) {
            pba_seeks_turn(pba_file_seeks(file));
        }
        if (fds[0].revents && fuse_session_receive_buf(session, &buffer) > 0) {
            fuse_session_process_buf(session, &buffer);
        }
    }
    free(buffer.mem);
}

/* NULL on error: nothing must be freed, because the process ends then. */
static PbaFile *new_file(PbaConnection *connection, const PbaVolumeOptions *options, bool is_whole,
                         GError **error)
{
    PbaSeeks *seeks = is_whole ? pba_seeks_new(options, error) : NULL;

    return seeks || !is_whole ? pba_file_new(connection, pba_ahead_new(options, seeks), seeks)
                              : NULL;
}

static bool run(const char *path, const PbaVolumeOptions *options, const char *kind, GError **error)
{
    bool is_image = g_str_equal(kind, "image");
    bool is_whole = is_image || g_str_equal(kind, "whole");
    PbaHooks hooks = {.interrupted = told_to_end};
    PbaVolumeOptions data = *options; /* the map has a connection of its own: pba_scan_start */
    int signal_fd = watch_signals(error);
    PbaNbdVolume *nbd;
    PbaConnection *connection;
    struct fuse_session *session;
    PbaFile *file;

    data.bitmap = NULL;
    if (signal_fd < 0) {
        return false;
    }
    if (!wait_for_volume(signal_fd)) {
        return true;
    }
    if (!make_file(path, error)) {
        return false;
    }
    bool done = (nbd = is_image ? pba_nbd_open_allocation(&data, &hooks, error)
                                : pba_nbd_open(&data, &hooks, error)) &&
                (connection = pba_connection_start(nbd, error)) &&
                (file = new_file(connection, options, is_whole, error)) &&
                (session = mount_file(path, file, is_image, error));
    if (done) {
        done = report_ready();
        serve(session, file, connection, signal_fd);
        fuse_session_unmount(session);
    }
    unlink(path);
    return done;
}

int main(int argc, char **argv)
{
    g_autoptr(GError) error = NULL;

    if (argc < 6 || argc > 7) {
        fputs("usage: pba-vfile FILE SOCKET DEVICE SIZE image|whole|part [BITMAP]\n", stderr);
        return EXIT_FAILURE;
    }
    PbaVolumeOptions options = {
        .device = argv[3],
        .path = argv[2],
        .bitmap = argv[6],
        .size = g_ascii_strtoull(argv[4], NULL, 10),
    };
    umask(077);
    if (chdir("/") != 0 || !run(argv[1], &options, argv[5], &error)) {
        fputs(error ? error->message : "cannot serve the file", stderr);
        fflush(stderr);
        _exit(EXIT_FAILURE);
    }
    /* Threads still run, and the kernel cleans up everything else. */
    _exit(EXIT_SUCCESS);
}
