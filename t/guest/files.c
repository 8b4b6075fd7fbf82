/* The test guest: a file system that is in use. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

struct files {
    pthread_t thread;
    bool started;
    volatile bool stop;
    uint64_t operations; /* one aligned word, so other threads can read it */
    int error;
};

static struct files files;

void cmd_mount(int n, char **w)
{
    struct disk *d;

    if (n != 2) {
        fail("usage: mount DISK");
        return;
    }
    if (!(d = need_disk(w[1])))
        return;
    if (mount(d->path, "/mnt", "ext4", MS_NOATIME, ""))
        fail("mount %s: %s", d->path, strerror(errno));
    else
        ok_nothing();
}

void cmd_umount(int n, char **w)
{
    (void)n, (void)w;
    if (files.started)
        fail("files-stop first");
    else if (umount("/mnt"))
        fail("umount: %s", strerror(errno));
    else
        ok_nothing();
}

void cmd_sync(int n, char **w)
{
    (void)n, (void)w;
    sync();
    ok_nothing();
}

/* Appends to a file or overwrites a part of it. Returns an errno, or 0. */
static int files_write(const char *path, uint64_t number, uint32_t random, bool flush)
{
    char record[64];
    int error = 0;
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | (random & 1 ? O_TRUNC : 0), 0644);

    if (fd < 0)
        return errno;
    lseek(fd, (random >> 1) % 8 * 4096, SEEK_SET);
    memset(record, '.', sizeof record);
    int length = snprintf(record, sizeof record, "%s %" PRIu64, path, number);
    record[length] = '.';
    record[sizeof record - 1] = '\n';
    for (unsigned i = 0, count = 1 + (random >> 4) % 512; i < count && !error; i++)
        if (write(fd, record, sizeof record) != sizeof record)
            error = errno ? errno : ENOSPC;
    if (!error && flush && fsync(fd))
        error = errno;
    close(fd);
    return error;
}

static void *files_run(void *opaque)
{
    uint32_t x = 1;
    char path[64], other[64];

    (void)opaque;
    for (uint64_t i = 1; !files.stop; i++) {
        uint32_t r = (x = churn_step(x)) >> 8;
        int error = 0;

        snprintf(path, sizeof path, "/mnt/d%u", r % 8);
        if (mkdir(path, 0755) && errno != EEXIST)
            error = errno;
        snprintf(path, sizeof path, "/mnt/d%u/f%u", r % 8, (r >> 3) % 16);
        snprintf(other, sizeof other, "/mnt/d%u/f%u", (r >> 7) % 8, (r >> 10) % 16);
        errno = 0;
        if (!error && (r >> 14) % 8 == 0)
            error = unlink(path) && errno != ENOENT ? errno : 0;
        else if (!error && (r >> 14) % 8 == 1)
            error = rename(path, other) && errno != ENOENT ? errno : 0;
        else if (!error)
            error = files_write(path, i, r >> 6, i % 4 == 0);
        if (error) {
            files.error = error;
            break;
        }
        files.operations = i;
    }
    return NULL;
}

void cmd_files_start(int n, char **w)
{
    (void)n, (void)w;
    if (files.started) {
        fail("files is already running");
        return;
    }
    files.stop = false;
    files.error = 0;
    files.operations = 0;
    if ((errno = pthread_create(&files.thread, NULL, files_run, NULL))) {
        fail("thread: %s", strerror(errno));
        return;
    }
    files.started = true;
    ok_nothing();
}

void cmd_files_stop(int n, char **w)
{
    (void)n, (void)w;
    if (!files.started) {
        fail("files does not run");
        return;
    }
    files.stop = true;
    pthread_join(files.thread, NULL);
    files.started = false;
    if (files.error)
        fail("files: %s", strerror(files.error));
    else
        ok("%" PRIu64, files.operations);
}
