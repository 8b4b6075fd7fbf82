/* Shared by the parts of a copy: copy.c drives, source.c reads, sink*.c write. */
#ifndef PBA_SRC_COPY_H
#define PBA_SRC_COPY_H

#include "pool.h"
#include "src/volume/volume.h"

#define PBA_COPY_MAX_CONNECTIONS 16

/* Everything that a copy waits for. Handles are borrowed. */
typedef struct {
    struct nbd_handle *handles[2 * PBA_COPY_MAX_CONNECTIONS + 1]; /* one that reads back */
    unsigned count;
    PbaPool *pool; /* NULL until a file is read */
    int watched;   /* a descriptor, if on_ready */
    bool (*on_ready)(void *opaque, GError **error);
    void *opaque;
    PbaHooks hooks;
    pid_t owner; /* the process whose copy it is */
} PbaLoop;

/* Does not add a connection twice. */
void pba_loop_add(PbaLoop *loop, struct nbd_handle *handle);
/* Calls on_ready in each turn. A turn ends when watched is readable. If on_ready fails, so does the
 * turn. */
void pba_loop_watch(PbaLoop *loop, int watched, bool (*on_ready)(void *opaque, GError **error),
                    void *opaque);
/* The pool, after adding this many threads. */
PbaPool *pba_loop_pool(PbaLoop *loop, unsigned threads, GError **error);
/* Perl code in a callback may have forked and returned in the child. */
bool pba_loop_check_owner(const PbaLoop *loop, GError **error);
/* Waits for an event, or for the time until, and handles it: completions are called from here.
 * Returns false on timeout and interruption, and in a child, which handles nothing. */
bool pba_loop_turn(PbaLoop *loop, gint64 until, gint64 deadline, GError **error);

typedef enum {
    PBA_PIECE_FREE,
    PBA_PIECE_READING,
    PBA_PIECE_READ,
    PBA_PIECE_HASHING,
    PBA_PIECE_HASHED,
    PBA_PIECE_READY, /* to be written */
    PBA_PIECE_WRITING,
    PBA_PIECE_WRITTEN,
} PbaPieceState;

typedef struct PbaSink PbaSink;

/* A part of a dirty region that is being copied. Completion callbacks change its state and record
 * errors; the copy loop does everything else. */
typedef struct {
    PbaSink *sink; /* while it is written */
    PbaPieceState state;
    char *buffer; /* aligned for direct I/O; of pba_buffer_new */
    size_t room;  /* bytes of the buffer: our own choice, rounded up to the peer's blocks */
    char *data;   /* in buffer, or zeroes */
    uint64_t sequence;
    uint64_t offset; /* of the range that is read; later, of the part that is written */
    uint32_t length;
    uint64_t whole_offset; /* of the range that was read */
    uint32_t whole_length;
    uint32_t written;             /* bytes of that range, so far */
    bool is_zeroes;               /* was not read: data is not in buffer */
    uint32_t seen;                /* bytes that have arrived, at most length */
    uint32_t holes;               /* those of them that the source reported as a hole */
    uint32_t zero;                /* bytes written as zeroes */
    unsigned pending;             /* requests in flight */
    bool again;                   /* must be written once more */
    struct PbaDigestJob *digests; /* its digests, once hashed; owned */
    bool is_back;                 /* the target has all of it, and it is read back from there */
    struct PbaReadbackJob *back;  /* digests of what was read back; owned */
    int error;                    /* errno of the first failure; 0: none */
    uint64_t error_offset;        /* where it failed */
} PbaPiece;

/* Memory for a piece, shared with processes that are cloned later. It starts as zeroes, because a
 * server whose answers overlap leaves parts of it unwritten. NULL on error. */
char *pba_buffer_new(size_t size, GError **error);
void pba_buffer_free(char *buffer, size_t size);
/* Zeroes, never written to, so they take no memory. Free them with pba_buffer_free. */
char *pba_zeroes_new(size_t size, GError **error);

/* Starts the piece for a range. With zeroes, the range counts as read at once. */
void pba_piece_begin(PbaPiece *piece, uint64_t offset, uint32_t length, char *zeroes);

/* Notes a failure, unless there is an earlier one. */
void pba_piece_fail(PbaPiece *piece, int error, uint64_t offset);

/* Sets the error for a failed read or write. Returns false. */
bool pba_piece_explain(const PbaPiece *piece, const PbaVolume *volume, const PbaSink *sink,
                       GError **error);

/* True while another piece that shares a block with this one is being written. A piece that was
 * written may have to be written again. */
bool pba_piece_is_beside_write(const PbaPiece *piece, const PbaPiece *pieces, unsigned count,
                               uint64_t block);

/* The volume's side */

/* For a volume that is a file handle: one request at a time, for callers and the map of a copy. */
extern const PbaReader pba_handle_reader;
/* The volume's descriptor; the volume keeps it. */
int pba_handle_fd(const PbaVolume *volume);

/* What comes next in a region. */
typedef enum {
    PBA_NEXT_UNKNOWN, /* the source was not asked yet */
    PBA_NEXT_LATER,   /* the answer is under way */
    PBA_NEXT_DATA,    /* or unknown: it must be read */
    PBA_NEXT_ZEROES,
    PBA_NEXT_NOTHING, /* there are no more regions */
} PbaNext;

/* Where regions are zeroes, according to a server or file system. */
typedef struct PbaHoles PbaHoles;

/* Asks over a volume from pba_nbd_open_allocation, which is borrowed. Holes start and end at
 * multiples of align. */
