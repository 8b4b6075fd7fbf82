/* Copies to an NBD server, such as qemu-nbd with a qcow2 image, nbdkit, or Ceph.
 *
 * The server may store clusters, and may lose a write during a write-zeroes of another part of the
 * same cluster (QEMU 11.0.0 with "qcow2: Fix corruption on discard during write with COW"; QEMU
 * reports a block size of 4096 for any cluster size). So no two requests in flight share a block,
 * and zeroes are written in whole blocks only. */
#include "copy.h"
#include "src/base/base.h"
#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define DEFAULT_CONNECTIONS 4

typedef struct {
    PbaSink sink;
    PbaNbdVolume *connections[PBA_COPY_MAX_CONNECTIONS];
    unsigned count;
    uint64_t size; /* of the volume */
    uint32_t most; /* bytes of a request that all connections take */
    bool can_zero;
    bool can_flush;
    PbaBlocks blocks;
    unsigned flushing; /* flushes in flight */
} NbdSink;

/* A part of a piece that is being written. */
typedef struct {
    PbaPiece *piece;
    uint64_t offset;
    bool zero;
} Write;

static void finish_part(PbaPiece *piece)
{
    if (--piece->pending == 0) {
        piece->state = PBA_PIECE_WRITTEN;
    }
}

static int on_write_done(void *opaque, int *error)
{
    Write *part = opaque;
    PbaPiece *piece = part->piece;

    if (part->zero && (*error == ENOTSUP || *error == EINVAL)) {
        /* The server had claimed support: for this piece and later ones, write zeroes as data. */
        ((NbdSink *)piece->sink)->can_zero = false;
        piece->again = true;
    } else if (*error) {
        pba_piece_fail(piece, *error, part->offset);
    }
    finish_part(piece);
    return 1; /* retire the command */
}

static bool send_request(NbdSink *self, PbaNbdVolume *nbd, PbaPiece *piece, size_t at,
                         size_t length, bool zero, GError **error)
{
    Write *part = g_new(Write, 1);
    nbd_completion_callback callback = {
        .callback = on_write_done, .user_data = part, .free = g_free};

    *part = (Write){piece, piece->offset + at, zero};
    piece->pending++;
    int64_t cookie =
        zero ? nbd_aio_zero(nbd->handle, length, part->offset, callback, 0)
             : nbd_aio_pwrite(nbd->handle, piece->data + at, length, part->offset, callback, 0);
    if (cookie == -1) {
        g_autofree char *what = g_strdup_printf("writing %zu bytes at offset %" PRIu64 " to %s",
                                                length, piece->offset + at, self->sink.name);
        pba_nbd_set_error(nbd, what, error);
        return false;
    }
    return true;
}

/* Writes a part, in as many requests as the server's limits need; zeroes in whole blocks. */
static bool send_part(NbdSink *self, PbaNbdVolume *nbd, PbaPiece *piece, size_t at, size_t length,
                      bool zero, GError **error)
{
    uint32_t most =
        zero ? self->most / self->sink.block * self->sink.block : nbd->volume.sizes.request;

    for (size_t end = at + length; at < end;) {
        size_t size = MIN(most, end - at);
        if (!send_request(self, nbd, piece, at, size, zero, error)) {
            return false;
        }
        at += size;
    }
    return true;
}

/* What else must be written because the target takes whole blocks: zeroes beyond the end of the
 * volume. Beyond the end of a region is other data, which is not known here. */
static bool fill_block(const NbdSink *self, PbaPiece *piece, size_t *rest, GError **error)
{
    uint32_t align = self->sink.align;

    *rest = pba_whole_blocks(piece->length, align) - piece->length;
    if (piece->offset % align != 0 || (*rest > 0 && piece->offset + piece->length != self->size)) {
        pba_error_set(error, PBA_ERROR_UNSUPPORTED,
                      "%s accepts only whole blocks of %" PRIu32 " bytes, and cannot take %" PRIu32
                      " bytes at offset %" PRIu64,
                      self->sink.name, align, piece->length, piece->offset);
        return false;
    }
    if (*rest > 0 && !piece->is_zeroes) {
        g_assert(piece->whole_length + *rest <= piece->room);
        memset(piece->data + piece->length, 0, *rest);
    }
    return true;
}

static bool nbd_sink_write(PbaSink *sink, PbaPiece *piece, GError **error)
{
    NbdSink *self = (NbdSink *)sink;
    PbaNbdVolume *nbd = pba_nbd_least_busy(self->connections, self->count);
    size_t rest;

    if (!fill_block(self, piece, &rest, error)) {
        return false;
    }
    piece->sink = sink;
    piece->zero = 0;
    piece->pending = 1; /* this function */
    for (size_t at = 0; at < piece->length;) {
        size_t run = piece->length - at;
        bool zero = false;
        if (self->can_zero) {
            run = pba_piece_run(piece, at, &self->blocks, &zero);
        }
        size_t more = at + run == piece->length ? rest : 0;
        if (!send_part(self, nbd, piece, at, run + more, zero, error)) {
            return false;
        }
        piece->zero += zero ? (uint32_t)run : 0;
        at += run;
    }
    finish_part(piece);
    return true;
}

static int on_flush_done(void *opaque, int *error)
{
    NbdSink *self = opaque;

    if (*error && !self->sink.flush_error) {
        self->sink.flush_error = *error;
    }
    self->sink.flushed = --self->flushing == 0;
    return 1;
}

