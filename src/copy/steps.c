/* The steps of a copy's pieces: read, hashed, written, read back, released for discarding. Each
 * step is started here; completions say when it is done. */
#include "steps.h"
#include "src/base/base.h"
#include <errno.h>
#include <string.h>

/* If the caller has a function for it, the copy continues after data that cannot be read. */
static bool pass_over(const PbaCopy *copy, PbaPiece *piece, GError **error)
{
    const PbaCopyOptions *options = copy->options;
    PbaCopyDamaged tell = options->unreadable ? options->unreadable : options->damaged;

    if (!tell || (piece->error != EIO && piece->error != EINVAL)) {
        return pba_piece_explain(piece, copy->volume, copy->sink, error);
    }
    piece->error = 0;
    memset(piece->data, 0, piece->length);
    piece->state = PBA_PIECE_READY;
    copy->statistics->bytes_damaged += piece->length;
    if (!tell(options->opaque, piece->offset, piece->length)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "the function for damage failed");
        return false;
    }
    return pba_loop_check_owner(&copy->loop, error);
}

static bool after_read(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    copy->steps++;
    if (piece->error) {
        return pass_over(copy, piece, error);
    }
    piece->state = PBA_PIECE_READY;
    if (copy->digests) {
        pba_digests_begin(copy->digests, copy->loop.pool, piece);
    }
    return true;
}

static bool is_early(const PbaCopy *copy, const PbaPiece *piece)
{
    return copy->sink->ordered && piece->sequence != copy->next_write;
}

static bool after_hashed(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    if (is_early(copy, piece)) {
        return true; /* its turn comes */
    }
    copy->steps++;
    piece->state = PBA_PIECE_READY;
    if (!pba_digests_tell(copy->digests, piece, copy->options, copy->statistics, error) ||
        !pba_loop_check_owner(&copy->loop, error)) {
        return false;
    }
    piece->length = 0;
    pba_digests_next_part(piece, copy->sink->align);
    return true;
}

static bool write_piece(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    if (is_early(copy, piece) ||
        pba_piece_is_beside_write(piece, copy->pieces, copy->piece_count, copy->sink->block)) {
        return true;
    }
    copy->steps++;
    if (piece->length == 0) { /* all of it is unchanged */
        piece->state = PBA_PIECE_WRITTEN;
        return true;
    }
    piece->state = PBA_PIECE_WRITING;
    return copy->sink->write(copy->sink, piece, error) && pba_loop_check_owner(&copy->loop, error);
}

static bool finish_piece(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    copy->next_write++;
    copy->done += piece->whole_length;
    copy->statistics->bytes_read += piece->whole_length;
    copy->statistics->bytes_unchanged += piece->whole_length - piece->written;
    pba_digests_forget(piece);
    piece->is_back = false;
    piece->state = PBA_PIECE_FREE;
    copy->used--;
    return !(copy->options->discard && copy->source->can_discard) ||
           pba_source_release(copy->source, piece->whole_offset, piece->whole_length, error);
}

static bool after_written(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    PbaCopyStatistics *statistics = copy->statistics;

    copy->steps++;
    if (piece->error) {
        return pba_piece_explain(piece, copy->volume, copy->sink, error);
    }
    if (piece->again) {
        piece->again = false;
        piece->state = PBA_PIECE_WRITING;
        return copy->sink->write(copy->sink, piece, error);
    }
    piece->written += piece->length;
    statistics->bytes_zero += piece->zero;
    statistics->bytes_written += piece->length - piece->zero;
    piece->zero = 0;
    copy->last_event = g_get_monotonic_time();
    if (pba_digests_next_part(piece, copy->sink->align)) {
        piece->state = PBA_PIECE_READY;
        return true;
    }
    if (copy->readback && piece->digests) { /* what could not be read has none */
        pba_readback_begin(piece);
        return true;
    }
    return finish_piece(copy, piece, error);
}

static bool read_back(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    PbaPieceState before = piece->state;
    bool done = false;

    if (!pba_readback_move(copy->readback, piece, copy->statistics, &done, error)) {
        return false;
    }
    if (done) {
        copy->steps++;
        return finish_piece(copy, piece, error);
    }
    if (piece->state != before) {
        copy->steps++;
        copy->last_event = g_get_monotonic_time();
    }
    return true;
}

/* A hashed piece is written before anything else is reported. */
static bool move_piece(PbaCopy *copy, PbaPiece *piece, GError **error)
{
    if (piece->is_back) {
        return read_back(copy, piece, error);
    }
    return (piece->state != PBA_PIECE_READ || after_read(copy, piece, error)) &&
           (piece->state != PBA_PIECE_HASHED || after_hashed(copy, piece, error)) &&
           (piece->state != PBA_PIECE_READY || write_piece(copy, piece, error)) &&
           (piece->state != PBA_PIECE_WRITTEN || after_written(copy, piece, error));
}

/* A piece that waited for another one may continue after that one's step. */
bool pba_copy_move_pieces(PbaCopy *copy, GError **error)
{
    uint64_t before;

    do {
        before = copy->steps;
        for (unsigned i = 0; i < copy->piece_count; i++) {
            if (!move_piece(copy, &copy->pieces[i], error)) {
                return false;
            }
        }
    } while (copy->steps != before);
    return pba_source_check_trims(copy->source, error);
}
