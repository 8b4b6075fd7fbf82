/* What the parts that read a volume share, whatever it is read from; and what is NBD's alone. */
#ifndef PBA_SRC_VOLUME_H
#define PBA_SRC_VOLUME_H

#include "sizes.h"
#include "src/pba.h"
#include "trims.h"
#include <libnbd.h>

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

/* What a volume is read from: an NBD server (nbd.c) or a file handle (handle.c). */
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
extern const PbaReader pba_handle_reader;

struct PbaVolume {
    const PbaReader *reader;
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
void pba_map_free(PbaMap *map);
/* The next dirty region on that way. Without later (NULL) a server's answer is waited for; else
 * *later says that it is under way. */
bool pba_volume_next_region(PbaVolume *volume, PbaMap *map, uint64_t *offset, uint64_t *length,
                            bool *later, GError **error);
/* The descriptor of a volume that is a file handle; the volume keeps it. */
int pba_handle_fd(const PbaVolume *volume);

/* Seconds a request may take: storage below may be slow, and a server that is gone is seen at
 * once anyhow. */
#define PBA_NBD_LIMIT_S 300

#include "nbd.h"

#endif
