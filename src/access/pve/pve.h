/* The backend made of Proxmox' own commands. */
#ifndef PBA_PVE_H
#define PBA_PVE_H

#include "src/access/backend.h"

extern const PbaBackend pba_pve_backend;

/* The form of backup-access-setup that has one bitmap mode for all devices and takes the bitmap's
 * name. */
#define PBA_PVE_EARLY_FORM "devlist"
bool pba_pve_has_early_form(const PbaAccess *access);

/* The table's */
bool pba_pve_suits(PbaQmp *qmp, PbaQemu *qemu, const char **form, bool *suits, GError **error);
bool pba_pve_check(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_pve_prepare(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_pve_cut(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_pve_teardown(PbaAccess *access, PbaBlock *block, bool success, GError **error);

/* Whether QEMU has nothing of this access, by what it has now: setup failed, or did not come to its
 * command. */
bool pba_pve_has_done_nothing(const PbaAccess *access, const PbaBlock *now);

/* Companions, beside bitmaps whose teardown is QEMU's own */

/* What QEMU is told as the target of an access whose bitmaps have companions, or have none; the
 * caller's to free. */
char *pba_pve_target(const PbaAccess *access, bool tied);
/* The name of the target's bitmap with a companion, or of the one without: the early form of the
 * command may have another one than the target. */
char *pba_pve_bitmap(const PbaAccess *access, bool tied);
/* Whether an access of this target can have that bitmap. */
bool pba_pve_may_be_targets(const PbaAccess *access, const char *name, JsonObject *info);
/* Before setup: removes bitmaps that must not be used. */
bool pba_pve_check_ties(PbaAccess *access, const PbaBlock *block, GError **error);
/* After setup: bitmaps that are new get a companion without an id. */
bool pba_pve_open_ties(PbaAccess *access, GError **error);
/* Before QEMU is told of a success: takes the companions their ids. */
bool pba_pve_take_ids(PbaAccess *access, const PbaBlock *block, GError **error);
/* After it: gives them the access' one; block is what QEMU had before they were taken. A failure
 * makes the next backup a full one, and is logged. */
void pba_pve_give_ids(PbaAccess *access, const PbaBlock *block);

/* The table's */
bool pba_pve_is_access_up(const PbaBlock *block);
bool pba_pve_has_strays(const PbaAccess *access, const PbaBlock *block);
bool pba_pve_drop_strays(PbaAccess *access, GPtrArray *lines, GError **error);

#endif
