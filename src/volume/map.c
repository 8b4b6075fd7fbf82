/* Iterates over the runs of extents that have a flag (NBD spec: NBD_CMD_BLOCK_STATUS): the dirty
 * regions of a qemu:dirty-bitmap context, or the zeroes of base:allocation.
 *
 * The map is requested in chunks, several of which are in flight. If a server answers for less than
 * was requested, the rest is requested again. Any other incomplete answer is an error, because
 * "nothing more is dirty" would lose data. */
#include "src/base/base.h"
#include "volume.h"
#include <inttypes.h>
#include <string.h>

/* The first region is needed soon; later chunks are as large as the server's answers and a request
 * allow: under 4 GiB. */
#define FIRST_CHUNK (UINT64_C(256) << 20)
#define MAX_CHUNK (UINT64_C(2) << 30)
#define MIN_CHUNK (UINT64_C(1) << 20)
/* QEMU answers with at most 131,072 extents (NBD_MAX_BLOCK_STATUS_EXTENTS, 7.2 to 11.0); stay well
 * below. */
#define MANY_NUMBERS (UINT64_C(2) * 32768)

PbaNbdMap *pba_nbd_map_new(PbaNbdVolume *nbd, uint32_t flag, uint64_t begin, uint64_t end)
{
    PbaNbdMap *map = g_new0(PbaNbdMap, 1);

    map->nbd = nbd;
    map->flag = flag;
    map->asked = begin;
    map->end = end;
    map->chunk_size = FIRST_CHUNK;
    map->connection = nbd->connection;
    for (unsigned i = 0; i < PBA_MAP_DEPTH; i++) {
        map->chunks[i].map = map;
    }
    return map;
}

void pba_nbd_map_free(PbaNbdMap *map)
{
    if (!map) {
        return;
    }
    if (!pba_nbd_map_is_idle(map)) {
        pba_nbd_disconnect(map->nbd);
    }
    for (unsigned i = 0; i < PBA_MAP_DEPTH; i++) {
        g_free(map->chunks[i].extents);
    }
    g_free(map);
}

bool pba_nbd_map_is_idle(const PbaNbdMap *map)
{
    bool is_idle = true;

    for (unsigned i = 0; i < PBA_MAP_DEPTH; i++) {
        is_idle &= map->chunks[i].state != PBA_CHUNK_ASKED;
    }
    return is_idle || map->connection != map->nbd->connection;
}

/* Requests over a lost connection must be sent again. */
static void forget_lost_requests(PbaNbdMap *map)
{
    if (map->connection == map->nbd->connection) {
        return;
    }
    map->connection = map->nbd->connection;
    for (unsigned i = 0; i < PBA_MAP_DEPTH; i++) {
        PbaMapChunk *chunk = &map->chunks[i];
        if (chunk->state == PBA_CHUNK_ASKED) {
            chunk->state = PBA_CHUNK_TO_ASK;
        }
    }
}

static int on_extents(void *opaque, const char *context, uint64_t offset, uint32_t *entries,
                      size_t count, int *error)
{
    PbaMapChunk *chunk = opaque;

    if (*error || strcmp(context, chunk->map->nbd->context) != 0 || offset != chunk->offset) {
        return 0;
    }
    if (count > chunk->capacity) {
        chunk->extents = g_renew(uint32_t, chunk->extents, count);
        chunk->capacity = count;
    }
    memcpy(chunk->extents, entries, count * sizeof(*entries));
    chunk->count = count;
    return 0;
}

static int on_answered(void *opaque, int *error)
{
    PbaMapChunk *chunk = opaque;

    /* When a connection is closed, libnbd 1.22 completes the requests in flight: that is no
     * answer. */
    if (chunk->map->nbd->handle) {
        chunk->error = *error;
        chunk->state = PBA_CHUNK_ANSWERED;
    }
    return 1; /* retire the command */
}

static bool send_chunk(PbaNbdVolume *nbd, PbaMapChunk *chunk, GError **error)
{
    chunk->state = PBA_CHUNK_ASKED;
    chunk->error = 0;
    chunk->count = 0;
    chunk->next = 0;
    if (nbd_aio_block_status(nbd->handle, chunk->length, chunk->offset,
                             (nbd_extent_callback){.callback = on_extents, .user_data = chunk},
                             (nbd_completion_callback){.callback = on_answered, .user_data = chunk},
                             0) == -1) {
        pba_nbd_set_error(nbd, "asking for the dirty bitmap", error);
        return false;
    }
    return true;
}

/* Keeps requests in flight: new chunks up to the map's end, and those to be sent again. */
static bool fill_ring(PbaNbdMap *map, GError **error)
{
    forget_lost_requests(map);
    while (map->used < PBA_MAP_DEPTH && map->asked < map->end) {
        PbaMapChunk *chunk = &map->chunks[(map->head + map->used) % PBA_MAP_DEPTH];
        chunk->offset = map->asked;
        chunk->length = MIN(map->chunk_size, map->end - map->asked);
        chunk->state = PBA_CHUNK_TO_ASK;
        map->asked += chunk->length;
        map->used++;
    }
    for (unsigned i = 0; i < map->used; i++) {
        PbaMapChunk *chunk = &map->chunks[(map->head + i) % PBA_MAP_DEPTH];
        if (chunk->state == PBA_CHUNK_TO_ASK && !send_chunk(map->nbd, chunk, error)) {
            return false;
        }
    }
    return true;
}

