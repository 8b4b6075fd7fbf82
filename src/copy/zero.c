/* Finding zeroes, for holes in the target. */
#include "copy.h"
#include <string.h>

#define BLOCK 4096u
#define PROBE 16u

/* Comparing the data with itself, one step on, is as fast as memcmp() is. */
static bool is_zero(const char *data, size_t length)
{
    static const char zeroes[PROBE];

    if (length < PROBE) {
        return memcmp(data, zeroes, length) == 0;
    }
    return memcmp(data, zeroes, PROBE) == 0 && memcmp(data, data + PROBE, length - PROBE) == 0;
}

size_t pba_piece_run(const PbaPiece *piece, size_t at, bool *zero)
{
    const char *data = piece->data + at;
    size_t length = piece->length - at;
    size_t run = MIN(length, BLOCK - (piece->offset + at) % BLOCK);

    if (piece->holes == piece->length) {
        *zero = true;
        return length;
    }
    *zero = is_zero(data, run);
    while (run < length) {
        size_t block = MIN(length - run, BLOCK);
        if (is_zero(data + run, block) != *zero) {
            break;
        }
        run += block;
    }
    return run;
}
