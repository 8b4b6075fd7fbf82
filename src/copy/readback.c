/* Reads written data back from the target during the copy, and compares digests.
 *
 * Each piece is read back into its own buffer once the target has acknowledged all of it, in the
 * parts in which it was written. Unchanged parts, which were not written, are not read. So the
 * pieces limit memory and requests in flight, the volume's snapshot is kept until the data is
 * checked, and there is no second pass. If later writes to other ranges change a range, this is not
 * detected. */
#include "readback.h"
#include "src/base/base.h"
#include <errno.h>
#include <inttypes.h>
#include <string.h>

/* The number of ranges in a message. */
#define MOST_SHOWN 8u

struct PbaReadback {
    PbaSink *sink;          /* borrowed, as the next two */
    PbaLoop *loop;          /* whose pool hashes */
    PbaDigests *digests;    /* that were taken on the way */
    PbaSource *source;      /* owned: the sink's connection, read as any volume */
    PbaHoles *holes;        /* owned; NULL: zeroes have to be read */
    const PbaPiece *asking; /* about holes; NULL: none is */
    uint32_t request;
};

struct PbaReadbackJob {
    PbaJob job;
    PbaDigests *digests; /* a reference */
    PbaPiece *piece;
    char *buffer; /* the piece's, as for digest.c */
    size_t room;
    const char *data; /* NULL: all of it is zeroes */
    uint32_t length;
    size_t size;     /* of each of these */
    uint8_t *wanted; /* a digest for each block */
    uint8_t *found;
    bool failed;
};

/* In a thread */

static void run_job(PbaJob *job)
{
    struct PbaReadbackJob *self = (struct PbaReadbackJob *)job;

    self->failed = !pba_digests_compute(self->digests, self->data, self->length, self->found);
}

static void free_job(struct PbaReadbackJob *self)
{
    pba_digests_unref(self->digests);
    g_free(self->wanted);
    g_free(self->found);
    g_free(self);
}

/* The job owns the piece's buffer now. */
static void leave_job(PbaJob *job)
{
    struct PbaReadbackJob *self = (struct PbaReadbackJob *)job;

    pba_buffer_free(self->buffer, self->room);
    free_job(self);
}

/* In the copy's thread */

static void job_done(PbaJob *job)
{
    struct PbaReadbackJob *self = (struct PbaReadbackJob *)job;

    self->piece->back = self;
    self->piece->state = PBA_PIECE_HASHED;
}

void pba_readback_forget(PbaPiece *piece)
{
    if (piece->back) {
        free_job(g_steal_pointer(&piece->back));
    }
}

static void hash_part(const PbaReadback *readback, PbaPiece *piece)
{
    uint32_t block = pba_digests_block(readback->digests);
    struct PbaReadbackJob *self = g_new0(struct PbaReadbackJob, 1);

    self->job = (PbaJob){.run = run_job, .done = job_done, .leave = leave_job};
    self->digests = pba_digests_ref(readback->digests);
    self->piece = piece;
    self->buffer = piece->buffer;
    self->room = piece->room;
    self->data = piece->holes == piece->seen ? NULL : piece->data;
    self->length = piece->length;
    self->size = pba_whole_blocks(piece->length, block) / block * PBA_DIGEST_SIZE;
    self->wanted = g_memdup2(pba_digests_values(piece), self->size);
    self->found = g_malloc(self->size);
    piece->state = PBA_PIECE_HASHING;
    pba_pool_submit(readback->loop->pool, &self->job);
}

/* A target with larger blocks gets whole blocks at the volume's end. What it has beyond that end is
 * not compared. */
static bool read_part(PbaReadback *readback, PbaPiece *piece, GError **error)
{
    piece->length =
        (uint32_t)pba_whole_blocks(MIN(piece->length, readback->request), readback->source->align);
    piece->data = piece->buffer;
    piece->seen = piece->holes = 0;
    piece->state = PBA_PIECE_READING;
    if (pba_source_read(readback->source, piece, error)) {
        return true;
    }
    g_autofree char *hint = g_strdup_printf("the error is at the target %s", readback->sink->name);
    pba_error_add_hint(error, hint);
    return false;
}

static bool after_read(const PbaReadback *readback, PbaPiece *piece, GError **error)
{
    uint64_t end = piece->whole_offset + piece->whole_length;

    if (piece->error) {
        pba_error_set(error, readback->sink->error_code,
                      "reading back %" PRIu32 " bytes at offset %" PRIu64 " from %s failed - %s",
                      piece->length, piece->offset, readback->sink->name, g_strerror(piece->error));
        return false;
    }
    piece->length = (uint32_t)MIN(piece->length, end - piece->offset);
    hash_part(readback, piece);
    return true;
}

static bool is_good(const struct PbaReadbackJob *job, size_t at)
{
    return memcmp(job->wanted + at, job->found + at, PBA_DIGEST_SIZE) == 0;
}

