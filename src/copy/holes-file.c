/* Zeroes of a file: its holes (lseek(2): SEEK_HOLE, SEEK_DATA). A thread asks for them, because a
 * virtual file needs its server for an answer. */
#define _GNU_SOURCE /* SEEK_HOLE */
#include "holes.h"
#include "src/base/base.h"
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

typedef struct FileHoles FileHoles;

typedef struct {
    PbaJob job;
    FileHoles *holes; /* for done */
    PbaJobFile *file;
    uint64_t begin; /* where to look, and then the hole; empty: there is none */
    uint64_t end;
} Seek;

struct FileHoles {
    PbaHoles holes;
    PbaPool *pool;
    PbaJobFile *file; /* a description of its own: the caller's keeps its offset */
    uint64_t at;      /* where to look next */
    bool is_seeking;  /* a thread does */
    bool has_hole;    /* it has found found */
    PbaRange found;
};

/* After an error, everything is read. */
static void run_seek(PbaJob *job)
{
    Seek *seek = (Seek *)job;
    off_t hole = lseek(seek->file->fd, (off_t)seek->begin, SEEK_HOLE);
    off_t data = hole < 0 ? -1 : lseek(seek->file->fd, hole, SEEK_DATA);
    bool at_end = hole >= 0 && data < 0 && errno == ENXIO;
    bool is_hole = hole >= (off_t)seek->begin && (data > hole || at_end);

    seek->begin = is_hole ? MIN((uint64_t)hole, seek->end) : seek->end;
    seek->end = is_hole && !at_end ? MIN((uint64_t)data, seek->end) : seek->end;
}

static void leave_seek(PbaJob *job)
{
    pba_job_file_unref(((Seek *)job)->file);
    g_free(job);
}

static void seek_done(PbaJob *job)
{
    const Seek *seek = (const Seek *)job;

    seek->holes->is_seeking = false;
    seek->holes->has_hole = true;
    seek->holes->found = (PbaRange){seek->begin, seek->end};
    leave_seek(job);
}

static void start_seek(FileHoles *holes)
{
    Seek *seek = g_new(Seek, 1);

    *seek = (Seek){
        .job = {.run = run_seek, .done = seek_done, .leave = leave_seek},
        .holes = holes,
        .file = pba_job_file_ref(holes->file),
        .begin = holes->at,
        .end = holes->holes.end,
    };
    holes->is_seeking = true;
    pba_pool_submit(holes->pool, &seek->job);
}

static bool begin_region(PbaHoles *base)
{
    FileHoles *holes = (FileHoles *)base;

    holes->has_hole = false;
    holes->at = base->begin;
    return !holes->is_seeking;
}

static PbaHoleAnswer find_in_file(PbaHoles *base, uint64_t *offset, uint64_t *length)
{
    FileHoles *holes = (FileHoles *)base;

    if (!holes->has_hole) {
        if (!holes->is_seeking) {
            start_seek(holes);
        }
        return PBA_HOLE_LATER;
    }
    holes->has_hole = false;
    holes->at = holes->found.end;
    *offset = holes->found.begin;
    *length = holes->found.end - holes->found.begin;
    return *length > 0 ? PBA_HOLE_FOUND : PBA_HOLE_NONE;
}

static void free_file_holes(PbaHoles *base)
{
    FileHoles *holes = (FileHoles *)base;

    pba_job_file_unref(holes->file);
    g_free(holes);
}

static const PbaHolesKind file_holes = {
    .begin = begin_region,
    .find = find_in_file,
    .free = free_file_holes,
};

PbaHoles *pba_holes_new_file(int fd, PbaPool *pool, uint32_t align)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    int own = open(path, O_RDONLY | O_CLOEXEC);

    if (own < 0) {
        return NULL;
    }
    FileHoles *holes = g_new0(FileHoles, 1);
    holes->holes = (PbaHoles){.kind = &file_holes, .align = align};
    holes->pool = pool;
    holes->file = pba_job_file_new(own);
    return &holes->holes;
}
