/* What a backend is: a table of functions, chosen once, by what QEMU says it has. */
#ifndef PBA_BACKEND_H
#define PBA_BACKEND_H

#include "access.h"

struct PbaBackend {
    const char *name;
    /* Whether an access is made by it on this QEMU. If so, fills in the form of its commands, where
     * there are several (static). False, with an error, also where the QEMU lacks something that
     * no other backend does without. */
    bool (*suits)(PbaQmp *qmp, PbaQemu *qemu, const char **form, bool *suits, GError **error);

    /* Setup: check comes first and changes nothing. prepare does all that may come before the
     * instant, the NBD server among it, and begins the changes before its first one. The guest may
     * be frozen while cut runs, some time later: it looks once at what would be fatal now, makes
     * the instant, and does nothing else. finish does the rest. block is what QEMU had before.
     * teardown undoes as much of it as there is, by what QEMU has now; exports and NBD server are
     * gone before. */

    /* Fills in a disk by a name that no device of the guest has, or refuses it. */
    bool (*resolve_node)(PbaDisk *disk, const PbaBlock *block, GError **error);
    /* What tells the disk from others of its guest, also after a restart, whichever of its names
     * was given. device is query-block's entry, or NULL. The caller's to free. */
    char *(*identify)(const char *name, JsonObject *device);
    bool (*check)(PbaAccess *access, const PbaBlock *block, GError **error);
    bool (*prepare)(PbaAccess *access, const PbaBlock *block, GError **error);
    bool (*cut)(PbaAccess *access, const PbaBlock *block, GError **error);
    bool (*finish)(PbaAccess *access, GError **error);
    bool (*teardown)(PbaAccess *access, PbaBlock *block, bool success, GError **error);
    /* True if QEMU can be asked and has nothing of an access any more but markers. */
    bool (*is_clean)(PbaAccess *access);

    /* Exports */

    /* Whether only reads within single clusters of the snapshot are right. */
    bool (*reads_by_cluster)(const PbaAccess *access);
    /* Whether nbd-server-stop waits, and the guest with QEMU, for clients that are in the middle of
     * their first messages. */
    bool (*stop_waits)(const PbaAccess *access);
    /* Once all are there; nothing depends on it. */
    void (*after_export)(PbaAccess *access);

    /* Bitmaps, by their names */

    /* The name of the target's bitmap that has no companion, as version 0.1.0 calls it, too; the
     * caller's to free. */
    char *(*plain_bitmap)(const char *target_id);
    /* That of the access' target with a companion, or without one; the caller's to free. */
    char *(*bitmap)(const PbaAccess *access, bool tied);
    /* The target in the name, which it points into; NULL: it is no bitmap of a target. */
    const char *(*bitmap_target)(const char *name);
    /* Whether such a bitmap records what the guest writes while an access is up. */
    bool (*is_background)(const char *name);

    /* Leftovers of dead processes, and what others do */

    bool ends_by_graph; /* teardown needs the block graph */
    /* Fills in what QEMU tells of a disk of which only the key is known. */
    bool (*resolve_stale)(PbaAccess *dead, PbaDisk *disk, const PbaBlock *block, GError **error);
    /* What teardown does to the target's bitmaps on that node, as recover says it; NULL where they
     * need nothing. Static. */
    const char *(*bitmap_repair)(const PbaBlock *block, const char *node, const char *target_id);
    /* Whether another program has an access up by QEMU's own commands, and for which target: the
     * caller's to free, NULL if that is not known. */
    bool (*find_foreign)(const PbaBlock *block, char **target_id);
    /* Whether any access is up by QEMU's own commands, also one without bitmaps. */
    bool (*is_access_up)(const PbaBlock *block);
    /* Whether there are bitmaps of no access that a snapshot with RAM or a migration in the middle
     * of one has brought back. */
    bool (*has_strays)(const PbaAccess *access, const PbaBlock *block);
    /* Removes them; the marker of this access is there. Lines say what was removed. */
    bool (*drop_strays)(PbaAccess *access, GPtrArray *lines, GError **error);
    /* Adds what else QEMU says of backups. */
    bool (*add_status)(PbaQmp *qmp, JsonObject *status, GError **error);
};

/* What became of the step that makes a success of a backup, whatever its reply was. */
typedef enum {
    PBA_OUTCOME_DONE,
    PBA_OUTCOME_NOT_DONE, /* it can still end as a failure */
    PBA_OUTCOME_UNKNOWN,  /* QEMU cannot be asked: no other step is taken */
} PbaOutcome;

/* Says so, in the log and in *error: whether done, "the access has ended", is not known. */
PbaOutcome pba_outcome_unknown(const PbaAccess *access, const char *done, const GError *unreachable,
                               GError **error);

/* Asks QEMU for its capabilities, which choose the backend, and if needed for its identity. */
bool pba_access_begin(PbaAccess *access, GError **error);

#endif
