/* Copying to a file or block device. Threads do the writing, since that may block for long. */
#define _GNU_SOURCE /* fallocate() */
#include "copy.h"
#include "src/base/base.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* That write to a device, or to a file past the page cache. */
#define DIRECT_THREADS 4
/* The blocks of most file systems. */
static const PbaBlocks blocks = {.size = 4096};

/* How zeroes come into the target, the next way if one is not possible there. */
typedef enum { ZERO_BY_HOLE, ZERO_BY_RANGE, ZERO_BY_WRITING } ZeroWay;

/* A flush may take long, and a caller that is interrupted does not wait for it: its thread keeps
 * what it needs. */
typedef struct {
    PbaJob job;
    PbaSink *sink; /* for done */
    int fd;
    int error;
} Flush;

typedef struct {
    PbaSink sink;
    PbaLoop *loop;
    int fd;
    unsigned threads; /* that write to a file or block device; 0: nothing blocks, nor is flushed */
    uint64_t zero_from; /* from here on the target holds nothing but zeroes yet */
    gint zero_way;      /* a ZeroWay; atomic */
} FileSink;

/* Writing, in the pool's threads */

static bool write_data(int fd, PbaPiece *piece, size_t at, size_t length)
{
    while (length > 0) {
        uint64_t offset = piece->offset + at;
        ssize_t count = pwrite(fd, piece->data + at, length, (off_t)offset);
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            pba_piece_fail(piece, count == 0 ? EIO : errno, offset);
            return false;
        }
        at += (size_t)count;
        length -= (size_t)count;
    }
    return true;
}

static bool is_unsupported(int error)
{
    return error == EOPNOTSUPP || error == ENODEV || error == ENOSYS || error == EINVAL ||
           error == ESPIPE || error == EPERM;
}

/* Makes zeroes without writing them. *done is false if the target has no way to. */
static bool make_hole(FileSink *self, PbaPiece *piece, size_t at, size_t length, bool *done)
{
    static const int modes[] = {
        [ZERO_BY_HOLE] = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        [ZERO_BY_RANGE] = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
    };
    uint64_t offset = piece->offset + at;
    gint way;

    while ((way = g_atomic_int_get(&self->zero_way)) != ZERO_BY_WRITING) {
        if (fallocate(self->fd, modes[way], (off_t)offset, (off_t)length) == 0) {
            *done = true;
            return true;
        }
        if (is_unsupported(errno)) {
            g_atomic_int_compare_and_exchange(&self->zero_way, way, way + 1);
        } else if (errno != EINTR) {
            pba_piece_fail(piece, errno, offset);
            return false;
        }
    }
    *done = false;
    return true;
}

static bool write_zeroes(FileSink *self, PbaPiece *piece, size_t at, size_t length)
{
    bool done = piece->offset + at >= self->zero_from;

    if (!done && !make_hole(self, piece, at, length, &done)) {
        return false;
    }
    piece->zero += done ? (uint32_t)length : 0;
    return done || write_data(self->fd, piece, at, length);
}

static void run_write(PbaJob *job)
{
    PbaPiece *piece = (PbaPiece *)job;
    FileSink *self = (FileSink *)piece->sink;
    bool zero;

    for (size_t at = 0; at < piece->length;) {
        size_t run = pba_piece_run(piece, at, &blocks, &zero);
        if (!(zero ? write_zeroes(self, piece, at, run) : write_data(self->fd, piece, at, run))) {
            return;
        }
        at += run;
    }
}

static void write_done(PbaJob *job)
{
    ((PbaPiece *)job)->state = PBA_PIECE_WRITTEN;
}

static bool file_write(PbaSink *sink, PbaPiece *piece, GError **error)
{
    FileSink *self = (FileSink *)sink;

    piece->sink = sink;
    if (self->threads == 0) {
        run_write(&piece->job);
        write_done(&piece->job);
        return true;
    }
    PbaPool *pool = pba_loop_pool(self->loop, self->threads, error);
    if (!pool) {
        return false;
    }
    piece->job.run = run_write;
    piece->job.done = write_done;
    pba_pool_submit(pool, &piece->job);
    return true;
}

/* Flushing */

static void run_flush(PbaJob *job)
{
    Flush *flush = (Flush *)job;

    flush->error = fdatasync(flush->fd) == 0 ? 0 : errno;
}

static void leave_flush(PbaJob *job)
{
    Flush *flush = (Flush *)job;

    close(flush->fd);
    g_free(flush);
}

