/* The source of a copy over NBD: reads and discards over one or more connections. */
#include "copy.h"
#include <errno.h>
#include <inttypes.h>

#define DEFAULT_CONNECTIONS 2
#define GUEST_REQUEST (1u << 20)

typedef struct {
    PbaSource source;
    PbaNbdVolume *connections[PBA_COPY_MAX_CONNECTIONS]; /* the first is the caller's */
    unsigned count;
    uint32_t whole_flag; /* for reads that are answered in one part; 0: the server has none */
    bool reads_whole;
} NbdSource;

/* The second connection asks for holes, if the server reports them. */
static PbaNbdVolume *open_another(const NbdSource *self, GError **error)
{
    const PbaNbdVolume *first = self->connections[0];
    const PbaVolume *volume = &first->volume;
    PbaVolumeOptions options = {
        .device = volume->device, .path = first->path, .size = volume->size};

    /* QEMU before 9.2 (6475155d51) must not be asked for holes in a range that it is reading. */
    if (self->count == 1 && !first->by_cluster) {
        return pba_nbd_open_allocation(&options, &volume->hooks, error);
    }
    return pba_nbd_open(&options, &volume->hooks, error);
}

static bool open_more(NbdSource *self, unsigned connections, GError **error)
{
    while (self->count < connections) {
        PbaNbdVolume *nbd = open_another(self, error);
        if (!nbd) {
            return false;
        }
        if (!pba_nbd_keep_newer(self->connections[0], &nbd, error)) {
            pba_volume_free(nbd ? &nbd->volume : NULL);
            return false;
        }
        if (!nbd) {
            return true; /* fewer connections are only slower */
        }
        self->connections[self->count++] = nbd;
    }
    return true;
}

static bool open_connections(PbaSource *source, unsigned connections, PbaLoop *loop, GError **error)
{
    NbdSource *self = (NbdSource *)source;
    PbaNbdVolume *first = (PbaNbdVolume *)source->volume;

    self->connections[0] = first;
    self->count = 1;
    if (!pba_nbd_connect(first, error)) {
        return false;
    }
    if (connections == 0) {
        /* With requests of single clusters, one connection keeps QEMU's main loop busy. More would
         * only delay the guest. */
        connections = first->by_cluster ? 1 : DEFAULT_CONNECTIONS;
    }
    bool safe = nbd_can_multi_conn(first->handle) == 1;
    if (!open_more(self, safe ? connections : 1, error)) {
        return false;
    }
    source->can_discard = nbd_can_trim(first->handle) == 1;
    /* Only the snapshot of a guest can be discarded. The guest's I/O waits behind all requests in
     * QEMU's main loop, so a few large ones are better than many. */
    if (source->can_discard && !first->by_cluster) {
        source->request = GUEST_REQUEST;
    }
    self->whole_flag = nbd_can_df(first->handle) == 1 ? LIBNBD_CMD_FLAG_DF : 0;
    /* Otherwise QEMU searches each read range for holes, by block status on the snapshot. */
    self->reads_whole = first->by_cluster;
    for (unsigned i = 0; i < self->count; i++) {
        PbaNbdVolume *nbd = self->connections[i];
        /* Every byte of a read is counted, so the buffer need not be cleared. */
        nbd_set_pread_initialize(nbd->handle, false);
        pba_loop_add(loop, nbd->handle);
        source->align = MAX(source->align, nbd->volume.sizes.block);
    }
    return true;
}

static PbaHoles *new_holes(PbaSource *source, uint32_t align)
{
    const NbdSource *self = (const NbdSource *)source;
    bool can_tell = self->count > 1 && self->connections[1]->context;

    return can_tell ? pba_holes_new_nbd(self->connections[1], align) : NULL;
}

static void close_connections(PbaSource *source, bool broken)
{
    NbdSource *self = (NbdSource *)source;
    PbaNbdVolume *first = self->connections[0];

    for (unsigned i = 1; i < self->count; i++) {
        pba_volume_free(&self->connections[i]->volume);
    }
    if (broken) {
        pba_nbd_disconnect(first);
    } else if (first->handle) {
        nbd_set_pread_initialize(first->handle, true);
    }
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
    const NbdSource *self = (const NbdSource *)source;
    PbaNbdVolume *nbd = pba_nbd_least_busy(self->connections, self->count);
    /* If QEMU cannot read a part between two holes, it closes the connection. */
    bool whole = self->reads_whole || source->goes_on;
    piece->pending = 1; /* this function */
    for (uint64_t done = 0; done < piece->length;) {
        uint64_t offset = piece->offset + done;
        uint64_t length = pba_nbd_unit(nbd, offset, piece->length - done);
        piece->pending++;
        if (nbd_aio_pread_structured(
                nbd->handle, piece->data + done, length, offset,
                (nbd_chunk_callback){.callback = on_chunk, .user_data = piece},
                (nbd_completion_callback){.callback = on_read_done, .user_data = piece},
                whole ? self->whole_flag : 0) == -1) {
            g_autofree char *what =
                g_strdup_printf("reading %" PRIu64 " bytes at offset %" PRIu64, length, offset);
            pba_nbd_set_error(nbd, what, error);
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
    const NbdSource *self = (const NbdSource *)source;
    PbaNbdVolume *nbd = pba_nbd_least_busy(self->connections, self->count);
    Trim *trim = g_new(Trim, 1);
    *trim = (Trim){source, range};
    if (nbd_aio_trim(
            nbd->handle, range.end - range.begin, range.begin,
            (nbd_completion_callback){.callback = on_trim_done, .user_data = trim, .free = g_free},
            0) == -1) {
        g_autofree char *what = g_strdup_printf("discarding %" PRIu64 " bytes at offset %" PRIu64,
                                                range.end - range.begin, range.begin);
        pba_nbd_set_error(nbd, what, error);
        return false;
    }
    return true;
}

const PbaSourceKind pba_source_nbd = {
    .reader = &pba_nbd_reader,
    .size = sizeof(NbdSource),
    .open = open_connections,
    .read = send_reads,
    .trim = send_trim,
    .new_holes = new_holes,
    .close = close_connections,
};
