/* Copies the dirty regions of a volume: decides what is read next, and what happens to it.
 *
 * Regions are cut into pieces. A piece is read, written to the sink, read back from there if
 * requested, then released for discarding. Many pieces are in flight, each with its own buffer.
 * Completions only note what happened. This file makes all decisions, between two waits. */
#include "src/base/base.h"
#include "steps.h"
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#define MEMORY (16u << 20)
#define MIN_PIECES 2u
/* Zeroes that need not be read are written in larger pieces. */
#define MAX_ZERO (32u << 20)
/* Discards in flight: more would fill the server's queue. */
#define MAX_TRIMMING 32u
#define PROGRESS_INTERVAL (G_TIME_SPAN_SECOND / 4)

/* Reading */

static PbaPiece *free_piece(PbaCopy *copy)
{
    for (unsigned i = 0; copy->used < copy->piece_count && i < copy->piece_count; i++) {
        if (copy->pieces[i].state == PBA_PIECE_FREE) {
            return &copy->pieces[i];
        }
    }
    return NULL;
}

static uint32_t max_length(const PbaCopy *copy)
{
    return copy->course.next == PBA_NEXT_ZEROES
               ? MIN(MAX_ZERO, MAX(copy->sink->max_zero, copy->align))
               : copy->request;
}

static bool start_piece(PbaCopy *copy, PbaPiece *piece, uint32_t length, GError **error)
{
    bool zero = copy->course.next == PBA_NEXT_ZEROES;

    pba_piece_begin(piece, copy->course.offset, length, zero ? copy->zeroes : NULL);
    piece->sequence = copy->next_read++;
    pba_course_take(&copy->course, length);
    copy->used++;
    return zero || pba_source_read(copy->source, piece, error);
}

static bool may_read(const PbaCopy *copy)
{
    return copy->course.next != PBA_NEXT_NOTHING && copy->used < copy->piece_count &&
           copy->source->trimming < MAX_TRIMMING;
}

/* Keeps as many reads in flight as there are buffers. */
static bool fill(PbaCopy *copy, GError **error)
{
    while (may_read(copy)) {
        if (!pba_course_next(&copy->course, error) || !pba_loop_check_owner(&copy->loop, error)) {
            return false;
        }
        if (copy->course.next != PBA_NEXT_DATA && copy->course.next != PBA_NEXT_ZEROES) {
            return true;
        }
        uint32_t length =
            pba_course_length(&copy->course, copy->sink, max_length(copy), copy->align);
        if (copy->course.next == PBA_NEXT_DATA &&
            !pba_limit_take(&copy->limit, length, g_get_monotonic_time())) {
            return true;
        }
        if (!start_piece(copy, free_piece(copy), length, error)) {
            return false;
        }
    }
    return true;
}

static bool tell_progress(PbaCopy *copy, bool last, GError **error)
{
    if (!copy->options->progress) {
        return true;
    }
    gint64 now = g_get_monotonic_time();
    if (!last && now - copy->last_progress < PROGRESS_INTERVAL) {
        return true;
    }
    copy->last_progress = now;
    if (!copy->options->progress(copy->options->opaque, copy->done, copy->total)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED, "the progress function failed");
        return false;
    }
    return pba_loop_check_owner(&copy->loop, error);
}

/* Waiting */

static bool turn(PbaCopy *copy, GError **error)
{
    gint64 now = g_get_monotonic_time();
    bool idle =
        copy->used == 0 && copy->source->trimming == 0 && copy->course.next != PBA_NEXT_LATER;
    gint64 until = now + PROGRESS_INTERVAL;

    if (idle || copy->last_event == 0) {
        copy->last_event = now;
    }
    if (may_read(copy) && copy->course.next != PBA_NEXT_LATER) {
        until = MIN(until, pba_limit_ready_at(&copy->limit));
    }
    return pba_loop_turn(&copy->loop, until,
                         copy->last_event + PBA_NBD_LIMIT_S * G_TIME_SPAN_SECOND, error);
}

