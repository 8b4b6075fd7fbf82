/* Reading and discarding over NBD, one request at a time. */
#include "src/base/base.h"
#include "volume.h"
#include <errno.h>
#include <inttypes.h>
#include <string.h>

/* Flags of the context qemu:dirty-bitmap (QEMU: docs/interop/nbd). */
#define STATE_DIRTY 1u

/* Waits for one request. A lost connection ends the volume; a refused request does not. */
static bool finish_request(PbaNbdVolume *nbd, int64_t cookie, const char *what, GError **error)
{
    gint64 deadline = pba_deadline(PBA_NBD_LIMIT_S);
    GError *local = NULL;
    int state = -1;

    while (cookie >= 0 && (state = nbd_aio_command_completed(nbd->handle, (uint64_t)cookie)) == 0) {
        if (!pba_nbd_turn(nbd, deadline, what, &local)) {
            break;
        }
    }
    if (state == 1) {
        return true;
    }
    if (!local) {
        pba_nbd_set_error(nbd, what, &local);
    }
    if (local->code != PBA_ERROR_INTERRUPTED && pba_nbd_is_lost(nbd)) {
        pba_volume_break(&nbd->volume, local);
    }
    if (state == 0) {
        pba_nbd_disconnect(nbd); /* the request still refers to the caller's memory */
    }
    g_propagate_error(error, local);
    return false;
}

static bool read_piece(PbaNbdVolume *nbd, void *buffer, uint64_t offset, uint64_t length,
                       GError **error)
{
    g_autofree char *what =
        g_strdup_printf("reading %" PRIu64 " bytes at offset %" PRIu64, length, offset);
    int64_t cookie =
        nbd_aio_pread(nbd->handle, buffer, (size_t)length, offset, NBD_NULL_COMPLETION, 0);

    if (finish_request(nbd, cookie, what, error)) {
        return true;
    }
    if (nbd_get_errno() == EINVAL && !pba_nbd_is_lost(nbd)) {
        pba_error_add_hint(error, PBA_HINT_UNREADABLE);
    }
    return false;
}

/* Reads all blocks that the range touches, and returns the range. */
static bool read_blocks(PbaNbdVolume *nbd, char *buffer, uint64_t offset, uint64_t length,
                        GError **error)
{
    uint32_t block = nbd->volume.sizes.block;
    uint64_t begin = offset / block * block;
    uint64_t end = pba_whole_blocks(offset + length, block); /* the export ends with a block */
    g_autofree char *blocks = g_malloc(MIN(end - begin, nbd->volume.sizes.request));

    for (uint64_t at = begin; at < end;) {
        uint64_t size = pba_nbd_unit(nbd, at, end - at);
        if (!read_piece(nbd, blocks, at, size, error)) {
            return false;
        }
        uint64_t from = MAX(at, offset);
        uint64_t to = MIN(at + size, offset + length);
        memcpy(buffer + (from - offset), blocks + (from - at), to - from);
        at += size;
    }
    return true; // NOLINT(clang-analyzer-unix.Malloc): blocks is freed by g_autofree
}

static bool read_range(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                       GError **error)
{
    PbaNbdVolume *nbd = (PbaNbdVolume *)volume;

    if (!pba_nbd_connect(nbd, error)) {
        return false;
    }
    if ((offset | length) % volume->sizes.block != 0) {
        return read_blocks(nbd, buffer, offset, length, error);
    }
    for (uint64_t done = 0; done < length;) {
        uint64_t size = pba_nbd_unit(nbd, offset + done, length - done);
        if (!read_piece(nbd, (char *)buffer + done, offset + done, size, error)) {
            return false;
        }
        done += size;
    }
    return true;
}

static bool discard_range(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error)
{
    PbaNbdVolume *nbd = (PbaNbdVolume *)volume;
    g_autofree char *what =
        g_strdup_printf("discarding %" PRIu64 " bytes at offset %" PRIu64, length, offset);
    if (!pba_nbd_connect(nbd, error)) {
        return false;
    }
    int64_t cookie = nbd_aio_trim(nbd->handle, length, offset, NBD_NULL_COMPLETION, 0);
    return finish_request(nbd, cookie, what, error);
}

/* Without a bitmap, the rest of the volume is one region. */
static bool next_region(PbaVolume *volume, PbaMap *base, uint64_t *offset, uint64_t *length,
                        bool *later, GError **error)
{
    PbaNbdMap *map = (PbaNbdMap *)base;

    if (((PbaNbdVolume *)volume)->context) {
        return pba_nbd_map_next(map, offset, length, later, error);
    }
    *offset = map->asked;
    *length = map->end - map->asked;
    map->asked = map->end;
    return true;
}

static PbaMap *new_map(PbaVolume *volume, uint64_t begin)
{
    PbaNbdMap *map = pba_nbd_map_new((PbaNbdVolume *)volume, STATE_DIRTY, begin, volume->size);

    map->map.reader = &pba_nbd_reader;
    return &map->map;
}

static void free_map(PbaMap *map)
{
    pba_nbd_map_free((PbaNbdMap *)map);
}

PbaNbdMap *pba_nbd_zeroes(PbaNbdVolume *nbd, uint64_t begin, uint64_t end)
{
    PbaNbdMap *map = pba_nbd_map_new(nbd, LIBNBD_STATE_ZERO, begin, end);

    map->map.reader = &pba_nbd_reader;
    return map;
}

static void free_nbd(PbaVolume *volume)
{
    PbaNbdVolume *nbd = (PbaNbdVolume *)volume;

    pba_nbd_disconnect(nbd);
    g_free(nbd->path);
    g_free(nbd->context);
}

const PbaReader pba_nbd_reader = {
    .pread = read_range,
    .discard = discard_range,
    .new_map = new_map,
    .free_map = free_map,
    .next_region = next_region,
    .free = free_nbd,
    .error_code = PBA_ERROR_NBD,
    .unreadable = EINVAL,
};
