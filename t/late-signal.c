/* t/late-signal.t preloads this library, which sends the program one SIGALRM: just before the Nth
 * call that would block or that blocks signals, or just after the Nth start of a process. Perl runs
 * its handlers between two operations, so a signal at this moment does not end the call. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/wait.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Counts calls of this program, not of its children, and only while it has a handler. */
static pid_t program;
static int left;

static void __attribute__((constructor)) begin(void)
{
    const char *number = getenv("PBA_LATE_SIGNAL");

    program = getpid();
    left = number ? atoi(number) : 0;
}

static void would_block(void)
{
    struct sigaction action;

    if (left > 0 && getpid() == program && sigaction(SIGALRM, NULL, &action) == 0 &&
        action.sa_handler != SIG_DFL && --left == 0) {
        raise(SIGALRM);
    }
}

static bool is_ready(int fd, short events)
{
    struct pollfd pollfd = {.fd = fd, .events = events};

    return REAL(poll)(&pollfd, 1, 0) != 0;
}

/* Until signals are unblocked again, an exception of a handler must not leave the code. */
int sigprocmask(int how, const sigset_t *set, sigset_t *old)
{
    if (how == SIG_BLOCK && set && !sigisemptyset(set)) {
        would_block();
    }
    return REAL(sigprocmask)(how, set, old);
}

/* If a handler dies, the child must not be lost. */
pid_t fork(void)
{
    pid_t pid = REAL(fork)();

    if (pid > 0) {
        would_block();
    }
    return pid;
}

/* The same after a vfork, after which they are unblocked again. */
int pthread_sigmask(int how, const sigset_t *set, sigset_t *old)
{
    if (how == SIG_SETMASK) {
        would_block();
    }
    return REAL(pthread_sigmask)(how, set, old);
}

ssize_t read(int fd, void *buffer, size_t length)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags >= 0 && !(flags & O_NONBLOCK) && !is_ready(fd, POLLIN)) {
        would_block();
    }
    return REAL(read)(fd, buffer, length);
}

pid_t wait4(pid_t pid, int *status, int options, struct rusage *usage)
{
    siginfo_t info = {.si_pid = 0};

    if (pid > 0 && !(options & WNOHANG) &&
        waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == 0) {
        would_block();
    }
    return REAL(wait4)(pid, status, options, usage);
}

pid_t waitpid(pid_t pid, int *status, int options)
{
    return wait4(pid, status, options, NULL);
}

int select(int count, fd_set *in, fd_set *out, fd_set *odd, struct timeval *time)
{
    fd_set sets[3];
    fd_set *given[3] = {in, out, odd};
    fd_set *copies[3] = {NULL, NULL, NULL};
    struct timeval now = {0};

    for (int i = 0; i < 3; i++) {
        if (given[i]) {
            sets[i] = *given[i];
            copies[i] = &sets[i];
        }
    }
    if (count > 0 && (!time || time->tv_sec || time->tv_usec) &&
        REAL(select)(count, copies[0], copies[1], copies[2], &now) == 0) {
        would_block();
    }
    return REAL(select)(count, in, out, odd, time);
}

int poll(struct pollfd *fds, nfds_t count, int time)
{
    if (count > 0 && time != 0 && REAL(poll)(fds, count, 0) == 0) {
        would_block();
    }
    return REAL(poll)(fds, count, time);
}

int flock(int fd, int how)
{
    int done = REAL(flock)(fd, how | LOCK_NB);

    if (done == 0 || errno != EWOULDBLOCK) {
        return done;
    }
    would_block();
    return REAL(flock)(fd, how);
}