/* The map is of one instant, so two passes over it must have the same total. */
static bool check_total(const PbaCopy *copy, GError **error)
{
    if (!copy->options->progress || copy->done == copy->total) {
        return true;
    }
    pba_error_set(error, PBA_ERROR_INCOMPLETE,
                  "the dirty bitmap changed while it was read, from %" PRIu64 " to %" PRIu64
                  " dirty bytes",
                  copy->total, copy->done);
    return false;
}

/* True if a step is possible without waiting, because a sink has completed a piece at once. */
static bool can_go_on(const PbaCopy *copy)
{
    PbaNext next = copy->course.next;

    return may_read(copy) && (next == PBA_NEXT_UNKNOWN || next == PBA_NEXT_ZEROES);
}

static bool copy_regions(PbaCopy *copy, GError **error)
{
    /* Zeroes are available without waiting. */
    while (fill(copy, error) && pba_copy_move_pieces(copy, error) &&
           tell_progress(copy, false, error)) {
        if (copy->course.next == PBA_NEXT_NOTHING && copy->used == 0) {
            return check_total(copy, error);
        }
        if (!can_go_on(copy) && (!turn(copy, error) || !pba_copy_move_pieces(copy, error))) {
            break;
        }
    }
    return false;
}

static bool flush_sink(PbaCopy *copy, GError **error)
{
    copy->last_event = 0;
    if (!copy->sink->flush(copy->sink, error)) {
        return false;
    }
    while (!copy->sink->flushed) {
        copy->last_event = 0; /* no time limit: a flush may take long */
        if (!turn(copy, error)) {
            return false;
        }
    }
    if (copy->sink->flush_error) {
        pba_error_set(error, copy->sink->error_code, "flushing %s failed - %s", copy->sink->name,
                      g_strerror(copy->sink->flush_error));
        return false;
    }
    return true;
}

static bool finish_digests(PbaCopy *copy, GError **error)
{
    if (!copy->digests) {
        return true;
    }
    pba_digests_finish(copy->digests, copy->loop.pool, &copy->digests_end);
    while (!copy->digests_end.done) {
        copy->last_event = 0; /* no time limit: a disk may be slow */
        if (!turn(copy, error)) {
            return false;
        }
    }
    return pba_digests_check_end(copy->digests, &copy->digests_end, error);
}

static bool finish_discards(PbaCopy *copy, GError **error)
{
    copy->last_event = 0;
    if (!pba_source_release_all(copy->source, error)) {
        return false;
    }
    for (unsigned left; (left = copy->source->trimming) > 0;) {
        if (!turn(copy, error)) {
            return false;
        }
        /* The time limit is for each request. */
        copy->last_event = copy->source->trimming < left ? 0 : copy->last_event;
    }
    copy->statistics->bytes_discarded = copy->source->discarded;
    copy->statistics->regions = copy->course.regions;
    return pba_source_check_trims(copy->source, error);
}

/* Before and after */

static bool prepare_pieces(PbaCopy *copy, GError **error)
{
    uint32_t wanted = copy->options->request_size ? copy->options->request_size
                                                  : MAX(copy->source->request, copy->sink->block);
    uint32_t request;

    copy->align = MAX(copy->source->align, copy->sink->align);
    if (copy->digests) {
        copy->align = MAX(copy->align, pba_digests_block(copy->digests));
    }
    request = (uint32_t)pba_whole_blocks(wanted, copy->align);
    copy->piece_count = CLAMP(MEMORY / request, MIN_PIECES, PBA_COPY_MAX_PIECES);
    for (unsigned i = 0; i < copy->piece_count; i++) {
        PbaPiece *piece = &copy->pieces[i];
        piece->room = (size_t)request + 1; /* Perl may look at the byte behind a string */
        if (!(piece->buffer = pba_buffer_new(piece->room, error))) {
            return false;
        }
    }
    copy->request =
        (uint32_t)pba_whole_blocks(pba_limit_request(&copy->limit, request), copy->align);
    return true;
}

static bool prepare_holes(PbaCopy *copy, GError **error)
{
    if (copy->sink->wants_zeroes || !pba_source_find_holes(copy->source, copy->align)) {
        return true;
    }
    copy->course.holes = copy->source->holes;
    copy->zeroes = pba_zeroes_new(MAX_ZERO, error);
    return copy->zeroes != NULL;
}

