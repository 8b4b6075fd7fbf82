/* The volume's side of a copy where that is a file handle: threads read and discard. */
#define _GNU_SOURCE /* fallocate() */
#include "copy.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <unistd.h>

/* A discard under way. */
struct PbaFileTrim {
    PbaJob job;
    PbaSource *source;
    PbaRange range;
    int fd;
    int error;
    PbaFileTrim *next;
};

static void run_read(PbaJob *job)
{
    PbaPiece *piece = (PbaPiece *)job;

    while (piece->seen < piece->length) {
        uint64_t offset = piece->offset + piece->seen;
        ssize_t count =
            pread(piece->fd, piece->data + piece->seen, piece->length - piece->seen, (off_t)offset);
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            pba_piece_fail(piece, count == 0 ? ENODATA : errno, offset);
            return;
        }
        piece->seen += (uint32_t)count;
    }
}

static void read_done(PbaJob *job)
{
    ((PbaPiece *)job)->state = PBA_PIECE_READ;
}

void pba_source_file_read(PbaSource *source, PbaPiece *piece)
{
    piece->fd = pba_handle_fd(source->volumes[0]->handle);
    piece->job = (PbaJob){.run = run_read, .done = read_done};
    pba_pool_submit(source->pool, &piece->job);
}

static void run_trim(PbaJob *job)
{
    PbaFileTrim *trim = (PbaFileTrim *)job;
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    int result;

    do {
        result = fallocate(trim->fd, mode, (off_t)trim->range.begin,
                           (off_t)(trim->range.end - trim->range.begin));
    } while (result == -1 && errno == EINTR);
    trim->error = result == 0 ? 0 : errno;
}

static void trim_done(PbaJob *job)
{
    PbaFileTrim *trim = (PbaFileTrim *)job;
    PbaFileTrim **place = &trim->source->file_trims;

    while (*place != trim) {
        place = &(*place)->next;
    }
    *place = trim->next;
    pba_source_trimmed(trim->source, trim->range, trim->error);
    g_free(trim);
}

void pba_source_file_trim(PbaSource *source, PbaRange range)
{
    PbaFileTrim *trim = g_new(PbaFileTrim, 1);

    *trim = (PbaFileTrim){
        .job = {.run = run_trim, .done = trim_done},
        .source = source,
        .range = range,
        .fd = pba_handle_fd(source->volumes[0]->handle),
        .next = source->file_trims,
    };
    source->file_trims = trim;
    pba_pool_submit(source->pool, &trim->job);
}

void pba_source_file_close(PbaSource *source)
{
    while (source->file_trims) {
        PbaFileTrim *trim = source->file_trims;
        source->file_trims = trim->next;
        g_free(trim);
    }
}
