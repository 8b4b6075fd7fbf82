/* Reading back what a copy has written, to compare it with what was read. */
#ifndef PBA_SRC_READBACK_H
#define PBA_SRC_READBACK_H

#include "digest.h"

typedef struct PbaReadback PbaReadback;

/* Over the sink's connection for that, by requests of at most so many bytes, for which the pieces'
 * buffers have room. The sink must outlive it. NULL on error. */
PbaReadback *pba_readback_new(PbaSink *sink, PbaDigests *digests, PbaLoop *loop, uint32_t request,
                              GError **error);
/* The loop's pool is freed by now. With broken, requests may still be in flight. */
void pba_readback_free(PbaReadback *readback, bool broken);
/* All of the piece was written. Its buffer is needed for nothing else any more. */
void pba_readback_begin(PbaPiece *piece);
/* Goes on with such a piece; *done if all of it is as it should be. PBA_ERROR_CONTENT if something
 * is not. */
bool pba_readback_move(PbaReadback *readback, PbaPiece *piece, PbaCopyStatistics *statistics,
                       bool *done, GError **error);
/* What was found is not needed any more, if something was. */
void pba_readback_forget(PbaPiece *piece);

#endif