static bool prepare_digests(PbaCopy *copy, GError **error)
{
    bool good =
        pba_digests_open(copy->options, copy->volume->size, &copy->loop, &copy->digests, error);
    copy->course.digests = copy->digests;
    return good;
}

static bool prepare_readback(PbaCopy *copy, GError **error)
{
    if (!copy->options->check) {
        return true;
    }
    copy->readback = pba_readback_new(copy->sink, copy->digests, &copy->loop, copy->request, error);
    return copy->readback != NULL;
}

static bool count_total(PbaCopy *copy, GError **error)
{
    return pba_course_total(&copy->course, &copy->total, error) &&
           pba_loop_check_owner(&copy->loop, error);
}

static bool prepare(PbaCopy *copy, GError **error)
{
    const PbaCopyOptions *options = copy->options;

    if (!pba_limit_init(&copy->limit, options->bandwidth_limit, options->limit_fd, error) ||
        !prepare_digests(copy, error) || (options->progress && !count_total(copy, error))) {
        return false;
    }
    copy->source = pba_source_open(copy->volume, options->connections, &copy->loop, error);
    if (!copy->source) {
        return false;
    }
    copy->source->goes_on = options->damaged || options->unreadable;
    copy->sink = pba_sink_new(options, copy->volume, &copy->loop, error);
    return copy->sink && prepare_pieces(copy, error) && prepare_holes(copy, error) &&
           prepare_readback(copy, error) &&
           (!copy->sink->start || copy->sink->start(copy->sink, error));
}

/* Requests in flight use the memory of the pieces, so connections and threads end first. */
static void clean_up(PbaCopy *copy, bool broken)
{
    bool keeps_buffers = copy->source && copy->source->kind->keeps_buffers;

    pba_pool_free(copy->loop.pool);
    pba_readback_free(copy->readback, broken);
    if (copy->sink) {
        copy->sink->free(copy->sink);
    }
    pba_source_close(copy->source, broken);
    for (unsigned i = 0; i < copy->piece_count; i++) {
        PbaPiece *piece = &copy->pieces[i];
        if (piece->state != PBA_PIECE_HASHING &&
            (!keeps_buffers || piece->is_back || piece->state != PBA_PIECE_READING)) {
            pba_buffer_free(piece->buffer, piece->room);
        }
        pba_digests_forget(piece);
        pba_readback_forget(piece);
    }
    pba_digests_unref(copy->digests);
    pba_buffer_free(copy->zeroes, MAX_ZERO);
    pba_limit_clear(&copy->limit);
}

static bool run(PbaCopy *copy, GError **error)
{
    /* Flush before the last discards: what is discarded can no longer be read again if the target
     * loses it. Progress comes last, because it says that everything is done. */
    bool done = prepare(copy, error) && copy_regions(copy, error) && flush_sink(copy, error) &&
                finish_digests(copy, error) && finish_discards(copy, error) &&
                tell_progress(copy, true, error);
    clean_up(copy, !done);
    return done;
}

bool pba_volume_copy(PbaVolume *volume, const PbaCopyOptions *options,
                     PbaCopyStatistics *statistics, GError **error)
{
    gint64 start = g_get_monotonic_time();
    PbaCopy *copy = g_new0(PbaCopy, 1);

    *statistics = (PbaCopyStatistics){0};
    *copy = (PbaCopy){
        .volume = volume,
        .options = options,
        .statistics = statistics,
        .loop = {.hooks = volume->hooks, .owner = getpid()},
    };
    copy->course = (PbaCourse){
        .volume = volume, .map = pba_volume_map(volume, 0), .only_known = options->only_known};
    bool done = run(copy, error);
    pba_map_free(copy->course.map);
    g_free(copy);
    statistics->seconds = (double)(g_get_monotonic_time() - start) / G_TIME_SPAN_SECOND;
    if (!done) {
        pba_error_add_device(error, volume->device);
    }
    return done;
}
