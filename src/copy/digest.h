/* Digests of what a copy reads: computed by threads, told to the caller, kept in a file, compared.
 */
#ifndef PBA_SRC_DIGEST_H
#define PBA_SRC_DIGEST_H

#include "copy.h"

/* A file of digests: a header, then a slot for each block of the volume. A slot of zeroes says that
 * nothing is known of the block, or, in a complete file, that the block is zeroes. */
typedef struct PbaDigestFile PbaDigestFile;

/* Opens one for reading. *block is its block size, which must be the one given unless that is 0;
 * its volume must have size bytes. */
PbaDigestFile *pba_digest_file_open(const char *path, uint64_t size, uint32_t *block,
                                    GError **error);
/* Creates a file of digests, which is not valid until it is finished. With is_increment, continues
 * an existing one. */
PbaDigestFile *pba_digest_file_begin(const char *path, uint64_t size, uint32_t block,
                                     bool is_increment, GError **error);
/* A reference, for as long as a thread uses it. */
PbaDigestFile *pba_digest_file_ref(PbaDigestFile *file);
void pba_digest_file_unref(PbaDigestFile *file);
const char *pba_digest_file_path(const PbaDigestFile *file);
/* A slot of zeroes means a block of zeroes. */
bool pba_digest_file_is_complete(const PbaDigestFile *file);
/* Slots of consecutive blocks; these block, and give an errno, 0 if they succeed. */
int pba_digest_file_read(const PbaDigestFile *file, uint64_t first, size_t count, uint8_t *slots);
int pba_digest_file_write(const PbaDigestFile *file, uint64_t first, size_t count,
                          const uint8_t *slots);
/* What was written is durable, and the file valid. */
int pba_digest_file_finish(PbaDigestFile *file);
/* The next range, from offset on, of blocks with a digest; *length is 0 at the end. */
bool pba_digest_file_next(const PbaDigestFile *file, uint64_t *offset, uint64_t *length,
                          GError **error);
bool pba_digest_is_unset(const uint8_t *slot);

/* Zeroes, or the 32 bytes of the data's SHA-256. */
typedef struct PbaDigests PbaDigests;

/* Opens what the options request; *digests is NULL if they request nothing. May block:
 * pba_digests_open does this in a thread of the loop's pool, and can be interrupted. */
bool pba_digests_new(const PbaCopyOptions *options, uint64_t size, PbaDigests **digests,
                     GError **error);
bool pba_digests_open(const PbaCopyOptions *options, uint64_t size, PbaLoop *loop,
                      PbaDigests **digests, GError **error);
PbaDigests *pba_digests_ref(PbaDigests *digests);
void pba_digests_unref(PbaDigests *digests);
/* For a thread: the digests of consecutive blocks. Data that is NULL is zeroes. False if there is
 * no memory. */
bool pba_digests_compute(const PbaDigests *digests, const char *data, size_t length,
                         uint8_t *values);
uint32_t pba_digests_block(const PbaDigests *digests);
/* With only_known, the file that says which blocks are copied. */
PbaDigestFile *pba_digests_known(const PbaDigests *digests);
/* False if a region does not consist of whole blocks. */
bool pba_digests_check_region(const PbaDigests *digests, uint64_t offset, uint64_t length,
                              GError **error);
/* Lets a thread of the pool compute the digests of a piece that was read. The piece's state tells
 * when this is done; until then, the thread owns its buffer. */
void pba_digests_begin(PbaDigests *digests, PbaPool *pool, PbaPiece *piece);
/* Reports the results to the caller. */
bool pba_digests_tell(const PbaDigests *digests, PbaPiece *piece, const PbaCopyOptions *options,
                      PbaCopyStatistics *statistics, GError **error);
/* Advances the piece to its next part that must be written, in whole units of align, skipping
 * unchanged blocks. Returns false, with a length of 0, if there is no such part. */
bool pba_digests_next_part(PbaPiece *piece, uint32_t align);
/* The digests that were computed for the blocks from the piece's offset on. */
const uint8_t *pba_digests_values(const PbaPiece *piece);
/* Frees the results, if there are any. */
void pba_digests_forget(PbaPiece *piece);

/* Finishes a file that was written: done says when this has ended, error is its errno. */
typedef struct {
    bool done;
    int error;
} PbaDigestsEnd;

/* end must live as long as the pool. */
void pba_digests_finish(PbaDigests *digests, PbaPool *pool, PbaDigestsEnd *end);
/* The error, if this has failed. */
bool pba_digests_check_end(const PbaDigests *digests, const PbaDigestsEnd *end, GError **error);

#endif
