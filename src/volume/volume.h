/* What the parts that read a volume share, whatever it is read from. */
#ifndef PBA_SRC_VOLUME_H
#define PBA_SRC_VOLUME_H

#include "sizes.h"
#include "src/pba.h"
#include "trims.h"

/* What EINVAL for a read most likely means. */
#define PBA_HINT_UNREADABLE                                                                        \
    "the range is not wholly dirty or was discarded, or the snapshot broke: "                      \
    "is the fleecing image full?"

/* A hole that is shorter is read along with what is around it: to ask costs more. */
#define PBA_MIN_HOLE (UINT64_C(256) << 10)

typedef struct PbaReader PbaReader;

/* A way through the regions; a reader's begins with this. */
typedef struct {
    const PbaReader *reader;
} PbaMap;

/* What a volume is read from: an NBD server (nbd.c), or what copy/ has. */
struct PbaReader {
    /* The range is inside the volume. */
    bool (*pread)(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                  GError **error);
    /* Whole clusters, at most PBA_MAX_DISCARD. */
    bool (*discard)(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error);
    /* As pba_volume_map. */
    PbaMap *(*new_map)(PbaVolume *volume, uint64_t begin);
    void (*free_map)(PbaMap *map);
    /* As pba_volume_next_dirty_region. Where later is given there is no wait for an answer of a
     * server: it says then that the answer is under way. */
    bool (*next_region)(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                        bool *later, GError **error);
    /* What the reader itself has of the volume. */
    void (*free)(PbaVolume *volume);
    PbaErrorCode error_code; /* of requests that fail */
    int unreadable;          /* errno of a read where PBA_HINT_UNREADABLE fits */
};

extern const PbaReader pba_nbd_reader;

struct PbaVolume {
    const PbaReader *reader;
    PbaHooks hooks;
    char *device;
    uint64_t size;
    PbaSizes sizes; /* of this connection */
    char *broken;   /* why nothing more can be had from this volume; NULL: it works */
    PbaMap *map;    /* owned: where pba_volume_next_dirty_region is; NULL: nowhere */
};

/* The part of a range that a discard frees: see pba_whole_clusters. */
PbaRange pba_volume_whole_clusters(const PbaVolume *volume, PbaRange range);
/* Marks the volume as of no more use because of error. */
void pba_volume_break(PbaVolume *volume, const GError *error);
/* False once it is so marked. */
bool pba_volume_check(const PbaVolume *volume, GError **error);

/* A way of its own through the dirty regions, from begin on. The volume must outlive it. */
PbaMap *pba_volume_map(PbaVolume *volume, uint64_t begin);
void pba_map_free(PbaMap *map);
/* The next dirty region on that way. Without later (NULL) a server's answer is waited for; else
 * *later says that it is under way. */
bool pba_volume_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                            bool *later, GError **error);

/* Seconds a request may take: storage below may be slow, and a server that is gone is seen at
 * once anyhow. */
#define PBA_NBD_LIMIT_S 300

#include "nbd.h"

#endif
