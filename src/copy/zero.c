/* Finds zeroes, which become holes in the target. */
#include "copy.h"
#include <string.h>

#define PROBE 16u

/* Compares the data with itself, shifted by one step, at the speed of memcmp(). */
bool pba_is_zero(const char *data, size_t length)
{
    static const char zeroes[PROBE];

    if (length < PROBE) {
        return memcmp(data, zeroes, length) == 0;
    }
    return memcmp(data, zeroes, PROBE) == 0 && memcmp(data, data + PROBE, length - PROBE) == 0;
}

/* The part of a block that starts at the offset at. */
static size_t measure_block(const PbaPiece *piece, size_t at, const PbaBlocks *blocks, bool *zero)
{
    uint64_t offset = piece->offset + at;
    size_t length = MIN(piece->length - at, blocks->size - offset % blocks->size);
    bool whole =
        length == blocks->size || (offset % blocks->size == 0 && offset + length == blocks->end);

    *zero = (whole || !blocks->whole) &&
            (piece->holes == piece->length || pba_is_zero(piece->data + at, length));
    return length;
}

size_t pba_piece_run(const PbaPiece *piece, size_t at, const PbaBlocks *blocks, bool *zero)
{
    size_t run = measure_block(piece, at, blocks, zero);

    while (at + run < piece->length) {
        bool next_zero;
        size_t next = measure_block(piece, at + run, blocks, &next_zero);
        if (next_zero != *zero) {
            break;
        }
        run += next;
    }
    return run;
}
