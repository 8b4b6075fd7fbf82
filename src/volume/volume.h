/* What the parts that read a volume share: its connection and its map. */
#ifndef PBA_SRC_VOLUME_H
#define PBA_SRC_VOLUME_H

#include "handle.h"
#include "regions.h"
#include "sizes.h"
#include "src/pba.h"
#include "trims.h"
#include <libnbd.h>

/* What EINVAL for a read most likely means. */
#define PBA_HINT_UNREADABLE                                                                        \
    "the range is not wholly dirty or was discarded, or the snapshot broke: "                      \
    "is the fleecing image full?"

/* Block-status requests kept in flight. */
#define PBA_MAP_DEPTH 4

/* One block-status request: a part of the map, asked for and then read out in order. */
typedef struct {
    struct PbaMap *map;
    uint64_t offset; /* what it covers */
    uint64_t length;
    bool sent;
    bool answered;
    int error;         /* errno of the completion, 0 if good */
    uint32_t *extents; /* length, flags, length, flags... as the server sent them */
    size_t count;      /* of numbers in extents */
    size_t capacity;
    size_t next; /* number to read out next */
} PbaMapChunk;

/* The way through the map. The chunks are a ring: head is read out, the others are under way. */
typedef struct PbaMap {
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
    unsigned connection;    /* of the volume that its requests went over */
    PbaRegionsCursor given; /* of a handle's regions, where the volume has one */
} PbaMap;

/* What a volume is read from: an NBD server (nbd.c) or a file handle (handle.c). */
typedef struct {
    /* The range is inside the volume. */
    bool (*pread)(PbaVolume *volume, void *buffer, uint64_t offset, uint64_t length,
                  GError **error);
    /* Whole clusters, at most PBA_MAX_DISCARD. */
    bool (*discard)(PbaVolume *volume, uint64_t offset, uint64_t length, GError **error);
    /* As pba_volume_next_dirty_region. Where later is given there is no wait for an answer of a
     * server: it says then that the answer is under way. */
    bool (*next_region)(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                        bool *later, GError **error);
    void (*free)(PbaVolume *volume);
    PbaErrorCode error_code; /* of requests that fail */
    int unreadable;          /* errno of a read where PBA_HINT_UNREADABLE fits */
} PbaReader;

extern const PbaReader pba_nbd_reader;
extern const PbaReader pba_handle_reader;

struct PbaVolume {
    const PbaReader *reader;
    PbaHandle *handle;      /* the handle reader's, owned */
    struct nbd_handle *nbd; /* NULL: not connected */
    unsigned connection;    /* counts them, so that a map knows whether its requests are lost */
    PbaHooks hooks;
    char *device;
    char *path;
    char *context; /* what the map is of; NULL: no bitmap */
    uint64_t size;
    PbaSizes sizes;  /* of this connection */
    bool by_cluster; /* see PBA_BY_CLUSTER */
    char *broken;    /* why nothing more can be had from this volume; NULL: it works */
    PbaMap *map;     /* owned: where pba_volume_next_dirty_region is; NULL: nowhere */
};

/* A further connection to what pba_volume_open has, without the bitmap. Where the server tells
 * which parts are zeroes (NBD spec: the base:allocation context), the volume has a context. */
PbaVolume *pba_volume_open_allocation(const PbaVolumeOptions *options, const PbaHooks *hooks,
                                      GError **error);
/* Whether a path is a URI, one over TLS, and one that may be connected to: PBA_ERROR_ARGUMENT. */
bool pba_uri_is(const char *path);
bool pba_uri_is_tls(const char *uri);
bool pba_uri_check(const char *uri, GError **error);
/* Connects, or connects again after an interrupted call. */
bool pba_volume_connect(PbaVolume *volume, GError **error);
/* What libnbd waits for (poll(2)), and letting it go on with what came: -1 on error. */
short pba_nbd_events(struct nbd_handle *nbd);
int pba_nbd_notify(struct nbd_handle *nbd, short events, short revents);
/* Lets libnbd send and receive once something can be. what names the wait. */
bool pba_volume_turn(PbaVolume *volume, gint64 deadline, const char *what, GError **error);
/* How much of a range one request with data may be about. */
uint64_t pba_volume_unit(const PbaVolume *volume, uint64_t offset, uint64_t length);
/* The part of a range that a discard frees: see pba_whole_clusters. */
PbaRange pba_volume_whole_clusters(const PbaVolume *volume, PbaRange range);
/* Discards these ranges as pba_volume_discard does, many at a time. Over NBD only. */
bool pba_volume_discard_ranges(PbaVolume *volume, const PbaRange *ranges, unsigned count,
                               GError **error);
/* Closes the connection, and with it all that is in flight. */
void pba_volume_disconnect(PbaVolume *volume);
/* A volume with an NBD handle is noted, so that pba_connections_cut finds its connection. */
void pba_connection_note(PbaVolume *volume);
void pba_connection_forget(PbaVolume *volume);
/* Ends this process' connections to the server at that socket, whoever uses them. */
void pba_connections_cut(const char *socket_path);
/* True if there is no connection any more. */
bool pba_volume_is_lost(const PbaVolume *volume);
/* libnbd's last error, as one of ours about this device. */
void pba_volume_set_nbd_error(const PbaVolume *volume, const char *what, GError **error);
/* Marks the volume as of no more use because of error. */
void pba_volume_break(PbaVolume *volume, const GError *error);
/* False once it is so marked. */
bool pba_volume_check(const PbaVolume *volume, GError **error);

/* A way of its own through the dirty regions, from begin on. The volume must outlive it, or at
 * least be closed before: answers that are under way reach the map that asked. */
PbaMap *pba_volume_map(PbaVolume *volume, uint64_t begin);
/* The next dirty region on that way. Without later (NULL) a server's answer is waited for; else
 * *later says that it is under way. */
bool pba_volume_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                            bool *later, GError **error);
/* The zeroes of a volume of pba_volume_open_allocation, between begin and end: for pba_map_next. */
PbaMap *pba_volume_zeroes(PbaVolume *volume, uint64_t begin, uint64_t end);

/* The extents of the volume's context that have that flag. */
PbaMap *pba_map_new(PbaVolume *volume, uint32_t flag, uint64_t begin, uint64_t end);
void pba_map_free(PbaMap *map);
/* The next run of extents with the flag; *length is 0 at the end. later as above. */
bool pba_map_next(PbaMap *map, uint64_t *offset, uint64_t *length, bool *later, GError **error);
/* True if no answer to a request of this map is under way any more. */
bool pba_map_is_idle(const PbaMap *map);

/* Seconds a request may take: storage below may be slow, and a server that is gone is seen at
 * once anyhow. */
#define PBA_NBD_LIMIT_S 300

#endif
