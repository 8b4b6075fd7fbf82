/* Threads for calls that block, and descriptors that wake another thread's poll(2). */
#include "base.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

/* Perl's signal handlers must not run in a thread that Perl does not know. */
bool pba_thread_start(GThreadFunc run, void *opaque, GError **error)
{
    sigset_t all;
    sigset_t before;
    g_autoptr(GError) local = NULL;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    GThread *thread = g_thread_try_new("pba", run, opaque, &local);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!thread) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot start a thread - %s", local->message);
        return false;
    }
    g_thread_unref(thread);
    return true;
}

int pba_wake_new(GError **error)
{
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    if (fd < 0) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot make an eventfd - %s", g_strerror(errno));
    }
    return fd;
}

void pba_wake(int fd)
{
    uint64_t one = 1;
    /* This can only fail if the counter is so high that it is readable anyway. */
    ssize_t written = write(fd, &one, sizeof(one));
    (void)written;
}

bool pba_wake_clear(int fd)
{
    uint64_t count;

    return read(fd, &count, sizeof(count)) == sizeof(count);
}
