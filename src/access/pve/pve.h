/* The backend made of Proxmox' own commands. */
#ifndef PBA_PVE_H
#define PBA_PVE_H

#include "src/access/backend.h"

extern const PbaBackend pba_pve_backend;

/* The form of backup-access-setup with one bitmap mode for all devices, and the bitmap's name as an
 * argument. */
#define PBA_PVE_EARLY_FORM "devlist"
bool pba_pve_has_early_form(const PbaAccess *access);

/* The table's */
bool pba_pve_suits(PbaQmp *qmp, PbaQemu *qemu, const char **form, bool *suits, GError **error);
bool pba_pve_check(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_pve_prepare(PbaAccess *access, const PbaBlock *block, GError **error);
bool pba_pve_cut(PbaAccess *access, GError **error);
bool pba_pve_teardown(PbaAccess *access, PbaBlock *block, bool success, GError **error);

/* Whether QEMU's current state has nothing of this access: setup failed, or did not reach its
 * command. */
bool pba_pve_has_done_nothing(const PbaAccess *access, const PbaBlock *now);

/* Companions of bitmaps that QEMU's own teardown handles */

/* The target-id that QEMU is given for an access whose bitmaps have companions, or have none; the
 * caller frees it. */
char *pba_pve_target(const PbaAccess *access, bool tied);
/* The name of the target's bitmap with a companion, or of the one without. In the early form of the
 * command, it may differ from the target's name. */
char *pba_pve_bitmap(const PbaAccess *access, bool tied);
/* Whether an access of this target may have that bitmap. */
bool pba_pve_may_be_targets(const PbaAccess *access, const char *name, JsonObject *info);
/* Before setup: removes bitmaps that must not be used. */
bool pba_pve_check_ties(PbaAccess *access, const PbaBlock *block, GError **error);
/* Before QEMU is told of a success: gives the companions the ID of the access, or removes them if
 * there is none; block is QEMU's state. */
bool pba_pve_give_ids(PbaAccess *access, const PbaBlock *block, GError **error);

/* The table's */
bool pba_pve_is_access_up(const PbaBlock *block);
bool pba_pve_has_strays(const PbaAccess *access, const PbaBlock *block);
bool pba_pve_drop_strays(PbaAccess *access, GPtrArray *lines, GError **error);

#endif