PbaHoles *pba_holes_new_nbd(PbaNbdVolume *nbd, uint32_t align);
/* Asks a file in a thread of the pool. NULL if the file cannot be opened again. */
PbaHoles *pba_holes_new_file(int fd, PbaPool *pool, uint32_t align);
/* Call it after the pool is freed, but before the volume is. */
void pba_holes_free(PbaHoles *holes);
/* Starts this region. */
void pba_holes_begin(PbaHoles *holes, uint64_t offset, uint64_t length);
/* What the region has from offset on, and its length. Offsets must ascend. */
PbaNext pba_holes_next(PbaHoles *holes, uint64_t offset, uint64_t *length);

typedef struct PbaSource PbaSource;

/* From what a volume is read during a copy: an NBD server or a file handle. */
typedef struct {
    const PbaReader *reader; /* of the volumes that it is for */
    size_t size;             /* of its source, which begins with a PbaSource */
    /* Opens what is needed besides the volume. */
    bool (*open)(PbaSource *source, unsigned connections, PbaLoop *loop, GError **error);
    /* See pba_source_read. */
    bool (*read)(PbaSource *source, PbaPiece *piece, GError **error);
    /* Starts to discard whole clusters; calls pba_source_trimmed when done. */
    bool (*trim)(PbaSource *source, PbaRange range, GError **error);
    /* NULL if holes are not reported. */
    PbaHoles *(*new_holes)(PbaSource *source, uint32_t align);
    /* See pba_source_close. Also called if open has failed. */
    void (*close)(PbaSource *source, bool broken);
    /* Operations in flight when the pool is freed continue on their own, and own the buffer of the
     * piece that they read. */
    bool keeps_buffers;
} PbaSourceKind;

extern const PbaSourceKind pba_source_nbd;
extern const PbaSourceKind pba_source_file;

struct PbaSource {
    const PbaSourceKind *kind;
    PbaVolume *volume; /* the caller's */
    PbaHoles *holes;   /* owned; NULL: all has to be read */
    bool can_discard;
    bool goes_on;     /* after a failed read; set by the copy */
    uint32_t request; /* bytes of a read, unless the caller chooses */
    uint32_t align;   /* reads begin and end at its multiples */
    PbaTrims trims;
    unsigned trimming; /* discards in flight */
    uint64_t discarded;
    int trim_error;
    PbaRange trim_error_range;
};

/* Opens what is needed besides the volume: this many connections in total, 0 to choose the fastest
 * number. A server that does not say that several are safe gets one. NULL on error. */
PbaSource *pba_source_open(PbaVolume *volume, unsigned connections, PbaLoop *loop, GError **error);
/* From now on, asks for holes. Returns whether this is possible. */
bool pba_source_find_holes(PbaSource *source, uint32_t align);
/* Frees the source. With broken, requests may be in flight: closes all connections. */
void pba_source_close(PbaSource *source, bool broken);
/* Starts to read the piece's range, for which its buffer has room. */
bool pba_source_read(PbaSource *source, PbaPiece *piece, GError **error);
/* The range is no longer needed. Discards what is now worth a request. */
bool pba_source_release(PbaSource *source, uint64_t offset, uint64_t length, GError **error);
/* Discards the rest. */
bool pba_source_release_all(PbaSource *source, GError **error);

/* False after a failed discard. */
bool pba_source_check_trims(const PbaSource *source, GError **error);
/* A discard has ended. */
void pba_source_trimmed(PbaSource *source, PbaRange range, int error);

/* The target's side */

/* What a target's zeroes are made of. */
typedef struct {
    uint32_t size;
    bool whole;   /* a part of a block is written as data, but for the last one */
    uint64_t end; /* where the target ends, if whole */
} PbaBlocks;

struct PbaSink {
    /* Called when all pieces have their memory. NULL: there is nothing to do. */
    bool (*start)(PbaSink *sink, GError **error);
    /* Starts to write a piece that was read; its state says when this is done. */
    bool (*write)(PbaSink *sink, PbaPiece *piece, GError **error);
    /* Starts to flush; flushed says when this is done, flush_error with what result. */
    bool (*flush)(PbaSink *sink, GError **error);
    void (*free)(PbaSink *sink);
    char *name;        /* for messages */
    bool ordered;      /* wants pieces in ascending order */
    bool wants_zeroes; /* zeroes count as data that was read, so their position is not queried */
    uint32_t block; /* pieces that share a block of this size are written in turn; 0: at any time */
    uint32_t align; /* pieces have to begin and end at its multiples, or at the volume's end; where
                       they do not, their buffer has room for the rest */
    uint32_t max_zero;       /* bytes of a piece that is zeroes */
    PbaErrorCode error_code; /* of writes and flushes that fail */
    PbaNbdVolume *back;      /* what was written is read back over this one, which is the sink's;
                                NULL: it is not */
    bool flushed;
    int flush_error;
};

/* Makes the sink that the options describe, for a volume of this size. */
PbaSink *pba_sink_new(const PbaCopyOptions *options, PbaVolume *volume, PbaLoop *loop,
                      GError **error);
PbaSink *pba_sink_file_new(const PbaCopyOptions *options, uint64_t size, PbaLoop *loop,
                           GError **error);
PbaSink *pba_sink_nbd_new(const PbaCopyOptions *options, const PbaVolume *volume, PbaLoop *loop,
                          GError **error);

bool pba_is_zero(const char *data, size_t length);
/* The number of bytes from at on that are all zeroes (*zero), or not, in units of the target's
 * blocks. */
size_t pba_piece_run(const PbaPiece *piece, size_t at, const PbaBlocks *blocks, bool *zero);

#endif