/* Sets an error that names the ranges that differ. Returns false. */
static bool tell_damage(const PbaReadback *readback, const PbaPiece *piece, GError **error)
{
    const struct PbaReadbackJob *job = piece->back;
    uint32_t block = pba_digests_block(readback->digests);
    g_autoptr(GString) places = g_string_new(NULL);
    uint64_t bytes = 0;
    unsigned ranges = 0;

    for (uint64_t at = 0, run = 0; at < piece->length; at += block) {
        size_t slot = at / block * PBA_DIGEST_SIZE;
        if (is_good(job, slot)) {
            continue;
        }
        uint64_t length = MIN(block, piece->length - at);
        run += length;
        bytes += length;
        if (slot + PBA_DIGEST_SIZE < job->size && !is_good(job, slot + PBA_DIGEST_SIZE)) {
            continue; /* it goes on */
        }
        if (ranges++ < MOST_SHOWN) {
            g_string_append_printf(places, "%s%" PRIu64 " at offset %" PRIu64,
                                   ranges > 1 ? ", " : "", run, piece->offset + at + length - run);
        }
        run = 0;
    }
    if (ranges > MOST_SHOWN) {
        g_string_append_printf(places, " and %u more", ranges - MOST_SHOWN);
    }
    pba_error_set(error, PBA_ERROR_CONTENT,
                  "the target lacks what was written to it - %" PRIu64
                  " bytes differ from what was read from the guest: %s",
                  bytes, places->str);
    return false;
}

static bool after_hashed(const PbaReadback *readback, PbaPiece *piece,
                         PbaCopyStatistics *statistics, GError **error)
{
    const struct PbaReadbackJob *job = piece->back;
    bool good = !job->failed && memcmp(job->wanted, job->found, job->size) == 0;

    if (job->failed) {
        pba_error_set(error, PBA_ERROR_SYSTEM, "digests: libcrypto failed - %s",
                      g_strerror(ENOMEM));
    } else if (!good) {
        tell_damage(readback, piece, error);
    }
    pba_readback_forget(piece);
    statistics->bytes_checked += good ? piece->length : 0;
    piece->state = PBA_PIECE_WRITTEN;
    return good;
}

/* Large zeroes in a thin target are not read: the target reports them, as it will for a restore.
 * One piece asks at a time. Zeroes that were read as data are handled like data. */
static PbaNext ask(PbaReadback *readback, PbaPiece *piece, uint64_t *length)
{
    *length = piece->length;
    if (!readback->holes || !piece->is_zeroes) {
        return PBA_NEXT_DATA;
    }
    if (readback->asking && readback->asking != piece) {
        return PBA_NEXT_LATER;
    }
    if (!readback->asking) {
        pba_holes_begin(readback->holes, piece->offset, piece->length);
        readback->asking = piece;
    }
    PbaNext next = pba_holes_next(readback->holes, piece->offset, length);
    if (next != PBA_NEXT_LATER) {
        readback->asking = NULL;
    }
    return next;
}

/* In the state WRITTEN, the next part must be found; in READY, there is one. */
static bool begin_part(PbaReadback *readback, PbaPiece *piece, PbaCopyStatistics *statistics,
                       bool *done, GError **error)
{
    while (piece->state == PBA_PIECE_WRITTEN || piece->state == PBA_PIECE_READY) {
        uint64_t length;
        if (piece->state == PBA_PIECE_WRITTEN) {
            *done = !pba_digests_next_part(piece, readback->sink->align);
            piece->state = PBA_PIECE_READY;
        }
        PbaNext next = *done ? PBA_NEXT_NOTHING : ask(readback, piece, &length);
        if (next == PBA_NEXT_NOTHING || next == PBA_NEXT_LATER) {
            return true;
        }
        piece->length = (uint32_t)MIN(length, piece->length);
        if (next == PBA_NEXT_DATA) {
            return read_part(readback, piece, error);
        }
        statistics->bytes_checked += piece->length;
        piece->state = PBA_PIECE_WRITTEN;
    }
    return true;
}

void pba_readback_begin(PbaPiece *piece)
{
    piece->is_back = true;
    piece->offset = piece->whole_offset;
    piece->length = 0;
    piece->data = piece->buffer;
    piece->state = PBA_PIECE_WRITTEN;
}

bool pba_readback_move(PbaReadback *readback, PbaPiece *piece, PbaCopyStatistics *statistics,
                       bool *done, GError **error)
{
    return (piece->state != PBA_PIECE_READ || after_read(readback, piece, error)) &&
           (piece->state != PBA_PIECE_HASHED || after_hashed(readback, piece, statistics, error)) &&
           begin_part(readback, piece, statistics, done, error);
}

PbaReadback *pba_readback_new(PbaSink *sink, PbaDigests *digests, PbaLoop *loop, uint32_t request,
                              GError **error)
{
    PbaReadback *readback = g_new0(PbaReadback, 1);

    readback->sink = sink;
    readback->loop = loop;
    readback->digests = digests;
    readback->request = request;
    readback->source = pba_source_open(&sink->back->volume, 1, loop, error);
    if (!readback->source) {
        g_free(readback);
        return NULL;
    }
    if (sink->back->context) {
        readback->holes =
            pba_holes_new_nbd(sink->back, MAX(pba_digests_block(digests), sink->align));
    }
    return readback;
}

void pba_readback_free(PbaReadback *readback, bool broken)
{
    if (readback) {
        pba_holes_free(readback->holes);
        pba_source_close(readback->source, broken);
        g_free(readback);
    }
}
