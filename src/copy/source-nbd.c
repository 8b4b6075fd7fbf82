/* A copy's side of a volume over NBD: reads and discards over one or more connections. */
#include "copy.h"
#include <errno.h>
#include <inttypes.h>

#define DEFAULT_CONNECTIONS 4

/* The second connection can tell where there are holes, if the server can. */
static PbaVolume *open_another(const PbaSource *source, GError **error)
{
    const PbaVolume *first = source->volumes[0];
    PbaVolumeOptions options = {.device = first->device, .path = first->path, .size = first->size};

    /* QEMU before 10.0 cannot ask a snapshot twice at a time. */
    if (source->count == 1 && !first->by_cluster) {
        return pba_volume_open_allocation(&options, &first->hooks, error);
    }
    return pba_volume_open(&options, &first->hooks, error);
}

static bool open_more(PbaSource *source, unsigned connections, GError **error)
{
    while (source->count < connections) {
        PbaVolume *volume = open_another(source, error);
        if (!volume) {
            return false;
        }
        source->volumes[source->count++] = volume;
    }
    return true;
}

static bool open_connections(PbaSource *source, unsigned connections, PbaLoop *loop, GError **error)
{
    PbaVolume *volume = source->volumes[0];

    if (!pba_volume_connect(volume, error)) {
        return false;
    }
    if (connections == 0) {
        /* So many small requests as of single clusters keep QEMU's main loop busy with one
         * connection. More would not be faster, but make the guest wait for it. */
        connections = volume->by_cluster ? 1 : DEFAULT_CONNECTIONS;
    }
    bool safe = nbd_can_multi_conn(volume->nbd) == 1;
    if (!open_more(source, safe ? connections : 1, error)) {
        return false;
    }
    source->can_discard = nbd_can_trim(volume->nbd) == 1;
    /* Looking for holes in what is read, a server asks the same. */
    source->read_flags =
        volume->by_cluster && nbd_can_df(volume->nbd) == 1 ? LIBNBD_CMD_FLAG_DF : 0;
    for (unsigned i = 0; i < source->count; i++) {
        /* Every byte of a read is counted, so none has to be set before. */
        nbd_set_pread_initialize(source->volumes[i]->nbd, false);
        pba_loop_add(loop, source->volumes[i]->nbd);
        source->align = MAX(source->align, source->volumes[i]->sizes.block);
    }
    return true;
}

static PbaHoles *new_holes(PbaSource *source, uint32_t align)
{
    bool can_tell = source->count > 1 && source->volumes[1]->context;

    return can_tell ? pba_holes_new_nbd(source->volumes[1], align) : NULL;
}

static void restore(PbaSource *source)
{
    if (source->volumes[0]->nbd) {
        nbd_set_pread_initialize(source->volumes[0]->nbd, true);
    }
}

/* The connection with the least to do. */
static PbaVolume *choose(const PbaSource *source)
{
    PbaVolume *best = source->volumes[0];
    int least = nbd_aio_in_flight(best->nbd);

    for (unsigned i = 1; i < source->count && least > 0; i++) {
        int in_flight = nbd_aio_in_flight(source->volumes[i]->nbd);
        if (in_flight < least) {
            least = in_flight;
            best = source->volumes[i];
        }
    }
    return best;
}

static int on_chunk(void *opaque, const void *data, size_t count, uint64_t offset, unsigned status,
                    int *error)
{
    PbaPiece *piece = opaque;

    (void)data;
    (void)offset;
    if (*error || status == LIBNBD_READ_ERROR) {
        pba_piece_fail(piece, *error ? *error : EIO, piece->offset);
        return 0;
    }
    if (count > piece->length - piece->seen) {
        pba_piece_fail(piece, EIO,
                       piece->offset); /* parts came twice, so that others are missing */
        return 0;
    }
    piece->seen += (uint32_t)count;
    if (status == LIBNBD_READ_HOLE) {
        piece->holes += (uint32_t)count;
    }
    return 0;
}

static int on_read_done(void *opaque, int *error)
{
    PbaPiece *piece = opaque;

    if (*error) {
        pba_piece_fail(piece, *error, piece->offset);
    }
    if (--piece->pending > 0) {
        return 1;
    }
    if (piece->seen != piece->length) {
        pba_piece_fail(piece, EIO, piece->offset);
    }
    piece->state = PBA_PIECE_READ;
    return 1; /* retire the command */
}

static bool send_reads(PbaSource *source, PbaPiece *piece, GError **error)
{
    PbaVolume *volume = choose(source);
    piece->pending = 1; /* this function */
    for (uint64_t done = 0; done < piece->length;) {
        uint64_t offset = piece->offset + done;
        uint64_t length = pba_volume_unit(volume, offset, piece->length - done);
        piece->pending++;
        if (nbd_aio_pread_structured(
                volume->nbd, piece->data + done, length, offset,
                (nbd_chunk_callback){.callback = on_chunk, .user_data = piece},
                (nbd_completion_callback){.callback = on_read_done, .user_data = piece},
                source->read_flags) == -1) {
            g_autofree char *what =
                g_strdup_printf("reading %" PRIu64 " bytes at offset %" PRIu64, length, offset);
            pba_volume_set_nbd_error(volume, what, error);
            return false;
        }
        done += length;
    }
    int none = 0;
    on_read_done(piece, &none);
    return true;
}

typedef struct {
    PbaSource *source;
    PbaRange range;
} Trim;

static int on_trim_done(void *opaque, int *error)
{
    Trim *trim = opaque;

    pba_source_trimmed(trim->source, trim->range, *error);
    return 1; /* retire the command */
}

static bool send_trim(PbaSource *source, PbaRange range, GError **error)
{
    PbaVolume *volume = choose(source);
    Trim *trim = g_new(Trim, 1);
    *trim = (Trim){source, range};
    if (nbd_aio_trim(
            volume->nbd, range.end - range.begin, range.begin,
            (nbd_completion_callback){.callback = on_trim_done, .user_data = trim, .free = g_free},
            0) == -1) {
        g_autofree char *what = g_strdup_printf("discarding %" PRIu64 " bytes at offset %" PRIu64,
                                                range.end - range.begin, range.begin);
        pba_volume_set_nbd_error(volume, what, error);
        return false;
    }
    return true;
}

const PbaSourceKind pba_source_nbd = {
    .reader = &pba_nbd_reader,
    .open = open_connections,
    .read = send_reads,
    .trim = send_trim,
    .new_holes = new_holes,
    .close = restore,
};
