/* The environment of a target: a clock, processes and a peer that do not depend on the machine, so
 * that an input always has the same effect and never waits. */
#include "fuzz.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* A wait that nothing ends lasts until its time limit. */
#define LONG_WAIT (10 * G_TIME_SPAN_MINUTE)
/* A pause in a polling loop. */
#define PAUSE (20 * G_TIME_SPAN_SECOND)

/* The names that the linker's --wrap gives them. */
gint64 __wrap_g_get_monotonic_time(void);
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout);
int __real_poll(struct pollfd *fds, nfds_t count, int timeout);
pid_t __wrap_getpid(void);
pid_t __real_getpid(void);
int __wrap_kill(pid_t pid, int signal);
gboolean __wrap_g_file_get_contents(const char *path, char **contents, gsize *length,
                                    GError **error);

static gint64 now;
static FakePeer peer;
static int first_free;
static char dir[64];

/* GLib's critical messages are caused by our bugs. */
__attribute__((constructor)) static void make_criticals_fatal(void)
{
    g_log_set_always_fatal(G_LOG_LEVEL_CRITICAL | G_LOG_FATAL_MASK);
}

void check(bool holds, const char *what, const char *file, int line)
{
    if (!holds) {
        fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
        abort();
    }
}

void check_outcome(bool done, GError **error)
{
    const char *message = *error ? (*error)->message : "";

    CHECK(done == !*error);
    CHECK(done || ((*error)->domain == PBA_ERROR && *pba_error_class(*error)));
    CHECK(done || (*message && g_utf8_validate(message, -1, NULL)));
    CHECK(!strpbrk(message, "\r\n\033"));
    g_clear_error(error);
}

gint64 __wrap_g_get_monotonic_time(void)
{
    return now;
}

/* The peer runs in the same thread, whenever the other side would wait for it. */
int __wrap_poll(struct pollfd *fds, nfds_t count, int timeout)
{
    (void)timeout;
    for (;;) {
        int ready = count > 0 ? __real_poll(fds, count, 0) : 0;
        if (ready != 0) {
            return ready;
        }
        if (!peer || !peer()) {
            now += count > 0 ? LONG_WAIT : PAUSE;
            return 0;
        }
        if (count == 0) {
            return 0;
        }
    }
}

pid_t __wrap_getpid(void)
{
    return FAKE_PID;
}

int __wrap_kill(pid_t pid, int signal)
{
    (void)pid;
    (void)signal;
    errno = ESRCH;
    return -1;
}

/* proc(5)'s stat; no run directory tells its target. */
gboolean __wrap_g_file_get_contents(const char *path, char **contents, gsize *length,
                                    GError **error)
{
    (void)length;
    (void)error;
    int pid;
    if (sscanf(path, "/proc/%d/stat", &pid) != 1 || (pid != FAKE_PID && pid != FAKE_OTHER_PID)) {
        return FALSE;
    }
    *contents = g_strdup_printf("%d (a) b) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 77 0 0", pid);
    return TRUE;
}

static int next_descriptor(void)
{
    int fd = dup(STDERR_FILENO);
    close(fd);
    return fd;
}

void fake_begin(FakePeer new_peer)
{
    now = G_TIME_SPAN_DAY;
    peer = new_peer;
    first_free = next_descriptor();
}

void fake_end(void)
{
    /* The sanitizers' own thread, which looks at the memory, opens one now and then. */
    for (int i = 0; next_descriptor() > first_free; i++) {
        CHECK(i < 100);
        g_usleep(1000);
    }
}

static void remove_dir(void)
{
    rmdir(dir);
}

const char *fake_dir(void)
{
    if (!*dir) {
        snprintf(dir, sizeof(dir), "/dev/shm/pba-fuzz-%d", (int)__real_getpid());
        CHECK(mkdir(dir, 0700) == 0);
        atexit(remove_dir);
    }
    return dir;
}

int fake_listen(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    g_strlcpy(address.sun_path, path, sizeof(address.sun_path));
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof(address)) == 0);
    CHECK(listen(fd, 64) == 0);
    return fd;
}
