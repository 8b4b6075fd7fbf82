/* What an NBD server says of sizes. It is checked here, before a buffer is made or a request is cut
 * by it, and nowhere else. */
#ifndef PBA_SRC_SIZES_H
#define PBA_SRC_SIZES_H

#include "src/pba.h"
#include "trims.h"
#include <libnbd.h>

/* Of data in one request: what servers take that say nothing of it (NBD spec: block sizes). */
#define PBA_MAX_REQUEST (32u << 20)
/* The largest that the smallest block may be, by the same. */
#define PBA_MAX_BLOCK 65536u

typedef struct {
    uint64_t size;    /* of the export: whole blocks */
    uint32_t block;   /* requests begin and end at its multiples; a power of two */
    uint32_t request; /* of data at most: whole blocks, from 512 bytes to PBA_MAX_REQUEST */
    uint64_t cluster; /* what one discard frees as a whole: PBA_CLUSTER or a multiple, at most
                         PBA_MAX_DISCARD; a power of two */
} PbaSizes;

/* Those of a volume that is read from a file: a file system frees its blocks as a whole
 * (statvfs(3): f_frsize), that of a virtual file the clusters below it. */
void pba_sizes_read_file(PbaSizes *sizes, int fd, uint64_t size);
/* Asks libnbd, which passes over block sizes that break the protocol. PBA_ERROR_NBD for what is
 * left and cannot be used. */
bool pba_sizes_read(PbaSizes *sizes, struct nbd_handle *nbd, GError **error);
/* The least number of bytes in whole blocks that is not below this. */
uint64_t pba_whole_blocks(uint64_t bytes, uint32_t block);

#endif
