/* The target of a copy: chooses its kind; the caller's function as a target. */
#include "copy.h"
#include "src/base/base.h"

typedef struct {
    PbaSink sink;
    PbaCopyWrite write;
    void *opaque;
} CallSink;

static bool call_write(PbaSink *sink, PbaPiece *piece, GError **error)
{
    CallSink *self = (CallSink *)sink;

    if (!self->write(self->opaque, piece->offset, piece->data, piece->length)) {
        pba_error_set(error, PBA_ERROR_INTERRUPTED,
                      "the target's function failed at offset %" G_GUINT64_FORMAT, piece->offset);
        return false;
    }
    piece->state = PBA_PIECE_WRITTEN;
    return true;
}

static bool flush_nothing(PbaSink *sink, GError **error)
{
    (void)error;
    sink->flushed = true;
    return true;
}

static void call_free(PbaSink *sink)
{
    g_free(sink->name);
    g_free(sink);
}

static PbaSink *call_sink_new(PbaCopyWrite write, void *opaque)
{
    CallSink *self = g_new0(CallSink, 1);

    self->sink = (PbaSink){
        .write = call_write,
        .flush = flush_nothing,
        .free = call_free,
        .name = g_strdup("the target's function"),
        .ordered = true,
        .wants_zeroes = true,
        .error_code = PBA_ERROR_SYSTEM,
        .align = 1,
        .max_zero = UINT32_MAX,
    };
    self->write = write;
    self->opaque = opaque;
    return &self->sink;
}

/* No target: the volume is only read. */
static bool no_write(PbaSink *sink, PbaPiece *piece, GError **error)
{
    (void)sink;
    (void)error;
    piece->zero = piece->holes == piece->length ? piece->length : 0;
    piece->state = PBA_PIECE_WRITTEN;
    return true;
}

static PbaSink *no_sink_new(void)
{
    PbaSink *sink = g_new0(PbaSink, 1);

    *sink = (PbaSink){
        .write = no_write,
        .flush = flush_nothing,
        .free = call_free,
        .error_code = PBA_ERROR_SYSTEM,
        .align = 1,
        .max_zero = UINT32_MAX,
    };
    return sink;
}

PbaSink *pba_sink_new(const PbaCopyOptions *options, PbaVolume *volume, PbaLoop *loop,
                      GError **error)
{
    if (options->write) {
        return call_sink_new(options->write, options->opaque);
    }
    if (options->uri) {
        return pba_sink_nbd_new(options, volume, loop, error);
    }
    if (!options->path && options->fd == -1) {
        return no_sink_new();
    }
    return pba_sink_file_new(options, volume->size, loop, error);
}
