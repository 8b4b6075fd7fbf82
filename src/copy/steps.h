/* A running copy, and the steps of its pieces. */
#ifndef PBA_SRC_STEPS_H
#define PBA_SRC_STEPS_H

#include "course.h"
#include "limit.h"
#include "readback.h"

#define PBA_COPY_MAX_PIECES 64u

typedef struct {
    PbaVolume *volume;
    PbaCourse course;
    const PbaCopyOptions *options;
    PbaCopyStatistics *statistics;
    PbaLoop loop;
    PbaSource *source;
    PbaSink *sink;
    PbaDigests *digests; /* owned; NULL: none are wanted */
    PbaDigestsEnd digests_end;
    PbaReadback *readback; /* owned; NULL: what is written is not read back */
    PbaLimit limit;
    PbaPiece pieces[PBA_COPY_MAX_PIECES];
    unsigned piece_count;
    unsigned used;      /* pieces that are not free */
    uint32_t request;   /* longest read: whole blocks */
    uint32_t align;     /* the blocks of source and sink */
    char *zeroes;       /* never written to, so that they take no memory */
    uint64_t next_read; /* sequence numbers */
    uint64_t next_write;
    uint64_t steps; /* how many steps all pieces have made */
    uint64_t done;  /* bytes that the sink has */
    uint64_t total;
    gint64 last_progress;
    gint64 last_event; /* the last progress, for the time limit */
} PbaCopy;

/* Advances each piece as far as possible now. */
bool pba_copy_move_pieces(PbaCopy *copy, GError **error);

#endif
