/* The state of pieces and discards in flight. */
#include "copy.h"
#include "src/base/base.h"
#include <inttypes.h>

void pba_piece_begin(PbaPiece *piece, uint64_t offset, uint32_t length, char *zeroes)
{
    piece->offset = piece->whole_offset = offset;
    piece->length = piece->whole_length = length;
    piece->written = 0;
    piece->is_zeroes = zeroes != NULL;
    piece->data = zeroes ? zeroes : piece->buffer;
    piece->seen = piece->holes = zeroes ? length : 0;
    piece->zero = 0;
    piece->error = 0;
    piece->state = zeroes ? PBA_PIECE_READ : PBA_PIECE_READING;
}

void pba_piece_fail(PbaPiece *piece, int error, uint64_t offset)
{
    if (!piece->error) {
        piece->error = error;
        piece->error_offset = offset;
    }
}

bool pba_piece_explain(const PbaPiece *piece, const PbaVolume *volume, const PbaSink *sink,
                       GError **error)
{
    const char *text = g_strerror(piece->error);
    uint32_t length = piece->length - (uint32_t)(piece->error_offset - piece->offset);

    if (piece->state == PBA_PIECE_WRITTEN) {
        pba_error_set(error, sink->error_code,
                      "writing %" PRIu32 " bytes at offset %" PRIu64 " to %s failed - %s", length,
                      piece->error_offset, sink->name, text);
        return false;
    }
    pba_error_set(error, volume->reader->error_code,
                  "reading %" PRIu32 " bytes at offset %" PRIu64 " failed - %s", length,
                  piece->error_offset, text);
    if (piece->error == volume->reader->unreadable) {
        pba_error_add_hint(error, PBA_HINT_UNREADABLE);
    }
    return false;
}

bool pba_piece_is_beside_write(const PbaPiece *piece, const PbaPiece *pieces, unsigned count,
                               uint64_t block)
{
    for (unsigned i = 0; block && piece->length > 0 && i < count; i++) {
        const PbaPiece *other = &pieces[i];
        bool busy = other->state == PBA_PIECE_WRITING || other->state == PBA_PIECE_WRITTEN;
        if (busy && other->length > 0 &&
            other->offset / block <= (piece->offset + piece->length - 1) / block &&
            piece->offset / block <= (other->offset + other->length - 1) / block) {
            return true;
        }
    }
    return false;
}

void pba_source_trimmed(PbaSource *source, PbaRange range, int error)
{
    source->trimming--;
    if (!error) {
        /* QEMU with commit 507175197b does not discard the volume's last, partial cluster. */
        source->discarded +=
            range.end / source->trims.cluster * source->trims.cluster - range.begin;
    } else if (!source->trim_error) {
        source->trim_error = error;
        source->trim_error_range = range;
    }
}
