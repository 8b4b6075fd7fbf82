/* What volumes over NBD have beside the reader's table. Included by volume.h. */
#ifndef PBA_SRC_VOLUME_NBD_H
#define PBA_SRC_VOLUME_NBD_H

#include "volume.h"

/* Block-status requests kept in flight. */
#define PBA_MAP_DEPTH 4

typedef enum { PBA_CHUNK_TO_ASK, PBA_CHUNK_ASKED, PBA_CHUNK_ANSWERED } PbaMapChunkState;

/* One block-status request: a part of the map, asked for and then read out in order. */
typedef struct {
    struct PbaNbdMap *map;
    uint64_t offset; /* what it covers */
    uint64_t length;
    PbaMapChunkState state;
    int error;         /* errno of the completion, 0 if good */
    uint32_t *extents; /* length, flags, length, flags... as the server sent them */
    size_t count;      /* of numbers in extents */
    size_t capacity;
    size_t next; /* number to read out next */
} PbaMapChunk;

/* The way through the map. The chunks are a ring: head is read out, the others are under way. */
typedef struct PbaNbdMap {
    PbaMap map;
    PbaVolume *volume; /* borrowed */
    uint32_t flag;     /* of the extents that are looked for */
    PbaMapChunk chunks[PBA_MAP_DEPTH];
    unsigned head;
    unsigned used;
    uint64_t asked;      /* up to here chunks were made */
    uint64_t end;        /* of what is to be asked */
    uint64_t chunk_size; /* of the next one */
    uint64_t run_offset; /* the run that is being joined; run_length 0: none */
    uint64_t run_length;
    unsigned connection; /* of the volume that its requests went over */
} PbaNbdMap;

/* The extents of the volume's context that have that flag. */
PbaNbdMap *pba_nbd_map_new(PbaVolume *volume, uint32_t flag, uint64_t begin, uint64_t end);
void pba_nbd_map_free(PbaNbdMap *map);
/* The next run of extents with the flag; *length is 0 at the end. later as above. */
bool pba_nbd_map_next(PbaNbdMap *map, uint64_t *offset, uint64_t *length, bool *later,
                      GError **error);
/* True if no answer to a request of this map is under way any more. */
bool pba_nbd_map_is_idle(const PbaNbdMap *map);

/* The zeroes of a volume of pba_volume_open_allocation, between begin and end: for
 * pba_nbd_map_next. */
PbaNbdMap *pba_nbd_zeroes(PbaVolume *volume, uint64_t begin, uint64_t end);

/* Discards these ranges as pba_volume_discard does, many at a time. */
bool pba_nbd_discard_ranges(PbaVolume *volume, const PbaRange *ranges, unsigned count,
                            GError **error);

#endif
