/* The sizes that an NBD server reports. They are checked here and nowhere else, before a buffer is
 * allocated or a request is cut. */
#ifndef PBA_SRC_SIZES_H
#define PBA_SRC_SIZES_H

#include "src/pba.h"
#include "trims.h"
#include <libnbd.h>

/* The most data of a request to a server that advertises no maximum (NBD spec: block size
 * constraints). */
#define PBA_MAX_REQUEST (32u << 20)
/* The largest minimum block size that the NBD spec allows. */
#define PBA_MAX_BLOCK 65536u

typedef struct {
    uint64_t size;    /* of the export: whole blocks */
    uint32_t block;   /* requests begin and end at multiples of this; a power of two */
    uint32_t request; /* of data at most: whole blocks, from 512 bytes to PBA_MAX_REQUEST */
    uint64_t cluster; /* the unit in which discards free space: PBA_CLUSTER or a multiple, at most
                         PBA_MAX_DISCARD; a power of two */
} PbaSizes;

/* The sizes of a volume that is read from a file: a file system frees whole blocks (statvfs(3):
 * f_frsize), and that of a virtual file the clusters below it. */
void pba_sizes_read_file(PbaSizes *sizes, int fd, uint64_t size);
/* Queries libnbd, which ignores block sizes that violate the protocol. PBA_ERROR_NBD if the
 * remaining ones cannot be used. */
bool pba_sizes_read(PbaSizes *sizes, struct nbd_handle *nbd, GError **error);
/* Rounds up to whole blocks. */
uint64_t pba_whole_blocks(uint64_t bytes, uint32_t block);

#endif
