/* Declarations for NBD only. Included by volume.h. */
#ifndef PBA_SRC_VOLUME_NBD_H
#define PBA_SRC_VOLUME_NBD_H

#include "volume.h"
#include <libnbd.h>

/* A volume whose reader is pba_nbd_reader. */
typedef struct {
    PbaVolume volume;
    struct nbd_handle *handle; /* NULL: not connected */
    unsigned connection; /* counts connections, so that a map knows whether its requests are lost */
    char *path;
    char *context;   /* the bitmap of the map; NULL: none */
    bool by_cluster; /* see PBA_BY_CLUSTER */
    pid_t owner;     /* the process that connected: in its children it is only closed */
    gint64 made;     /* when it was connected, on g_get_monotonic_time's clock; 0: it is not yet */
} PbaNbdVolume;

/* pba_volume_open, as one of these. */
PbaNbdVolume *pba_nbd_open(const PbaVolumeOptions *options, const PbaHooks *hooks, GError **error);
/* Another connection to the same export, without the bitmap. If the server reports which parts are
 * zeroes (NBD spec: the base:allocation context), the new volume has a context. */
PbaNbdVolume *pba_nbd_open_allocation(const PbaVolumeOptions *options, const PbaHooks *hooks,
                                      GError **error);
/* Closes *newer, a later connection to the same export, and sets it to NULL if nbd is not answered
 * for some seconds: QEMU may wait until *newer ends, with the guest (newer.c). */
bool pba_nbd_keep_newer(PbaNbdVolume *nbd, PbaNbdVolume **newer, GError **error);
/* Whether a path is a URI, a URI over TLS, a URI for which libnbd may block while it connects, and
 * a URI that may be used: else PBA_ERROR_ARGUMENT. */
bool pba_uri_is(const char *path);
bool pba_uri_is_tls(const char *uri);
bool pba_uri_may_block(const char *uri);
bool pba_uri_check(const char *uri, GError **error);
/* Whether the TLS files that it names can be read completely. May block. */
bool pba_uri_check_files(const char *uri, GError **error);
/* Connects, or connects again after an interrupted call. */
bool pba_nbd_connect(PbaNbdVolume *nbd, GError **error);
/* Connects to a URI for which libnbd may block. Takes over the handle, and returns it; the caller
 * closes it. NULL on error: *is_full if the queue of a socket is full. */
struct nbd_handle *pba_connect_aside(struct nbd_handle *handle, const char *uri, gint64 deadline,
                                     const PbaHooks *hooks, bool *is_full, GError **error);
/* What libnbd waits for (poll(2)), and a step of libnbd after an event: -1 on error. */
short pba_nbd_events(struct nbd_handle *handle);
int pba_nbd_notify(struct nbd_handle *handle, short events, short revents);
/* Waits until something can be sent or received, and lets libnbd do so. what describes the wait. */
bool pba_nbd_turn(PbaNbdVolume *nbd, gint64 deadline, const char *what, GError **error);
/* The most of a range that one request with data may cover. */
uint64_t pba_nbd_unit(const PbaNbdVolume *nbd, uint64_t offset, uint64_t length);
/* Sends a block status, whose answer is ignored. Its buffer has 1 MiB in QEMU 7.2, 2 MiB in 10.0.
 * From then on, the C library of qemu-nbd keeps the memory of smaller requests; else it gets new
 * pages for each. */
void pba_nbd_ask_for_status(const PbaNbdVolume *nbd);
/* Of several connections to one export, the first with the fewest requests in flight. */
PbaNbdVolume *pba_nbd_least_busy(PbaNbdVolume *const *connections, unsigned count);
/* Closes the connection, and with it all requests in flight, whose callbacks may still be called.
 * Waits for their answers, at most half a second, if requests must not overlap (PBA_BY_CLUSTER). */
void pba_nbd_disconnect(PbaNbdVolume *nbd);
/* Registers a volume with a handle, so that pba_connections_cut finds its connection. */
void pba_connection_note(PbaNbdVolume *nbd);
void pba_connection_made(PbaNbdVolume *nbd);
void pba_connection_forget(PbaNbdVolume *nbd);
/* Ends all connections of this process to the server at that socket, as it was bound (NULL: to
 * any), also those in use, that were made since then (g_get_monotonic_time); 0: all. */
void pba_connections_cut(const char *socket_path, gint64 since);
/* Without an answer for that long, QEMU may be waiting for a later connection to the same export to
 * end (newer.c). */
#define PBA_NBD_LATE_S 3
/* Registers an export of PBA_BY_CLUSTER whose server may still be carrying out requests of a closed
 * connection. This process does not use the export any more. */
void pba_export_note_cut(const PbaNbdVolume *nbd);
bool pba_export_is_cut(const PbaNbdVolume *nbd);
/* True if the connection is lost or closed. */
bool pba_nbd_is_lost(const PbaNbdVolume *nbd);
/* libnbd's last error, as one of ours about this device. */
void pba_nbd_set_error(const PbaNbdVolume *nbd, const char *what, GError **error);

/* Block-status requests kept in flight. */
#define PBA_MAP_DEPTH 4

typedef enum { PBA_CHUNK_TO_ASK, PBA_CHUNK_ASKED, PBA_CHUNK_ANSWERED } PbaMapChunkState;

/* One block-status request: a part of the map, requested and then read in order. */
typedef struct {
    struct PbaNbdMap *map;
    uint64_t offset; /* the part that it covers */
    uint64_t length;
    PbaMapChunkState state;
    int error;         /* errno of the completion, 0 if good */
    uint32_t *extents; /* length, flags, length, flags... as the server sent them */
    size_t count;      /* of numbers in extents */
    size_t capacity;
    size_t next; /* index of the next number to read */
} PbaMapChunk;

/* The iteration over the map. The chunks are a ring: head is being read, the others are in
 * flight. */
typedef struct PbaNbdMap {
    PbaMap map;
    PbaNbdVolume *nbd; /* borrowed */
    uint32_t flag;     /* the flag of the extents that are searched for */
    PbaMapChunk chunks[PBA_MAP_DEPTH];
    unsigned head;
    unsigned used;
    uint64_t asked;      /* end of the part for which chunks were made */
    uint64_t end;        /* of the part that must be asked about */
    uint64_t chunk_size; /* length of the next chunk */
    uint64_t run_offset; /* the run that is being joined; run_length 0: none */
    uint64_t run_length;
    unsigned connection; /* the volume's connection count when the requests were sent */
} PbaNbdMap;

/* The extents of the volume's context that have that flag. */
PbaNbdMap *pba_nbd_map_new(PbaNbdVolume *nbd, uint32_t flag, uint64_t begin, uint64_t end);
/* Closes the connection if an answer is in flight, because it would write to the map. */
void pba_nbd_map_free(PbaNbdMap *map);
/* The next run of extents with the flag; *length is 0 at the end. later is as above. */
bool pba_nbd_map_next(PbaNbdMap *map, uint64_t *offset, uint64_t *length, bool *later,
                      GError **error);
/* True if no request of this map is in flight any more. */
bool pba_nbd_map_is_idle(const PbaNbdMap *map);

/* The zeroes of a volume of pba_nbd_open_allocation between begin and end, for pba_nbd_map_next. */
PbaNbdMap *pba_nbd_zeroes(PbaNbdVolume *nbd, uint64_t begin, uint64_t end);

/* Discards these ranges like pba_volume_discard, many at a time. */
bool pba_nbd_discard_ranges(PbaNbdVolume *nbd, const PbaRange *ranges, unsigned count,
                            GError **error);

#endif
