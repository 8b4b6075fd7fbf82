/* The backend made of stock QEMU's commands, and declarations that its parts share. */
#ifndef PBA_UPSTREAM_H
#define PBA_UPSTREAM_H

#include "src/access/backend.h"

extern const PbaBackend pba_upstream_backend;

/* The table's */
bool pba_upstream_suits(PbaQmp *qmp, PbaQemu *qemu, const char **form, bool *suits, GError **error);
bool pba_upstream_check(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_upstream_prepare(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_upstream_cut(PbaAccess *access, GError **error);
bool pba_upstream_finish(PbaAccess *access, GError **error);
bool pba_upstream_teardown(PbaAccess *access, PbaBlock *block, bool success, GError **error);
bool pba_upstream_is_clean(PbaAccess *access);
bool pba_upstream_stop_waits(const PbaAccess *access);
bool pba_upstream_reads_by_cluster(const PbaAccess *access);

/* The data of a disk that only this backend has. It exists after the disk was checked, or found
 * again. */
typedef struct {
    char *raw;          /* the node that replaces the disk below the guest device */
    char *filter;       /* copy-before-write */
    char *guest_device; /* its QOM path, which no later device has; NULL: not queried */
    bool persistent;    /* its bitmaps are stored in its image */
} PbaUpstreamDisk;

PbaUpstreamDisk *pba_upstream_disk(const PbaDisk *disk);

/* Runs a step for each disk, until one fails: the error names the device. */
typedef bool (*PbaDiskStep)(PbaAccess *access, PbaDisk *disk, GError **error);
bool pba_upstream_each_disk(PbaAccess *access, PbaDiskStep step, GError **error);

/* Guest devices */

/* Fills in the disk's guest_device. */
bool pba_upstream_find_guest_device(PbaAccess *access, const PbaDisk *disk, const char *qdev,
                                    GError **error);
/* Refuses disks in an iothread where QEMU may abort (before 10.0: see versions.c). */
bool pba_upstream_check_iothreads(PbaAccess *access, GError **error);

/* Versions of QEMU */

bool pba_upstream_allows_iothreads(const PbaAccess *access);
unsigned pba_upstream_cbw_timeout_s(const PbaAccess *access);

/* The graph */

/* Creates what pba_upstream_disk returns: the names of the nodes around the disk. */
void pba_upstream_name_nodes(const PbaAccess *access, PbaDisk *disk);
/* The disk below our nodes, according to the graph: borrowed, NULL if they do not exist. */
const char *pba_upstream_root(const PbaBlock *block, const PbaDisk *disk);
/* Options of the raw node above a disk, with file as its child. discard=unmap passes the guest's
 * own trims to the disk; the size makes QEMU refuse block_resize, on which 7.2 to 11.0 abort while
 * a bitmap is exported. */
JsonNode *pba_raw_options(const PbaDisk *disk, const char *file);

/* Discards the clean parts of the exported snapshot, if the map is small enough. This is an
 * optimization, so a failure is only logged. */
void pba_trim_clean_parts(PbaAccess *access, const PbaDisk *disk);

/* Bitmaps */

/* Makes a bitmap of the target on this disk with every bit set, in one transaction. */
bool pba_bitmap_add_all_dirty(PbaAccess *access, PbaDisk *disk, GError **error);
/* Removes what an interrupted pba_bitmap_add_all_dirty may have left behind. */
bool pba_dirty_source_drop(PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                           GError **error);
/* The arguments of block-dirty-bitmap-add for one of our bitmaps on this disk. */
JsonNode *pba_bitmap_add_arguments(const PbaDisk *disk, const char *name);
/* Removes the disk's bitmap with that name. */
bool pba_bitmap_remove(PbaAccess *access, const PbaDisk *disk, const char *name, GError **error);
/* Action of a transaction; sources, an array of what pba_bitmap_ref returns, is consumed. */
void pba_bitmap_add_merge(JsonArray *actions, const PbaDisk *disk, const char *target,
                          JsonArray *sources);
/* Removes the bitmap, if it exists, together with its companions. The second function adds the
 * actions that do this. */
bool pba_bitmap_drop(PbaAccess *access, const PbaDisk *disk, const PbaBlock *block,
                     const char *name, GError **error);
void pba_bitmap_removals(JsonArray *actions, const PbaAccess *access, const PbaDisk *disk,
                         const PbaBlock *block, const char *name);
/* Joins the target's bitmap and the background bitmap on every disk that has both, and enters the
 * phase committed if this is a success. If it fails, the target's bitmap is removed. */
bool pba_bitmaps_join(PbaAccess *access, PbaBlock *block, bool success, GError **error);

#endif