static void set_incomplete(const PbaNbdVolume *nbd, const PbaMapChunk *chunk, const char *problem,
                           GError **error)
{
    pba_error_set(error, PBA_ERROR_INCOMPLETE,
                  "the dirty bitmap cannot be read from offset %" PRIu64 " on - %s", chunk->offset,
                  problem);
    pba_error_add_device(error, nbd->volume.device);
}

static bool wait_answer(PbaNbdVolume *nbd, PbaMapChunk *chunk, GError **error)
{
    gint64 deadline = pba_deadline(PBA_NBD_LIMIT_S);

    while (chunk->state != PBA_CHUNK_ANSWERED) {
        if (pba_nbd_is_lost(nbd)) {
            set_incomplete(nbd, chunk, "the NBD server closed the connection", error);
            return false;
        }
        if (!pba_nbd_turn(nbd, deadline, "reading the dirty bitmap", error)) {
            return false;
        }
    }
    return true;
}

static bool check_answer(const PbaNbdVolume *nbd, const PbaMapChunk *chunk, GError **error)
{
    const char *problem = chunk->error            ? g_strerror(chunk->error)
                          : chunk->count == 0     ? "the NBD server's answer is empty"
                          : chunk->count % 2 != 0 ? "the NBD server's answer has half an extent"
                                                  : NULL;
    if (problem) {
        set_incomplete(nbd, chunk, problem, error);
    }
    return !problem;
}

/* True if the chunk has its answer. Waits for it unless later is given; then sets *later
 * instead. */
static bool has_answer(PbaNbdMap *map, PbaMapChunk *chunk, bool *later, GError **error)
{
    if (map->used > 0 && chunk->state == PBA_CHUNK_ANSWERED) {
        return true;
    }
    if (!pba_nbd_connect(map->nbd, error) || !fill_ring(map, error)) {
        return false;
    }
    if (!later) {
        return wait_answer(map->nbd, chunk, error);
    }
    *later = chunk->state != PBA_CHUNK_ANSWERED;
    return !*later;
}

/* The next chunk to read; NULL without an error at the end of the map, and if its answer has not
 * arrived and must not be waited for. */
static PbaMapChunk *current_chunk(PbaNbdMap *map, bool *later, GError **error)
{
    PbaMapChunk *chunk = &map->chunks[map->head];

    if (map->used == 0 && map->asked == map->end) {
        return NULL;
    }
    if (!has_answer(map, chunk, later, error)) {
        return NULL;
    }
    return check_answer(map->nbd, chunk, error) ? chunk : NULL;
}

/* Adds the chunk's extents to the run until one does not belong to it; then returns true. */
static bool read_run(PbaNbdMap *map, PbaMapChunk *chunk, GError **error)
{
    while (chunk->next < chunk->count && chunk->length > 0) {
        uint64_t length = MIN(chunk->extents[chunk->next], chunk->length);
        bool has_flag = chunk->extents[chunk->next + 1] & map->flag;
        if (length == 0) {
            set_incomplete(map->nbd, chunk, "the NBD server sent an extent of no length", error);
            return false;
        }
        if (has_flag) {
            map->run_offset = map->run_length ? map->run_offset : chunk->offset;
            map->run_length += length;
        } else if (map->run_length > 0) {
            return true;
        }
        chunk->offset += length;
        chunk->length -= length;
        chunk->next += 2;
    }
    return false;
}

/* Adapts to the server: short answers make later chunks shorter, sparse ones longer. */
static void finish_chunk(PbaNbdMap *map, PbaMapChunk *chunk)
{
    chunk->state = PBA_CHUNK_TO_ASK;
    if (chunk->length > 0) {
        map->chunk_size = MAX(map->chunk_size / 2, MIN_CHUNK);
        return; /* the rest is asked again */
    }
    if (chunk->count < MANY_NUMBERS) {
        map->chunk_size = MIN(map->chunk_size * 2, MAX_CHUNK);
    }
    map->head = (map->head + 1) % PBA_MAP_DEPTH;
    map->used--;
}

static bool find_run(PbaNbdMap *map, bool *later, GError **error)
{
    GError *local = NULL;
    PbaMapChunk *chunk;

    while ((chunk = current_chunk(map, later, &local))) {
        if (read_run(map, chunk, &local)) {
            return true;
        }
        if (local) {
            break;
        }
        finish_chunk(map, chunk);
    }
    if (!local) {
        return true;
    }
    if (local->code != PBA_ERROR_INTERRUPTED) {
        pba_volume_break(&map->nbd->volume, local);
    }
    g_propagate_error(error, local);
    return false;
}

bool pba_nbd_map_next(PbaNbdMap *map, uint64_t *offset, uint64_t *length, bool *later,
                      GError **error)
{
    if (later) {
        *later = false;
    }
    if (!find_run(map, later, error)) {
        return false;
    }
    if (!later || !*later) {
        *offset = map->run_offset;
        *length = map->run_length;
        map->run_length = 0;
    }
    return true;
}
