/* A backend is a table of functions. It is chosen once, by QEMU's capabilities. */
#ifndef PBA_BACKEND_H
#define PBA_BACKEND_H

#include "access.h"

struct PbaBackend {
    const char *name;
    /* Whether this backend supports the QEMU. If so, fills in the form of its commands, if there
     * are several (static). Returns false with an error if QEMU lacks something that every later
     * backend needs, too. */
    bool (*suits)(PbaQmp *qmp, PbaQemu *qemu, const char **form, bool *suits, GError **error);

    /* Setup. check comes first and changes nothing. prepare does everything that can be done before
     * the instant, including the NBD server, and begins the changes before its first one. cut runs
     * some time later, and the guest may be frozen while it runs: it checks once for what would be
     * fatal, makes the instant, and does nothing else. finish does the rest. block is QEMU's state
     * before. teardown undoes as much of this as QEMU's current state shows; the exports and the
     * NBD server were removed before. */

    /* Fills in a disk by a name that no device of the guest has, or refuses it. */
    bool (*resolve_node)(PbaDisk *disk, const PbaBlock *block, GError **error);
    /* The disk's identity: it identifies the disk in its guest, also after a restart, and under any
     * of its names. device is query-block's entry, or NULL. The caller frees it. */
    char *(*identify)(const char *name, JsonObject *device);
    bool (*check)(PbaAccess *access, const PbaBlock *block, GError **error);
    bool (*prepare)(PbaAccess *access, const PbaBlock *block, GError **error);
    bool (*cut)(PbaAccess *access, GError **error);
    bool (*finish)(PbaAccess *access, GError **error);
    bool (*teardown)(PbaAccess *access, PbaBlock *block, bool success, GError **error);
    /* True if QEMU can be queried and has nothing of an access any more except markers. */
    bool (*is_clean)(PbaAccess *access);

    /* Exports */

    /* Whether reads of the snapshot are only right within single clusters. */
    bool (*reads_by_cluster)(const PbaAccess *access);
    /* Whether nbd-server-stop, and the guest with QEMU, waits for clients that are in the middle of
     * the handshake. */
    bool (*stop_waits)(const PbaAccess *access);
    /* Called when all exports exist; nothing depends on its success. */
    void (*after_export)(PbaAccess *access);

    /* Bitmaps, by their names */

    /* The name, also in version 0.1.0, of the target's bitmap without a companion; the caller frees
     * it. */
    char *(*plain_bitmap)(const char *target_id);
    /* The name of the target's bitmap with a companion, or of the one without; the caller frees
     * it. */
    char *(*bitmap)(const PbaAccess *access, bool tied);
    /* The target, which points into the name; NULL: the name is not that of a target's bitmap. */
    const char *(*bitmap_target)(const char *name);
    /* Whether such a bitmap records the guest's writes while an access is active. */
    bool (*is_background)(const char *name);

    /* Leftovers of dead processes, and what others do */

    bool ends_by_graph; /* teardown needs the block graph */
    /* Fills in a disk of which only the key is known, from QEMU's state. */
    bool (*resolve_stale)(PbaAccess *dead, PbaDisk *disk, const PbaBlock *block, GError **error);
    /* What teardown does to the target's bitmaps on that node, in recover's words; NULL if nothing.
     * Static. */
    const char *(*bitmap_repair)(const PbaBlock *block, const char *node, const char *target_id);
    /* Whether another program has an active access by QEMU's own commands, and for which target:
     * the caller frees it, NULL if that is not known. */
    bool (*find_foreign)(const PbaBlock *block, char **target_id);
    /* Whether any access by QEMU's own commands is active, also one without bitmaps. */
    bool (*is_access_up)(const PbaBlock *block);
    /* Whether there are bitmaps that belong to no access, because a snapshot with RAM or a
     * migration during an access has brought them back. */
    bool (*has_strays)(const PbaAccess *access, const PbaBlock *block);
    /* Removes them, while the marker of this access is in QEMU. Appends lines that say what was
     * removed. */
    bool (*drop_strays)(PbaAccess *access, GPtrArray *lines, GError **error);
    /* Adds what QEMU itself reports about backups. */
    bool (*add_status)(PbaQmp *qmp, JsonObject *status, GError **error);
};

/* The outcome of the step that makes a backup a success, whatever its reply was. */
typedef enum {
    PBA_OUTCOME_DONE,
    PBA_OUTCOME_NOT_DONE, /* it can still end as a failure */
    PBA_OUTCOME_UNKNOWN,  /* QEMU cannot be queried: no other step is taken */
} PbaOutcome;

/* Reports, in the log and in *error, that it is unknown whether done has happened, such as "the
 * access has ended". */
PbaOutcome pba_outcome_unknown(const PbaAccess *access, const char *done, const GError *unreachable,
                               GError **error);

/* Queries QEMU's capabilities, which choose the backend, and, if needed, its identity. */
bool pba_access_begin(PbaAccess *access, GError **error);

#endif
