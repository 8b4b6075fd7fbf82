/* Reading back what a copy has written, to compare it with what was read. */
#ifndef PBA_SRC_READBACK_H
#define PBA_SRC_READBACK_H

#include "digest.h"

typedef struct PbaReadback PbaReadback;

/* Uses the sink's connection for reading back. Requests have at most this many bytes, for which the
 * pieces' buffers have room. The sink must outlive it. NULL on error. */
PbaReadback *pba_readback_new(PbaSink *sink, PbaDigests *digests, PbaLoop *loop, uint32_t request,
                              GError **error);
/* Call it after the loop's pool is freed. With broken, requests may still be in flight. */
void pba_readback_free(PbaReadback *readback, bool broken);
/* The whole piece was written. Its buffer is no longer needed for anything else. */
void pba_readback_begin(PbaPiece *piece);
/* Continues with such a piece. *done: all of it is correct. PBA_ERROR_CONTENT: something is not. */
bool pba_readback_move(PbaReadback *readback, PbaPiece *piece, PbaCopyStatistics *statistics,
                       bool *done, GError **error);
/* Frees the results, if there are any. */
void pba_readback_forget(PbaPiece *piece);

#endif
