/* Wakes another thread's poll(2). */
#include "server.h"
#include "src/base/base.h"
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

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

void pba_wake_clear(int fd)
{
    uint64_t count;
    ssize_t got = read(fd, &count, sizeof(count));
    (void)got;
}
