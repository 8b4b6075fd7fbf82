/* The source of a copy from a file handle: threads read and discard. */
#define _GNU_SOURCE /* fallocate() */
#include "copy.h"
#include "src/base/base.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

/* Threads that read and discard. */
#define THREADS 4

typedef struct {
    PbaSource source;
    PbaPool *pool;    /* borrowed; NULL until it is open, as the file */
    PbaJobFile *file; /* owned */
} FileSource;

/* A read in flight. It owns all its data; it needs the source only to report its end. */
typedef struct {
    PbaJob job;
    PbaJobFile *file;
    PbaPiece *piece;
    char *buffer;
    size_t room;
    uint64_t offset;
    uint32_t length;
    uint32_t seen;
    int error;
} FileRead;

/* A discard in flight. */
typedef struct {
    PbaJob job;
    PbaJobFile *file;
    PbaSource *source; /* for done */
    PbaRange range;
    int error;
} FileTrim;

static void run_read(PbaJob *job)
{
    FileRead *read = (FileRead *)job;

    while (read->seen < read->length) {
        uint64_t offset = read->offset + read->seen;
        ssize_t count = pread(read->file->fd, read->buffer + read->seen, read->length - read->seen,
                              (off_t)offset);
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            read->error = count == 0 ? ENODATA : errno;
            return;
        }
        read->seen += (uint32_t)count;
    }
}

static void read_done(PbaJob *job)
{
    FileRead *read = (FileRead *)job;

    read->piece->seen = read->seen;
    if (read->error) {
        pba_piece_fail(read->piece, read->error, read->offset + read->seen);
    }
    read->piece->state = PBA_PIECE_READ;
    pba_job_file_unref(read->file);
    g_free(read);
}

/* The read owns the piece's buffer now. */
static void leave_read(PbaJob *job)
{
    FileRead *read = (FileRead *)job;

    pba_buffer_free(read->buffer, read->room);
    pba_job_file_unref(read->file);
    g_free(read);
}

static bool start_read(PbaSource *source, PbaPiece *piece, GError **error)
{
    FileSource *self = (FileSource *)source;
    FileRead *read = g_new(FileRead, 1);

    (void)error;
    *read = (FileRead){
        .job = {.run = run_read, .done = read_done, .leave = leave_read},
        .file = pba_job_file_ref(self->file),
        .piece = piece,
        .buffer = piece->buffer,
        .room = piece->room,
        .offset = piece->offset,
        .length = piece->length,
    };
    pba_pool_submit(self->pool, &read->job);
    return true;
}

static void run_trim(PbaJob *job)
{
    FileTrim *trim = (FileTrim *)job;
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    int result;

    do {
        result = fallocate(trim->file->fd, mode, (off_t)trim->range.begin,
                           (off_t)(trim->range.end - trim->range.begin));
    } while (result == -1 && errno == EINTR);
    trim->error = result == 0 ? 0 : errno;
}

static void leave_trim(PbaJob *job)
{
    FileTrim *trim = (FileTrim *)job;

    pba_job_file_unref(trim->file);
    g_free(trim);
}

static void trim_done(PbaJob *job)
{
    FileTrim *trim = (FileTrim *)job;

    pba_source_trimmed(trim->source, trim->range, trim->error);
    leave_trim(job);
}

static bool start_trim(PbaSource *source, PbaRange range, GError **error)
{
    FileSource *self = (FileSource *)source;
    FileTrim *trim = g_new(FileTrim, 1);

    (void)error;
    *trim = (FileTrim){
        .job = {.run = run_trim, .done = trim_done, .leave = leave_trim},
        .file = pba_job_file_ref(self->file),
        .source = source,
        .range = range,
    };
    pba_pool_submit(self->pool, &trim->job);
    return true;
}

static bool open_file(PbaSource *source, unsigned connections, PbaLoop *loop, GError **error)
{
    FileSource *self = (FileSource *)source;

    (void)connections;
    source->can_discard = true;
    self->pool = pba_loop_pool(loop, THREADS, error);
    if (!self->pool) {
        return false;
    }
    int fd = fcntl(pba_handle_fd(source->volume), F_DUPFD_CLOEXEC, 0);
    if (fd == -1) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "cannot use the file handle - %s",
                      g_strerror(errno));
        return false;
    }
    self->file = pba_job_file_new(fd);
    return true;
}

/* If a reader must not skip anything, a virtual file reports no holes: see src/vfile. */
static PbaHoles *new_holes(PbaSource *source, uint32_t align)
{
    const FileSource *self = (const FileSource *)source;

    return pba_holes_new_file(self->file->fd, self->pool, align);
}

static void close_source(PbaSource *source, bool broken)
{
    FileSource *self = (FileSource *)source;

    (void)broken;
    g_clear_pointer(&self->file, pba_job_file_unref);
}

const PbaSourceKind pba_source_file = {
    .reader = &pba_handle_reader,
    .size = sizeof(FileSource),
    .open = open_file,
    .read = start_read,
    .trim = start_trim,
    .new_holes = new_holes,
    .close = close_source,
    .keeps_buffers = true,
};