static void flush_done(PbaJob *job)
{
    Flush *flush = (Flush *)job;

    flush->sink->flushed = true;
    flush->sink->flush_error = flush->error;
    leave_flush(job);
}

static bool file_flush(PbaSink *sink, GError **error)
{
    FileSink *self = (FileSink *)sink;

    if (self->threads == 0) {
        sink->flushed = true;
        return true;
    }
    PbaPool *pool = pba_loop_pool(self->loop, self->threads, error);
    if (!pool) {
        return false;
    }
    int fd = fcntl(self->fd, F_DUPFD_CLOEXEC, 0);
    if (fd == -1) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "flushing %s failed - %s", sink->name,
                      g_strerror(errno));
        return false;
    }
    Flush *flush = g_new(Flush, 1);
    *flush = (Flush){
        .job = {.run = run_flush, .done = flush_done, .leave = leave_flush},
        .sink = sink,
        .fd = fd,
    };
    pba_pool_submit(pool, &flush->job);
    return true;
}

/* Opening */

static void file_free(PbaSink *sink)
{
    FileSink *self = (FileSink *)sink;

    if (self->fd != -1) {
        close(self->fd);
    }
    g_free(sink->name);
    g_free(self);
}

static bool fail_open(const FileSink *self, GError **error)
{
    pba_error_set(error, PBA_ERROR_SYSTEM, "cannot write to %s - %s", self->sink.name,
                  g_strerror(errno));
    return false;
}

/* The caller's descriptor stays the caller's; what it was opened for can be asked. */
static bool take_descriptor(FileSink *self, int fd, GError **error)
{
    int flags = fcntl(fd, F_GETFL);

    if (flags == -1) {
        return fail_open(self, error);
    }
    if ((flags & O_ACCMODE) == O_RDONLY || (flags & O_APPEND)) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "%s must be open for writing, not for %s",
                      self->sink.name, flags & O_APPEND ? "appending" : "reading only");
        return false;
    }
    self->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return self->fd != -1 || fail_open(self, error);
}

/* The size is part of what is copied: an image of another size would not restore. */
static bool prepare_file(FileSink *self, uint64_t size, uint64_t old_size, GError **error)
{
    /* Through the page cache the kernel lets one write at a time: others would only spin. */
    self->threads = fcntl(self->fd, F_GETFL) & O_DIRECT ? DIRECT_THREADS : 1;
    self->zero_from = old_size;
    return old_size == size || ftruncate(self->fd, (off_t)size) == 0 || fail_open(self, error);
}

static bool prepare_device(FileSink *self, uint64_t size, GError **error)
{
    uint64_t device_size;

    self->threads = DIRECT_THREADS;
    if (ioctl(self->fd, BLKGETSIZE64, &device_size) == -1) {
        return fail_open(self, error);
    }
    if (device_size < size) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "%s has %" PRIu64 " bytes, too few for the volume's %" PRIu64,
                      self->sink.name, device_size, size);
        return false;
    }
    return true;
}

static bool prepare(FileSink *self, uint64_t size, GError **error)
{
    struct stat stat;

    if (fstat(self->fd, &stat) == -1) {
        return fail_open(self, error);
    }
    if (S_ISREG(stat.st_mode)) {
        return prepare_file(self, size, (uint64_t)stat.st_size, error);
    }
    if (S_ISBLK(stat.st_mode)) {
        return prepare_device(self, size, error);
    }
    /* Such as /dev/null: anything that has offsets. */
    return lseek(self->fd, 0, SEEK_CUR) != -1 || fail_open(self, error);
}

PbaSink *pba_sink_file_new(const char *path, int fd, uint64_t size, PbaLoop *loop, GError **error)
{
    FileSink *self = g_new0(FileSink, 1);

    self->sink = (PbaSink){
        .write = file_write,
        .flush = file_flush,
        .free = file_free,
        .name = path ? g_strdup(path) : g_strdup_printf("the file descriptor %d", fd),
        .max_request = UINT32_MAX,
    };
    self->loop = loop;
    self->fd = -1;
    self->zero_from = UINT64_MAX;
    if (path) {
        /* What is made is as secret as the disk. */
        self->fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0600);
    }
    bool opened =
        path ? self->fd != -1 || fail_open(self, error) : take_descriptor(self, fd, error);
    if (opened && prepare(self, size, error)) {
        return &self->sink;
    }
    file_free(&self->sink);
    return NULL;
}