/* Flushes every connection: only with NBD_FLAG_CAN_MULTI_CONN does one flush cover the others. */
static bool nbd_sink_flush(PbaSink *sink, GError **error)
{
    NbdSink *self = (NbdSink *)sink;

    sink->flushed = !self->can_flush;
    if (sink->flushed) {
        return true;
    }
    self->flushing = self->count;
    for (unsigned i = 0; i < self->count; i++) {
        if (nbd_aio_flush(self->connections[i]->handle,
                          (nbd_completion_callback){.callback = on_flush_done, .user_data = self},
                          0) == -1) {
            g_autofree char *what = g_strdup_printf("flushing %s", sink->name);
            pba_nbd_set_error(self->connections[i], what, error);
            return false;
        }
    }
    return true;
}

static void nbd_sink_free(PbaSink *sink)
{
    NbdSink *self = (NbdSink *)sink;

    for (unsigned i = 0; i < self->count; i++) {
        pba_volume_free(&self->connections[i]->volume);
    }
    if (sink->back && sink->back != self->connections[0]) {
        pba_volume_free(&sink->back->volume);
    }
    g_free(sink->name);
    g_free(self);
}

/* All connections see the same export. */
static PbaNbdVolume *open_one(NbdSink *self, const PbaVolume *source, bool tells_zeroes,
                              GError **error)
{
    PbaVolumeOptions options = {
        .device = source->device,
        .path = self->sink.name,
        .size = self->count > 0 ? self->connections[0]->volume.size : UINT64_MAX,
    };
    PbaNbdVolume *nbd = tells_zeroes ? pba_nbd_open_allocation(&options, &source->hooks, error)
                                     : pba_nbd_open(&options, &source->hooks, error);

    if (!nbd) {
        g_autofree char *hint = g_strdup_printf("the error is at the target %s", self->sink.name);
        pba_error_add_hint(error, hint);
        return NULL;
    }
    self->sink.align = MAX(self->sink.align, nbd->volume.sizes.block);
    return nbd;
}

static bool connect_one(NbdSink *self, const PbaVolume *source, bool tells_zeroes, PbaLoop *loop,
                        GError **error)
{
    PbaNbdVolume *nbd = open_one(self, source, tells_zeroes, error);

    if (!nbd) {
        return false;
    }
    self->connections[self->count++] = nbd;
    self->most = MIN(self->most, nbd->volume.sizes.request);
    pba_loop_add(loop, nbd->handle);
    return true;
}

static bool check_target(NbdSink *self, uint64_t size, GError **error)
{
    const PbaNbdVolume *nbd = self->connections[0];

    if (nbd->volume.size < size) {
        pba_error_set(error, PBA_ERROR_ARGUMENT,
                      "the target %s has %" PRIu64 " bytes, too few for the volume's %" PRIu64,
                      self->sink.name, nbd->volume.size, size);
        return false;
    }
    if (nbd_is_read_only(nbd->handle) != 0) {
        pba_error_set(error, PBA_ERROR_ARGUMENT, "the target %s is read-only", self->sink.name);
        return false;
    }
    return true;
}

/* Opens all useful connections. Reading back has its own, to avoid waiting for writes, unless the
 * server does not say that several are safe: then it uses the first. */
static bool connect_all(NbdSink *self, const PbaCopyOptions *options, const PbaVolume *source,
                        PbaLoop *loop, GError **error)
{
    if (!connect_one(self, source, true, loop, error) || !check_target(self, source->size, error)) {
        return false;
    }
    pba_nbd_ask_for_status(self->connections[0]);
    bool safe = nbd_can_multi_conn(self->connections[0]->handle) == 1;
    unsigned wanted = !safe ? 1 : options->connections ? options->connections : DEFAULT_CONNECTIONS;
    while (self->count < wanted) {
        if (!connect_one(self, source, false, loop, error)) {
            return false;
        }
    }
    if (options->check) {
        self->sink.back = safe ? open_one(self, source, true, error) : self->connections[0];
    }
    return !options->check || self->sink.back;
}

PbaSink *pba_sink_nbd_new(const PbaCopyOptions *options, const PbaVolume *source, PbaLoop *loop,
                          GError **error)
{
    NbdSink *self = g_new0(NbdSink, 1);

    self->sink = (PbaSink){
        .write = nbd_sink_write,
        .flush = nbd_sink_flush,
        .free = nbd_sink_free,
        .name = g_strdup(options->uri),
        .block = options->cluster_size ? options->cluster_size : PBA_CLUSTER,
        .error_code = PBA_ERROR_NBD,
        .align = 1,
    };
    self->size = source->size;
    self->most = PBA_MAX_REQUEST;
    if (!connect_all(self, options, source, loop, error)) {
        nbd_sink_free(&self->sink);
        return NULL;
    }
    self->blocks = (PbaBlocks){
        .size = self->sink.block, .whole = true, .end = self->connections[0]->volume.size};
    struct nbd_handle *first = self->connections[0]->handle;
    self->can_zero = nbd_can_zero(first) == 1 && self->most >= self->sink.block;
    /* Asked now, because libnbd forgets it when a connection dies. */
    self->can_flush = nbd_can_flush(first) == 1;
    /* Limits the number of requests for one piece, however small they are. */
    self->sink.max_zero = (uint32_t)pba_whole_blocks(self->most, self->sink.align);
    return &self->sink;
}
