/* Declarations for all readers of a volume. */
#ifndef PBA_SRC_VOLUME_H
#define PBA_SRC_VOLUME_H

#include "sizes.h"
#include "src/pba.h"
#include "trims.h"

/* The most likely meaning of EINVAL for a read. */
#define PBA_HINT_UNREADABLE                                                                        \
    "the range is not wholly dirty or was discarded, or the snapshot broke: "                      \
    "is the fleecing image full?"

/* A shorter hole is read with its surroundings, because a query costs more. */
#define PBA_MIN_HOLE (UINT64_C(256) << 10)

typedef struct PbaReader PbaReader;

/* An iteration over the regions; a reader's own struct begins with this. */
typedef struct {
    const PbaReader *reader;
} PbaMap;

/* The source of a volume: an NBD server (nbd.c), or one of those in copy/. */
struct PbaReader {
    /* The range is inside the volume. */
    bool (*pread)(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                  GError **error);
    /* Whole clusters, at most PBA_MAX_DISCARD. */
    bool (*discard)(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error);
    /* As pba_volume_map. */
    PbaMap *(*new_map)(PbaVolume *volume, uint64_t begin);
    void (*free_map)(PbaMap *map);
    /* Like pba_volume_next_dirty_region. With later, it does not wait for a server's answer, but
     * reports in *later that it is in flight. */
    bool (*next_region)(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                        bool *later, GError **error);
    /* The reader's own data of the volume. */
    void (*free)(PbaVolume *volume);
    PbaErrorCode error_code; /* of failed requests */
    int unreadable;          /* errno of a read for which PBA_HINT_UNREADABLE is right */
};

extern const PbaReader pba_nbd_reader;

struct PbaVolume {
    const PbaReader *reader;
    PbaHooks hooks;
    char *device;
    uint64_t size;
    PbaSizes sizes; /* of this connection */
    char *broken;   /* why the volume cannot be used any more; NULL: it can */
    PbaMap *map;    /* owned: the position of pba_volume_next_dirty_region; NULL: none */
};

/* The part of a range that a discard frees: see pba_whole_clusters. */
PbaRange pba_volume_whole_clusters(const PbaVolume *volume, PbaRange range);
/* Marks the volume as unusable because of error. */
void pba_volume_break(PbaVolume *volume, const GError *error);
/* False once it is so marked. */
bool pba_volume_check(const PbaVolume *volume, GError **error);

/* An independent iteration over the dirty regions, from begin on. The volume must outlive it. */
PbaMap *pba_volume_map(PbaVolume *volume, uint64_t begin);
void pba_map_free(PbaMap *map);
/* The next dirty region of the iteration. Without later (NULL), waits for a server's answer; else
 * *later says that it is in flight. */
bool pba_volume_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                            bool *later, GError **error);

/* Seconds that a request may take: the storage below may be slow, and the loss of a server is
 * noticed at once anyway. */
#define PBA_NBD_LIMIT_S 300

#include "nbd.h"

#endif
